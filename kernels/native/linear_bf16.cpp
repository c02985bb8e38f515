// Linear layers on a few rows for processors with AVX-512 BF16: in bfloat16, 32 numbers of the weight meet 32 of x in one
// instruction; and with weights of 4 bits (`quantized.h` says how they lie).
//
// 128 + q is a bfloat16 whose last four bits are q, so four bits become a number by one operation, and 32 of them meet 32
// numbers of x in one instruction. What that is too much, 128 scale times the sum of x, is taken from the offset: of the
// 24 bits of a sum it costs about five.
#include <immintrin.h>

#include "quantized.h"

namespace stripedrag::STRIPEDRAG_ISA {
namespace {

constexpr float kBias = 128;
constexpr short kBiasBits = 0x4300;  // as a bfloat16

// 128 + the j-th number of each word, as bfloat16.
template <int j>
STRIPEDRAG_INLINE __m512bh numbers(__m512i words) {
  constexpr int kMasked = 0xea;  // (a & b) | c
  const __m512i shifted = j == 0 ? words : _mm512_srli_epi16(words, 4 * j);
  return (__m512bh)_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi16(15), _mm512_set1_epi16(kBiasBits), kMasked);
}

STRIPEDRAG_INLINE __m512 widen16(const bfloat16* x, __mmask16 there) {
  const __m256i bits = _mm256_maskz_loadu_epi16(there, x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Of R rows and x, padded to whole blocks; `x_sums` are those of x in each group.
template <int R>
STRIPEDRAG_INLINE void dot_int4(float (&dots)[R], const uint16_t* words, const bfloat16* scales, const bfloat16* offsets,
                                const bfloat16* x, const float* x_sums, int64_t blocks) {
  constexpr int64_t kGroups = 16, kBlocks = kGroups / kBlockGroups;  // whose scales are made wide at a time
  const int64_t groups = blocks * kBlockGroups, words_of_row = blocks * kGroupColumns;
  alignas(64) float wide_scales[R][kGroups];
  __m512 sums[R][kBlockGroups] = {};
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    const int64_t group = first * kBlockGroups;
    const __mmask16 there = groups - group >= kGroups ? 0xffff : __mmask16((1u << (groups - group)) - 1);
    const __m512 x_sum = _mm512_maskz_loadu_ps(there, x_sums + group);
    for (int r = 0; r < R; r++) {
      const __m512 scale = widen16(scales + r * groups + group, there);
      const __m512 offset = _mm512_fnmadd_ps(scale, _mm512_set1_ps(kBias), widen16(offsets + r * groups + group, there));
      _mm512_store_ps(wide_scales[r], scale);
      sums[r][0] = _mm512_fmadd_ps(offset, x_sum, sums[r][0]);
    }
    for (int64_t block = first; block < smaller(blocks, first + kBlocks); block++) {
      __m512bh with[kBlockGroups];
      for (int j = 0; j < kBlockGroups; j++)
        with[j] = (__m512bh)_mm512_load_si512(x + (block * kBlockGroups + j) * kGroupColumns);
      for (int r = 0; r < R; r++) {
        const __m512i word = _mm512_loadu_si512(words + r * words_of_row + block * kGroupColumns);
        const __m512bh q[kBlockGroups] = {numbers<0>(word), numbers<1>(word), numbers<2>(word), numbers<3>(word)};
        for (int j = 0; j < kBlockGroups; j++) {
          const __m512 product = _mm512_dpbf16_ps(_mm512_setzero_ps(), q[j], with[j]);
          const __m512 scale = _mm512_set1_ps(wide_scales[r][(block - first) * kBlockGroups + j]);
          sums[r][j] = _mm512_fmadd_ps(product, scale, sums[r][j]);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    dots[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]), _mm512_add_ps(sums[r][2], sums[r][3])));
}

// One output of each of R rows of x, from row b on.
template <int R>
STRIPEDRAG_INLINE void dot_bf16(const Linear& f, int64_t row, int64_t b) {
  constexpr int kSums = 2;
  constexpr int64_t kStep = 32;
  const auto* weight = static_cast<const bfloat16*>(f.weight) + row * f.columns;
  const auto* x = static_cast<const bfloat16*>(f.x) + b * f.columns;
  __m512 sums[R][kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kStep <= f.columns; i += kSums * kStep)
#pragma GCC unroll 2
    for (int s = 0; s < kSums; s++) {
      const int64_t at = i + s * kStep;
      if constexpr (R > 2) __builtin_prefetch(weight + at + kAheadBytes / int64_t(sizeof(bfloat16)));
      const auto w = (__m512bh)_mm512_loadu_si512(weight + at);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r][s] = _mm512_dpbf16_ps(sums[r][s], w, (__m512bh)_mm512_loadu_si512(x + r * f.columns + at));
    }
  for (; i < f.columns; i += kStep) {
    const __mmask32 there = f.columns - i >= kStep ? 0xffffffff : (1u << (f.columns - i)) - 1;
    const auto w = (__m512bh)_mm512_maskz_loadu_epi16(there, weight + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], w, (__m512bh)_mm512_maskz_loadu_epi16(there, x + r * f.columns + i));
  }
  const float bias = f.bias == nullptr ? 0 : widen(static_cast<const bfloat16*>(f.bias)[row]);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const __m512 sum = _mm512_add_ps(sums[r][0], sums[r][1]);
    static_cast<bfloat16*>(f.y)[(b + r) * f.rows + row] = narrow<bfloat16>(sum_of_lanes<float>((Vector<float>)sum) + bias);
  }
}

