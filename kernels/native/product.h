// Products of matrices in float32, of which a few rows by a few vectors of sums live in registers.
#pragma once
#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSumVectors = 4;  // of 32 registers 24 hold sums, 4 a row of b
#else
constexpr int kSumVectors = 2;  // of 16 registers 12 and 2
#endif
constexpr int kSumRows = 6;
constexpr double kLog2E = 1.4426950408889634;
constexpr int kPanel = kSumVectors * kLanes<float>;  // columns of a panel, which lies row after row without gaps

// What sums begin with: nothing, what is there, or that by a factor for each row.
enum class Begin { nothing, sums, scaled };

// c (kSumRows, N vectors) = begin + a b: a (kSumRows, depth), b (depth, N vectors) without gaps.
template <int N, Begin kBegin>
STRIPEDRAG_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride,
                                const float* factors = nullptr) {
  using Floats = Vector<float>;
  constexpr int kWidth = kLanes<float>;
  Floats sums[kSumRows][N];
#pragma GCC unroll 6
  for (int i = 0; i < kSumRows; i++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      sums[i][n] = kBegin == Begin::nothing ? Floats{} : load_in_order(c + i * c_stride + kWidth * n);
      if constexpr (kBegin == Begin::scaled) sums[i][n] *= factors[i];
    }
  for (int64_t p = 0; p < depth; p++, b += N * kWidth) {
    Floats row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) row[n] = load_in_order(b + kWidth * n);
#pragma GCC unroll 6
    for (int i = 0; i < kSumRows; i++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[i][n] += row[n] * a[i * a_stride + p];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kSumRows; i++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store_in_order(c + i * c_stride + kWidth * n, sums[i][n]);
}

// run(n) with n, a number of vectors up to kMost, as a constant.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int kMost, class Run>
STRIPEDRAG_INLINE void by_count(int64_t n, Run run) {
  if constexpr (kMost > 1)
    if (n < kMost) return by_count<kMost - 1>(n, run);
  run(Count<kMost>{});
}

// Of two vectors the lanes of every other run of kRun: the first of each with the first of the other, or the second.
template <int kRun, class V, int... kLane>
STRIPEDRAG_INLINE void exchange_lanes(V& a, V& b, LaneList<kLane...>) {
  constexpr int kCount = int(sizeof...(kLane));
  const V first = __builtin_shufflevector(a, b, (kLane & kRun ? kCount + kLane - kRun : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kRun ? kCount + kLane : kLane + kRun)...);
  a = first;
}
// As many vectors as they have lanes: rows become columns.
template <int kRun = kLanes<float> / 2>
STRIPEDRAG_INLINE void transpose(Vector<float> (&rows)[kLanes<float>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<float>; i++)
    if (!(i & kRun)) exchange_lanes<kRun>(rows[i], rows[i + kRun], typename FirstLanes<kLanes<float>>::List{});
  if constexpr (kRun > 1) transpose<kRun / 2>(rows);
}

// Rows [first, first + kPanel) of w (rows, columns) as the columns of a panel (columns, kPanel); rows that are not there
// are zeros.
template <class T>
STRIPEDRAG_INLINE void lay_out_panel(const T* w, int64_t stride, int64_t first, int64_t rows, int64_t columns, float* panel) {
  constexpr int kWidth = kLanes<float>;
  for (int64_t column = 0; column < columns; column += kWidth) {
    const int64_t some = smaller(kWidth, columns - column);
    for (int at = 0; at < kPanel; at += kWidth) {
      Vector<float> block[kWidth];
      for (int i = 0; i < kWidth; i++) {
        const int64_t row = first + at + i;
        block[i] = row < rows ? load_in_order(w + row * stride + column, int(some)) : Vector<float>{};
      }
      transpose(block);
      for (int64_t i = 0; i < some; i++) store_in_order(panel + (column + i) * kPanel + at, block[i]);
    }
  }
}

}  // namespace stripedrag::STRIPEDRAG_ISA
