// The gradient of causal attention in bfloat16, for processors with AVX-512 BF16.
//
// A task is a block of keys: its dk and dv are sums that stay in the cache while the blocks of queries that read the keys come
// by, and the scores of each are made again (Dao et al. 2022, 2205.14135). These stand with queries side by side: what
// belongs to a query is a lane, and both layouts in which products take the gradient of scores come without a transposition.
//
// dq is a sum over tasks, which take their turns at each block of queries in the order of the keys: the same bits for any
// number of threads. Tasks are begun in that order too, so none waits for one that is not on its way.
#include <sched.h>

#include "pairs.h"

namespace stripedrag::STRIPEDRAG_ISA {
namespace {

constexpr int64_t kBlock = 192, kBlockPairs = kBlock / 2;  // of keys, or of queries
static_assert(kBlock % kPanel == 0 && kBlock % kGroup == 0, "a block is of whole panels and groups");

// A thread's memory.
struct GradientRoom : Parts {
  float *scores, *upstream, *dk, *dv, *lse, *delta;  // twice (block, panel), twice (block, D), twice (block)
  uint32_t *keys, *values, *key_channels;            // twice (block, D / 2), (D to whole groups, block / 2)
  uint32_t *q_by_channels, *dy_by_channels;          // panels of (D / 2, queries)
  uint32_t *q_by_rows, *dy_by_rows;                  // panels of (queries / 2, D)
  uint32_t *shares, *changes, *changes_by_keys;      // twice (keys, queries / 2), panels of (keys / 2, queries)
  GradientRoom(float* at, int64_t width) : Parts{at} {
    const int64_t numbers = kBlock * width, scores_pairs = kBlock * kBlockPairs;
    scores = take(kBlock * kPanel), upstream = take(kBlock * kPanel);
    dk = take(numbers), dv = take(numbers);
    lse = take(kBlock), delta = take(kBlock);
    keys = take<uint32_t>(numbers / 2), values = take<uint32_t>(numbers / 2);
    key_channels = take<uint32_t>(divide_up(width, kGroup) * kGroup * kBlockPairs);
    q_by_channels = take<uint32_t>(numbers / 2), dy_by_channels = take<uint32_t>(numbers / 2);
    q_by_rows = take<uint32_t>(numbers / 2), dy_by_rows = take<uint32_t>(numbers / 2);
    shares = take<uint32_t>(scores_pairs), changes = take<uint32_t>(scores_pairs), changes_by_keys = take<uint32_t>(scores_pairs);
  }
};

// Whose turn it is at some places; it is 0's first.
class Turns {
 public:
  explicit Turns(int64_t count) : at_(count) {
    if (has_memory()) memset(at_.begin(), 0, size_t(count) * sizeof(int64_t));
  }
  bool has_memory() const { return at_.has_memory(); }
  void wait(int64_t place, int64_t turn) const {
    for (int spins = 0; __atomic_load_n(at_.begin() + place, __ATOMIC_ACQUIRE) != turn;) {
      if (spins < 1000) spins++, _mm_pause();
      else sched_yield();
    }
  }
  void end(int64_t place, int64_t turn) const { __atomic_store_n(at_.begin() + place, turn + 1, __ATOMIC_RELEASE); }

 private:
  Scratch<int64_t> at_;
};

STRIPEDRAG_INLINE const bfloat16* head_of(const void* x, const int64_t (&strides)[3], int64_t batch, int64_t head, int64_t position) {
  return static_cast<const bfloat16*>(x) + batch * strides[0] + head * strides[1] + position * strides[2];
}

class AttentionBackward {
 public:
  explicit AttentionBackward(const AttentionGradient& f)
      : g_(f), f_(f.attention), heads_(f_.heads / f_.kv_heads), depth_(f_.width / 2), blocks_(divide_up(f_.length, kBlock)),
        sequences_(f_.batch * f_.kv_heads), padded_width_(divide_up(f_.width, kGroup) * kGroup),
        slots_(smaller(2, sequences_)), room_numbers_(GradientRoom(nullptr, f_.width).end - static_cast<float*>(nullptr)),
        delta_(f_.batch * f_.heads * f_.length), dq_(slots_ * blocks_ * heads_ * padded_width_ * kBlock),
        rooms_(room_numbers_ * f_.threads), turns_(slots_ * blocks_ * heads_) {}