bool run_linear(const Linear& f) {
  const int threads = threads_for(f.threads, f.rows * f.columns * int64_t(sizeof(bfloat16)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < f.rows; row++) {
    int64_t b = 0;
    for (; b + 8 <= f.batch; b += 8) dot_bf16<8>(f, row, b);
    for (; b + 4 <= f.batch; b += 4) dot_bf16<4>(f, row, b);
    for (; b + 2 <= f.batch; b += 2) dot_bf16<2>(f, row, b);
    for (; b < f.batch; b++) dot_bf16<1>(f, row, b);
  }
  return true;
}

bool run_linear_int4(const QuantizedLinear& f) {
  const int64_t blocks = divide_up(f.columns, kBlockColumns), padded = blocks * kBlockColumns, groups = blocks * kBlockGroups;
  const Scratch<bfloat16> x(f.batch * padded);
  const Scratch<float> x_sums(f.batch * groups);
  if (!x.has_memory() || !x_sums.has_memory()) return false;
  memset(x.begin(), 0, size_t(f.batch * padded) * sizeof(bfloat16));
  for (int64_t b = 0; b < f.batch; b++)
    memcpy(x.begin() + b * padded, static_cast<const bfloat16*>(f.x) + b * f.columns, size_t(f.columns) * sizeof(bfloat16));
  for (int64_t group = 0; group < f.batch * groups; group++) {
    const __m512i pairs = _mm512_load_si512(x.begin() + group * kGroupColumns);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
    x_sums.begin()[group] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
  }
  linear_by_rows<bfloat16>(f, f.rows * padded / 2, padded * 2 > kLongBytes, [&](auto& sums, int64_t row, int64_t b) {
    dot_int4(sums, static_cast<const uint16_t*>(f.weight) + row * blocks * kGroupColumns,
             static_cast<const bfloat16*>(f.scale) + row * groups, static_cast<const bfloat16*>(f.offset) + row * groups,
             x.begin() + b * padded, x_sums.begin() + b * groups, blocks);
  });
  return true;
}

}  // namespace

extern bool (*const linear_bf16)(const Linear&);
bool (*const linear_bf16)(const Linear&) = run_linear;
extern bool (*const linear_int4_bf16)(const QuantizedLinear&);
bool (*const linear_int4_bf16)(const QuantizedLinear&) = run_linear_int4;

}  // namespace stripedrag::STRIPEDRAG_ISA
