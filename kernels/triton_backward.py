"""The Hyena operator backward, in Triton, over the chunks of `triton_forward.py`.

With g = dy x2, f = Re Σ R s + D u, and λ_t = conj(R) g_t + a_t, the gradient that reaches s_t, of which
a_t = conj(p) λ_{t+1} comes from later ones (a_{L-1} is the gradient of the last state):

    chunk_adjoints      as chunk_states, from the right          reads x2 and dy
    carry               as above, with conj(p), from the right
    gate_gradients      dx2 = dy f; dR = Σ g conj(s), dD = Σ g u, dw and db of x2's FIR: forward in time
    input_gradients     du = D g + Re λ, dx1 = du v, dv = du x1; dp = Σ λ_t conj(s_{t-1}), dw and db of theirs: backward

dz is the transposed FIR of these, dz_t = Σ_m w_{K-1-m} dc_{t+m}, for which a program walks K-1 tokens past the end of
its chunk; the chunks of λ lie K-1 tokens later for that. dp needs no s_t: within a chunk that s enters with S, it is
conj(S) μ_{first-1} + Σ_j u_j μ_j with μ_j = λ_{j+1} + conj(p) μ_{j+1}, which runs backward as λ does.

Sums over a chunk are a program's own and are added up by torch. Shapes: states and adjoints of chunks (B, C, N, 2, H),
sums (B, C, …, H).
"""

import triton
import triton.language as tl

from stripedrag.kernels.triton_rows import (
    SIZES,
    advanced,
    convolved,
    earlier,
    emitted,
    filters_of,
    is_real,
    later,
    modes_at,
    place_of,
    put_modes,
    row_of,
    system_of,
    taps_of,
    three_of,
    window_of,
    windows_of,
    zeros,
)


@triton.jit
def _receded(xr, xi, pr, pi, br, bi):
    """conj(p) x + b, as fused multiply-adds."""
    return pr * xr + (pi * xi + br), pr * xi + (bi - pi * xr)


@triton.jit
def _arriving(adjoints, place, H, dlast, h, is_last, ok, N: tl.constexpr, COUNT: tl.constexpr, WORK: tl.constexpr):
    """a at the end of a chunk (N, 2, H): of the last, the gradient (H, N, 2) of the state after the sequence."""
    carried = modes_at(adjoints + place, H, ok & (not is_last), COUNT, WORK)
    given = modes_at(dlast + h * (2 * N), 1, ok & is_last, COUNT, WORK)
    found = ()
    for i in tl.static_range(2 * COUNT):
        found = found + (carried[i] + given[i],)
    return found


@triton.jit
def _with_taps(dw, dc, window, now, K: tl.constexpr):
    """The gradient of the taps, Σ_t dc_t z_{t-K+1+k}."""
    added = ()
    for k in tl.static_range(K - 1):
        added = added + (dw[k] + dc * window[k],)
    return added + (dw[K - 1] + dc * now,)


