// Causal attention in bfloat16 for processors with AVX-512 BF16: the last L of P + L tokens read all up to themselves.
//
// Blocks of keys are read one after another with a running maximum and sum (Dao et al. 2022, 2205.14135). Each block is
// laid out once for all the queries of a task, which are those of every head that shares the keys, position by position.
// Both products are of pairs of bfloat16 with sums in float32. What a query gets of finite numbers depends on its keys
// alone, in one order: the same bits for any number of threads, and wherever a prompt is split.
#include <immintrin.h>

#include <cmath>

#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {
namespace {

constexpr int kGroup = 6;        // rows of a product that live in registers: 6 by 4 vectors of sums
constexpr int kRows = 8 * kGroup;  // rows whose scores are made together
constexpr int kPanel = 64;       // keys of a product: 4 vectors of scores
constexpr int kKeys = 256;       // keys of a block
constexpr int kTaskNumbers = 768 * 64;  // of a task's queries: with its sums they stay in the second-level cache

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

// A task's memory, one allocation after the other, each on a line: the last ends at `end`.
struct Room {
  float *sums, *scores, *highest, *total, *keep, *end;  // (rows, D), (kRows, kKeys), (rows), (rows), (kRows)
  uint32_t *queries, *keys, *values, *shares;  // (rows, D / 2), panels of (D / 2, 64), columns of (128, 64), (kRows, 128)
  Room(float* at, int64_t rows, int64_t width) : end(at) {
    const auto take = [this](int64_t count) {
      float* begin = end;
      end += divide_up(count, 16) * 16;
      return begin;
    };
    const auto take_pairs = [&](int64_t count) { return reinterpret_cast<uint32_t*>(take(count)); };
    sums = take(rows * width);
    scores = take(kRows * kKeys);
    highest = take(rows);
    total = take(rows);
    keep = take(kRows);
    queries = take_pairs(rows * width / 2);
    keys = take_pairs(kKeys * width / 2);
    values = take_pairs(kKeys * width / 2);
    shares = take_pairs(kRows * kKeys / 2);
  }
};

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

// Panels of 64 keys, in each a pair of channels after another; keys that are not there are zeros.
void lay_out_keys(const uint16_t* k, int64_t stride, int64_t keys, int64_t pairs, uint32_t* to) {
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
void lay_out_values(const uint16_t* v, int64_t stride, int64_t keys, int64_t width, uint32_t* to) {
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

// A row's shares exp(scale · (score - highest)) of the first `seen` of `width` keys, zeros for the others; its maximum and
// sum go on, and `keep` is what its sums so far are still worth.
STRIPEDRAG_INLINE void weigh(const float* scores, int64_t seen, int64_t width, float scale, float* highest, float* total,
                             float* keep, uint32_t* shares) {
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

// What the positions [begin, end) of the heads that share one head of keys read.
void attend(const Attention& f, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, const Room& room) {
  const int64_t heads = f.heads / f.kv_heads, past = f.keys - f.length, pairs = f.width / 2;
  const int64_t rows = (end - begin) * heads, padded = divide_up(rows, kGroup) * kGroup;
  const float scale = float(f.scale * 1.4426950408889634);  // of base 2
  const auto position = [&](int64_t row) { return begin + smaller(row, rows - 1) / heads; };
  const auto query = [&](int64_t row) { return kv_head * heads + row % heads; };

  const auto* q = static_cast<const uint16_t*>(f.q) + batch * f.q_strides[0];
  for (int64_t row = 0; row < padded; row++) {
    const auto* from = q + query(row) * f.q_strides[1] + position(row) * f.q_strides[2];
    if (row < rows) memcpy(room.queries + row * pairs, from, size_t(f.width) * 2);
    else memset(room.queries + row * pairs, 0, size_t(f.width) * 2);
    room.highest[row] = -__FLT_MAX__, room.total[row] = 0;  // so that a score of -inf weighs nothing
  }
  memset(room.sums, 0, size_t(padded * f.width) * sizeof(float));

  const auto* k = static_cast<const uint16_t*>(f.k) + batch * f.k_strides[0] + kv_head * f.k_strides[1];
  const auto* v = static_cast<const uint16_t*>(f.v) + batch * f.v_strides[0] + kv_head * f.v_strides[1];
  for (int64_t first = 0; first < past + end; first += kKeys) {
    const int64_t keys = smaller(kKeys, past + end - first);
    lay_out_keys(k + first * f.k_strides[2], f.k_strides[2], keys, pairs, room.keys);
    lay_out_values(v + first * f.v_strides[2], f.v_strides[2], keys, f.width, room.values);
    const int64_t laid_out = divide_up(keys, kPanel) * kPanel / 2;  // pairs of keys
    for (int64_t row = 0; row < padded; row += kRows) {
      const int64_t some = smaller(kRows, padded - row);
      const auto seen = [&](int64_t at) { return smaller(keys, past + position(row + at) + 1 - first); };
      if (seen(some - 1) <= 0) continue;
      const int64_t panels = divide_up(seen(some - 1), kPanel);
      for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < some; i += kGroup)
          multiply<4, false>(room.queries + (row + i) * pairs, pairs, room.keys + panel * pairs * kPanel, pairs,
                             room.scores + i * kKeys + panel * kPanel, kKeys, nullptr);
      for (int64_t i = 0; i < some; i++)
        weigh(room.scores + i * kKeys, larger(0, seen(i)), panels * kPanel, scale, room.highest + row + i, room.total + row + i,
              room.keep + i, room.shares + i * (kKeys / 2));
      for (int64_t column = 0; column < f.width; column += 64)
        for (int64_t i = 0; i < some; i += kGroup) {
          const uint32_t *shares = room.shares + i * (kKeys / 2), *values = room.values + laid_out * column;
          float* sums = room.sums + (row + i) * f.width + column;
          const int64_t pairs_seen = panels * kPanel / 2;
          switch (smaller(64, f.width - column) / 16) {
            case 1: multiply<1, true>(shares, kKeys / 2, values, pairs_seen, sums, f.width, room.keep + i); break;
            case 2: multiply<2, true>(shares, kKeys / 2, values, pairs_seen, sums, f.width, room.keep + i); break;
            case 3: multiply<3, true>(shares, kKeys / 2, values, pairs_seen, sums, f.width, room.keep + i); break;
            default: multiply<4, true>(shares, kKeys / 2, values, pairs_seen, sums, f.width, room.keep + i);
          }
        }
    }
  }

  for (int64_t row = 0; row < rows; row++) {
    auto* y = static_cast<bfloat16*>(f.y) + ((batch * f.length + position(row)) * f.heads + query(row)) * f.width;
    const Floats share = _mm512_set1_ps(1 / room.total[row]);
    if (f.lse != nullptr)
      f.lse[(batch * f.heads + query(row)) * f.length + position(row)] =
          room.highest[row] * float(f.scale) + std::log(room.total[row]);
    for (int64_t c = 0; c < f.width; c += 16) {
      const Floats mean = _mm512_mul_ps(_mm512_load_ps(room.sums + row * f.width + c), share);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + c), (__m256i)_mm512_cvtneps_pbh(mean));
    }
  }
}

bool run(const Attention& f) {
  const int64_t heads = f.heads / f.kv_heads, sequences = f.batch * f.kv_heads;
  // Tasks of as many positions as the cache takes, and of fewer where there would be too few for the threads.
  int64_t positions = larger(1, kTaskNumbers / (heads * f.width));
  positions = smaller(positions, larger(divide_up(kRows, heads), divide_up(f.length * sequences, 4 * f.threads)));
  const int64_t tasks = divide_up(f.length, positions), rows = divide_up(smaller(positions, f.length) * heads, kGroup) * kGroup;
  const int64_t numbers = Room(nullptr, rows, f.width).end - static_cast<float*>(nullptr);
  Scratch<float> scratch(numbers * f.threads);
  if (!scratch.has_memory()) return false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(f.threads) if (f.threads > 1)
  for (int64_t task = 0; task < tasks * sequences; task++) {
    const int64_t begin = (tasks - 1 - task / sequences) * positions, sequence = task % sequences;  // the longest first
    attend(f, sequence / f.kv_heads, sequence % f.kv_heads, begin, smaller(begin + positions, f.length),
         Room(scratch.begin() + numbers * thread_index(), rows, f.width));
  }
  return true;
}

}  // namespace

extern bool (*const attention)(const Attention&);
bool (*const attention)(const Attention&) = run;

}  // namespace stripedrag::STRIPEDRAG_ISA
