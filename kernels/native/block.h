// What filter and gradient share: which channels a pair of vectors holds, its parameters gathered side by side, and the
// walk that fetches the next rows from memory while these are computed.
#pragma once
#include <cstdlib>

#include "simd.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace stripedrag::STRIPEDRAG_ISA {

STRIPEDRAG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
STRIPEDRAG_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
STRIPEDRAG_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kStreamBytes = 1 << 20;  // an output above this passes the cache: it would not stay there anyway

STRIPEDRAG_INLINE int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Uninitialised memory for vectors, given back at the end of its scope.
template <class P>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : begin_(static_cast<P*>(std::aligned_alloc(kLineBytes, size_t(divide_up(count * sizeof(P), kLineBytes)) * kLineBytes))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(begin_); }
  bool has_memory() const { return begin_ != nullptr; }
  P* begin() const { return begin_; }

 private:
  P* begin_;
};

// What an allocation of floats is divided into, one part after the other, each on a line.
struct Parts {
  float* end;  // of those that were taken
  // `count` numbers as wide as a float.
  template <class P = float>
  P* take(int64_t count) {
    static_assert(sizeof(P) == sizeof(float), "parts are counted in floats");
    float* const begin = end;
    end += divide_up(count, kLineBytes / 4) * (kLineBytes / 4);
    return reinterpret_cast<P*>(begin);
  }
};

// Whether `bytes` at `p` are worth streaming stores, and can be written so: by whole pairs that begin on a line.
template <class T>
static bool can_stream(const void* p, int64_t head_width, int64_t bytes) {
  return kCanStream<T> && bytes > kStreamBytes && reinterpret_cast<intptr_t>(p) % kLineBytes == 0 &&
         head_width % kPair<T> == 0;
}

// The pairs of all channels, head by head; the last pair of a head may be partly filled.
struct Layout {
  int64_t channels, head_width, pair_channels, pairs_per_head, pairs;
  Layout(const Shape& shape, int64_t pair_channels)
      : channels(shape.channels),
        head_width(shape.head_width),
        pair_channels(pair_channels),
        pairs_per_head(divide_up(head_width, pair_channels)),
        pairs(shape.channels / head_width * pairs_per_head) {}
  int64_t in_head(int64_t pair) const { return pair % pairs_per_head * pair_channels; }
  int64_t channel(int64_t pair) const { return pair / pairs_per_head * head_width + in_head(pair); }
  int valid(int64_t pair) const { return int(smaller(pair_channels, head_width - in_head(pair))); }
  // Column of z of the pair's first channel in stream 0 (x2), 1 (x1) or 2 (v).
  int64_t column(int64_t pair, int stream) const {
    return (pair / pairs_per_head * 3 + stream) * head_width + in_head(pair);
  }
};

// How the work is cut. A block of pairs goes through time together, a tile of rows at a time: wide enough that rows are
// read in long runs, small enough that a tile, and the next one on its way, stay in the second-level cache.
constexpr int64_t kTileBytes = 192 << 10;
struct Cut {
  int64_t blocks, tile_rows;
  // For tiles of at least `least_rows` rows of z.
  Cut(const Shape& shape, const Layout& layout, int64_t element_bytes, int64_t least_rows) {
    const int64_t row_bytes = 3 * shape.channels * element_bytes;
    int64_t share = shape.threads;  // so that batch · blocks is a multiple of the threads
    for (int64_t a = shape.batch, b = share; b != 0;) {
      const int64_t rest = a % b;
      a = b, b = rest;
      if (b == 0) share = shape.threads / a;
    }
    blocks = smaller(divide_up(divide_up(row_bytes * least_rows, kTileBytes), share) * share, layout.pairs);
    const int64_t rows = kTileBytes / larger(1, row_bytes / blocks);
    tile_rows = rows >= kCheckpointTokens ? kCheckpointTokens : rows >= 16 ? 16 : 8;
  }
};

// FIRs are compiled for three taps and for the most: a filter of another length is padded with zeros on its old side, and
// its history likewise. (An infinite input then makes a NaN of a few outputs more than it would.)
constexpr int kUsualTaps = 3;
STRIPEDRAG_INLINE int padded_taps(const Shape& shape) { return shape.taps <= kUsualTaps ? kUsualTaps : kMaxTaps; }

// A pair's parameters and state, one allocation after the other in scratch memory.
template <class W>
struct Record {
  Pair<W>*fir_weight, *fir_bias, *history, *skip, *poles, *residues, *state, *end;
  Record(Pair<W>* base, const Shape& shape)
      : fir_weight(base),                                  // [stream][padded tap]
        fir_bias(fir_weight + 3 * padded_taps(shape)),     // [stream]
        history(fir_bias + 3),                             // [stream][padded taps - 1], oldest first
        skip(history + 3 * (padded_taps(shape) - 1)),      //
        poles(skip + 1),                                   // [mode][re, im]
        residues(poles + 2 * shape.modes),                 // [mode][re, im]
        state(residues + 2 * shape.modes),                 // [mode][re, im]
        end(state + 2 * shape.modes) {}
  static int64_t pairs(const Shape& shape) {
    return 6 * padded_taps(shape) + 1 + 6 * shape.modes;
  }
};

