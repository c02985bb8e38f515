// A linear layer on one row, y = W x + b: what a decode step spends its time on, and nothing but reading W. Sums are in
// the arithmetic's type whatever the element, and in one order whatever the threads.
#pragma once
#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {

// Waking a second thread costs some microseconds: as long as reading this much.
STRIPEDRAG_INLINE int threads_for(int threads, int64_t bytes) {
  constexpr int64_t kBytesPerThread = 128 << 10;
  return int(smaller(threads, 1 + bytes / kBytesPerThread));
}

template <class W>
STRIPEDRAG_INLINE W sum_of(const Pair<W>& x) {
  const Vector<W> both = x.half[0] + x.half[1];
  W sum = 0;
  for (int lane = 0; lane < kLanes<W>; lane++) sum += both[lane];
  return sum;
}

// One output; x as pairs, padded with zeros.
template <class T>
STRIPEDRAG_INLINE void dot_row(const Linear& f, int64_t row, const Pair<Work<T>>* x) {
  using W = Work<T>;
  const T* weight = static_cast<const T*>(f.weight) + row * f.columns;
  const int64_t whole = f.columns / kPair<T>, rest = f.columns - whole * kPair<T>;
  Pair<W> sums = {};
  const auto add = [&](const Pair<W>& w, int64_t i) {
    for (int half = 0; half < 2; half++) sums.half[half] += w.half[half] * x[i].half[half];
  };
  for (int64_t i = 0; i < whole; i++) add(load(weight + i * kPair<T>), i);
  if (rest > 0) add(load(weight + whole * kPair<T>, int(rest)), whole);
  const W bias = f.bias == nullptr ? W(0) : widen(static_cast<const T*>(f.bias)[row]);
  static_cast<T*>(f.y)[row] = narrow<T>(sum_of(sums) + bias);
}

template <class T>
static bool linear(const Linear& f) {
  using W = Work<T>;
  const int64_t pairs = divide_up(f.columns, kPair<T>);
  Scratch<Pair<W>> x(pairs);
  if (!x.has_memory()) return false;
  const T* from = static_cast<const T*>(f.x);
  for (int64_t i = 0; i < pairs; i++)
    x.begin()[i] = load(from + i * kPair<T>, int(smaller(kPair<T>, f.columns - i * kPair<T>)));
  const int threads = threads_for(f.threads, f.rows * f.columns * int64_t(sizeof(T)));
  // A row after the other, one long run of memory for each thread: four rows side by side took twice as long.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < f.rows; row++) dot_row<T>(f, row, x.begin());
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
