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

// A pair's sums of parameter gradients, and what one tile hands to the tile before it.
template <class W>
struct GradientRecord {
  Pair<W>*dfir_weight, *dfir_bias, *dskip, *dpoles, *dresidues, *future, *adjoint, *end;
  GradientRecord(Pair<W>* base, const Shape& shape)
      : dfir_weight(base),                                // [stream][tap]
        dfir_bias(dfir_weight + 3 * shape.taps),          // [stream]
        dskip(dfir_bias + 3),                             //
        dpoles(dskip + 1),                                // [mode][re, im]
        dresidues(dpoles + 2 * shape.modes),              // [mode][re, im]
        future(dresidues + 2 * shape.modes),              // [stream][K-1]: dx of the rows after the tile
        adjoint(future + 3 * (shape.taps - 1)),           // [mode][re, im]: conj(p) λ of the row after the tile
        end(adjoint + 2 * shape.modes) {}
  static int64_t pairs(const Shape& shape) {
    return GradientRecord(nullptr, shape).end - static_cast<Pair<W>*>(nullptr);
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
                         Tile<W>& tile, Pair<W>* adjoint, Pair<W>* dpoles, Pair<W>* dresidues, Walk& ahead, int pace) {
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
    dpoles[2 * m].half[half] += dpr[m], dpoles[2 * m + 1].half[half] += dpi[m];
    dresidues[2 * m].half[half] += drr[m], dresidues[2 * m + 1].half[half] += dri[m];
  }
}

// The transpose of one stream's FIR: dz of a tile from dx, and the gradients of its weight and bias. `before` holds the
// K-1 rows of z before the tile, `future` the K-1 rows of dx after it, replaced by the tile's first.
template <class T, int K, bool kStream>
static void transpose_fir(const T* z, int64_t z_row_stride, T* dz, int64_t dz_row_stride, int valid,
                          const uint8_t* real, int rows, const Pair<Work<T>>* weight, const Pair<Work<T>>* before,
                          const Pair<Work<T>>* dx, Pair<Work<T>>* future, Pair<Work<T>>* dweight,
                          Pair<Work<T>>* dbias) {
  using W = Work<T>;
  using V = Vector<W>;
  const auto row = [&](int t) __attribute__((always_inline)) {
    if (t < 0) return t >= 1 - K ? before[t + K - 1] : Pair<W>{};
    return real != nullptr && !real[t] ? Pair<W>{} : load(z + t * z_row_stride, valid);
  };
  V w[2][K], dw[2][K] = {}, db[2] = {}, after[2][K], window[2][K];  // after[i] = dx_{t+i}, window[k] = z_{t-K+1+k}
  for (int half = 0; half < 2; half++) {
    for (int k = 0; k < K; k++) w[half][k] = weight[k].half[half];
    for (int i = 0; i + 1 < K; i++) after[half][i] = future[i].half[half];
  }
  for (int k = 0; k < K; k++) {
    const Pair<W> z_row = row(rows - K + k);
    window[0][k] = z_row.half[0], window[1][k] = z_row.half[1];
  }
  for (int t = rows - 1; t >= 0; t--) {
    const Pair<W> above = row(t - K);
    Pair<W> out;
    for (int half = 0; half < 2; half++) {
      for (int i = K - 1; i > 0; i--) after[half][i] = after[half][i - 1];
      const V now = after[half][0] = dx[t].half[half];
      db[half] += now;
      V sum = w[half][K - 1] * now;
      for (int i = 1; i < K; i++) sum += w[half][K - 1 - i] * after[half][i];
      for (int k = 0; k < K; k++) dw[half][k] += now * window[half][k];
      for (int k = K - 1; k > 0; k--) window[half][k] = window[half][k - 1];
      window[half][0] = above.half[half];
      out.half[half] = sum;
    }
    if (real != nullptr && !real[t]) out = Pair<W>{};
    if (kStream) stream(dz + t * dz_row_stride, out);
    else store(dz + t * dz_row_stride, out, valid);
  }
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i + 1 < K; i++) future[i].half[half] = after[half][i];
    for (int k = 0; k < K; k++) dweight[k].half[half] += dw[half][k];
    dbias->half[half] += db[half];
  }
}

template <class T>
using TransposeFir = void (*)(const T*, int64_t, T*, int64_t, int, const uint8_t*, int, const Pair<Work<T>>*,
                              const Pair<Work<T>>*, const Pair<Work<T>>*, Pair<Work<T>>*, Pair<Work<T>>*,
                              Pair<Work<T>>*);
template <class T, bool kStream>
static TransposeFir<T> transpose_fir_of(int taps) {
  static constexpr TransposeFir<T> table[kMaxTaps] = {
      transpose_fir<T, 1, kStream>, transpose_fir<T, 2, kStream>, transpose_fir<T, 3, kStream>,
      transpose_fir<T, 4, kStream>, transpose_fir<T, 5, kStream>, transpose_fir<T, 6, kStream>,
      transpose_fir<T, 7, kStream>, transpose_fir<T, 8, kStream>};
  return table[taps - 1];
}

