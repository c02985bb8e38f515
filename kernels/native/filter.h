// The operator over a sequence. A tile of rows of one pair of vectors at a time: the three FIRs into two small arrays,
// u = x1 v and x2, then the modes, up to four together in registers, down the rows; the last of them write y.
//
//   s_t = p s_{t-1} + u_t      y_t = x2_t (Re Σ_n R_n s_{t,n} + D u_t)
//
// The recurrence is taken as it stands, a complex number as two vectors (four fused multiply-adds), since any form with
// fewer rounds a coefficient of the pole, which is wrong by time constant times 6e-8. A channel is computed alone and in
// one order, so results depend neither on the threads nor on where a sequence is split.
#pragma once
#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {

// `kModes` modes of one half of a pair over `rows` rows: emit(row, sum) with the sum of D u, if this is the first group
// of modes, or of what `sums` holds, and of Re R s over the modes. The state moves on by `rows`.
template <class W, int kModes, class Emit>
STRIPEDRAG_INLINE void scan(int half, int rows, const Pair<W>* poles, const Pair<W>* residues, Pair<W>* state,
                            const Pair<W>* u, const Pair<W>* sums, Vector<W> skip, bool first, Walk& ahead, int pace,
                            Emit emit) {
  Vector<W> pr[kModes], pi[kModes], rr[kModes], ri[kModes], sr[kModes], si[kModes];
  for (int m = 0; m < kModes; m++) {
    pr[m] = poles[2 * m].half[half], pi[m] = poles[2 * m + 1].half[half];
    rr[m] = residues[2 * m].half[half], ri[m] = residues[2 * m + 1].half[half];
    sr[m] = state[2 * m].half[half], si[m] = state[2 * m + 1].half[half];
  }
  Walk walk = ahead;
  for (int t = 0; t < rows; t++) {
    const Vector<W> input = u[t].half[half];
    Vector<W> sum = first ? skip * input : sums[t].half[half];
    walk.tick(pace);
#pragma GCC unroll 4
    for (int m = 0; m < kModes; m++) {
      const Vector<W> re = pr[m] * sr[m] + (input - pi[m] * si[m]);
      const Vector<W> im = pr[m] * si[m] + pi[m] * sr[m];
      sr[m] = re, si[m] = im;
      sum += rr[m] * re;
      sum -= ri[m] * im;
    }
    emit(t, sum);
  }
  ahead = walk;
  for (int m = 0; m < kModes; m++) state[2 * m].half[half] = sr[m], state[2 * m + 1].half[half] = si[m];
}

// The modes of a pair over a tile, and its rows of y. `gate` holds x2 and is used up.
template <class T, bool kStream>
static void scan_tile(const Shape& shape, const Record<Work<T>>& record, int rows, int valid, const Pair<Work<T>>* u,
                      Pair<Work<T>>* gate, Pair<Work<T>>* sums, T* y, int64_t row_stride, Walk& ahead,
                      int pace_of_a_mode) {
  using W = Work<T>;
  for (int half = 0; half < 2; half++)
    for (int m = 0; m < shape.modes;) {
      const int group = shape.modes - m >= 4 ? 4 : shape.modes - m >= 2 ? 2 : 1;
      const auto run = [&](auto emit) __attribute__((always_inline)) {
        const Pair<W>*poles = record.poles + 2 * m, *residues = record.residues + 2 * m;
        Pair<W>* state = record.state + 2 * m;
        const Vector<W> skip = record.skip->half[half];
        const int pace = pace_of_a_mode * group;
        if (group == 4) scan<W, 4>(half, rows, poles, residues, state, u, sums, skip, m == 0, ahead, pace, emit);
        else if (group == 2) scan<W, 2>(half, rows, poles, residues, state, u, sums, skip, m == 0, ahead, pace, emit);
        else scan<W, 1>(half, rows, poles, residues, state, u, sums, skip, m == 0, ahead, pace, emit);
      };
      if (m + group < shape.modes) {
        run([&](int t, Vector<W> sum) { sums[t].half[half] = sum; });
      } else if (half == 0) {
        run([&](int t, Vector<W> sum) { gate[t].half[0] *= sum; });
      } else {
        const auto output = [&](int t, Vector<W> sum) { return Pair<W>{{gate[t].half[0], gate[t].half[1] * sum}}; };
        if (kStream) run([&](int t, Vector<W> sum) { stream(y + t * row_stride, output(t, sum)); });
        else if (valid == kPair<T>) run([&](int t, Vector<W> sum) { store(y + t * row_stride, output(t, sum)); });
        else run([&](int t, Vector<W> sum) { store(y + t * row_stride, output(t, sum), valid); });
      }
      m += group;
    }
}

// u = x1 v and the gate x2 of a tile.
template <class T, int K>
static void fir_tile(const T* const z[3], int64_t row_stride, int valid, const uint8_t* real, int rows,
                     const Record<Work<T>>& r, Pair<Work<T>>* u, Pair<Work<T>>* gate, Walk& ahead, int pace) {
  using W = Work<T>;
  const auto stream = [&](int s, auto emit) __attribute__((always_inline)) {
    fir<T, K>(z[s], row_stride, valid, real, rows, r.fir_weight + s * K, r.fir_bias[s], r.history + s * (K - 1), ahead,
              pace, emit);
  };
  stream(1, [&](int t, const Pair<W>& c) { u[t] = c; });
  stream(2, [&](int t, const Pair<W>& c) { u[t].half[0] *= c.half[0], u[t].half[1] *= c.half[1]; });
  stream(0, [&](int t, const Pair<W>& c) { gate[t] = c; });
}

