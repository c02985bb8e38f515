// Attention's products in bfloat16 for processors with AVX-512 BF16: of pairs of neighbouring channels, or keys, with sums in
// float32 (`attention.h` has what goes on around them).
#include "attention.h"
#include "pairs.h"

namespace stripedrag::STRIPEDRAG_ISA {
namespace {

struct PairProducts {
  using Element = bfloat16;
  using Number = uint32_t;
  static constexpr int64_t kPacked = 2, kGroup = bf16::kGroup, kPanel = bf16::kPanel;

  static STRIPEDRAG_INLINE_MEMBER void lay_out_query(const bfloat16* from, int64_t width, uint32_t* to) {
    lay_out_row(from, width, to);
  }
  static STRIPEDRAG_INLINE_MEMBER void lay_out_keys(const bfloat16* k, int64_t stride, int64_t keys, int64_t width, uint32_t* to) {
    lay_out_by_channels(k, stride, keys, width, to);
  }
  static STRIPEDRAG_INLINE_MEMBER void lay_out_values(const bfloat16* v, int64_t stride, int64_t keys, int64_t width, uint32_t* to) {
    lay_out_by_rows(v, stride, keys, width, to);
  }
  static STRIPEDRAG_INLINE_MEMBER void score(const uint32_t* q, int64_t depth, const uint32_t* k, float* scores, int64_t stride) {
    multiply<4, Begin::nothing>(q, depth, k, depth, scores, stride);
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
    by_count<4>(width / 16, [&](auto n) { multiply<n.value, Begin::scaled>(shares, shares_stride, values, pairs, sums, stride, keep); });
  }
  static STRIPEDRAG_INLINE_MEMBER void write(const float* sums, float share, int64_t width, bfloat16* y) {
    write_row(sums, share, width, y);
  }
};

bool run(const Attention& f) { return attention<PairProducts>(f); }

}  // namespace

extern bool (*const attention_bf16)(const Attention&);
bool (*const attention_bf16)(const Attention&) = run;

}  // namespace stripedrag::STRIPEDRAG_ISA