@triton.jit
def _gate_row(
    raw, k2, k1, kv, s, ahead, dr, dskip, dw, db, w2, w1, wv, b2, b1, bv, p, r, skip, is_row,
    N: tl.constexpr, K: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """The x2 column of dz of K-1 rows ago and all that is carried, after a row of z and dy; its part of the sums where
    it COUNTS.
    """
    x2 = convolved(k2, raw[0], w2, b2, K)
    u = convolved(k1, raw[1], w1, b1, K) * convolved(kv, raw[2], wv, bv, K)
    u = tl.where(is_row, u, 0.0)
    s = advanced(s, p, u, N)
    dc = raw[3] * emitted(s, r, skip, u, N)
    if COUNTS:
        g = raw[3] * x2
        re, im = (), ()
        for n in tl.static_range(N):
            re = re + (dr[n] + g * s[n],)
            im = im + (dr[N + n] - g * s[N + n],)
        dr = re + im
        dskip += g * u
        dw = _with_taps(dw, dc, k2, raw[0], K)
        db += dc
    dz2 = w2[0] * dc
    for m in tl.static_range(K - 1):
        dz2 += w2[K - 1 - m] * ahead[m]
    return (
        dz2, later(k2, raw[0], K), later(k1, raw[1], K), later(kv, raw[2], K), s, later(ahead, dc, K),
        dr, dskip, dw, db,
    )  # fmt: skip


@triton.jit
def _gate_raw(row, dy, t, L, column, W, ok, real, MASKED: tl.constexpr, WORK: tl.constexpr):
    """x2, x1, v and dy of a row."""
    kept = ok & is_real(real, t, L, MASKED)
    return three_of(row, column, W, kept, WORK) + (tl.load(dy, mask=kept, other=0.0).to(WORK),)


@triton.jit
def _put_row(dz, value, t, first, ok, real, L, MASKED: tl.constexpr):
    """Row t of a column of dz, from `first` on."""
    if MASKED:
        kept = tl.where(is_real(real, t, L, MASKED), value, 0.0)
    else:
        kept = value
    tl.store(dz, kept.to(dz.dtype.element_ty), mask=ok & (t >= first))


@triton.jit
def _put_early(dbefore, value, t, column, ok, K: tl.constexpr):
    """A column of the given FIR state's gradient (3H, K-1), in the row that is t < 0."""
    if K > 1:
        early = ok & (t < 0) & (t > -K)
        tl.store(dbefore + column * (K - 1) + (t + K - 1), value.to(dbefore.dtype.element_ty), mask=early)


@triton.jit(do_not_specialize=SIZES)
def gate_gradients(
    z, before, real, fir_weight, fir_bias, poles, residues, skips, states, dy, dz, dbefore, sums,
    L, H, W, G, C, batch_stride, row_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The x2 columns of dz (B, L, 3H) and of the given FIR state's gradient; sums of dR (2N), dD, dw (K) and db, each
    of H. Grid B C blocks.
    """
    b, chunk, h, ok = place_of(H, C, BLOCK)
    z += b * batch_stride
    before += b * 3 * H * (K - 1)
    dbefore += b * 3 * H * (K - 1)
    real += b * L
    column, w2, w1, wv, b2, b1, bv = filters_of(fir_weight, fir_bias, h, W, ok, K, WORK)
    skip = tl.load(skips + h, mask=ok, other=0.0).to(WORK)
    p, r = system_of(poles, h, ok, H, G, N, N, WORK), system_of(residues, h, ok, H, G, N, N, WORK)
    first = chunk * T
    stop = tl.minimum(first + T, L)
    k2, k1, kv = windows_of(z, before, row_stride, first - (K - 1), L, column, W, ok, real, K, MASKED, WORK)
    s = modes_at(states + ((b * C + chunk) * (2 * N)) * H + h, H, ok, N, WORK)
    ahead = zeros(K - 1, BLOCK, WORK)  # dc of the K-1 rows before t
    dr, dw = zeros(2 * N, BLOCK, WORK), zeros(K, BLOCK, WORK)
    dskip, db = tl.zeros([BLOCK], WORK), tl.zeros([BLOCK], WORK)
    z += first.to(tl.int64) * row_stride
    dy += (b * L + first) * H + h
    dz += (b * L + first - (K - 1)) * (3 * H) + column
    whole = first + (stop - first) // ROWS * ROWS
    for t in range(first, whole, ROWS):
        rows = ()
        for j in tl.static_range(ROWS):
            rows = rows + (_gate_raw(z, dy + j * H, t + j, L, column, W, ok, real, MASKED, WORK),)
            z += row_stride
        for j in tl.static_range(ROWS):
            dz2, k2, k1, kv, s, ahead, dr, dskip, dw, db = _gate_row(
                rows[j], k2, k1, kv, s, ahead, dr, dskip, dw, db, w2, w1, wv, b2, b1, bv, p, r, skip,
                is_real(real, t + j, L, MASKED), N, K, True,
            )  # fmt: skip
            e = t + j - (K - 1)
            _put_row(dz + j * (3 * H), dz2, e, first, ok, real, L, MASKED)
            _put_early(dbefore, dz2, e, column, ok, K)
        dy += ROWS * H
        dz += ROWS * (3 * H)
    for t in range(whole, stop):
        raw = _gate_raw(z, dy, t, L, column, W, ok, real, MASKED, WORK)
        dz2, k2, k1, kv, s, ahead, dr, dskip, dw, db = _gate_row(
            raw, k2, k1, kv, s, ahead, dr, dskip, dw, db, w2, w1, wv, b2, b1, bv, p, r, skip,
            is_real(real, t, L, MASKED), N, K, True,
        )  # fmt: skip
        _put_row(dz, dz2, t - (K - 1), first, ok, real, L, MASKED)
        _put_early(dbefore, dz2, t - (K - 1), column, ok, K)
        z += row_stride
        dy += H
        dz += 3 * H
    for j in tl.static_range(K - 1):  # the next chunk's, whose gradients the FIR mixes with this one's
        t = stop + j
        raw = _gate_raw(z, dy + j * H, t, L, column, W, ok, real, MASKED, WORK)
        z += row_stride
        dz2, k2, k1, kv, s, ahead, dr, dskip, dw, db = _gate_row(
            raw, k2, k1, kv, s, ahead, dr, dskip, dw, db, w2, w1, wv, b2, b1, bv, p, r, skip,
            is_real(real, t, L, MASKED), N, K, False,
        )  # fmt: skip
        _put_row(dz + j * (3 * H), dz2, t - (K - 1), first, ok, real, L, MASKED)
        _put_early(dbefore, dz2, t - (K - 1), column, ok, K)
    sums += ((b * C + chunk) * (2 * N + K + 2)) * H + h
    put_modes(sums, H, dr, ok, N)
    tl.store(sums + (2 * N) * H, dskip, mask=ok)
    for k in tl.static_range(K):
        tl.store(sums + (2 * N + 1 + k) * H, dw[k], mask=ok)
    tl.store(sums + (2 * N + 1 + K) * H, db, mask=ok)


@triton.jit
def _moved(a, g, p, r, N: tl.constexpr):
    """a of the row before, conj(p) (conj(R) g + a), in every mode."""
    re, im = (), ()
    for n in tl.static_range(N):
        ar, ai = _receded(a[n] + r[n] * g, a[N + n] - r[N + n] * g, p[n], p[N + n], 0.0, 0.0)
        re, im = re + (ar,), im + (ai,)
    return re + im


@triton.jit(do_not_specialize=SIZES)
def chunk_adjoints(
    z, before, real, fir_weight, fir_bias, poles, residues, dlast, dy, adjoints,
    L, H, W, G, C, batch_stride, row_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What each chunk but the first, K-1 tokens later, adds to the adjoint λ before it: into the place of the chunk's
    before. Grid B (C-1) blocks.
    """
    b, chunk, h, ok = place_of(H, C - 1, BLOCK)
    z += b * batch_stride
    before += b * 3 * H * (K - 1)
    real += b * L
    dlast += b * H * (2 * N)
    column2 = h // W * (3 * W) + h % W
    w2 = taps_of(fir_weight, column2, ok, K, WORK)
    b2 = tl.load(fir_bias + column2, mask=ok, other=0.0).to(WORK)
    p, r = system_of(poles, h, ok, H, G, N, N, WORK), system_of(residues, h, ok, H, G, N, N, WORK)
    end = (chunk + 1) * T + (K - 1)
    last = tl.minimum(end + T, L) - 1
    is_last = (last == L - 1) & (last >= end)
    k2 = window_of(z, before, row_stride, last - (K - 1), L, column2, ok, real, K, MASKED, WORK)
    now = row_of(z, before, row_stride, last, L, column2, ok, real, K, MASKED, WORK)
    a = modes_at(dlast + h * (2 * N), 1, ok & is_last, N, WORK)
    dy += (b * L + last) * H + h
    rest = tl.maximum(last + 1 - end, 0) % ROWS
    for back in range(0, rest):
        t = last - back
        dout = tl.load(dy, mask=ok & is_real(real, t, L, MASKED), other=0.0).to(WORK)
        a = _moved(a, dout * convolved(k2, now, w2, b2, K), p, r, N)
        now, k2 = _before1(k2, row_of(z, before, row_stride, t - K, L, column2, ok, real, K, MASKED, WORK), K)
        dy -= H
    for back in range(rest, last + 1 - end, ROWS):
        rows, outs = (), ()
        for j in tl.static_range(ROWS):
            t = last - back - j
            rows = rows + (row_of(z, before, row_stride, t - K, L, column2, ok, real, K, MASKED, WORK),)
            kept = ok & is_real(real, t, L, MASKED)
            outs = outs + (tl.load(dy - j * H, mask=kept, other=0.0).to(WORK),)
        for j in tl.static_range(ROWS):
            a = _moved(a, outs[j] * convolved(k2, now, w2, b2, K), p, r, N)
            now, k2 = _before1(k2, rows[j], K)
        dy -= ROWS * H
    put_modes(adjoints + ((b * C + chunk) * (2 * N)) * H + h, H, a, ok, N)


@triton.jit
def _before1(window, new, K: tl.constexpr):
    """A column's row and window one row earlier, `new` being the earliest."""
    if K == 1:
        return new, window
    else:
        return window[K - 2], earlier(window, new, K)


@triton.jit
def _transposed(dc, after, taps, K: tl.constexpr):
    """dz_t = Σ_m w_{K-1-m} dc_{t+m}, from dc_t and those of the K-1 rows after."""
    out = taps[K - 1] * dc
    for m in tl.static_range(1, K):
        out += taps[K - 1 - m] * after[m - 1]
    return out


@triton.jit
def _input_row(
    now, dout, k2, k1, kv, a, later1, laterv, mu, dp, dw1, db1, dwv, dbv, w2, w1, wv, b2, b1, bv, p, r, skip, is_row,
    N: tl.constexpr, K: tl.constexpr, COUNTS: tl.constexpr, INPUTS: tl.constexpr, POLES: tl.constexpr,
):  # fmt: skip
    """The x1 and v columns of a row of dz and all that is carried, before it; its part of the sums where it COUNTS."""
    x2 = convolved(k2, now[0], w2, b2, K)
    x1 = tl.where(is_row, convolved(k1, now[1], w1, b1, K), 0.0)
    v = tl.where(is_row, convolved(kv, now[2], wv, bv, K), 0.0)
    g, u = dout * x2, x1 * v
    du = skip * g
    a_re, a_im, mu_re, mu_im, added = (), (), (), (), ()
    for n in tl.static_range(N):
        re, im = a[n] + r[n] * g, a[N + n] - r[N + n] * g  # λ
        du += re
        if COUNTS and POLES:
            mr, mi = _receded(mu[n], mu[N + n], p[n], p[N + n], re, im)
            mu_re, mu_im = mu_re + (mr,), mu_im + (mi,)
        ar, ai = _receded(re, im, p[n], p[N + n], 0.0, 0.0)
        a_re, a_im = a_re + (ar,), a_im + (ai,)
    dc1, dcv = du * v, du * x1
    if COUNTS and POLES:
        for i in tl.static_range(2 * N):
            added = added + (dp[i] + u * mu[i],)
        dp, mu = added, mu_re + mu_im
    if COUNTS and INPUTS:
        dw1, dwv = _with_taps(dw1, dc1, k1, now[1], K), _with_taps(dwv, dcv, kv, now[2], K)
        db1 += dc1
        dbv += dcv
    dz1, dzv = _transposed(dc1, later1, w1, K), _transposed(dcv, laterv, wv, K)
    if INPUTS:
        later1, laterv = earlier(later1, dc1, K), earlier(laterv, dcv, K)
    return dz1, dzv, a_re + a_im, later1, laterv, mu, dp, dw1, db1, dwv, dbv


@triton.jit
def _before(k2, k1, kv, new, K: tl.constexpr):
    """The row and the windows one row earlier."""
    z2, k2 = _before1(k2, new[0], K)
    z1, k1 = _before1(k1, new[1], K)
    zv, kv = _before1(kv, new[2], K)
    return (z2, z1, zv), k2, k1, kv


@triton.jit
def _rows3(
    z, before, row_stride, t, L, column2, W, ok, real, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr
):
    return (
        row_of(z, before, row_stride, t, L, column2, ok, real, K, MASKED, WORK),
        row_of(z, before, row_stride, t, L, column2 + W, ok, real, K, MASKED, WORK),
        row_of(z, before, row_stride, t, L, column2 + 2 * W, ok, real, K, MASKED, WORK),
    )


@triton.jit(do_not_specialize=SIZES)
def input_gradients(
    z, before, real, fir_weight, fir_bias, poles, residues, skips, states, adjoints, dlast, dy, dz, dbefore, dstate,
    sums,
    L, H, W, G, C, batch_stride, row_stride,
    T: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr,
    INPUTS: tl.constexpr, POLES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The x1 and v columns of dz and of the given FIR state's gradient, the gradient of the given modal state
    (B, H, N, 2); sums of dp (2N), and of dw (K) and db of x1's and of v's, each of H. Grid B C blocks. The INPUTS'
    gradients are a launch of their own, and the POLES' one for every COUNT of N modes, whose tensors then begin with
    the first of these, where all together would want more registers than there are.
    """
    b, chunk, h, ok = place_of(H, C, BLOCK)
    z += b * batch_stride
    before += b * 3 * H * (K - 1)
    dbefore += b * 3 * H * (K - 1)
    real += b * L
    dlast += b * H * (2 * N)
    column, w2, w1, wv, b2, b1, bv = filters_of(fir_weight, fir_bias, h, W, ok, K, WORK)
    skip = tl.load(skips + h, mask=ok, other=0.0).to(WORK)
    p, r = system_of(poles, h, ok, H, G, N, COUNT, WORK), system_of(residues, h, ok, H, G, N, COUNT, WORK)
    first = chunk * T
    stop = tl.minimum(first + T, L)
    last = tl.minimum(first + T + K - 1, L) - 1
    k2, k1, kv = windows_of(z, before, row_stride, last - (K - 1), L, column, W, ok, real, K, MASKED, WORK)
    now = _rows3(z, before, row_stride, last, L, column, W, ok, real, K, MASKED, WORK)
    a = _arriving(adjoints, ((b * C + chunk) * (2 * N)) * H + h, H, dlast, h, last == L - 1, ok, N, COUNT, WORK)
    later1, laterv = zeros(K - 1, BLOCK, WORK), zeros(K - 1, BLOCK, WORK)  # dc of the K-1 rows after t
    mu, dp = zeros(2 * COUNT, BLOCK, WORK), zeros(2 * COUNT, BLOCK, WORK)
    dw1, dwv = zeros(K, BLOCK, WORK), zeros(K, BLOCK, WORK)
    db1, dbv = tl.zeros([BLOCK], WORK), tl.zeros([BLOCK], WORK)
    dy += (b * L + last) * H + h
    dz += (b * L + stop - 1) * (3 * H) + column + W
    for back in range(0, last + 1 - stop):  # the next chunk's, whose gradients the FIR mixes with this one's
        t = last - back
        is_row = is_real(real, t, L, MASKED)
        dout = tl.load(dy, mask=ok & is_row, other=0.0).to(WORK)
        _, _, a, later1, laterv, mu, dp, dw1, db1, dwv, dbv = _input_row(
            now, dout, k2, k1, kv, a, later1, laterv, mu, dp, dw1, db1, dwv, dbv, w2, w1, wv, b2, b1, bv, p, r, skip,
            is_row, COUNT, K, False, INPUTS, POLES,
        )  # fmt: skip
        new = _rows3(z, before, row_stride, t - K, L, column, W, ok, real, K, MASKED, WORK)
        now, k2, k1, kv = _before(k2, k1, kv, new, K)
        dy -= H
    rest = (stop - first) % ROWS
    for back in range(0, rest):
        t = stop - 1 - back
        is_row = is_real(real, t, L, MASKED)
        dout = tl.load(dy, mask=ok & is_row, other=0.0).to(WORK)
        dz1, dzv, a, later1, laterv, mu, dp, dw1, db1, dwv, dbv = _input_row(
            now, dout, k2, k1, kv, a, later1, laterv, mu, dp, dw1, db1, dwv, dbv, w2, w1, wv, b2, b1, bv, p, r, skip,
            is_row, COUNT, K, True, INPUTS, POLES,
        )  # fmt: skip
        if INPUTS:
            _put_row(dz, dz1, t, first, ok, real, L, MASKED)
            _put_row(dz + W, dzv, t, first, ok, real, L, MASKED)
        new = _rows3(z, before, row_stride, t - K, L, column, W, ok, real, K, MASKED, WORK)
        now, k2, k1, kv = _before(k2, k1, kv, new, K)
        dy -= H
        dz -= 3 * H
    for back in range(rest, stop - first, ROWS):
        rows, outs = (), ()
        for j in tl.static_range(ROWS):
            t = stop - 1 - back - j
            rows = rows + (_rows3(z, before, row_stride, t - K, L, column, W, ok, real, K, MASKED, WORK),)
            kept = ok & is_real(real, t, L, MASKED)
            outs = outs + (tl.load(dy - j * H, mask=kept, other=0.0).to(WORK),)
        for j in tl.static_range(ROWS):
            t = stop - 1 - back - j
            dz1, dzv, a, later1, laterv, mu, dp, dw1, db1, dwv, dbv = _input_row(
                now, outs[j], k2, k1, kv, a, later1, laterv, mu, dp, dw1, db1, dwv, dbv, w2, w1, wv, b2, b1, bv, p, r,
                skip, is_real(real, t, L, MASKED), COUNT, K, True, INPUTS, POLES,
            )  # fmt: skip
            if INPUTS:
                _put_row(dz - j * (3 * H), dz1, t, first, ok, real, L, MASKED)
                _put_row(dz - j * (3 * H) + W, dzv, t, first, ok, real, L, MASKED)
            now, k2, k1, kv = _before(k2, k1, kv, rows[j], K)
        dy -= ROWS * H
        dz -= ROWS * (3 * H)
    sums += ((b * C + chunk) * (2 * N + 2 * K + 2)) * H + h
    if POLES:
        s = modes_at(states + ((b * C + chunk) * (2 * N)) * H + h, H, ok, COUNT, WORK)
        re, im = (), ()
        for n in tl.static_range(COUNT):
            dr, di = _receded(mu[n], mu[COUNT + n], s[n], s[COUNT + n], dp[n], dp[COUNT + n])  # + conj(S) μ
            re, im = re + (dr,), im + (di,)
        put_modes(sums, H, re + im, ok, COUNT)
    if INPUTS:
        begins = ok & (chunk == 0)
        for j in tl.static_range(K - 1):  # what the FIR's given state had a part in
            zero = tl.zeros([BLOCK], WORK)
            dz1, dzv = _transposed(zero, later1, w1, K), _transposed(zero, laterv, wv, K)
            later1, laterv = earlier(later1, zero, K), earlier(laterv, zero, K)
            place = dbefore + (K - 2 - j)
            tl.store(place + (column + W) * (K - 1), dz1.to(dbefore.dtype.element_ty), mask=begins)
            tl.store(place + (column + 2 * W) * (K - 1), dzv.to(dbefore.dtype.element_ty), mask=begins)
        put_modes(dstate + (b * H + h) * (2 * N), 1, a, begins, N)
        for k in tl.static_range(K):
            tl.store(sums + (2 * N + k) * H, dw1[k], mask=ok)
            tl.store(sums + (2 * N + K + 1 + k) * H, dwv[k], mask=ok)
        tl.store(sums + (2 * N + K) * H, db1, mask=ok)
        tl.store(sums + (2 * N + 2 * K + 1) * H, dbv, mask=ok)
