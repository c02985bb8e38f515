// The operator over a sequence. A tile of rows of one vector of channels at a time: in one loop down the rows the three
// FIRs, u = x1 v, the gate x2 and the first two modes, then in loops of their own the other modes, up to four together
// in registers; at the end the rows of y.
//
//   s_t = p s_{t-1} + u_t      y_t = x2_t (Re Σ_n R_n s_{t,n} + D u_t)
//
// The recurrence is taken as it stands, a complex number as two vectors (four fused multiply-adds), since any form with
// fewer rounds a coefficient of the pole, which is wrong by time constant times 6e-8. A channel is computed alone and in
// one order, so results depend neither on the threads nor on where a sequence is split.
#pragma once
#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {

// `kModes` modes of one half of a pair, in registers.
template <class W, int kModes>
struct Modes {
  using V = Vector<W>;
  V pr[kModes], pi[kModes], rr[kModes], ri[kModes], sr[kModes], si[kModes];

  STRIPEDRAG_INLINE_MEMBER Modes(const Record<W>& r, int first, int half) {
    for (int m = 0, i = 2 * first; m < kModes; m++, i += 2) {
      pr[m] = r.poles[i].half[half], pi[m] = r.poles[i + 1].half[half];
      rr[m] = r.residues[i].half[half], ri[m] = r.residues[i + 1].half[half];
      sr[m] = r.state[i].half[half], si[m] = r.state[i + 1].half[half];
    }
  }
  // The state moves on by one token; `sum` and the modes' Re R s, added in two chains.
  STRIPEDRAG_INLINE_MEMBER V advance(V u, V sum) {
    V imaginary = {};
#pragma GCC unroll 4
    for (int m = 0; m < kModes; m++) {
      const V re = pr[m] * sr[m] + (u - pi[m] * si[m]);
      const V im = pr[m] * si[m] + pi[m] * sr[m];
      sr[m] = re, si[m] = im;
      sum += rr[m] * re;
      imaginary = m == 0 ? ri[m] * im : imaginary + ri[m] * im;
    }
    return sum - imaginary;
  }
  STRIPEDRAG_INLINE_MEMBER void keep(const Record<W>& r, int first, int half) const {
    for (int m = 0, i = 2 * first; m < kModes; m++, i += 2) r.state[i].half[half] = sr[m], r.state[i + 1].half[half] = si[m];
  }
};

// A tile of one pair: where its rows are, and how fast the next tile is fetched meanwhile (Walk::tick).
template <class T>
struct FilterTile {
  const T* z[3];
  T* y;
  int64_t z_row_stride, y_row_stride;
  const uint8_t* real;
  int rows, valid, modes;
  bool streams;  // y passes the cache
  int pace_of_firs, pace_of_a_mode;
};

// The FIRs and the first modes of one half of a pair: emit(row, gate, u, sum). A padded row counts as zeros, and so do its
// FIRs' outputs.
template <class T, int K, int kModes, class Emit>
STRIPEDRAG_INLINE void first_scan(const FilterTile<T>& tile, const Record<Work<T>>& r, int half, Walk& ahead,
                                  Emit emit) {
  using W = Work<T>;
  using V = Vector<W>;
  V weight[3][K], bias[3], past[3][K];
  for (int s = 0; s < 3; s++) {
    bias[s] = r.fir_bias[s].half[half];
    for (int k = 0; k < K; k++) weight[s][k] = r.fir_weight[s * K + k].half[half];
    for (int k = 0; k + 1 < K; k++) past[s][k] = r.history[s * (K - 1) + k].half[half];
  }
  const V skip = r.skip->half[half];
  Modes<W, kModes> modes(r, 0, half);
  const int pace = tile.pace_of_firs + kModes * tile.pace_of_a_mode;
  const auto run = [&](auto read, bool check) __attribute__((always_inline)) {
    Walk walk = ahead;
    for (int t = 0; t < tile.rows; t++) {
      const bool pad = check && !tile.real[t];
      V c[3];
      walk.tick(pace);
      for (int s = 0; s < 3; s++) {
        past[s][K - 1] = pad ? V{} : read(tile.z[s] + t * tile.z_row_stride);
        c[s] = bias[s];
        for (int k = 0; k < K; k++) c[s] += weight[s][k] * past[s][k];
        for (int k = 0; k + 1 < K; k++) past[s][k] = past[s][k + 1];
        if (pad) c[s] = V{};
      }
      const V u = c[1] * c[2];
      emit(t, c[0], u, modes.advance(u, skip * u));
    }
    ahead = walk;
  };
  if (tile.valid == kPair<T> && tile.real == nullptr) run([&](const T* p) { return load_half(p, half); }, false);
  else run([&](const T* p) { return load(p, tile.valid).half[half]; }, tile.real != nullptr);
  modes.keep(r, 0, half);
  for (int s = 0; s < 3; s++)
    for (int k = 0; k + 1 < K; k++) r.history[s * (K - 1) + k].half[half] = past[s][k];
}

