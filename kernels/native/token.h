// What a decode step needs beside the kernels for rows: one token's attention over all keys, its rotary position, and sums.
// Of float32 and bfloat16; arithmetic is float32, in one order whatever the threads.
#pragma once
#include "rows.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int64_t kKeysAtOnce = 256;  // keys of a part: its scores, and mostly its values, stay in the first-level cache
constexpr int kQueries = 4;           // heads that read a key together
constexpr int kPairsAtOnce = 2;       // of the sums of values that stay in registers

// A vector whose lane i is the sum of x[i]'s lanes. Overwrites x.
template <int kWidth = kLanes<float>>
STRIPEDRAG_INLINE Vector<float> sums_of(Vector<float>* x) {
  if constexpr (kWidth == 1) {
    return x[0];
  } else {
    for (int i = 0; i < kWidth / 2; i++) x[i] = fold<kWidth, float>(x[i], x[i + kWidth / 2]);
    return sums_of<kWidth / 2>(x);
  }
}

// What some heads have read of a part of the keys: with s the scores and m the largest of them, m, Σ e^(s - m), and
// Σ e^(s - m) v, which begins `sums`.
struct Reading {
  float most, total;
};

// scores (kHeads, kKeysAtOnce) of `keys` keys for as many heads' queries, which lie as pairs padded with zeros; those of
// the last key again, up to a whole vector.
template <class T, int kHeads>
STRIPEDRAG_INLINE void score(const T* k, int64_t keys, const Pairs<T>& pairs, const Pair<float>* queries, float* scores) {
  for (int64_t first = 0; first < keys; first += kLanes<float>) {
    Vector<float> products[kHeads][kLanes<float>];
    for (int lane = 0; lane < kLanes<float>; lane++) {
      const T* key = k + smaller(first + lane, keys - 1) * pairs.columns;
      Pair<float> sums[kHeads] = {};
      for (int64_t i = 0; i < pairs.count; i++) {
        const auto x = load(key + i * kPair<T>, pairs.valid(i));
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; h++)
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) sums[h].half[half] += x.half[half] * queries[h * pairs.count + i].half[half];
      }
      for (int h = 0; h < kHeads; h++) products[h][lane] = sums[h].half[0] + sums[h].half[1];
    }
    for (int h = 0; h < kHeads; h++) {
      const Vector<float> dots = sums_of(products[h]);
      memcpy(scores + h * kKeysAtOnce + first, &dots, sizeof dots);
    }
  }
}

// kPairs pairs of Σ p v, a head's weights p in a row of `weights` (kHeads, kKeysAtOnce), into `sums` (kHeads, pairs).
template <class T, int kHeads, int kPairs>
STRIPEDRAG_INLINE void mix(const T* v, int64_t keys, const Pairs<T>& pairs, int64_t first, const float* weights, Pair<float>* sums) {
  Pair<float> held[kHeads][kPairs] = {};
  for (int64_t key = 0; key < keys; key++)
#pragma GCC unroll 2
    for (int i = 0; i < kPairs; i++) {
      const auto x = load(v + key * pairs.columns + (first + i) * kPair<T>, pairs.valid(first + i));
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; h++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) held[h][i].half[half] += weights[h * kKeysAtOnce + key] * x.half[half];
    }
  for (int h = 0; h < kHeads; h++)
    for (int i = 0; i < kPairs; i++) sums[h * pairs.count + first + i] = held[h][i];
}

template <class T, int kHeads>
static void read_part(const T* k, const T* v, int64_t keys, const Pairs<T>& pairs, const Pair<float>* queries, Reading* reading,
                      Pair<float>* sums) {
  alignas(kVectorBytes) float scores[kHeads * kKeysAtOnce];
  score<T, kHeads>(k, keys, pairs, queries, scores);
  for (int h = 0; h < kHeads; h++) {
    float* row = scores + h * kKeysAtOnce;
    const int64_t end = divide_up(keys, kLanes<float>) * kLanes<float>;
    float most = -__FLT_MAX__;  // a score of -inf weighs nothing
    for (int64_t i = 0; i < keys; i++) most = row[i] > most ? row[i] : most;
    Vector<float> total = {};
    for (int64_t i = 0; i < end; i += kLanes<float>) {
      auto* some = reinterpret_cast<VectorOf<float>::loose*>(row + i);
      *some = exponential(*some - most);
      if (i + kLanes<float> > keys)
        for (int64_t lane = keys - i; lane < kLanes<float>; lane++) row[i + lane] = 0;
      total += *some;
    }
    reading[h] = {most, sum_of_lanes<float>(total)};
  }
  int64_t i = 0;
  for (; i + kPairsAtOnce <= pairs.count; i += kPairsAtOnce) mix<T, kHeads, kPairsAtOnce>(v, keys, pairs, i, scores, sums);
  for (; i < pairs.count; i++) mix<T, kHeads, 1>(v, keys, pairs, i, scores, sums);
}