// Pairs [begin, end) of one sequence, from its first row to its last.
template <class T, bool kStream>
static void filter_block(const Filter& f, const Layout& layout, int64_t tile_rows, int64_t batch, int64_t begin,
                         int64_t end, Pair<Work<T>>* scratch) {
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
  Pair<W> u[kCheckpointTokens], gate[kCheckpointTokens], sums[kCheckpointTokens];
  const T* z = static_cast<const T*>(in.z) + batch * in.z_batch_stride;
  T* y = static_cast<T*>(f.y) + batch * f.y_batch_stride;
  const uint8_t* real = in.real == nullptr ? nullptr : in.real + batch * length;
  const int taps = padded_taps(shape), padding = taps - shape.taps;
  const auto run_fir = taps == kUsualTaps ? fir_tile<T, kUsualTaps> : fir_tile<T, kMaxTaps>;
  // The next tile's lines are asked for in step with the arithmetic of this one: so many of each row's for each tap and
  // mode, by their share of the multiply-adds.
  const int lines = 3 * int(divide_up(kPair<T> * sizeof(T), kLineBytes));
  const int adds = 6 * (taps + 1) + 2 * (6 * shape.modes + 2);
  for (int64_t t = 0; t < length; t += tile_rows) {
    const int rows = int(smaller(tile_rows, length - t));
    const bool more = t + tile_rows < length;
    const int64_t next_rows = smaller(tile_rows, length - t - tile_rows);
    Walk ahead = more ? Walk(columns_of(layout, z + (t + tile_rows) * in.z_row_stride, next_rows, in.z_row_stride, begin, end))
                      : Walk();
    const int pace_of_a_fir = more ? 256 * lines * 2 * (taps + 1) / adds + 1 : 0;
    const int pace_of_a_mode = more ? 256 * lines * 6 / adds + 1 : 0;
    for (int64_t pair = begin; pair < end; pair++) {
      const Record<W> r = record(pair);
      const int valid = layout.valid(pair);
      if (f.checkpoints != nullptr && t % kCheckpointTokens == 0) {
        const int64_t tiles = divide_up(length, kCheckpointTokens), width = 2 * shape.modes;
        Pair<W>* kept = static_cast<Pair<W>*>(f.checkpoints) +
                        ((batch * tiles + t / kCheckpointTokens) * layout.pairs + pair) * width;
        for (int i = 0; i < width; i++)
          for (int half = 0; half < 2; half++) stream_vector(&kept[i].half[half], (Bits)r.state[i].half[half]);
      }
      const T* streams[3];
      for (int i = 0; i < 3; i++) streams[i] = z + t * in.z_row_stride + layout.column(pair, i);
      run_fir(streams, in.z_row_stride, valid, real == nullptr ? nullptr : real + t, rows, r, u, gate, ahead,
              pace_of_a_fir);
      scan_tile<T, kStream>(shape, r, rows, valid, u, gate, sums, y + t * f.y_row_stride + layout.channel(pair),
                            f.y_row_stride, ahead, pace_of_a_mode);
    }
  }
  for (int64_t pair = begin; pair < end; pair++) {
    const Record<W> r = record(pair);
    scatter_modes<T>(shape, r.state, layout, batch, pair, f.iir_state_out);
    for (int s = 0; s < 3; s++)
      for (int k = 0; k < before; k++) {
        T* to = static_cast<T*>(f.fir_state_out) + (batch * 3 * shape.channels + layout.column(pair, s)) * before + k;
        scatter<T>(r.history[s * (taps - 1) + padding + k], layout.valid(pair), [&](int c, W x) { to[c * before] = narrow<T>(x); });
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
  const int64_t stride = divide_up(layout.pairs, cut.blocks) * Record<W>::pairs(shape);
  Scratch<Pair<W>> scratch(shape.threads * stride);
  if (!scratch.has_memory()) return false;
  // Over z itself the lines are in the cache already.
  const bool streams = f.y != f.sequence.z && f.y_row_stride * int64_t(sizeof(T)) % kLineBytes == 0 &&
                       f.y_batch_stride * int64_t(sizeof(T)) % kLineBytes == 0 &&
                       can_stream<T>(f.y, shape.head_width, shape.batch * shape.length * shape.channels * int64_t(sizeof(T)));
#pragma omp parallel for collapse(2) schedule(static) num_threads(shape.threads)
  for (int64_t batch = 0; batch < shape.batch; batch++)
    for (int64_t block = 0; block < cut.blocks; block++) {
      const int64_t begin = layout.pairs * block / cut.blocks, end = layout.pairs * (block + 1) / cut.blocks;
      Pair<W>* own = scratch.begin() + thread_index() * stride;
      if (streams) filter_block<T, true>(f, layout, cut.tile_rows, batch, begin, end, own);
      else filter_block<T, false>(f, layout, cut.tile_rows, batch, begin, end, own);
    }
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
