// Attention's products in bfloat16 for processors with AVX-512 BF16: of pairs of neighbouring channels, or keys, with sums in
// float32 (`attention.h` has what goes on around them).
#include <immintrin.h>

#include "attention.h"

namespace stripedrag::STRIPEDRAG_ISA {
namespace {

constexpr int kGroup = 6;  // rows of a product that live in registers: 6 by 4 vectors of sums

using Floats = __m512;

// c (kGroup, 16 N) = keep · c + a b, of pairs of bfloat16: a (kGroup, pairs), b (pairs, 16 N) without gaps.
template <int N, bool keeps>
STRIPEDRAG_INLINE void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t pairs, float* c,
                                int64_t c_stride, const float* keep) {
  Floats sums[kGroup][N];
  for (int i = 0; i < kGroup; i++)
    for (int n = 0; n < N; n++) {
      if constexpr (keeps) sums[i][n] = _mm512_mul_ps(_mm512_load_ps(c + i * c_stride + 16 * n), _mm512_set1_ps(keep[i]));
      else sums[i][n] = _mm512_setzero_ps();
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

// 2^x for x of at most 0, to 3e-6 of itself; 0 from -150 on. A NaN stays one.
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

struct PairProducts {
  using Element = bfloat16;
  using Number = uint32_t;
  static constexpr int64_t kPacked = 2, kGroup = bf16::kGroup, kPanel = bf16::kPanel;

  static STRIPEDRAG_INLINE_MEMBER void lay_out_query(const bfloat16* from, int64_t width, uint32_t* to) {
    if (from != nullptr) memcpy(to, from, size_t(width) * sizeof(bfloat16));
    else memset(to, 0, size_t(width) * sizeof(bfloat16));
  }
  // Panels of 64 keys, in each a pair of channels after another; keys that are not there are zeros.
  static STRIPEDRAG_INLINE_MEMBER void lay_out_keys(const bfloat16* k, int64_t stride, int64_t keys, int64_t width, uint32_t* to) {
    const int64_t pairs = width / 2;
    for (int64_t first = 0; first < divide_up(keys, kPanel) * kPanel; first += 16) {
      uint32_t* panel = to + first / kPanel * pairs * kPanel + first % kPanel;
      for (int64_t pair = 0; pair < pairs; pair += 16) {
        const int64_t some = smaller(16, pairs - pair);
        __m512i rows[16];
        for (int i = 0; i < 16; i++) {
          const __mmask16 there = __mmask16(first + i < keys ? (1u << some) - 1 : 0);
          rows[i] = _mm512_maskz_loadu_epi32(there, k + (first + i) * stride + 2 * pair);
        }
        transpose(rows);
        for (int64_t i = 0; i < some; i++) _mm512_store_si512(panel + (pair + i) * kPanel, rows[i]);
      }
    }
  }
  // Columns of 64 channels (the last may be fewer), in each a pair of keys after another.
  static STRIPEDRAG_INLINE_MEMBER void lay_out_values(const bfloat16* v, int64_t stride, int64_t keys, int64_t width, uint32_t* to) {
    const auto load = [&](int64_t key, int64_t channel) {
      if (key >= keys) return _mm512_setzero_si512();
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + key * stride + channel)));
    };
    const int64_t pairs = divide_up(keys, kPanel) * kPanel / 2;
    for (int64_t column = 0; column < width; column += 64)
      for (int64_t p = 0, n = smaller(64, width - column); p < pairs; p++)
        for (int64_t c = 0; c < n; c += 16, to += 16)
          _mm512_store_si512(to, _mm512_or_si512(load(2 * p, column + c), _mm512_slli_epi32(load(2 * p + 1, column + c), 16)));
  }
  static STRIPEDRAG_INLINE_MEMBER void score(const uint32_t* q, int64_t depth, const uint32_t* k, float* scores, int64_t stride) {
    multiply<4, false>(q, depth, k, depth, scores, stride, nullptr);
  }
  // A row's shares exp(scale · (score - highest)) of the first `seen` of `width` keys, zeros for the others; its maximum and
  // sum go on, and `keep` is what its sums so far are still worth.
  static STRIPEDRAG_INLINE_MEMBER void weigh(const float* scores, int64_t seen, int64_t width, float scale, float* highest,
                                             float* total, float* keep, uint32_t* shares) {
    const auto mask = [&](int64_t key) {
      return __mmask16(key + 16 <= seen ? 0xffff : key < seen ? (1u << (seen - key)) - 1 : 0);
    };
    Floats lanes = _mm512_set1_ps(*highest);
    for (int64_t key = 0; key < seen; key += 16)
      lanes = _mm512_mask_max_ps(lanes, mask(key), lanes, _mm512_load_ps(scores + key));
    const float now = _mm512_reduce_max_ps(lanes);
    const Floats most = _mm512_set1_ps(now), by = _mm512_set1_ps(scale);
    Floats sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < width; key += 32) {
      Floats share[2];
      for (int half = 0; half < 2; half++) {
        const Floats score = _mm512_load_ps(scores + key + 16 * half);
        share[half] = _mm512_maskz_mov_ps(mask(key + 16 * half), power_of_two(_mm512_mul_ps(_mm512_sub_ps(score, most), by)));
        sum = _mm512_add_ps(sum, share[half]);
      }
      _mm512_store_si512(shares + key / 2, (__m512i)_mm512_cvtne2ps_pbh(share[1], share[0]));
    }
    *keep = _mm512_cvtss_f32(power_of_two(_mm512_set1_ps((*highest - now) * scale)));
    *total = *total * *keep + _mm512_reduce_add_ps(sum);
    *highest = now;
  }
  static STRIPEDRAG_INLINE_MEMBER void mix(const uint32_t* shares, int64_t shares_stride, const uint32_t* values, int64_t pairs,
                                           int64_t width, float* sums, int64_t stride, const float* keep) {
    by_count<4>(width / 16, [&](auto n) { multiply<n.value, true>(shares, shares_stride, values, pairs, sums, stride, keep); });
  }
  static STRIPEDRAG_INLINE_MEMBER void write(const float* sums, float share, int64_t width, bfloat16* y) {
    for (int64_t c = 0; c < width; c += 16) {
      const Floats mean = _mm512_mul_ps(_mm512_load_ps(sums + c), _mm512_set1_ps(share));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + c), (__m256i)_mm512_cvtneps_pbh(mean));
    }
  }
};

bool run(const Attention& f) { return attention<PairProducts>(f); }

}  // namespace

extern bool (*const attention_bf16)(const Attention&);
bool (*const attention_bf16)(const Attention&) = run;

}  // namespace stripedrag::STRIPEDRAG_ISA
