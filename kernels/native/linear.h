// A linear layer on a few rows, y = W x + b: what a decode step spends its time on, and nothing but reading W. Sums are in
// the arithmetic's type whatever the element, and in one order whatever the threads and the rows beside.
#pragma once
#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {

// Waking a second thread costs some microseconds: as long as reading this much.
STRIPEDRAG_INLINE int threads_for(int threads, int64_t bytes) {
  constexpr int64_t kBytesPerThread = 128 << 10;
  return int(smaller(threads, 1 + bytes / kBytesPerThread));
}

template <int kWidth, class V, int... kLane>
STRIPEDRAG_INLINE V fold_lanes(V a, V b, LaneList<kLane...>) {
  constexpr int kHalf = kWidth / 2;
  return __builtin_shufflevector(a, b, (kLane / kWidth * kWidth + kLane % kHalf + kLane % kWidth / kHalf * int(sizeof...(kLane)))...) +
         __builtin_shufflevector(a, b, (kLane / kWidth * kWidth + kLane % kHalf + kLane % kWidth / kHalf * int(sizeof...(kLane)) + kHalf)...);
}
// Block by block of kWidth lanes: the two halves of a's block added, and beside them those of b's.
template <int kWidth, class W>
STRIPEDRAG_INLINE Vector<W> fold(Vector<W> a, Vector<W> b) {
  return fold_lanes<kWidth>(a, b, typename FirstLanes<kLanes<W>>::List{});
}

template <class W, int kWidth = kLanes<W>>
STRIPEDRAG_INLINE W sum_of_lanes(Vector<W> x) {
  if constexpr (kWidth == 1) return x[0];
  else return sum_of_lanes<W, kWidth / 2>(fold<kWidth, W>(x, x));
}
template <class W>
STRIPEDRAG_INLINE W sum_of(const Pair<W>& x) {
  return sum_of_lanes<W>(x.half[0] + x.half[1]);
}

constexpr int64_t kAheadBytes = 2048;

// One output of each of kRowsOfX rows of x, from row b on; they lie as pairs padded with zeros.
template <class T, int kRowsOfX>
STRIPEDRAG_INLINE void dot_row(const Linear& f, int64_t row, int64_t b, const Pair<Work<T>>* x) {
  using W = Work<T>;
  const T* weight = static_cast<const T*>(f.weight) + row * f.columns;
  const int64_t whole = f.columns / kPair<T>, rest = f.columns - whole * kPair<T>, pairs = divide_up(f.columns, kPair<T>);
  x += b * pairs;
  Pair<W> sums[kRowsOfX] = {};
  const auto add = [&](const Pair<W>& w, int64_t i) {
#pragma GCC unroll 4
    for (int r = 0; r < kRowsOfX; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) sums[r].half[half] += w.half[half] * x[r * pairs + i].half[half];
  };
  for (int64_t i = 0; i < whole; i++) {
    if constexpr (kRowsOfX > 2) __builtin_prefetch(weight + i * kPair<T> + kAheadBytes / int64_t(sizeof(T)));
    add(load(weight + i * kPair<T>), i);
  }
  if (rest > 0) add(load(weight + whole * kPair<T>, int(rest)), whole);
  const W bias = f.bias == nullptr ? W(0) : widen(static_cast<const T*>(f.bias)[row]);
  for (int r = 0; r < kRowsOfX; r++) static_cast<T*>(f.y)[(b + r) * f.rows + row] = narrow<T>(sum_of(sums[r]) + bias);
}

template <class T>
static bool linear(const Linear& f) {
  using W = Work<T>;
  const int64_t pairs = divide_up(f.columns, kPair<T>);
  Scratch<Pair<W>> x(f.batch * pairs);
  if (!x.has_memory()) return false;
  for (int64_t b = 0; b < f.batch; b++) {
    const T* from = static_cast<const T*>(f.x) + b * f.columns;
    for (int64_t i = 0; i < pairs; i++)
      x.begin()[b * pairs + i] = load(from + i * kPair<T>, int(smaller(kPair<T>, f.columns - i * kPair<T>)));
  }
  const int threads = threads_for(f.threads, f.rows * f.columns * int64_t(sizeof(T)));
  // A row after the other, one long run of memory for each thread: four rows side by side took twice as long.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < f.rows; row++) {
    int64_t b = 0;
    for (; b + 4 <= f.batch; b += 4) dot_row<T, 4>(f, row, b, x.begin());
    for (; b + 2 <= f.batch; b += 2) dot_row<T, 2>(f, row, b, x.begin());
    for (; b < f.batch; b++) dot_row<T, 1>(f, row, b, x.begin());
  }
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
