"""The Hyena operator forward, and its decode step, in Triton. Knows pointers and sizes; `gpu.py` launches it.

Time is cut into chunks of T tokens, a power of two, that run beside each other. A thread has a channel, and takes a
chunk's tokens one after the other with everything that it carries in registers; nothing is exchanged between threads,
so there is no shared memory, no atomic and one order of summation. With S_c the state that enters chunk c:

    chunk_states    E_c = Σ_{t in c} p^{last-t} u_t              reads x1 and v
    carry           S_{c+1} = p^T S_c + E_c                      in float64, from the given state on
    outputs         s_t = p s_{t-1} + u_t, y_t                   reads z, writes y and the last state

Shapes: z (B, L, 3H) with strides, states of chunks (B, C, N, 2, H).
"""

import triton
import triton.language as tl

from stripedrag.kernels.triton_rows import (
    SIZES,
    advanced,
    convolved,
    emitted,
    filters_of,
    is_real,
    later,
    modes_at,
    place_of,
    put_modes,
    system_of,
    taps_of,
    three_of,
    window_of,
    windows_of,
    zeros,
)


@triton.jit(do_not_specialize=SIZES)
def chunk_states(
    z, before, real, fir_weight, fir_bias, poles, states,
    L, H, W, G, C, batch_stride, row_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What each chunk but the last adds to the state after it, where the next chunk's goes. Grid B (C-1) blocks."""
    b, chunk, h, ok = place_of(H, C - 1, BLOCK)
    z += b * batch_stride
    before += b * 3 * H * (K - 1)
    real += b * L
    column1 = h // W * (3 * W) + h % W + W
    columnv = column1 + W
    w1, wv = taps_of(fir_weight, column1, ok, K, WORK), taps_of(fir_weight, columnv, ok, K, WORK)
    b1 = tl.load(fir_bias + column1, mask=ok, other=0.0).to(WORK)
    bv = tl.load(fir_bias + columnv, mask=ok, other=0.0).to(WORK)
    p = system_of(poles, h, ok, H, G, N, N, WORK)
    first = chunk * T
    k1 = window_of(z, before, row_stride, first - (K - 1), L, column1, ok, real, K, MASKED, WORK)
    kv = window_of(z, before, row_stride, first - (K - 1), L, columnv, ok, real, K, MASKED, WORK)
    tl.static_assert(T % ROWS == 0)
    s = zeros(2 * N, BLOCK, WORK)
    at = z + first.to(tl.int64) * row_stride
    for t in range(first, first + T, ROWS):
        rows = ()  # asked for together: their addresses depend on nothing that is computed
        for j in tl.static_range(ROWS):
            kept = ok & is_real(real, t + j, L, MASKED) if MASKED else ok
            rows = rows + (
                tl.load(at + column1, mask=kept, other=0.0).to(WORK),
                tl.load(at + columnv, mask=kept, other=0.0).to(WORK),
            )
            at += row_stride
        for j in tl.static_range(ROWS):
            u = convolved(k1, rows[2 * j], w1, b1, K) * convolved(kv, rows[2 * j + 1], wv, bv, K)
            if MASKED:
                u = tl.where(is_real(real, t + j, L, MASKED), u, 0.0)
            s = advanced(s, p, u, N)
            k1, kv = later(k1, rows[2 * j], K), later(kv, rows[2 * j + 1], K)
    put_modes(states + ((b * C + chunk + 1) * (2 * N)) * H + h, H, s, ok, N)


@triton.jit(do_not_specialize=("C", "G", "rows", "first", "step"))
def carry(
    states, poles, H, G, C, rows, first, step,
    SQUARINGS: tl.constexpr, N: tl.constexpr, CONJUGATE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Chunks' states from what each adds: X_{c+step} += p^T X_c, T = 2^SQUARINGS, from `first` on. Grid B N blocks.

    In float64, since a power by squaring is off by as many roundings as its exponent, which a slow pole would show.
    """
    b, n, h, ok = place_of(H, N, BLOCK)
    system = (h // (H // G) * N + n) * 2
    pr = tl.load(poles + system, mask=ok, other=0.0).to(tl.float64)
    pi = tl.load(poles + system + 1, mask=ok, other=0.0).to(tl.float64)
    if CONJUGATE:
        pi = -pi
    for _ in tl.static_range(SQUARINGS):
        pr, pi = pr * pr - pi * pi, 2 * pr * pi
    stride = step * (2 * N) * H
    at = states + ((b * C + first) * (2 * N) + 2 * n) * H + h
    xr = tl.load(at, mask=ok, other=0.0).to(tl.float64)
    xi = tl.load(at + H, mask=ok, other=0.0).to(tl.float64)
    for c in range(0, rows, ROWS):
        added = ()
        for j in tl.static_range(ROWS):
            there = ok & (c + j < rows)
            added = added + (
                tl.load(at + (j + 1) * stride, mask=there, other=0.0).to(tl.float64),
                tl.load(at + (j + 1) * stride + H, mask=there, other=0.0).to(tl.float64),
            )
        for j in tl.static_range(ROWS):
            there = ok & (c + j < rows)
            xr, xi = pr * xr - pi * xi + added[2 * j], pr * xi + pi * xr + added[2 * j + 1]
            tl.store(at + (j + 1) * stride, xr.to(states.dtype.element_ty), mask=there)
            tl.store(at + (j + 1) * stride + H, xi.to(states.dtype.element_ty), mask=there)
        at += ROWS * stride


@triton.jit
def _output(
    raw, k2, k1, kv, s, w2, w1, wv, b2, b1, bv, p, r, skip, is_row,
    N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """y, and the windows and the modes after a row."""
    x2 = convolved(k2, raw[0], w2, b2, K)
    u = convolved(k1, raw[1], w1, b1, K) * convolved(kv, raw[2], wv, bv, K)
    if MASKED:
        u, x2 = tl.where(is_row, u, 0.0), tl.where(is_row, x2, 0.0)
    s = advanced(s, p, u, N)
    y = x2 * emitted(s, r, skip, u, N)
    return y, later(k2, raw[0], K), later(k1, raw[1], K), later(kv, raw[2], K), s


@triton.jit(do_not_specialize=SIZES)
def outputs(
    z, before, real, fir_weight, fir_bias, poles, residues, skips, states, y, last,
    L, H, W, G, C, batch_stride, row_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y (B, L, H), and from the last chunks the state (B, H, N, 2) after the sequence. Grid B C blocks."""
    b, chunk, h, ok = place_of(H, C, BLOCK)
    z += b * batch_stride
    before += b * 3 * H * (K - 1)
    real += b * L
    column, w2, w1, wv, b2, b1, bv = filters_of(fir_weight, fir_bias, h, W, ok, K, WORK)
    skip = tl.load(skips + h, mask=ok, other=0.0).to(WORK)
    p, r = system_of(poles, h, ok, H, G, N, N, WORK), system_of(residues, h, ok, H, G, N, N, WORK)
    first = chunk * T
    stop = tl.minimum(first + T, L)
    k2, k1, kv = windows_of(z, before, row_stride, first - (K - 1), L, column, W, ok, real, K, MASKED, WORK)
    s = modes_at(states + ((b * C + chunk) * (2 * N)) * H + h, H, ok, N, WORK)
    at = z + first.to(tl.int64) * row_stride
    to = y + (b * L + first) * H + h
    whole = first + (stop - first) // ROWS * ROWS
    for t in range(first, whole, ROWS):
        rows = ()
        for j in tl.static_range(ROWS):
            kept = ok & is_real(real, t + j, L, MASKED) if MASKED else ok
            rows = rows + (three_of(at, column, W, kept, WORK),)
            at += row_stride
        for j in tl.static_range(ROWS):
            is_row = is_real(real, t + j, L, MASKED)
            out, k2, k1, kv, s = _output(
                rows[j], k2, k1, kv, s, w2, w1, wv, b2, b1, bv, p, r, skip, is_row, N, K, MASKED
            )
            tl.store(to + j * H, out.to(y.dtype.element_ty), mask=ok)
        to += ROWS * H
    for t in range(whole, stop):
        is_row = is_real(real, t, L, MASKED)
        raw = three_of(at, column, W, ok & is_row, WORK)
        out, k2, k1, kv, s = _output(raw, k2, k1, kv, s, w2, w1, wv, b2, b1, bv, p, r, skip, is_row, N, K, MASKED)
        tl.store(to, out.to(y.dtype.element_ty), mask=ok)
        at += row_stride
        to += H
    put_modes(last + (b * H + h) * (2 * N), 1, s, ok & (stop == L), N)


@triton.jit(do_not_specialize=("G",))
def step(
    z, fir_weight, fir_bias, poles, residues, skips, fir_state, iir_state, y, H, W, G,
    N: tl.constexpr, K: tl.constexpr, WORK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (B, H) for one token, and both states in their places. Grid B blocks."""
    b, _, h, ok = place_of(H, 1, BLOCK)
    z += b * 3 * H
    fir_state += b * 3 * H * (K - 1)
    p, r = system_of(poles, h, ok, H, G, N, N, WORK), system_of(residues, h, ok, H, G, N, N, WORK)
    gates = ()
    for part in tl.static_range(3):
        column = h // W * (3 * W) + h % W + part * W
        now = tl.load(z + column, mask=ok, other=0.0)
        taps = taps_of(fir_weight, column, ok, K, WORK)
        c = tl.load(fir_bias + column, mask=ok, other=0.0).to(WORK) + taps[K - 1] * now.to(WORK)
        at = fir_state + column * (K - 1)
        for k in tl.static_range(K - 1):
            old = tl.load(at + k, mask=ok, other=0.0)
            c += taps[k] * old.to(WORK)
            if k > 0:
                tl.store(at + k - 1, old, mask=ok)
        if K > 1:
            tl.store(at + K - 2, now, mask=ok)
        gates = gates + (c,)
    u = gates[1] * gates[2]
    place = iir_state + (b * H + h) * (2 * N)
    s = advanced(modes_at(place, 1, ok, N, WORK), p, u, N)
    put_modes(place, 1, s, ok, N)
    skip = tl.load(skips + h, mask=ok, other=0.0).to(WORK)
    tl.store(y + b * H + h, (gates[0] * emitted(s, r, skip, u, N)).to(y.dtype.element_ty), mask=ok)
