// A linear layer on a few rows of x with weights of 8 or 4 bits, which are read as they are stored, and its weights made wide
// again for many rows. Sums are float32, in one order whatever the threads and the rows beside.
//
// 8 bits: w = scale q, q (rows, columns) signed, a float32 scale a row. 4 bits: w = scale q + offset for q from 0 to 15, both
// bfloat16 for every 32 columns. A block is 128 columns in 32 words of 16 bits; bits 4j to 4j + 3 of word i are column 32j + i.
#pragma once
#include "linear.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int64_t kGroupColumns = 32, kBlockColumns = 128, kBlockGroups = kBlockColumns / kGroupColumns;

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
using Floats = Vector<float>;

// As many stored numbers as a vector has lanes, as 32-bit integers.
STRIPEDRAG_INLINE Integers integers(const int8_t* q) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
#else
  Integers x;
  for (int lane = 0; lane < kLanes<float>; lane++) x[lane] = q[lane];
  return x;
#endif
}
STRIPEDRAG_INLINE Integers integers(const uint16_t* q) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
#else
  Integers x;
  for (int lane = 0; lane < kLanes<float>; lane++) x[lane] = q[lane];
  return x;
#endif
}
STRIPEDRAG_INLINE Floats floats(Integers q) { return __builtin_convertvector(q, Floats); }

STRIPEDRAG_INLINE float sum_of(const Floats& x) { return sum_of_lanes<float>(x); }

// Rows of the weight that meet x together where it is longer than half of the first-level cache: else each would fetch x
// from the second. One at a time is faster where x stays there.
constexpr int kRows = 4;
constexpr int64_t kLongBytes = 18 << 10;

// Rows of x as float32, each filled up with zeros to the end of the last block.
template <class T>
static bool widen_rows(const QuantizedLinear& f, int64_t padded, const Scratch<float>& wide) {
  if (!wide.has_memory()) return false;
  for (int64_t b = 0; b < f.batch; b++)
    for (int64_t i = 0; i < padded; i++)
      wide.begin()[b * padded + i] = i < f.columns ? widen(static_cast<const T*>(f.x)[b * f.columns + i]) : 0;
  return true;
}

// y by dot(sums, first row of the weight, row of x) for R rows of the weight: R is kRows where x is long, and 1.
template <class T, class Dot>
STRIPEDRAG_INLINE void linear_by_rows(const QuantizedLinear& f, int64_t bytes, bool is_long, Dot dot) {
  const int threads = threads_for(f.threads, bytes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < f.rows; first += kRows) {
    const int64_t rows = smaller(kRows, f.rows - first);
    for (int64_t b = 0; b < f.batch; b++) {
      float sums[kRows];
      if (is_long && rows == kRows) dot(sums, first, b);
      else
        for (int64_t r = 0; r < rows; r++) {
          float sum[1];
          dot(sum, first + r, b);
          sums[r] = sum[0];
        }
      for (int64_t r = 0; r < rows; r++) {
        const float bias = f.bias == nullptr ? 0 : widen(static_cast<const T*>(f.bias)[first + r]);
        static_cast<T*>(f.y)[b * f.rows + first + r] = narrow<T>(sums[r] + bias);
      }
    }
  }
}

template <int R>
STRIPEDRAG_INLINE void dot_int8(float (&dots)[R], const int8_t* q, const float* x, int64_t columns) {
  constexpr int kSums = R == 1 ? 4 : 2;
  constexpr int64_t kStep = kSums * kLanes<float>;
  Floats sums[R][kSums] = {};
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep)
    for (int s = 0; s < kSums; s++) {
      const int64_t at = i + s * kLanes<float>;
      const Floats with = load_in_order(x + at);
      for (int r = 0; r < R; r++) sums[r][s] += floats(integers(q + r * columns + at)) * with;
    }
  for (; i + kLanes<float> <= columns; i += kLanes<float>)
    for (int r = 0; r < R; r++) sums[r][0] += floats(integers(q + r * columns + i)) * load_in_order(x + i);
  for (int r = 0; r < R; r++) {
    float rest = 0;
    for (int64_t k = i; k < columns; k++) rest += float(q[r * columns + k]) * x[k];
    for (int s = 1; s < kSums; s++) sums[r][0] += sums[r][s];
    dots[r] = sum_of(sums[r][0]) + rest;
  }
}