// What is kept of a half between its groups of modes.
template <class W>
struct Between {
  Vector<W> gate[kCheckpointTokens], u[kCheckpointTokens], sum[kCheckpointTokens];
};

// Further modes of one half of a pair: emit(row, sum).
template <class T, int kModes, class Emit>
STRIPEDRAG_INLINE void next_scan(const FilterTile<T>& tile, const Record<Work<T>>& r, int first, int half,
                                 const Between<Work<T>>& kept, Walk& ahead, Emit emit) {
  Modes<Work<T>, kModes> modes(r, first, half);
  const int pace = kModes * tile.pace_of_a_mode;
  Walk walk = ahead;
  for (int t = 0; t < tile.rows; t++) {
    walk.tick(pace);
    emit(t, modes.advance(kept.u[t], kept.sum[t]));
  }
  ahead = walk;
  modes.keep(r, first, half);
}

// The rows of y of one half of a pair, into `y`.
template <class T, int K>
STRIPEDRAG_INLINE void filter_half(const FilterTile<T>& tile, const Record<Work<T>>& r, int half, Walk& ahead,
                                   Vector<Work<T>>* y) {
  using V = Vector<Work<T>>;
  Between<Work<T>> kept;
  int done = tile.modes >= 2 ? 2 : 1;
  const auto start = [&](auto emit) __attribute__((always_inline)) {
    if (done == 2) first_scan<T, K, 2>(tile, r, half, ahead, emit);
    else first_scan<T, K, 1>(tile, r, half, ahead, emit);
  };
  if (done == tile.modes) return start([&](int t, V gate, V, V sum) { y[t] = gate * sum; });
  start([&](int t, V gate, V u, V sum) { kept.gate[t] = gate, kept.u[t] = u, kept.sum[t] = sum; });
  while (done < tile.modes) {
    const int first = done, left = tile.modes - done, group = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    done += group;
    const auto go_on = [&](auto emit) __attribute__((always_inline)) {
      if (group == 4) next_scan<T, 4>(tile, r, first, half, kept, ahead, emit);
      else if (group == 2) next_scan<T, 2>(tile, r, first, half, kept, ahead, emit);
      else next_scan<T, 1>(tile, r, first, half, kept, ahead, emit);
    };
    if (done < tile.modes) go_on([&](int t, V sum) { kept.sum[t] = sum; });
    else go_on([&](int t, V sum) { y[t] = kept.gate[t] * sum; });
  }
}

template <class T, int K>
static void filter_tile(const FilterTile<T>& tile, const Record<Work<T>>& r, Walk& ahead) {
  Vector<Work<T>> y[2][kCheckpointTokens];
  for (int half = 0; half < 2; half++) filter_half<T, K>(tile, r, half, ahead, y[half]);
  for (int t = 0; t < tile.rows; t++) {
    T* row = tile.y + t * tile.y_row_stride;
    const Pair<Work<T>> both = {{y[0][t], y[1][t]}};
    if (tile.streams) stream(row, both);
    else store(row, both, tile.valid);
  }
}

// How y is written: as it comes; as it comes, past the cache; or a tile at a time, past the cache and row by row, which
// memory takes faster than lines that lie rows apart, where there is too little arithmetic to hide the difference.
enum class Writing { direct, streamed, staged };
constexpr int kFewModes = 4;  // two were faster staged and eight were not; between them nothing was measured

