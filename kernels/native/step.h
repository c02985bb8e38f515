// One token: the states are read and written where they lie, and so are the parameters, in checkpoint layout. A decode
// step reads each of them once, so gathering them side by side first, as the filter does, would cost more than the step.
//
// The loops run over channels with the numbers of taps and modes known, so that the compiler vectorises them itself.
#pragma once
#include "block.h"

namespace stripedrag::STRIPEDRAG_ISA {

constexpr int kStepChannels = 64;  // intermediate results of so many channels stay in registers or the nearest cache

// Numbers in the type of the arithmetic: they themselves, or a widened copy in `buffer`.
template <class W, class T>
STRIPEDRAG_INLINE const W* widened(const T* from, int count, W* __restrict buffer) {
  if constexpr (sizeof(T) == sizeof(W)) {
    return from;
  } else {
    for (int i = 0; i < count; i++) buffer[i] = widen(from[i]);
    return buffer;
  }
}

// x = FIR of one stream's `n` channels; the history moves on by a row.
template <class T, class F, int kTaps>
static void step_fir(int taps_given, int n, const F* __restrict weight, const F* __restrict bias,
                     const T* __restrict now, T* __restrict past, Work<T>* __restrict x) {
  using W = Work<T>;
  const int taps = kTaps > 0 ? kTaps : taps_given, before = taps - 1;
  W buffers[2 * kMaxTaps * kStepChannels + kStepChannels];
  const W* w = widened<W>(weight, n * taps, buffers);
  const W* p = widened<W>(past, n * before, buffers + kMaxTaps * kStepChannels);
  const W* z = widened<W>(now, n, buffers + 2 * kMaxTaps * kStepChannels);
  for (int i = 0; i < n; i++) {
    W sum = widen(bias[i]);
    for (int k = 0; k < before; k++) sum += w[i * taps + k] * p[i * before + k];
    x[i] = sum + w[i * taps + before] * z[i];
  }
  if (before == 0) return;
  for (int i = 0; i < n; i++) {
    for (int k = 0; k + 1 < before; k++) past[i * before + k] = past[i * before + k + 1];
    past[i * before + before - 1] = now[i];
  }
}

// sum += Re Σ R s with the states of `n` channels moved on by their inputs u.
template <class W, int kModes>
static void step_modes(int modes_given, int n, const W* __restrict poles, const W* __restrict residues,
                       const W* __restrict u, W* __restrict state, W* __restrict sum) {
  const int modes = kModes > 0 ? kModes : modes_given;
  for (int i = 0; i < n; i++) {
    W total = sum[i];
    for (int m = 0; m < modes; m++) {
      const int at = (i * modes + m) * 2;
      const W pr = poles[at], pi = poles[at + 1], sr = state[at], si = state[at + 1];
      const W re = pr * sr + (u[i] - pi * si), im = pr * si + pi * sr;
      state[at] = re, state[at + 1] = im;
      total += residues[at] * re - residues[at + 1] * im;
    }
    sum[i] = total;
  }
}

// Channels [begin, end), all of one head.
template <class T, class F, class D>
static void step_channels(const Step& s, int64_t batch, int64_t begin, int64_t end) {
  using W = Work<T>;
  const Shape& shape = s.shape;
  const int taps = shape.taps, before = taps - 1, width = 2 * shape.modes;
  const int64_t channels = shape.channels, head = begin / shape.head_width, group_channels = channels / shape.groups;
  const F *weight = static_cast<const F*>(s.parameters.fir_weight), *bias = static_cast<const F*>(s.parameters.fir_bias);
  const D* skip = static_cast<const D*>(s.parameters.skip);
  const W *poles = static_cast<const W*>(s.parameters.poles), *residues = static_cast<const W*>(s.parameters.residues);
  const T* z = static_cast<const T*>(s.z) + batch * 3 * channels;
  T* past = static_cast<T*>(s.fir_state) + batch * 3 * channels * before;
  W* state = static_cast<W*>(s.iir_state) + batch * channels * width;
  T* y = static_cast<T*>(s.y) + batch * channels;
  const auto fir = taps == 3 ? step_fir<T, F, 3> : taps == 4 ? step_fir<T, F, 4> : step_fir<T, F, 0>;
  const auto scan = shape.modes == 1   ? step_modes<W, 1>
                    : shape.modes == 2 ? step_modes<W, 2>
                    : shape.modes == 4 ? step_modes<W, 4>
                    : shape.modes == 8 ? step_modes<W, 8>
                                       : step_modes<W, 0>;
  for (int64_t c = begin; c < end; c += kStepChannels) {
    const int n = int(smaller(kStepChannels, end - c));
    W x[3][kStepChannels], u[kStepChannels], sum[kStepChannels];
    for (int stream = 0; stream < 3; stream++) {
      const int64_t column = (head * 3 + stream) * shape.head_width + c - head * shape.head_width;
      fir(taps, n, weight + column * taps, bias + column, z + column, past + column * before, x[stream]);
    }
    for (int i = 0; i < n; i++) u[i] = x[1][i] * x[2][i], sum[i] = widen(skip[c + i]) * u[i];
    if (group_channels == 1) {
      scan(shape.modes, n, poles + c * width, residues + c * width, u, state + c * width, sum);
    } else {
      for (int i = 0; i < n; i++) {
        const int64_t row = (c + i) / group_channels * width;
        scan(shape.modes, 1, poles + row, residues + row, u + i, state + (c + i) * width, sum + i);
      }
    }
    for (int i = 0; i < n; i++) y[c + i] = narrow<T>(x[0][i] * sum[i]);
  }
}

template <class T, class F, class D>
static void step_of(const Step& s) {
  const Shape& shape = s.shape;
  // Waking a second thread costs some ten microseconds, as much as this many channels.
  constexpr int64_t kChannelsPerThread = 16384;
  const int64_t heads = shape.channels / shape.head_width, parts = divide_up(shape.head_width, kChannelsPerThread);
  const int64_t threads = smaller(shape.threads, 1 + shape.batch * shape.channels / kChannelsPerThread);
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t batch = 0; batch < shape.batch; batch++)
    for (int64_t head = 0; head < heads; head++)
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = head * shape.head_width;
        step_channels<T, F, D>(s, batch, first + shape.head_width * part / parts,
                               first + shape.head_width * (part + 1) / parts);
      }
}

template <class T>
static void step(const Step& s) {
  using W = Work<T>;
  if constexpr (sizeof(T) == 2) {
    const bool narrow_fir = s.fir_element == Element::bfloat16, narrow_skip = s.skip_element == Element::bfloat16;
    if (narrow_fir && narrow_skip) return step_of<T, T, T>(s);
    if (narrow_fir) return step_of<T, T, W>(s);
    if (narrow_skip) return step_of<T, W, T>(s);
  }
  step_of<T, W, W>(s);
}

}  // namespace stripedrag::STRIPEDRAG_ISA