template <class T>
static bool linear_int8(const QuantizedLinear& f) {
  const Scratch<float> x(f.batch * f.columns);
  if (!widen_rows<T>(f, f.columns, x)) return false;
  linear_by_rows<T>(f, f.rows * f.columns, f.columns * 4 > kLongBytes, [&](auto& sums, int64_t row, int64_t b) {
    dot_int8(sums, static_cast<const int8_t*>(f.weight) + row * f.columns, x.begin() + b * f.columns, f.columns);
    for (float& sum : sums) sum *= static_cast<const float*>(f.scale)[row++];
  });
  return true;
}

// Of whole blocks; `x_sums` are those of x in each group.
STRIPEDRAG_INLINE float dot_int4(const uint16_t* words, const bfloat16* scales, const bfloat16* offsets, const float* x,
                                 const float* x_sums, int64_t blocks) {
  typedef float Block __attribute__((vector_size(kBlockGroups * sizeof(float))));  // a number for each group
  Floats sums[kBlockGroups] = {};
  Block by_offsets = {};
  for (int64_t block = 0; block < blocks; block++, words += kGroupColumns, x += kBlockColumns) {
    Floats groups[kBlockGroups] = {};
    for (int64_t i = 0; i < kGroupColumns; i += kLanes<float>) {
      const Integers word = integers(words + i);
      for (int j = 0; j < kBlockGroups; j++) groups[j] += floats((word >> (4 * j)) & 15) * load_in_order(x + j * kGroupColumns + i);
    }
    Block offset, x_sum;
    memcpy(&x_sum, x_sums + block * kBlockGroups, sizeof x_sum);
    for (int j = 0; j < kBlockGroups; j++) {
      sums[j] += groups[j] * widen(scales[block * kBlockGroups + j]);
      offset[j] = widen(offsets[block * kBlockGroups + j]);
    }
    by_offsets += offset * x_sum;
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((by_offsets[0] + by_offsets[1]) + (by_offsets[2] + by_offsets[3]));
}

template <class T>
static bool linear_int4(const QuantizedLinear& f) {
  const int64_t blocks = divide_up(f.columns, kBlockColumns), groups = blocks * kBlockGroups;
  const Scratch<float> x(f.batch * blocks * kBlockColumns), x_sums(f.batch * groups);
  if (!widen_rows<T>(f, blocks * kBlockColumns, x) || !x_sums.has_memory()) return false;
  for (int64_t group = 0; group < f.batch * groups; group++) {
    float sum = 0;
    for (int64_t i = 0; i < kGroupColumns; i++) sum += x.begin()[group * kGroupColumns + i];
    x_sums.begin()[group] = sum;
  }
  linear_by_rows<T>(f, f.rows * blocks * kBlockColumns / 2, false, [&](auto& sums, int64_t row, int64_t b) {
    const uint16_t* words = static_cast<const uint16_t*>(f.weight) + row * blocks * kGroupColumns;
    const bfloat16* scales = static_cast<const bfloat16*>(f.scale) + row * groups;
    const bfloat16* offsets = static_cast<const bfloat16*>(f.offset) + row * groups;
    sums[0] = dot_int4(words, scales, offsets, x.begin() + b * blocks * kBlockColumns, x_sums.begin() + b * groups, blocks);
  });
  return true;
}

// w (rows, columns) into y, without gaps.
template <class T>
static void dequantize_int8(const QuantizedLinear& f) {
#pragma omp parallel for schedule(static) num_threads(f.threads) if (f.threads > 1)
  for (int64_t row = 0; row < f.rows; row++) {
    const int8_t* q = static_cast<const int8_t*>(f.weight) + row * f.columns;
    const float scale = static_cast<const float*>(f.scale)[row];
    T* w = static_cast<T*>(f.y) + row * f.columns;
    for (int64_t i = 0; i < f.columns; i++) w[i] = narrow<T>(scale * float(q[i]));
  }
}

template <class T>
static void dequantize_int4(const QuantizedLinear& f) {
  const int64_t groups = divide_up(f.columns, kBlockColumns) * kBlockGroups;
#pragma omp parallel for schedule(static) num_threads(f.threads) if (f.threads > 1)
  for (int64_t row = 0; row < f.rows; row++) {
    T* w = static_cast<T*>(f.y) + row * f.columns;
    for (int64_t group = 0; group * kGroupColumns < f.columns; group++, w += kGroupColumns) {
      const int64_t at = row * groups + group;
      const uint16_t* words = static_cast<const uint16_t*>(f.weight) + at / kBlockGroups * kGroupColumns;
      const float scale = widen(static_cast<const bfloat16*>(f.scale)[at]), offset = widen(static_cast<const bfloat16*>(f.offset)[at]);
      const int shift = 4 * int(at % kBlockGroups);
      const int64_t valid = smaller(kGroupColumns, f.columns - group * kGroupColumns);
      for (int64_t i = 0; i < valid; i++) w[i] = narrow<T>(scale * float((words[i] >> shift) & 15) + offset);
    }
  }
}

// A group of columns, and its levels: those between its ends first, then by turns those on the line that fits what was
// rounded to them best; of all these what has the least squared error. `q` are the numbers of the levels.
struct Group {
  static constexpr int kVectors = int(kGroupColumns) / kLanes<float>;
  Floats w[kVectors], q[kVectors];
  float scale, offset;

  static STRIPEDRAG_INLINE_MEMBER float total(const Floats (&x)[kVectors]) {
    Floats sum = x[0];
    for (int v = 1; v < kVectors; v++) sum += x[v];
    return sum_of(sum);
  }

  STRIPEDRAG_INLINE_MEMBER void fit(int refits) {
    constexpr float kLevels = 15, kToWhole = 12582912;  // 1.5 times 2^23: added and taken away it rounds
    Floats low = w[0], high = w[0], none = w[0] * 0.0f;
    for (int v = 1; v < kVectors; v++) {
      low = w[v] < low ? w[v] : low, high = w[v] > high ? w[v] : high;
      none += w[v] * 0.0f;
    }
    float ends[2] = {low[0], high[0]};
    for (int lane = 1; lane < kLanes<float>; lane++) {
      ends[0] = low[lane] < ends[0] ? low[lane] : ends[0];
      ends[1] = high[lane] > ends[1] ? high[lane] : ends[1];
    }
    const float nothing = sum_of(none);  // not 0 where a number is infinite or none
    float next_offset = ends[0] + nothing, next_scale = (ends[1] - ends[0]) / kLevels + nothing;
    float least = __builtin_inff();
    scale = next_scale, offset = next_offset;
    for (Floats& level : q) level = Floats{};
    for (int round = 0; round <= refits; round++) {
      const float s = widen(narrow<bfloat16>(next_scale)), o = widen(narrow<bfloat16>(next_offset));
      Floats level[kVectors], error[kVectors];
      for (int v = 0; v < kVectors; v++) {
        const Floats place = (w[v] - o) / (s == 0 ? 1 : s);
        const Floats inside = place < 0.0f ? Floats{} : place > kLevels ? Floats{} + kLevels : place;
        level[v] = (inside + kToWhole) - kToWhole;
        error[v] = level[v] * s + o - w[v];
        error[v] *= error[v];
      }
      if (const float sum = total(error); round == 0 || sum < least) {
        least = sum, scale = s, offset = o;
        memcpy(q, level, sizeof q);
      }
      const float middle = total(w) / kGroupColumns, level_middle = total(level) / kGroupColumns;
      Floats squares[kVectors], products[kVectors];
      for (int v = 0; v < kVectors; v++) {
        const Floats away = level[v] - level_middle;
        squares[v] = away * away, products[v] = away * w[v];
      }
      const float spread = total(squares);
      next_scale = total(products) / (spread == 0 ? 1 : spread);
      next_offset = middle - next_scale * level_middle;
    }
  }
};

template <class T>
static void quantize_int4(const Quantize& f) {
  const int64_t blocks = divide_up(f.columns, kBlockColumns);
#pragma omp parallel for schedule(static) num_threads(f.threads) if (f.threads > 1)
  for (int64_t row = 0; row < f.rows; row++) {
    const T* from = static_cast<const T*>(f.from) + row * f.columns;
    for (int64_t block = 0; block < blocks; block++) {
      uint16_t words[kGroupColumns] = {};
      for (int j = 0; j < kBlockGroups; j++) {
        alignas(kVectorBytes) float numbers[kGroupColumns];
        for (int64_t i = 0; i < kGroupColumns; i++) {
          const int64_t column = block * kBlockColumns + j * kGroupColumns + i;
          numbers[i] = widen(from[smaller(column, f.columns - 1)]);  // the last again, which widens no group's range
        }
        Group group;
        memcpy(group.w, numbers, sizeof numbers);
        group.fit(f.refits);
        memcpy(numbers, group.q, sizeof numbers);
        for (int64_t i = 0; i < kGroupColumns; i++) words[i] = uint16_t(words[i] | int(numbers[i]) << (4 * j));
        const int64_t at = (row * blocks + block) * kBlockGroups + j;
        static_cast<bfloat16*>(f.scale)[at] = narrow<bfloat16>(group.scale);
        static_cast<bfloat16*>(f.offset)[at] = narrow<bfloat16>(group.offset);
      }
      memcpy(static_cast<uint16_t*>(f.weight) + (row * blocks + block) * kGroupColumns, words, sizeof words);
    }
  }
}

}  // namespace stripedrag::STRIPEDRAG_ISA