template <class T>
static void gather_parameters(const Shape& shape, const Parameters& from, const Layout& layout, int64_t pair,
                              Record<Work<T>> to) {
  using W = Work<T>;
  const int valid = layout.valid(pair), taps = shape.taps, padding = padded_taps(shape) - taps, modes = shape.modes;
  const int64_t first = layout.channel(pair), group_channels = shape.channels / shape.groups;
  for (int s = 0; s < 3; s++) {
    const int64_t column = layout.column(pair, s);
    for (int k = 0; k < padding; k++) to.fir_weight[s * (padding + taps) + k] = {};
    for (int k = 0; k < taps; k++)
      to.fir_weight[s * (padding + taps) + padding + k] = gather<T>(
          valid, [&](int c) { return static_cast<const W*>(from.fir_weight)[(column + c) * taps + k]; });
    to.fir_bias[s] = gather<T>(valid, [&](int c) { return static_cast<const W*>(from.fir_bias)[column + c]; });
  }
  to.skip[0] = gather<T>(valid, [&](int c) { return static_cast<const W*>(from.skip)[first + c]; });
  int64_t begin[kPair<T>];  // of each channel's system
  for (int c = 0; c < valid; c++) begin[c] = (first + c) / group_channels * 2 * modes;
  for (int i = 0; i < 2 * modes; i++) {
    const auto at = [&](const void* system) {
      return gather<T>(valid, [&](int c) { return static_cast<const W*>(system)[begin[c] + i]; });
    };
    to.poles[i] = at(from.poles);
    to.residues[i] = at(from.residues);
  }
}

// The rows of z before the first, from the FIR state.
template <class T>
static void gather_history(const Shape& shape, const void* fir_state, const Layout& layout, int64_t batch,
                           int64_t pair, Pair<Work<T>>* history) {
  const int before = shape.taps - 1, padding = padded_taps(shape) - shape.taps;
  for (int s = 0; s < 3; s++, history += padding + before) {
    for (int k = 0; k < padding; k++) history[k] = {};
    for (int k = 0; k < before; k++) {
      const T* from = static_cast<const T*>(fir_state) + (batch * 3 * shape.channels + layout.column(pair, s)) * before;
      history[padding + k] = gather<T>(layout.valid(pair), [&](int c) { return widen(from[c * before + k]); });
    }
  }
}

// The state (B, H, N, 2) of a pair.
template <class T>
static void gather_modes(const Shape& shape, const void* iir_state, const Layout& layout, int64_t batch, int64_t pair,
                         Pair<Work<T>>* state) {
  using W = Work<T>;
  const int64_t width = 2 * shape.modes;
  const W* from = static_cast<const W*>(iir_state) + (batch * shape.channels + layout.channel(pair)) * width;
  for (int i = 0; i < width; i++)
    state[i] = gather<T>(layout.valid(pair), [&](int c) { return from[c * width + i]; });
}
template <class T>
static void scatter_modes(const Shape& shape, const Pair<Work<T>>* state, const Layout& layout, int64_t batch,
                          int64_t pair, void* iir_state) {
  using W = Work<T>;
  const int64_t width = 2 * shape.modes;
  W* to = static_cast<W*>(iir_state) + (batch * shape.channels + layout.channel(pair)) * width;
  for (int i = 0; i < width; i++)
    scatter<T>(state[i], layout.valid(pair), [&](int c, W x) { to[c * width + i] = x; });
}

// `rows` rows of memory of `runs` runs each.
struct Rectangle {
  const void* start;
  int64_t rows, row_stride, runs, run_stride, run_bytes;
};

// The columns of z that pairs [begin, end) read, over `rows` rows from `z` on.
template <class T>
static Rectangle columns_of(const Layout& layout, const T* z, int64_t rows, int64_t row_stride, int64_t begin,
                            int64_t end) {
  const int64_t bytes = sizeof(T), first = layout.column(begin, 0), valid = layout.valid(end - 1);
  const bool plain = layout.head_width == layout.channels, whole = begin == 0 && end == layout.pairs;
  const int64_t run = layout.column(end - 1, plain && !whole ? 0 : 2) + valid - first;
  return {z + first, rows, row_stride * bytes, plain && !whole ? 3 : 1, layout.channels * bytes, run * bytes};
}

// Prefetches rectangles line by line in address order, a little at each tick. A sequential walk is what the hardware's own
// prefetcher follows; the order in which a tile is computed, down the rows, is not.
class Walk {
 public:
  Walk() : now_{}, later_{} {}
  explicit Walk(const Rectangle& now, const Rectangle& later = {}) : now_(now), later_(later) { enter(); }
  // `pace` in 1/256 lines.
  STRIPEDRAG_INLINE_MEMBER void tick(int pace) {
    for (credit_ += pace; credit_ >= 256; credit_ -= 256) {
      __builtin_prefetch(reinterpret_cast<const void*>(next_), 0, 2);
      next_ += kLineBytes;
      left_ -= kLineBytes;
      if (__builtin_expect(left_ <= 0, 0)) turn();
    }
  }

 private:
  void enter() {
    left_ = now_.rows > 0 ? now_.run_bytes : INT64_MAX;
    if (now_.rows > 0) row_ = next_ = reinterpret_cast<uintptr_t>(now_.start);
  }
  void turn() {
    if (++run_ < now_.runs) {
      next_ = row_ + run_ * now_.run_stride;
    } else if (--now_.rows > 0) {
      run_ = 0, next_ = row_ += now_.row_stride;
    } else {
      run_ = 0, now_ = later_, later_ = {};
      return enter();
    }
    left_ = now_.run_bytes;
  }
  Rectangle now_, later_;
  uintptr_t next_ = 0, row_ = 0;  // numbers, since past the end the walk goes straight on
  int64_t left_ = INT64_MAX, run_ = 0;
  int credit_ = 0;
};

}  // namespace stripedrag::STRIPEDRAG_ISA
