// Causal attention: the last L of P + L tokens read all up to themselves.
//
// Blocks of keys are read one after another with a running maximum and sum (Dao et al. 2022, 2205.14135). Each block is
// laid out once for all the queries of a task, which are those of every head that shares the keys, position by position.
// Sums are float32. What a query gets of finite numbers depends on its keys alone, in one order: the same bits for any
// number of threads, and wherever a prompt is split.
//
// A processor's products are a struct P: Element (of q, k, v and y), Number (of what products take, which holds kPacked
// channels or keys), kGroup rows whose sums live in registers, kPanel keys or channels of a product, and the functions that
// are called here.
#pragma once
#include "product.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int64_t kBlockKeys = 256;
constexpr int64_t kTaskNumbers = 768 * 64;  // of a task's queries: with their sums they stay in the second-level cache
template <class P>
constexpr int64_t kRowsTogether = 8 * P::kGroup;  // whose scores are made together

// A task's memory.
template <class P>
struct Room : Parts {
  using Number = typename P::Number;
  float *sums, *scores, *highest, *total, *keep;  // (rows, D), (together, block), (rows), (rows), (together)
  Number *queries, *keys, *values;                // (rows, D), panels of (D, kPanel), columns of (block, kPanel)
  Number* shares;                                 // (together, block)
  Room(float* at, int64_t rows, int64_t width) : Parts{at} {
    const auto take_packed = [this](int64_t count) { return take<Number>(count / P::kPacked); };
    sums = take(rows * width);
    scores = take(kRowsTogether<P> * kBlockKeys);
    highest = take(rows);
    total = take(rows);
    keep = take(kRowsTogether<P>);
    queries = take_packed(rows * width);
    keys = take_packed(kBlockKeys * width);
    values = take_packed(kBlockKeys * width);
    shares = take_packed(kRowsTogether<P> * kBlockKeys);
  }
};

// What the positions [begin, end) of the heads that share one head of keys read.
template <class P>
static void attend_task(const Attention& f, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, const Room<P>& room) {
  using Element = typename P::Element;
  using Number = typename P::Number;
  constexpr int64_t kRows = kRowsTogether<P>, kPanel = P::kPanel, kPacked = P::kPacked;
  const int64_t heads = f.heads / f.kv_heads, past = f.keys - f.length, depth = f.width / kPacked;
  const int64_t rows = (end - begin) * heads, padded = divide_up(rows, P::kGroup) * P::kGroup;
  const float scale = float(f.scale * kLog2E);  // of base 2
  const auto position = [&](int64_t row) { return begin + smaller(row, rows - 1) / heads; };
  const auto query = [&](int64_t row) { return kv_head * heads + row % heads; };

  const auto* q = static_cast<const Element*>(f.q) + batch * f.q_strides[0];
  for (int64_t row = 0; row < padded; row++) {
    const auto* from = row < rows ? q + query(row) * f.q_strides[1] + position(row) * f.q_strides[2] : nullptr;
    P::lay_out_query(from, f.width, room.queries + row * depth);
    room.highest[row] = -__FLT_MAX__, room.total[row] = 0;  // so that a score of -inf weighs nothing
  }
  memset(room.sums, 0, size_t(padded * f.width) * sizeof(float));

  const auto* k = static_cast<const Element*>(f.k) + batch * f.k_strides[0] + kv_head * f.k_strides[1];
  const auto* v = static_cast<const Element*>(f.v) + batch * f.v_strides[0] + kv_head * f.v_strides[1];
  for (int64_t first = 0; first < past + end; first += kBlockKeys) {
    const int64_t keys = smaller(kBlockKeys, past + end - first);
    P::lay_out_keys(k + first * f.k_strides[2], f.k_strides[2], keys, f.width, room.keys);
    P::lay_out_values(v + first * f.v_strides[2], f.v_strides[2], keys, f.width, room.values);
    const int64_t laid_out = divide_up(keys, kPanel) * kPanel / kPacked;  // rows of a column of values
    for (int64_t row = 0; row < padded; row += kRows) {
      const int64_t some = smaller(kRows, padded - row);
      const auto seen = [&](int64_t at) { return smaller(keys, past + position(row + at) + 1 - first); };
      if (seen(some - 1) <= 0) continue;
      const int64_t width = divide_up(seen(some - 1), kPanel) * kPanel;
      for (int64_t key = 0; key < width; key += kPanel)
        for (int64_t i = 0; i < some; i += P::kGroup)
          P::score(room.queries + (row + i) * depth, depth, room.keys + key * depth, room.scores + i * kBlockKeys + key, kBlockKeys);
      for (int64_t i = 0; i < some; i++)
        P::weigh(room.scores + i * kBlockKeys, larger(0, seen(i)), width, scale, room.highest + row + i, room.total + row + i,
                 room.keep + i, room.shares + i * (kBlockKeys / kPacked));
      for (int64_t column = 0; column < f.width; column += kPanel)
        for (int64_t i = 0; i < some; i += P::kGroup) {
          const Number *shares = room.shares + i * (kBlockKeys / kPacked), *values = room.values + laid_out * column;
          float* sums = room.sums + (row + i) * f.width + column;
          P::mix(shares, kBlockKeys / kPacked, values, width / kPacked, smaller(kPanel, f.width - column), sums, f.width, room.keep + i);
        }
    }
  }

  for (int64_t row = 0; row < rows; row++) {
    if (f.lse != nullptr)
      f.lse[(batch * f.heads + query(row)) * f.length + position(row)] =
          room.highest[row] * float(f.scale) + __builtin_logf(room.total[row]);
    auto* y = static_cast<Element*>(f.y) + ((batch * f.length + position(row)) * f.heads + query(row)) * f.width;
    P::write(room.sums + row * f.width, 1 / room.total[row], f.width, y);
  }
}

template <class P>
static bool attention(const Attention& f) {
  const int64_t heads = f.heads / f.kv_heads, sequences = f.batch * f.kv_heads;
  // Tasks of as many positions as the cache takes, and of fewer where there would be too few for the threads.
  int64_t positions = larger(1, kTaskNumbers / (heads * f.width));
  positions = smaller(positions, larger(divide_up(kRowsTogether<P>, heads), divide_up(f.length * sequences, 4 * f.threads)));
  const int64_t tasks = divide_up(f.length, positions);
  const int64_t rows = divide_up(smaller(positions, f.length) * heads, P::kGroup) * P::kGroup;
  const int64_t numbers = Room<P>(nullptr, rows, f.width).end - static_cast<float*>(nullptr);
  Scratch<float> scratch(numbers * f.threads);
  if (!scratch.has_memory()) return false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(f.threads) if (f.threads > 1)
  for (int64_t task = 0; task < tasks * sequences; task++) {
    const int64_t begin = (tasks - 1 - task / sequences) * positions, sequence = task % sequences;  // the longest first
    attend_task<P>(f, sequence / f.kv_heads, sequence % f.kv_heads, begin, smaller(begin + positions, f.length),
                   Room<P>(scratch.begin() + numbers * thread_index(), rows, f.width));
  }
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
