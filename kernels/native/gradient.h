// The gradient of the operator with respect to everything that it was given, by a reverse scan. With g = dy x2:
//
//   λ_t = conj(R) g_t + conj(p) λ_{t+1}        dR = Σ g_t conj(s_t)        dp = Σ λ_t conj(s_{t-1})
//   du_t = D g_t + Re Σ_n λ_{t,n}              dD = Σ g_t u_t
//   dx2 = dy (Re Σ R s + D u)                  dx1 = du v                  dv = du x1
//
// and the transpose of the FIR. Tiles of kCheckpointTokens rows go from the last to the first; inside one, the states are
// computed again from the one that the filter kept. A thread owns its channels through all batches and all time, and
// adds in a fixed order: no atomics, and the same bits whatever the number of threads.
#pragma once
#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int kTile = int(kCheckpointTokens);

// The FIR of one stream over `rows` rows of z: emit(row, c). A padded row counts as zeros, and so does its output.
// `history` holds the K-1 rows before, and at the end the last K-1 of these.
template <class T, int K, class Emit>
STRIPEDRAG_INLINE void fir(const T* z, int64_t row_stride, int valid, const uint8_t* real, int rows,
                           const Pair<Work<T>>* weight, const Pair<Work<T>>& bias, Pair<Work<T>>* history, Walk& ahead,
                           int pace, Emit emit) {
  using W = Work<T>;
  Vector<W> w[2][K], past[2][K];
  for (int half = 0; half < 2; half++) {
    for (int k = 0; k < K; k++) w[half][k] = weight[k].half[half];
    for (int k = 0; k + 1 < K; k++) past[half][k] = history[k].half[half];
  }
  const auto run = [&](auto read, bool check) __attribute__((always_inline)) {
    Walk walk = ahead;
    for (int t = 0; t < rows; t++, z += row_stride) {
      const bool pad = check && !real[t];
      const Pair<W> now = pad ? Pair<W>{} : read();
      walk.tick(pace);
      Pair<W> c = bias;
      for (int half = 0; half < 2; half++) {
        past[half][K - 1] = now.half[half];
        for (int k = 0; k < K; k++) c.half[half] += w[half][k] * past[half][k];
        for (int k = 0; k + 1 < K; k++) past[half][k] = past[half][k + 1];
      }
      emit(t, pad ? Pair<W>{} : c);
    }
    ahead = walk;
  };
  if (valid == kPair<T> && real == nullptr) run([&] { return load(z); }, false);
  else run([&] { return load(z, valid); }, real != nullptr);
  for (int half = 0; half < 2; half++)
    for (int k = 0; k + 1 < K; k++) history[k].half[half] = past[half][k];
}

// A pair's sums of parameter gradients, and what one tile hands to the tile before it.
template <class W>
struct GradientRecord {
  Pair<W>*dfir_weight, *dfir_bias, *dskip, *dpoles, *dresidues, *lost, *future, *adjoint, *end;
  GradientRecord(Pair<W>* base, const Shape& shape)
      : dfir_weight(base),                                 // [stream][padded tap]
        dfir_bias(dfir_weight + 3 * padded_taps(shape)),   // [stream]
        dskip(dfir_bias + 3),                              //
        dpoles(dskip + 1),                                 // [mode][re, im]
        dresidues(dpoles + 2 * shape.modes),               // [mode][re, im]
        lost(dresidues + 2 * shape.modes),                 // what rounding took from each of the sums above
        future(lost + (lost - base)),                      // [stream][padded taps - 1]: dx of the rows after the tile
        adjoint(future + 3 * (padded_taps(shape) - 1)),    // [mode][re, im]: conj(p) λ of the row after the tile
        end(adjoint + 2 * shape.modes) {}
  static int64_t pairs(const Shape& shape) {
    const int64_t sums = 3 * padded_taps(shape) + 4 + 4 * shape.modes;
    return 2 * sums + 3 * (padded_taps(shape) - 1) + 2 * shape.modes;
  }
  // Adds a tile's part to a sum, compensated (Kahan 1965): a long sequence has thousands of tiles.
  void add(Pair<W>* sum, int half, Vector<W> part) const {
    Vector<W>&total = sum->half[half], &rest = sum[lost - dfir_weight].half[half];
    const Vector<W> wanted = part - rest, after = total + wanted;
    rest = (after - total) - wanted;
    total = after;
  }
};

// The arrays of one tile, small enough for the first-level cache or nearly.
template <class W>
struct Tile {
  Pair<W> g[kTile], x1[kTile], v[kTile], u[kTile], du[kTile], filtered[kTile];
};

