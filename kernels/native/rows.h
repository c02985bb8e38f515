// What stands between the matrix products, in one pass over memory: RMSNorm and SwiGLU, with their gradients.
// Arithmetic is in the arithmetic's type whatever the element, and in one order whatever the threads.
#pragma once
#include "linear.h"

namespace stripedrag::STRIPEDRAG_ISA {

// The pairs of a row of columns, the last of which may be partly filled.
template <class T>
struct Pairs {
  int64_t columns, count;
  explicit Pairs(int64_t columns) : columns(columns), count(divide_up(columns, kPair<T>)) {}
  STRIPEDRAG_INLINE_MEMBER int valid(int64_t i) const { return int(smaller(kPair<T>, columns - i * kPair<T>)); }
};

template <class T>
STRIPEDRAG_INLINE Work<T> inverse_root_mean_square(const T* x, const Pairs<T>& pairs, Work<T> eps) {
  Pair<Work<T>> sums = {};
  for (int64_t i = 0; i < pairs.count; i++) {
    const auto v = load(x + i * kPair<T>, pairs.valid(i));
    for (int half = 0; half < 2; half++) sums.half[half] += v.half[half] * v.half[half];
  }
  return 1 / Work<T>(__builtin_sqrt(double(sum_of(sums) / Work<T>(pairs.columns) + eps)));
}

// The scale as pairs; its element is x's or the arithmetic's.
template <class T>
static void gather_scale(const Norm& f, const Pairs<T>& pairs, Pair<Work<T>>* to) {
  for (int64_t i = 0; i < pairs.count; i++)
    to[i] = f.scale_is_wide ? gather<T>(pairs.valid(i), [&](int c) { return static_cast<const Work<T>*>(f.scale)[i * kPair<T> + c]; })
                            : load(static_cast<const T*>(f.scale) + i * kPair<T>, pairs.valid(i));
}

template <class T>
static bool norm(const Norm& f) {
  using W = Work<T>;
  const Pairs<T> pairs(f.columns);
  Scratch<Pair<W>> scale(pairs.count);
  if (!scale.has_memory()) return false;
  gather_scale(f, pairs, scale.begin());
  const int threads = threads_for(f.threads, f.rows * f.columns * int64_t(sizeof(T)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < f.rows; row++) {
    const T* x = static_cast<const T*>(f.x) + row * f.columns;
    T* y = static_cast<T*>(f.y) + row * f.columns;
    const W root = inverse_root_mean_square(x, pairs, W(f.eps));
    for (int64_t i = 0; i < pairs.count; i++) {
      auto v = load(x + i * kPair<T>, pairs.valid(i));
      for (int half = 0; half < 2; half++) v.half[half] = v.half[half] * root * scale.begin()[i].half[half];
      store(y + i * kPair<T>, v, pairs.valid(i));
    }
  }
  return true;
}

// With u = x / root mean square and g = dy · scale: dx = (g - u mean(g u)) / root mean square, dscale = Σ dy u. The sums
// of dscale are taken over blocks of rows, one after another.
template <class T>
static bool norm_gradient(const NormGradient& f) {
  using W = Work<T>;
  constexpr int64_t kBlocks = 64;
  const Pairs<T> pairs(f.norm.columns);
  const int64_t rows = f.norm.rows, rows_a_block = divide_up(rows, kBlocks);
  Scratch<Pair<W>> scale(pairs.count), sums(kBlocks * pairs.count);
  if (!scale.has_memory() || !sums.has_memory()) return false;
  gather_scale(f.norm, pairs, scale.begin());
  const int threads = threads_for(f.norm.threads, rows * f.norm.columns * int64_t(sizeof(T)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < kBlocks; block++) {
    Pair<W>* dscale = sums.begin() + block * pairs.count;
    for (int64_t i = 0; i < pairs.count; i++) dscale[i] = {};
    for (int64_t row = block * rows_a_block; row < smaller(rows, (block + 1) * rows_a_block); row++) {
      const T* x = static_cast<const T*>(f.norm.x) + row * pairs.columns;
      const T* dy = static_cast<const T*>(f.dy) + row * pairs.columns;
      T* dx = static_cast<T*>(f.dx) + row * pairs.columns;
      const W root = inverse_root_mean_square(x, pairs, W(f.norm.eps));
      Pair<W> along = {};
      for (int64_t i = 0; i < pairs.count; i++) {
        const auto v = load(x + i * kPair<T>, pairs.valid(i)), d = load(dy + i * kPair<T>, pairs.valid(i));
        for (int half = 0; half < 2; half++) {
          const auto du = d.half[half] * v.half[half] * root;
          dscale[i].half[half] += du;
          along.half[half] += du * scale.begin()[i].half[half];
        }
      }
      const W mean = sum_of(along) / W(pairs.columns);
      for (int64_t i = 0; i < pairs.count; i++) {
        const auto v = load(x + i * kPair<T>, pairs.valid(i));
        auto d = load(dy + i * kPair<T>, pairs.valid(i));
        for (int half = 0; half < 2; half++)
          d.half[half] = (d.half[half] * scale.begin()[i].half[half] - v.half[half] * root * mean) * root;
        store(dx + i * kPair<T>, d, pairs.valid(i));
      }
    }
  }
  for (int64_t i = 0; i < pairs.count; i++) {
    Pair<W> sum = {};
    for (int64_t block = 0; block < kBlocks; block++)
      for (int half = 0; half < 2; half++) sum.half[half] += sums.begin()[block * pairs.count + i].half[half];
    scatter<T>(sum, pairs.valid(i), [&](int c, W value) { static_cast<W*>(f.dscale)[i * kPair<T> + c] = value; });
  }
  return true;
}

// e^x to the last bit or two: 2^n e^r with |r| at most half of ln 2, and e^r by its series to the seventh power.
// Infinite from 88.4 on, and never below 2^-126.
STRIPEDRAG_INLINE Vector<float> exponential(Vector<float> x) {
  x = x > 89.0f ? Vector<float>{} + 89.0f : x;
  x = x < -87.0f ? Vector<float>{} - 87.0f : x;
  constexpr float kRounder = 12582912.0f;  // 1.5 · 2^23: a sum with it has n in its last bits
  const Vector<float> shifted = x * 1.44269504f + kRounder;
  const Vector<float> n = shifted - kRounder;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first in nine bits
  Vector<float> series = r * (1 / 5040.0f) + 1 / 720.0f;
  series = series * r + 1 / 120.0f;
  series = series * r + 1 / 24.0f;
  series = series * r + 1 / 6.0f;
  series = series * r + 0.5f;
  series = series * r * r + r + 1.0f;
  const Bits power = ((Bits)shifted << 23) + 0x3f800000u;
  return series * (Vector<float>)power;
}
STRIPEDRAG_INLINE Vector<float> sigmoid(Vector<float> x) { return 1.0f / (1.0f + exponential(-x)); }

// run(i, valid) for every pair of an array, on several threads.
template <class T, class Run>
static void for_pairs(int64_t numbers, int most_threads, Run run) {
  const Pairs<T> pairs(numbers);
  const int threads = threads_for(most_threads, numbers * int64_t(sizeof(T)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < pairs.count; i++) run(i * kPair<T>, pairs.valid(i));
}

template <class T>
static void gate(const Gate& f) {
  const T *a = static_cast<const T*>(f.a), *b = static_cast<const T*>(f.b);
  T* y = static_cast<T*>(f.y);
  for_pairs<T>(f.numbers, f.threads, [&](int64_t at, int valid) {
    auto p = load(a + at, valid);
    const auto q = load(b + at, valid);
    for (int half = 0; half < 2; half++) p.half[half] = p.half[half] * sigmoid(p.half[half]) * q.half[half];
    store(y + at, p, valid);
  });
}

// With s = sigmoid(a): da = dy b s (1 + a (1 - s)), db = dy a s.
template <class T>
static void gate_gradient(const GateGradient& f) {
  const T *a = static_cast<const T*>(f.gate.a), *b = static_cast<const T*>(f.gate.b), *dy = static_cast<const T*>(f.dy);
  T *da = static_cast<T*>(f.da), *db = static_cast<T*>(f.db);
  for_pairs<T>(f.gate.numbers, f.gate.threads, [&](int64_t at, int valid) {
    auto p = load(a + at, valid), q = load(b + at, valid);
    const auto d = load(dy + at, valid);
    for (int half = 0; half < 2; half++) {
      const auto s = sigmoid(p.half[half]), silu = p.half[half] * s;
      p.half[half] = d.half[half] * q.half[half] * (s + silu * (1.0f - s));
      q.half[half] = d.half[half] * silu;
    }
    store(da + at, p, valid);
    store(db + at, q, valid);
  });
}

}  // namespace stripedrag::STRIPEDRAG_ISA