// Keys are read in parts of one length, by all heads that share them, kQueries at a time; then each head's parts are
// merged in their order, as blocks of flash attention are (Dao et al. 2022).
template <class T>
static bool attend(const TokenAttention& f) {
  const Pairs<T> pairs(f.width);
  const int64_t group = f.heads / f.kv_heads, parts = divide_up(f.keys, kKeysAtOnce), rows = f.batch * f.heads;
  Scratch<Pair<float>> queries(rows * pairs.count), sums(rows * parts * pairs.count);
  Scratch<Reading> readings(rows * parts);
  if (!queries.has_memory() || !sums.has_memory() || !readings.has_memory()) return false;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < pairs.count; i++) {
      const T* q = static_cast<const T*>(f.q) + row / f.heads * f.q_stride + row % f.heads * f.width;
      auto x = load(q + i * kPair<T>, pairs.valid(i));
      for (int half = 0; half < 2; half++) x.half[half] *= float(f.scale);
      queries.begin()[row * pairs.count + i] = x;
    }
  const int64_t slices = divide_up(group, kQueries);
  const int threads = threads_for(f.threads, 2 * f.batch * f.kv_heads * f.keys * f.width * int64_t(sizeof(T)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t job = 0; job < f.batch * f.kv_heads * slices * parts; job++) {
    const int64_t part = job % parts, slice = job / parts % slices, kv_row = job / parts / slices;
    const int64_t heads = smaller(kQueries, group - slice * kQueries), first = part * kKeysAtOnce;
    const int64_t at = kv_row / f.kv_heads * f.kv_strides[0] + kv_row % f.kv_heads * f.kv_strides[1] + first * f.width;
    const T *k = static_cast<const T*>(f.k) + at, *v = static_cast<const T*>(f.v) + at;
    const int64_t row = kv_row * group + slice * kQueries, keys = smaller(kKeysAtOnce, f.keys - first);
    const Pair<float>* q = queries.begin() + row * pairs.count;
    // The heads of a part side by side, so that these are a job's own.
    Reading* reading = readings.begin() + row * parts + part * heads;
    Pair<float>* sum = sums.begin() + (row * parts + part * heads) * pairs.count;
    switch (heads) {
      case 1: read_part<T, 1>(k, v, keys, pairs, q, reading, sum); break;
      case 2: read_part<T, 2>(k, v, keys, pairs, q, reading, sum); break;
      case 3: read_part<T, 3>(k, v, keys, pairs, q, reading, sum); break;
      default: read_part<T, kQueries>(k, v, keys, pairs, q, reading, sum);
    }
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t in_slice = row % group % kQueries, first = row - in_slice;
    const int64_t heads = smaller(kQueries, group - (row % group - in_slice));
    const auto place = [&](int64_t part) { return first * parts + part * heads + in_slice; };
    float most = readings.begin()[place(0)].most, total = 0;
    for (int64_t part = 1; part < parts; part++) {
      const float other = readings.begin()[place(part)].most;
      most = other > most ? other : most;
    }
    Pair<float>* into = sums.begin() + place(0) * pairs.count;
    for (int64_t part = 0; part < parts; part++) {
      const Reading& reading = readings.begin()[place(part)];
      const float share = exponential(Vector<float>{} + (reading.most - most))[0];
      total += share * reading.total;
      const Pair<float>* from = sums.begin() + place(part) * pairs.count;
      for (int64_t i = 0; i < pairs.count; i++)
        for (int half = 0; half < 2; half++)
          into[i].half[half] = part == 0 ? from[i].half[half] * share : into[i].half[half] + from[i].half[half] * share;
    }
    T* y = static_cast<T*>(f.y) + row * f.width;
    for (int64_t i = 0; i < pairs.count; i++) {
      for (int half = 0; half < 2; half++) into[i].half[half] /= total;
      store(y + i * kPair<T>, into[i], pairs.valid(i));
    }
  }
  return true;
}

// Each half-split pair (a, b) of a head's numbers becomes (a cos - b sin, b cos + a sin), rounded after each operation, as
// tensors of the element are. In place.
template <class T>
static void rotate(const Rotation& f) {
  const int64_t half = f.width / 2;
  for (int64_t row = 0; row < f.batch; row++) {
    const T *cos = static_cast<const T*>(f.cos) + row * f.angle_stride, *sin = static_cast<const T*>(f.sin) + row * f.angle_stride;
    for (int64_t head = 0; head < f.heads; head++) {
      T* x = static_cast<T*>(f.x) + row * f.stride + head * f.width;
      for (int64_t i = 0; i < half; i++) {
        const float a = widen(x[i]), b = widen(x[i + half]), c = widen(cos[i]), s = widen(sin[i]);
        const auto product = [](float p, float q) { return widen(narrow<T>(p * q)); };
        x[i] = narrow<T>(product(a, c) - product(b, s));
        x[i + half] = narrow<T>(product(b, c) + product(a, s));
      }
    }
  }
}

// y += x, number by number.
template <class T>
static void add(int64_t numbers, const void* from, void* to) {
  const T* x = static_cast<const T*>(from);
  T* y = static_cast<T*>(to);
  for (int64_t i = 0; i < numbers; i++) y[i] = narrow<T>(widen(y[i]) + widen(x[i]));
}

}  // namespace stripedrag::STRIPEDRAG_ISA