// `kModes` modes of one half of a pair over a tile: forward for the states and their part of `filtered`, then backward.
template <class W, int kModes>
static void adjoint_scan(int half, int rows, const Pair<W>* poles, const Pair<W>* residues, const Pair<W>* entering,
                         Tile<W>& tile, const GradientRecord<W>& d, int first, Walk& ahead, int pace) {
  using V = Vector<W>;
  V pr[kModes], pi[kModes], rr[kModes], ri[kModes], sr[kModes], si[kModes];
  V states[kTile + 1][kModes][2];
  for (int m = 0; m < kModes; m++) {
    pr[m] = poles[2 * m].half[half], pi[m] = poles[2 * m + 1].half[half];
    rr[m] = residues[2 * m].half[half], ri[m] = residues[2 * m + 1].half[half];
    states[0][m][0] = sr[m] = entering[2 * m].half[half], states[0][m][1] = si[m] = entering[2 * m + 1].half[half];
  }
  Walk walk = ahead;
  for (int t = 0; t < rows; t++) {
    const V u = tile.u[t].half[half];
    V sum = tile.filtered[t].half[half];
    walk.tick(pace);
#pragma GCC unroll 2
    for (int m = 0; m < kModes; m++) {
      const V re = pr[m] * sr[m] + (u - pi[m] * si[m]);
      const V im = pr[m] * si[m] + pi[m] * sr[m];
      states[t + 1][m][0] = sr[m] = re, states[t + 1][m][1] = si[m] = im;
      sum += rr[m] * re;
      sum -= ri[m] * im;
    }
    tile.filtered[t].half[half] = sum;
  }
  Pair<W>*adjoint = d.adjoint + first, *dpoles = d.dpoles + first, *dresidues = d.dresidues + first;
  V ar[kModes], ai[kModes], dpr[kModes] = {}, dpi[kModes] = {}, drr[kModes] = {}, dri[kModes] = {};
  for (int m = 0; m < kModes; m++) ar[m] = adjoint[2 * m].half[half], ai[m] = adjoint[2 * m + 1].half[half];
  for (int t = rows - 1; t >= 0; t--) {
    const V g = tile.g[t].half[half];
    V du = tile.du[t].half[half];
    walk.tick(pace);
#pragma GCC unroll 2
    for (int m = 0; m < kModes; m++) {
      const V re = ar[m] + rr[m] * g, im = ai[m] - ri[m] * g;  // λ_t
      const V *now = states[t + 1][m], *before = states[t][m];
      du += re;
      drr[m] += g * now[0];
      dri[m] -= g * now[1];
      dpr[m] += re * before[0];
      dpr[m] += im * before[1];
      dpi[m] += im * before[0];
      dpi[m] -= re * before[1];
      ar[m] = pr[m] * re + pi[m] * im;
      ai[m] = pr[m] * im - pi[m] * re;
    }
    tile.du[t].half[half] = du;
  }
  ahead = walk;
  for (int m = 0; m < kModes; m++) {
    adjoint[2 * m].half[half] = ar[m], adjoint[2 * m + 1].half[half] = ai[m];
    d.add(dpoles + 2 * m, half, dpr[m]), d.add(dpoles + 2 * m + 1, half, dpi[m]);
    d.add(dresidues + 2 * m, half, drr[m]), d.add(dresidues + 2 * m + 1, half, dri[m]);
  }
}