// Pairs [begin, end) of one sequence, from its first row to its last. `stage` has room for a tile of y.
template <class T>
static void filter_block(const Filter& f, const Layout& layout, int64_t tile_rows, Writing writing, int64_t batch,
                         int64_t begin, int64_t end, Pair<Work<T>>* scratch, T* stage) {
  using W = Work<T>;
  const Shape& shape = f.shape;
  const Sequence& in = f.sequence;
  const int before = shape.taps - 1;
  const int64_t record_pairs = Record<W>::pairs(shape), length = shape.length;
  const auto record = [&](int64_t pair) { return Record<W>(scratch + (pair - begin) * record_pairs, shape); };
  for (int64_t pair = begin; pair < end; pair++) {
    gather_parameters<T>(shape, f.parameters, layout, pair, record(pair));
    gather_history<T>(shape, in.fir_state, layout, batch, pair, record(pair).history);
    gather_modes<T>(shape, in.iir_state, layout, batch, pair, record(pair).state);
  }
  const T* z = static_cast<const T*>(in.z) + batch * in.z_batch_stride;
  T* y = static_cast<T*>(f.y) + batch * f.y_batch_stride + layout.channel(begin);
  const uint8_t* real = in.real == nullptr ? nullptr : in.real + batch * length;
  const int taps = padded_taps(shape), padding = taps - shape.taps;
  const bool staged = writing == Writing::staged;
  const auto run = taps == kUsualTaps ? filter_tile<T, kUsualTaps> : filter_tile<T, kMaxTaps>;
  const int64_t stage_stride = (end - begin + 1) * kPair<T>;  // one more: rows a power of two apart share the cache's sets
  // The next tile's lines are asked for in step with the arithmetic of this one: so many a row, by the share of the
  // multiply-adds.
  const int pace = 256 * 3 * kPair<T> * int(sizeof(T)) / kLineBytes / 2;  // of a half's row
  const int adds = 3 * (taps + 1) + 6 * shape.modes;
  for (int64_t t = 0; t < length; t += tile_rows) {
    FilterTile<T> tile;
    tile.rows = int(smaller(tile_rows, length - t)), tile.modes = shape.modes;
    tile.streams = writing == Writing::streamed;
    tile.z_row_stride = in.z_row_stride, tile.y_row_stride = staged ? stage_stride : f.y_row_stride;
    tile.real = real == nullptr ? nullptr : real + t;
    const int64_t next = t + tile_rows, next_rows = smaller(tile_rows, length - next);
    const bool more = next_rows > 0;
    Walk ahead;
    if (more) ahead = Walk(columns_of(layout, z + next * in.z_row_stride, next_rows, in.z_row_stride, begin, end));
    tile.pace_of_firs = more ? pace * 3 * (taps + 1) / adds + 1 : 0;
    tile.pace_of_a_mode = more ? pace * 6 / adds + 1 : 0;
    T* rows_of_y = staged ? stage : y + t * f.y_row_stride;
    for (int64_t pair = begin; pair < end; pair++) {
      const Record<W> r = record(pair);
      if (f.checkpoints != nullptr && t % kCheckpointTokens == 0) {
        const int64_t tiles = divide_up(length, kCheckpointTokens), width = 2 * shape.modes;
        Pair<W>* kept = static_cast<Pair<W>*>(f.checkpoints) +
                        ((batch * tiles + t / kCheckpointTokens) * layout.pairs + pair) * width;
        for (int i = 0; i < width; i++)
          for (int half = 0; half < 2; half++) stream_vector(&kept[i].half[half], (Bits)r.state[i].half[half]);
      }
      for (int s = 0; s < 3; s++) tile.z[s] = z + t * in.z_row_stride + layout.column(pair, s);
      tile.y = rows_of_y + layout.channel(pair) - layout.channel(begin);
      tile.valid = layout.valid(pair);
      run(tile, r, ahead);
    }
    if (staged)
      for (int row = 0; row < tile.rows; row++)
        for (int64_t c = 0; c < (end - begin) * kPair<T>; c += kVectorBytes / int64_t(sizeof(T)))
          stream_vector(y + (t + row) * f.y_row_stride + c,
                        *reinterpret_cast<const LooseBits*>(stage + row * stage_stride + c));
  }
  for (int64_t pair = begin; pair < end; pair++) {
    const Record<W> r = record(pair);
    scatter_modes<T>(shape, r.state, layout, batch, pair, f.iir_state_out);
    for (int s = 0; s < 3; s++)
      for (int k = 0; k < before; k++) {
        T* to = static_cast<T*>(f.fir_state_out) + (batch * 3 * shape.channels + layout.column(pair, s)) * before + k;
        scatter<T>(r.history[s * (taps - 1) + padding + k], layout.valid(pair),
                   [&](int c, W x) { to[c * before] = narrow<T>(x); });
      }
  }
  end_of_streams();
}

template <class T>
static bool filter(const Filter& f) {
  using W = Work<T>;
  const Shape& shape = f.shape;
  const Layout layout(shape, kPair<T>);
  const Cut cut(shape, layout, sizeof(T), 16);
  const int64_t most_pairs = divide_up(layout.pairs, cut.blocks);
  const int64_t records = most_pairs * Record<W>::pairs(shape), stride = records + cut.tile_rows * (most_pairs + 1);
  Scratch<Pair<W>> scratch(shape.threads * stride);
  if (!scratch.has_memory()) return false;
  // Over z itself the lines are in the cache already.
  const int64_t bytes = sizeof(T), y_bytes = shape.batch * shape.length * shape.channels * bytes;
  const bool streams = f.y != f.sequence.z && f.y_row_stride * bytes % kLineBytes == 0 &&
                       f.y_batch_stride * bytes % kLineBytes == 0 && can_stream<T>(f.y, shape.head_width, y_bytes);
  const Writing writing = !streams ? Writing::direct : shape.modes <= kFewModes ? Writing::staged : Writing::streamed;
#pragma omp parallel for collapse(2) schedule(static) num_threads(shape.threads)
  for (int64_t batch = 0; batch < shape.batch; batch++)
    for (int64_t block = 0; block < cut.blocks; block++) {
      Pair<W>* own = scratch.begin() + thread_index() * stride;
      filter_block<T>(f, layout, cut.tile_rows, writing, batch, layout.pairs * block / cut.blocks,
                      layout.pairs * (block + 1) / cut.blocks, own, reinterpret_cast<T*>(own + records));
    }
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
