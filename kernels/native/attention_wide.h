// Attention's products for processors without those of bfloat16: of float32, to which numbers are made wide as they come
// into the cache.
#pragma once
#include "attention.h"
#include "linear.h"

namespace stripedrag::STRIPEDRAG_ISA {

// 2^x for x of at most 0, to 2e-7 of itself, and 0 below -126. A NaN stays one.
STRIPEDRAG_INLINE Vector<float> power_of_two(Vector<float> x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 · 2^23: a sum with it has the whole part in its last bits
  constexpr float kTerms[] = {0.009671513f, 0.055507336f, 0.24022242f, 0.693147f, 1};  // of 2^0 exactly 1
  const Vector<float> shifted = x + kRounder, part = x - (shifted - kRounder);
  Vector<float> y = Vector<float>{} + 0.0013264726f;
#pragma GCC unroll 5
  for (float term : kTerms) y = y * part + term;
  const Bits power = ((Bits)shifted << 23) + 0x3f800000u;
  return x < -126.0f ? Vector<float>{} : y * (Vector<float>)power;
}

template <class T>
struct WideProducts {
  using Element = T;
  using Number = float;
  static constexpr int64_t kPacked = 1, kGroup = kSumRows, kPanel = STRIPEDRAG_ISA::kPanel;
  static constexpr int kWidth = kLanes<float>;

  static STRIPEDRAG_INLINE_MEMBER void lay_out_query(const T* from, int64_t width, float* to) {
    for (int64_t c = 0; c < width; c += kWidth)
      store_in_order(to + c, from == nullptr ? Vector<float>{} : load_in_order(from + c));
  }
  static STRIPEDRAG_INLINE_MEMBER void lay_out_keys(const T* k, int64_t stride, int64_t keys, int64_t width, float* to) {
    for (int64_t first = 0; first < keys; first += kPanel) lay_out_panel(k, stride, first, keys, width, to + first * width);
  }
  static STRIPEDRAG_INLINE_MEMBER void lay_out_values(const T* v, int64_t stride, int64_t keys, int64_t width, float* to) {
    const int64_t padded = divide_up(keys, kPanel) * kPanel;
    for (int64_t column = 0; column < width; column += kPanel)
      for (int64_t key = 0; key < padded; key++)
        for (int64_t c = column; c < smaller(width, column + kPanel); c += kWidth, to += kWidth)
          store_in_order(to, key < keys ? load_in_order(v + key * stride + c) : Vector<float>{});
  }
  // (kGroup, kPanel) scores.
  static STRIPEDRAG_INLINE_MEMBER void score(const float* q, int64_t depth, const float* k, float* scores, int64_t stride) {
    multiply<kSumVectors, Begin::nothing>(q, depth, k, depth, scores, stride);
  }
  // A row's shares exp(scale · (score - highest)) of the first `seen` of `width` keys, zeros for the others; its maximum and
  // sum go on, and `keep` is what its sums so far are still worth.
  static STRIPEDRAG_INLINE_MEMBER void weigh(float* scores, int64_t seen, int64_t width, float scale, float* highest,
                                             float* total, float* keep, float* shares) {
    for (int64_t key = seen; key < width; key++) scores[key] = -__builtin_inff();
    Vector<float> lanes = Vector<float>{} + *highest, sum = {};
    for (int64_t key = 0; key < width; key += kWidth) {
      const auto some = load_in_order(scores + key);
      lanes = some > lanes ? some : lanes;
    }
    float now = lanes[0];
    for (int lane = 1; lane < kWidth; lane++) now = lanes[lane] > now ? lanes[lane] : now;
    for (int64_t key = 0; key < width; key += kWidth) {
      const auto share = power_of_two((load_in_order(scores + key) - now) * scale);
      sum += share;
      store_in_order(shares + key, share);
    }
    *keep = power_of_two(Vector<float>{} + (*highest - now) * scale)[0];
    *total = *total * *keep + sum_of_lanes<float>(sum);
    *highest = now;
  }
  // sums (kGroup, width up to kPanel) = keep · sums + shares · values.
  static STRIPEDRAG_INLINE_MEMBER void mix(const float* shares, int64_t shares_stride, const float* values, int64_t keys,
                                           int64_t width, float* sums, int64_t stride, const float* keep) {
    by_count<kSumVectors>(width / kWidth, [&](auto n) {
      multiply<n.value, Begin::scaled>(shares, shares_stride, values, keys, sums, stride, keep);
    });
  }
  static STRIPEDRAG_INLINE_MEMBER void write(const float* sums, float share, int64_t width, T* y) {
    for (int64_t c = 0; c < width; c += kWidth) store_in_order(y + c, load_in_order(sums + c) * share);
  }
};

}  // namespace stripedrag::STRIPEDRAG_ISA
