// Products of pairs of neighbouring numbers in bfloat16, with sums in float32, for processors with AVX-512 BF16.
#pragma once
#include <immintrin.h>

#include "product.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int kGroup = 6;  // rows of a product that live in registers: 6 by 4 vectors of sums

using Floats = Vector<float>;

// c (kGroup, 16 N) = begin + a b, of pairs of bfloat16: a (kGroup, pairs), b (pairs, 16 N) without gaps.
template <int N, Begin kBegin>
STRIPEDRAG_INLINE void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t pairs, float* c,
                                int64_t c_stride, const float* factors = nullptr) {
  Floats sums[kGroup][N];
  for (int i = 0; i < kGroup; i++)
    for (int n = 0; n < N; n++) {
      sums[i][n] = kBegin == Begin::nothing ? _mm512_setzero_ps() : _mm512_load_ps(c + i * c_stride + 16 * n);
      if constexpr (kBegin == Begin::scaled) sums[i][n] = _mm512_mul_ps(sums[i][n], _mm512_set1_ps(factors[i]));
    }
  for (int64_t p = 0; p < pairs; p++) {
    __m512bh column[N];
    for (int n = 0; n < N; n++) column[n] = (__m512bh)_mm512_load_si512(b + (p * N + n) * 16);
    for (int i = 0; i < kGroup; i++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a[i * a_stride + p]));
      for (int n = 0; n < N; n++) sums[i][n] = _mm512_dpbf16_ps(sums[i][n], pair, column[n]);
    }
  }
  for (int i = 0; i < kGroup; i++)
    for (int n = 0; n < N; n++) _mm512_store_ps(c + i * c_stride + 16 * n, sums[i][n]);
}

// 2^x to 3e-6 of itself; 0 from -150 on. A NaN stays one.
STRIPEDRAG_INLINE Floats power_of_two(Floats x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150), x);
  const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(x, whole);
  constexpr float kTerms[] = {0.055906426161527634f, 0.24024099111557007f, 0.6931241750717163f, 1};  // of 2^0 exactly 1
  Floats y = _mm512_set1_ps(0.009582852944731712f);
  for (float term : kTerms) y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(term));
  return _mm512_scalef_ps(y, whole);
}

// Rows of 16 pairs become columns.
STRIPEDRAG_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i twos[16], fours[16];  // of rows side by side, in each quarter of a vector
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; half++) {
      fours[i + 2 * half] = _mm512_unpacklo_epi64(twos[i + half], twos[i + 2 + half]);
      fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(twos[i + half], twos[i + 2 + half]);
    }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters
  for (int i = 0; i < 4; i++) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(fours[i], fours[4 + i], kEven),
                             _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], kEven)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(fours[i], fours[4 + i], kOdd),
                            _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], kOdd)};
    rows[i] = _mm512_shuffle_i32x4(even[0], even[1], kEven);
    rows[4 + i] = _mm512_shuffle_i32x4(odd[0], odd[1], kEven);
    rows[8 + i] = _mm512_shuffle_i32x4(even[0], even[1], kOdd);
    rows[12 + i] = _mm512_shuffle_i32x4(odd[0], odd[1], kOdd);
  }
}

// A row as it stands; zeros where there is none.
STRIPEDRAG_INLINE void lay_out_row(const bfloat16* from, int64_t width, uint32_t* to) {
  if (from != nullptr) memcpy(to, from, size_t(width) * sizeof(bfloat16));
  else memset(to, 0, size_t(width) * sizeof(bfloat16));
}

// x (rows, width) in panels of 64 rows, in each a pair of channels after another; rows that are not there are zeros.
STRIPEDRAG_INLINE void lay_out_by_channels(const bfloat16* x, int64_t stride, int64_t rows, int64_t width, uint32_t* to) {
  const int64_t pairs = width / 2;
  for (int64_t first = 0; first < divide_up(rows, kPanel) * kPanel; first += 16) {
    uint32_t* panel = to + first / kPanel * pairs * kPanel + first % kPanel;
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      const int64_t some = smaller(16, pairs - pair);
      __m512i block[16];
      for (int i = 0; i < 16; i++) {
        const __mmask16 there = __mmask16(first + i < rows ? (1u << some) - 1 : 0);
        block[i] = _mm512_maskz_loadu_epi32(there, x + (first + i) * stride + 2 * pair);
      }
      transpose(block);
      for (int64_t i = 0; i < some; i++) _mm512_store_si512(panel + (pair + i) * kPanel, block[i]);
    }
  }
}

// Rows `row` and `row + 1` of x from a channel on, the numbers of 16 channels in pairs; rows that are not there are zeros.
STRIPEDRAG_INLINE __m512i pairs_of_rows(const bfloat16* x, int64_t stride, int64_t rows, int64_t row, int64_t channel) {
  const auto load = [&](int64_t at) {
    if (at >= rows) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + at * stride + channel)));
  };
  return _mm512_or_si512(load(row), _mm512_slli_epi32(load(row + 1), 16));
}

// x (rows, width) in panels of 64 channels (the last may be fewer), in each a pair of rows after another, to whole panels of
// 64 rows: those that are not there are zeros.
STRIPEDRAG_INLINE void lay_out_by_rows(const bfloat16* x, int64_t stride, int64_t rows, int64_t width, uint32_t* to) {
  const int64_t pairs = divide_up(rows, kPanel) * kPanel / 2;
  for (int64_t column = 0; column < width; column += 64)
    for (int64_t p = 0, n = smaller(64, width - column); p < pairs; p++)
      for (int64_t c = 0; c < n; c += 16, to += 16)
        _mm512_store_si512(to, pairs_of_rows(x, stride, rows, 2 * p, column + c));
}

// y = factor · sums, rounded: a row of `width` numbers.
STRIPEDRAG_INLINE void write_row(const float* sums, float factor, int64_t width, bfloat16* y) {
  for (int64_t c = 0; c < width; c += 16) {
    const Floats scaled = _mm512_mul_ps(_mm512_load_ps(sums + c), _mm512_set1_ps(factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + c), (__m256i)_mm512_cvtneps_pbh(scaled));
  }
}

}  // namespace stripedrag::STRIPEDRAG_ISA