// The transpose of one stream's FIR: dz of a tile from dx(row), and the gradients of its weight and bias. `before` holds
// the K-1 rows of z before the tile, d.future the K-1 rows of dx after it, replaced by the tile's first. Not inlined: its
// loop fills the registers.
template <class T, int K, class Dx>
static __attribute__((noinline)) void transpose_fir(const T* z, int64_t z_row_stride, T* dz, int64_t dz_row_stride, bool streams, int valid,
                                     const uint8_t* real, int rows, const Pair<Work<T>>* weight,
                                     const Pair<Work<T>>* before, const GradientRecord<Work<T>>& d, int s,
                                     Walk& ahead, int pace, Dx dx) {
  using W = Work<T>;
  using V = Vector<W>;
  Pair<W>* future = d.future + s * (K - 1);
  V w[2][K], dw[2][K] = {}, db[2] = {}, after[2][K], window[2][K];  // after[i] = dx_{t+i}, window[k] = z_{t-K+1+k}
  const auto run = [&](auto read, auto write, bool check) __attribute__((always_inline)) {
    const auto row = [&](int t) __attribute__((always_inline)) {
      if (t < 0) return t > -K ? before[t + K - 1] : Pair<W>{};
      return check && !real[t] ? Pair<W>{} : read(z + t * z_row_stride);
    };
    for (int half = 0; half < 2; half++) {
      for (int k = 0; k < K; k++) w[half][k] = weight[k].half[half];
      for (int i = 0; i + 1 < K; i++) after[half][i] = future[i].half[half];
    }
    for (int k = 0; k < K; k++) {
      const Pair<W> z_row = row(rows - K + k);
      window[0][k] = z_row.half[0], window[1][k] = z_row.half[1];
    }
    Walk walk = ahead;
    for (int t = rows - 1; t >= 0; t--) {
      const bool pad = check && !real[t];
      const Pair<W> above = row(t - K), now = pad ? Pair<W>{} : dx(t);
      walk.tick(pace);
      Pair<W> out;
      for (int half = 0; half < 2; half++) {
        for (int i = K - 1; i > 0; i--) after[half][i] = after[half][i - 1];
        after[half][0] = now.half[half];
        db[half] += now.half[half];
        V sum = w[half][K - 1] * now.half[half];
        for (int i = 1; i < K; i++) sum += w[half][K - 1 - i] * after[half][i];
        for (int k = 0; k < K; k++) dw[half][k] += now.half[half] * window[half][k];
        for (int k = K - 1; k > 0; k--) window[half][k] = window[half][k - 1];
        window[half][0] = above.half[half];
        out.half[half] = sum;
      }
      write(dz + t * dz_row_stride, pad ? Pair<W>{} : out);
    }
    ahead = walk;
  };
  const auto read_all = [](const T* p) { return load(p); };
  const auto read_some = [&](const T* p) { return load(p, valid); };
  const auto write_all = [&](T* p, const Pair<W>& x) { streams ? stream(p, x) : store(p, x); };
  const auto write_some = [&](T* p, const Pair<W>& x) { store(p, x, valid); };
  if (valid < kPair<T>) run(read_some, write_some, real != nullptr);
  else if (real != nullptr) run(read_all, write_all, true);
  else run(read_all, write_all, false);
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i + 1 < K; i++) future[i].half[half] = after[half][i];
    for (int k = 0; k < K; k++) d.add(d.dfir_weight + s * K + k, half, dw[half][k]);
    d.add(d.dfir_bias + s, half, db[half]);
  }
}

// What a tile of one pair reads and writes.
template <class T>
struct TileArguments {
  const T *z[3], *dy;  // at the tile's first row, dy at the pair's first channel
  T* dz[3];
  int64_t z_row_stride, dy_row_stride, dz_row_stride;
  const uint8_t* real;
  int rows, valid, modes;
  bool is_first;  // of the sequence
  bool streams;   // dz passes the cache
  const Pair<Work<T>>* entering;
  int pace_of_a_fir, pace_of_a_mode;
};

template <class T, int K>
static void gradient_tile(const TileArguments<T>& a, const Record<Work<T>>& r, const GradientRecord<Work<T>>& d,
                          Tile<Work<T>>& tile, Walk& ahead) {
  using W = Work<T>;
  using V = Vector<W>;
  constexpr int kBefore = K - 1;
  Pair<W> past[3 * kBefore + 1], history[3 * kBefore + 1];
  for (int s = 0; s < 3; s++)
    for (int i = 0; i < kBefore; i++) {
      const int row = i - kBefore;
      past[s * kBefore + i] = a.is_first                          ? r.history[s * kBefore + i]
                              : a.real != nullptr && !a.real[row] ? Pair<W>{}
                                                                  : load(a.z[s] + row * a.z_row_stride, a.valid);
      history[s * kBefore + i] = past[s * kBefore + i];
    }
  const auto forward = [&](int s, auto emit) __attribute__((always_inline)) {
    fir<T, K>(a.z[s], a.z_row_stride, a.valid, a.real, a.rows, r.fir_weight + s * K, r.fir_bias[s],
              history + s * kBefore, ahead, a.pace_of_a_fir, emit);
  };
  const Pair<W> skip = *r.skip;
  Pair<W> dskip = {};
  forward(1, [&](int t, const Pair<W>& c) { tile.x1[t] = c; });
  forward(2, [&](int t, const Pair<W>& c) {
    tile.v[t] = c;
    for (int half = 0; half < 2; half++) {
      const V u = tile.x1[t].half[half] * c.half[half];
      tile.u[t].half[half] = u, tile.filtered[t].half[half] = skip.half[half] * u;
    }
  });
  const auto dy = [&](int t) __attribute__((always_inline)) { return load(a.dy + t * a.dy_row_stride, a.valid); };
  forward(0, [&](int t, const Pair<W>& c) {
    const Pair<W> dy_row = dy(t);
    for (int half = 0; half < 2; half++) {
      const V g = c.half[half] * dy_row.half[half];
      tile.g[t].half[half] = g, tile.du[t].half[half] = skip.half[half] * g;
      dskip.half[half] += g * tile.u[t].half[half];
    }
  });
  for (int half = 0; half < 2; half++) {
    d.add(d.dskip, half, dskip.half[half]);
    for (int m = 0; m < a.modes;) {
      const int i = 2 * m, group = a.modes - m >= 2 ? 2 : 1;
      const auto run = group == 2 ? adjoint_scan<W, 2> : adjoint_scan<W, 1>;
      run(half, a.rows, r.poles + i, r.residues + i, a.entering + i, tile, d, i, ahead, a.pace_of_a_mode * group);
      m += group;
    }
  }
  const auto transpose = [&](int s, auto dx) __attribute__((always_inline)) {
    transpose_fir<T, K>(a.z[s], a.z_row_stride, a.dz[s], a.dz_row_stride, a.streams, a.valid, a.real, a.rows,
                        r.fir_weight + s * K, past + s * kBefore, d, s, ahead, a.pace_of_a_fir, dx);
  };
  const auto product = [](const Pair<W>& x, const Pair<W>& y) __attribute__((always_inline)) {
    return Pair<W>{{x.half[0] * y.half[0], x.half[1] * y.half[1]}};
  };
  transpose(0, [&](int t) { return product(dy(t), tile.filtered[t]); });
  transpose(1, [&](int t) { return product(tile.du[t], tile.v[t]); });
  transpose(2, [&](int t) { return product(tile.du[t], tile.x1[t]); });
}