  bool run() {
    if (!delta_.has_memory() || !dq_.has_memory() || !rooms_.has_memory() || !turns_.has_memory()) return false;
    const int64_t rows = f_.batch * f_.heads * f_.length;
#pragma omp parallel for schedule(static) num_threads(f_.threads) if (f_.threads > 1)
    for (int64_t row = 0; row < rows; row++) delta_.begin()[row] = delta_of(row);
    int64_t next = 0;
#pragma omp parallel num_threads(f_.threads) if (f_.threads > 1)
    {
      const GradientRoom room(rooms_.begin() + room_numbers_ * thread_index(), f_.width);
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < sequences_ * blocks_;)
        run_task(task / blocks_, task % blocks_, room);
    }
    return true;
  }

 private:
  // Σ dy y of a row of (B, heads, L).
  float delta_of(int64_t row) const {
    const int64_t position = row % f_.length, head = row / f_.length % f_.heads, batch = row / f_.length / f_.heads;
    const bfloat16* dy = head_of(g_.dy, g_.dy_strides, batch, head, position);
    const auto* y = static_cast<const bfloat16*>(f_.y) + ((batch * f_.length + position) * f_.heads + head) * f_.width;
    const auto load = [](const bfloat16* x) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
      return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    };
    Floats sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < f_.width; c += 16) sum = _mm512_fmadd_ps(load(dy + c), load(y + c), sum);
    return _mm512_reduce_add_ps(sum);
  }

  // A block of keys of a sequence, and all blocks of queries from its own on.
  void run_task(int64_t sequence, int64_t block, const GradientRoom& room) const {
    const int64_t batch = sequence / f_.kv_heads, kv_head = sequence % f_.kv_heads, first = block * kBlock;
    const int64_t keys = smaller(kBlock, f_.length - first);
    lay_out_block(batch, kv_head, first, keys, room);
    memset(room.dk, 0, size_t(kBlock * f_.width) * sizeof(float));
    memset(room.dv, 0, size_t(kBlock * f_.width) * sizeof(float));
    for (int64_t i = block; i < blocks_; i++)
      for (int64_t head = 0; head < heads_; head++) {
        add_to_keys(batch, kv_head * heads_ + head, first, keys, i * kBlock, room);
        const int64_t place = (sequence % slots_ * blocks_ + i) * heads_ + head;
        const int64_t turn = sequence / slots_ * (i + 1) + block;  // a block of queries has i + 1 turns in each sequence
        float* dq = dq_.begin() + place * padded_width_ * kBlock;
        turns_.wait(place, turn);
        add_to_queries(first, keys, i * kBlock, dq, room);
        if (i == block) write_dq(batch, kv_head * heads_ + head, first, keys, dq);
        turns_.end(place, turn);
      }
    for (int64_t key = 0; key < keys; key++) {
      const int64_t at = ((batch * f_.length + first + key) * f_.kv_heads + kv_head) * f_.width;
      write_row(room.dk + key * f_.width, float(f_.scale), f_.width, static_cast<bfloat16*>(g_.dk) + at);
      write_row(room.dv + key * f_.width, 1, f_.width, static_cast<bfloat16*>(g_.dv) + at);
    }
  }

  // Keys and values row by row, and keys channel by channel; what is not there is zeros.
  void lay_out_block(int64_t batch, int64_t kv_head, int64_t first, int64_t keys, const GradientRoom& room) const {
    const bfloat16* k = head_of(f_.k, f_.k_strides, batch, kv_head, first);
    const bfloat16* v = head_of(f_.v, f_.v_strides, batch, kv_head, first);
    for (int64_t key = 0; key < kBlock; key++) {
      lay_out_row(key < keys ? k + key * f_.k_strides[2] : nullptr, f_.width, room.keys + key * depth_);
      lay_out_row(key < keys ? v + key * f_.v_strides[2] : nullptr, f_.width, room.values + key * depth_);
    }
    for (int64_t channel = 0; channel < f_.width; channel += 16)
      for (int64_t pair = 0; pair < kBlockPairs; pair += 16) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++) rows[i] = pairs_of_rows(k, f_.k_strides[2], keys, 2 * (pair + i), channel);
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(room.key_channels + (channel + i) * kBlockPairs + pair, rows[i]);
      }
    const int64_t there = f_.width * kBlockPairs;
    memset(room.key_channels + there, 0, size_t(padded_width_ * kBlockPairs - there) * sizeof(uint32_t));
  }

  // How many keys from `first` on the panel of queries from `query` on reads, to whole groups.
  int64_t seen_by(int64_t query, int64_t first, int64_t keys) const {
    return divide_up(smaller(keys, smaller(query + kPanel, f_.length) - first), kGroup) * kGroup;
  }

  // What a head's queries from `query` on, a block of them or the last, add to dk and dv of the keys from `first` on. The
  // gradient of the scores stays in the room.
  void add_to_keys(int64_t batch, int64_t head, int64_t first, int64_t keys, int64_t query, const GradientRoom& room) const {
    const int64_t rows = smaller(kBlock, f_.length - query);
    const bfloat16* q = head_of(f_.q, f_.q_strides, batch, head, query);
    const bfloat16* dy = head_of(g_.dy, g_.dy_strides, batch, head, query);
    lay_out_by_channels(q, f_.q_strides[2], rows, f_.width, room.q_by_channels);
    lay_out_by_channels(dy, g_.dy_strides[2], rows, f_.width, room.dy_by_channels);
    lay_out_by_rows(q, f_.q_strides[2], rows, f_.width, room.q_by_rows);
    lay_out_by_rows(dy, g_.dy_strides[2], rows, f_.width, room.dy_by_rows);
    const int64_t at = (batch * f_.heads + head) * f_.length + query, panels = divide_up(rows, kPanel);
    for (int64_t row = 0; row < panels * kPanel; row++) {
      room.lse[row] = row < rows ? f_.lse[at + row] * float(kLog2E) : 0;
      room.delta[row] = row < rows ? delta_.begin()[at + row] : 0;
    }

    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t begin = panel * kPanel, some = smaller(kPanel, rows - begin);
      const int64_t seen = seen_by(query + begin, first, keys);
      const uint32_t *q_panel = room.q_by_channels + begin * depth_, *dy_panel = room.dy_by_channels + begin * depth_;
      for (int64_t key = 0; key < seen; key += kGroup)
        multiply<4, Begin::nothing>(room.keys + key * depth_, depth_, q_panel, depth_, room.scores + key * kPanel, kPanel);
      for (int64_t key = 0; key < seen; key += kGroup)
        multiply<4, Begin::nothing>(room.values + key * depth_, depth_, dy_panel, depth_, room.upstream + key * kPanel, kPanel);
      const bool is_whole = some == kPanel && first + keys <= query + begin + 1 && seen == keys;
      if (is_whole) weigh<false>(begin, seen, 0, some, keys, room);
      else weigh<true>(begin, seen, query + begin - first, some, keys, room);
    }

    const int64_t row_pairs = panels * kPanel / 2;
    for (int64_t column = 0; column < f_.width; column += kPanel)
      by_count<4>(smaller(kPanel, f_.width - column) / 16, [&](auto n) {
        constexpr int kVectors = decltype(n)::value;
        const auto add = [&](const uint32_t* scores, const uint32_t* by_rows, float* sums) {
          for (int64_t key = 0; key < divide_up(keys, kGroup) * kGroup; key += kGroup) {
            // Where the queries are those of the block itself, panels of them before these keys' read none of these.
            const int64_t skip = query == first ? key / kPanel * kPanel / 2 : 0;
            multiply<kVectors, Begin::sums>(scores + key * kBlockPairs + skip, kBlockPairs,
                                            by_rows + row_pairs * column + skip * 16 * kVectors, row_pairs - skip,
                                            sums + key * f_.width + column, f_.width);
          }
        };
        add(room.shares, room.dy_by_rows, room.dv);
        add(room.changes, room.q_by_rows, room.dk);
      });
  }

  // What the keys add to the dq (D to whole groups, block) of the queries that `add_to_keys` had.
  void add_to_queries(int64_t first, int64_t keys, int64_t query, float* dq, const GradientRoom& room) const {
    for (int64_t begin = 0; begin < smaller(kBlock, f_.length - query); begin += kPanel) {
      const int64_t pairs = seen_by(query + begin, first, keys) / 2;
      for (int64_t channel = 0; channel < padded_width_; channel += kGroup) {
        const uint32_t *a = room.key_channels + channel * kBlockPairs, *b = room.changes_by_keys + begin * kBlockPairs;
        float* sums = dq + channel * kBlock + begin;
        if (first == 0) multiply<4, Begin::nothing>(a, kBlockPairs, b, pairs, sums, kBlock);
        else multiply<4, Begin::sums>(a, kBlockPairs, b, pairs, sums, kBlock);
      }
    }
  }

  // Of a panel's scores and of the gradient of its shares: the shares exp(scale · score - lse), and the gradient of the
  // scores, shares · (upstream - delta). Where it is `masked`, key i is read by the queries from i - `ahead` on, and there are
  // so many keys and `rows`: the others are zeros whatever stood there.
  template <bool masked>
  void weigh(int64_t begin, int64_t seen, int64_t ahead, int64_t rows, int64_t keys, const GradientRoom& room) const {
    const Floats scale = _mm512_set1_ps(float(f_.scale * kLog2E));
    for (int64_t key = 0; key < seen; key += 2)
      for (int64_t column = 0; column < kPanel; column += 32) {
        __m512i shares[2], changes[2];
        for (int i = 0; i < 2; i++) {
          Floats share[2], change[2];
          for (int half = 0; half < 2; half++) {
            const int64_t lane = column + 16 * half, at = (key + i) * kPanel + lane;
            const Floats score = _mm512_load_ps(room.scores + at), upstream = _mm512_load_ps(room.upstream + at);
            share[half] = power_of_two(_mm512_fmsub_ps(score, scale, _mm512_load_ps(room.lse + begin + lane)));
            change[half] = _mm512_mul_ps(share[half], _mm512_sub_ps(upstream, _mm512_load_ps(room.delta + begin + lane)));
            if constexpr (masked) {
              const int64_t from = larger(0, smaller(16, key + i - ahead - lane)), to = larger(0, smaller(16, rows - lane));
              const __mmask16 there = __mmask16(key + i < keys ? ((1u << to) - 1) & ~((1u << from) - 1) : 0);
              share[half] = _mm512_maskz_mov_ps(there, share[half]);
              change[half] = _mm512_maskz_mov_ps(there, change[half]);
            }
          }
          shares[i] = (__m512i)_mm512_cvtne2ps_pbh(share[1], share[0]);
          changes[i] = (__m512i)_mm512_cvtne2ps_pbh(change[1], change[0]);
          const int64_t place = (key + i) * kBlockPairs + (begin + column) / 2;
          _mm512_store_si512(room.shares + place, shares[i]);
          _mm512_store_si512(room.changes + place, changes[i]);
        }
        uint32_t* by_keys = room.changes_by_keys + begin * kBlockPairs + key / 2 * kPanel + column;
        const auto wide = [](__m256i x) { return _mm512_cvtepu16_epi32(x); };
        const __m512i low[2] = {wide(_mm512_castsi512_si256(changes[0])), wide(_mm512_extracti64x4_epi64(changes[0], 1))};
        const __m512i high[2] = {wide(_mm512_castsi512_si256(changes[1])), wide(_mm512_extracti64x4_epi64(changes[1], 1))};
        for (int half = 0; half < 2; half++)
          _mm512_store_si512(by_keys + 16 * half, _mm512_or_si512(low[half], _mm512_slli_epi32(high[half], 16)));
      }
  }

  void write_dq(int64_t batch, int64_t head, int64_t query, int64_t rows, const float* dq) const {
    alignas(64) float block[16][16];
    for (int64_t row = 0; row < rows; row += 16)
      for (int64_t channel = 0; channel < f_.width; channel += 16) {
        __m512i columns[16];
        for (int i = 0; i < 16; i++) columns[i] = _mm512_load_si512(dq + (channel + i) * kBlock + row);
        transpose(columns);
        for (int i = 0; i < 16; i++) _mm512_store_si512(block[i], columns[i]);
        for (int64_t i = 0; i < smaller(16, rows - row); i++) {
          const int64_t at = ((batch * f_.length + query + row + i) * f_.heads + head) * f_.width + channel;
          write_row(block[i], float(f_.scale), 16, static_cast<bfloat16*>(g_.dq) + at);
        }
      }
  }

  const AttentionGradient& g_;
  const Attention& f_;
  const int64_t heads_, depth_, blocks_, sequences_, padded_width_, slots_, room_numbers_;
  Scratch<float> delta_, dq_, rooms_;
  Turns turns_;
};

bool run_gradient(const AttentionGradient& f) { return AttentionBackward(f).run(); }

}  // namespace

extern bool (*const attention_gradient_bf16)(const AttentionGradient&);
bool (*const attention_gradient_bf16)(const AttentionGradient&) = run_gradient;

}  // namespace stripedrag::STRIPEDRAG_ISA