// Pairs [begin, end) through all batches.
template <class T>
static void gradient_block(const Gradient& f, const Layout& layout, bool streams, int64_t begin, int64_t end,
                           Pair<Work<T>>* scratch) {
  using W = Work<T>;
  const Shape& shape = f.shape;
  const Sequence& in = f.sequence;
  const int taps = shape.taps, before = taps - 1, modes = shape.modes;
  const int64_t length = shape.length, channels = shape.channels, tiles = divide_up(length, kTile);
  const int64_t record_pairs = Record<W>::pairs(shape) + GradientRecord<W>::pairs(shape);
  const auto record = [&](int64_t pair) { return Record<W>(scratch + (pair - begin) * record_pairs, shape); };
  const auto sums = [&](int64_t pair) { return GradientRecord<W>(record(pair).end, shape); };
  for (int64_t pair = begin; pair < end; pair++) {
    gather_parameters<T>(shape, f.parameters, layout, pair, record(pair));
    memset(sums(pair).dfir_weight, 0, size_t(GradientRecord<W>::pairs(shape)) * sizeof(Pair<W>));
  }
  const FirRows<T> fir = fir_rows_of<T, false>(taps);
  const TransposeFir<T> transpose = streams ? transpose_fir_of<T, true>(taps) : transpose_fir_of<T, false>(taps);
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
      Walk none;
      for (int64_t pair = begin; pair < end; pair++) {
        const Record<W> r = record(pair);
        const GradientRecord<W> d = sums(pair);
        const int valid = layout.valid(pair);
        const T *z_tile[3], *dy_tile = dy + t0 * channels + layout.channel(pair);
        Pair<W> past[3 * (kMaxTaps - 1)], history[3 * (kMaxTaps - 1)];
        for (int s = 0; s < 3; s++) {
          z_tile[s] = z + t0 * in.z_row_stride + layout.column(pair, s);
          for (int i = 0; i < before; i++) {
            const int row = i - before;
            past[s * before + i] = k == 0                            ? r.history[s * before + i]
                                   : real != nullptr && !real[row] ? Pair<W>{}
                                                                     : load(z_tile[s] + row * in.z_row_stride, valid);
          }
        }
        memcpy(history, past, size_t(3 * before) * sizeof(Pair<W>));
        const auto recompute = [&](int s, Pair<W>* out) {
          fir(z_tile[s], in.z_row_stride, valid, real, rows, r.fir_weight + s * taps, r.fir_bias[s],
              history + s * before, out, none, 0);
        };
        recompute(0, tile.g);
        recompute(1, tile.x1);
        recompute(2, tile.v);
        for (int t = 0; t < rows; t++) {
          const Pair<W> dy_row = load(dy_tile + t * channels, valid);
          for (int half = 0; half < 2; half++) {
            const Vector<W> skip = r.skip->half[half], u = tile.x1[t].half[half] * tile.v[t].half[half];
            const Vector<W> g = tile.g[t].half[half] * dy_row.half[half];
            tile.u[t].half[half] = u, tile.g[t].half[half] = g;
            tile.filtered[t].half[half] = skip * u, tile.du[t].half[half] = skip * g;
            d.dskip->half[half] += g * u;
          }
        }
        const Pair<W>* entering =
            static_cast<const Pair<W>*>(f.checkpoints) + ((batch * tiles + k) * layout.pairs + pair) * 2 * modes;
        for (int half = 0; half < 2; half++)
          for (int m = 0; m < modes;) {
            const int i = 2 * m, group = modes - m >= 2 ? 2 : 1;
            const auto run = group == 2 ? adjoint_scan<W, 2> : adjoint_scan<W, 1>;
            run(half, rows, r.poles + i, r.residues + i, entering + i, tile, d.adjoint + i, d.dpoles + i,
                d.dresidues + i, none, 0);
            m += group;
          }
        for (int t = 0; t < rows; t++) {
          const bool pad = real != nullptr && !real[t];
          const Pair<W> dy_row = load(dy_tile + t * channels, valid);
          for (int half = 0; half < 2; half++) {
            const Vector<W> du = tile.du[t].half[half], x1 = tile.x1[t].half[half];
            tile.x1[t].half[half] = du * tile.v[t].half[half];
            tile.v[t].half[half] = du * x1;
            tile.filtered[t].half[half] *= dy_row.half[half];
          }
          if (pad) tile.x1[t] = tile.v[t] = tile.filtered[t] = Pair<W>{};
        }
        const Pair<W>* dx[3] = {tile.filtered, tile.x1, tile.v};
        for (int s = 0; s < 3; s++)
          transpose(z_tile[s], in.z_row_stride, dz + t0 * 3 * channels + layout.column(pair, s), 3 * channels, valid,
                    real, rows, r.fir_weight + s * taps, past + s * before, dx[s], d.future + s * before,
                    d.dfir_weight + s * taps, d.dfir_bias + s);
      }
    }
    for (int64_t pair = begin; pair < end; pair++) {
      const GradientRecord<W> d = sums(pair);
      scatter_modes<T>(shape, d.adjoint, layout, batch, pair, f.diir_state);
      for (int s = 0; s < 3; s++)
        for (int i = 0; i < before; i++) {  // row i - (K-1) of z reached the outputs of rows 0 to i
          Pair<W> sum = {};
          for (int j = 0; j <= i; j++)
            for (int half = 0; half < 2; half++)
              sum.half[half] += record(pair).fir_weight[s * taps + j].half[half] * d.future[s * before + i - j].half[half];
          T* to = static_cast<T*>(f.dfir_state) + (batch * 3 * channels + layout.column(pair, s)) * before + i;
          scatter<T>(sum, layout.valid(pair), [&](int c, W x) { to[c * before] = narrow<T>(x); });
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
      for (int i = 0; i < taps; i++) write(f.dfir_weight, column * taps + i, taps, d.dfir_weight[s * taps + i]);
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
  const Cut cut(one, layout, sizeof(T));
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