// Pairs [begin, end) through all batches.
template <class T>
static void gradient_block(const Gradient& f, const Layout& layout, bool streams, int64_t begin, int64_t end,
                           Pair<Work<T>>* scratch) {
  using W = Work<T>;
  const Shape& shape = f.shape;
  const Sequence& in = f.sequence;
  const int taps = padded_taps(shape), padding = taps - shape.taps, before = taps - 1, modes = shape.modes;
  const int64_t length = shape.length, channels = shape.channels, tiles = divide_up(length, kTile);
  const int64_t record_pairs = Record<W>::pairs(shape) + GradientRecord<W>::pairs(shape);
  const auto record = [&](int64_t pair) { return Record<W>(scratch + (pair - begin) * record_pairs, shape); };
  const auto sums = [&](int64_t pair) { return GradientRecord<W>(record(pair).end, shape); };
  for (int64_t pair = begin; pair < end; pair++) {
    gather_parameters<T>(shape, f.parameters, layout, pair, record(pair));
    memset(sums(pair).dfir_weight, 0, size_t(GradientRecord<W>::pairs(shape)) * sizeof(Pair<W>));
  }
  const auto run_tile = taps == kUsualTaps ? gradient_tile<T, kUsualTaps> : gradient_tile<T, kMaxTaps>;
  const int pace = 256 * 4 * kPair<T> * int(sizeof(T)) / kLineBytes;  // of a pair's row
  const int adds = 2 * (3 * (3 * taps + 2) + 18 * modes);
  Tile<W> tile;
  for (int64_t batch = 0; batch < shape.batch; batch++) {
    const T* z = static_cast<const T*>(in.z) + batch * in.z_batch_stride;
    const T* dy = static_cast<const T*>(f.dy) + batch * length * channels;
    T* dz = static_cast<T*>(f.dz) + batch * length * 3 * channels;
    for (int64_t pair = begin; pair < end; pair++) {
      gather_history<T>(shape, in.fir_state, layout, batch, pair, record(pair).history);
      gather_modes<T>(shape, f.diir_out, layout, batch, pair, sums(pair).adjoint);
      memset(sums(pair).future, 0, size_t(3 * before) * sizeof(Pair<W>));
    }
    for (int64_t k = tiles - 1; k >= 0; k--) {
      const int64_t t0 = k * kTile;
      const int rows = int(smaller(kTile, length - t0));
      const uint8_t* real = in.real == nullptr ? nullptr : in.real + batch * length + t0;
      // The rows before these are next: fetched in step with the arithmetic, as in the filter.
      const int64_t next = (k - 1) * kTile;
      Walk ahead = k == 0 ? Walk()
                          : Walk(columns_of(layout, z + next * in.z_row_stride, kTile, in.z_row_stride, begin, end),
                                 {dy + next * channels + layout.channel(begin), kTile, channels * int64_t(sizeof(T)), 1, 0,
                                  (layout.channel(end - 1) + layout.valid(end - 1) - layout.channel(begin)) * int64_t(sizeof(T))});
      TileArguments<T> a;
      a.z_row_stride = in.z_row_stride, a.dy_row_stride = channels, a.dz_row_stride = 3 * channels;
      a.real = real, a.rows = rows, a.modes = modes, a.is_first = k == 0, a.streams = streams;
      a.pace_of_a_fir = k == 0 ? 0 : pace * (3 * taps + 2) / adds + 1;  // half of it forward, half in the transpose
      a.pace_of_a_mode = k == 0 ? 0 : pace * 9 / adds + 1;
      for (int64_t pair = begin; pair < end; pair++) {
        for (int s = 0; s < 3; s++) {
          a.z[s] = z + t0 * in.z_row_stride + layout.column(pair, s);
          a.dz[s] = dz + t0 * 3 * channels + layout.column(pair, s);
        }
        a.dy = dy + t0 * channels + layout.channel(pair);
        a.valid = layout.valid(pair);
        a.entering =
            static_cast<const Pair<W>*>(f.checkpoints) + ((batch * tiles + k) * layout.pairs + pair) * 2 * modes;
        run_tile(a, record(pair), sums(pair), tile, ahead);
      }
    }
    for (int64_t pair = begin; pair < end; pair++) {
      const GradientRecord<W> d = sums(pair);
      scatter_modes<T>(shape, d.adjoint, layout, batch, pair, f.diir_state);
      for (int s = 0; s < 3; s++)
        for (int i = padding; i < before; i++) {  // row i - (taps-1) of z reached the outputs of rows 0 to i
          Pair<W> sum = {};
          for (int j = 0; j <= i; j++)
            for (int half = 0; half < 2; half++)
              sum.half[half] += record(pair).fir_weight[s * taps + j].half[half] * d.future[s * before + i - j].half[half];
          const int kept = before - padding;
          T* to = static_cast<T*>(f.dfir_state) + (batch * 3 * channels + layout.column(pair, s)) * kept + i - padding;
          scatter<T>(sum, layout.valid(pair), [&](int c, W x) { to[c * kept] = narrow<T>(x); });
        }
    }
  }
  for (int64_t pair = begin; pair < end; pair++) {
    const GradientRecord<W> d = sums(pair);
    const int valid = layout.valid(pair);
    const auto write = [&](void* to, int64_t first, int64_t stride, const Pair<W>& x) {
      scatter<T>(x, valid, [&](int c, W number) { static_cast<W*>(to)[first + c * stride] = number; });
    };
    for (int s = 0; s < 3; s++) {
      const int64_t column = layout.column(pair, s);
      for (int i = 0; i < shape.taps; i++)
        write(f.dfir_weight, column * shape.taps + i, shape.taps, d.dfir_weight[s * taps + padding + i]);
      write(f.dfir_bias, column, 1, d.dfir_bias[s]);
    }
    const int64_t first = layout.channel(pair);
    write(f.dskip, first, 1, *d.dskip);
    for (int i = 0; i < 2 * modes; i++) {
      write(f.dpoles, first * 2 * modes + i, 2 * modes, d.dpoles[i]);
      write(f.dresidues, first * 2 * modes + i, 2 * modes, d.dresidues[i]);
    }
  }
  if (streams) end_of_streams();
}

template <class T>
static bool gradient(const Gradient& f) {
  using W = Work<T>;
  const Shape& shape = f.shape;
  const Layout layout(shape, kPair<T>);
  Shape one = shape;
  one.batch = 1;  // a block goes through all batches, so only blocks are shared out
  const Cut cut(one, layout, sizeof(T), kTile);
  const int64_t stride =
      divide_up(layout.pairs, cut.blocks) * (Record<W>::pairs(shape) + GradientRecord<W>::pairs(shape));
  Scratch<Pair<W>> scratch(shape.threads * stride);
  if (!scratch.has_memory()) return false;
  const bool streams =
      can_stream<T>(f.dz, shape.head_width, shape.batch * shape.length * 3 * shape.channels * int64_t(sizeof(T)));
#pragma omp parallel for schedule(static) num_threads(shape.threads)
  for (int64_t block = 0; block < cut.blocks; block++)
    gradient_block<T>(f, layout, streams, layout.pairs * block / cut.blocks, layout.pairs * (block + 1) / cut.blocks,
                      scratch.begin() + thread_index() * stride);
  return true;
}

}  // namespace stripedrag::STRIPEDRAG_ISA
