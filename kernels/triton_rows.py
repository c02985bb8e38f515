"""How the Triton kernels take a row of z, the FIR, and the modes: device functions that forward and backward share.

A thread has a channel; what it carries are tuples: K taps, a window of K-1 rows, the real parts of N modes and then the
imaginary ones (so that a compiler which packs neighbours, as for sm_100, packs what is multiplied alike). `real` (B, L)
bytes says which rows are no padding, and is read where MASKED. WORK is the dtype of the arithmetic.
"""

import triton
import triton.language as tl

SIZES = ("L", "C", "G")  # no kernel is compiled anew for a 1, or a multiple of 16


@triton.jit
def place_of(H, C, BLOCK: tl.constexpr):
    """Batch row, chunk, channels and which of these exist; neighbouring programs have neighbouring channels."""
    blocks = tl.cdiv(H, BLOCK)
    program = tl.program_id(0)
    h = program % blocks * BLOCK + tl.arange(0, BLOCK)
    program = program // blocks
    return (program // C).to(tl.int64), program % C, h, h < H


@triton.jit
def system_of(numbers, h, ok, H, G, N: tl.constexpr, COUNT: tl.constexpr, WORK: tl.constexpr):
    """The first COUNT poles or residues of (G, N, 1, 2), a channel's."""
    return modes_at(numbers + h // (H // G) * (2 * N), 1, ok, COUNT, WORK)


@triton.jit
def taps_of(weight, column, ok, K: tl.constexpr, WORK: tl.constexpr):
    """A column's taps of (3H, 1, K), the oldest row's first."""
    found = ()
    for k in tl.static_range(K):
        found = found + (tl.load(weight + column * K + k, mask=ok, other=0.0).to(WORK),)
    return found


@triton.jit
def filters_of(fir_weight, fir_bias, h, W, ok, K: tl.constexpr, WORK: tl.constexpr):
    """The x2 column of channels, with x1's W and v's 2W behind it, and the taps and biases of the three."""
    column = h // W * (3 * W) + h % W
    w2, w1 = taps_of(fir_weight, column, ok, K, WORK), taps_of(fir_weight, column + W, ok, K, WORK)
    wv = taps_of(fir_weight, column + 2 * W, ok, K, WORK)
    b2 = tl.load(fir_bias + column, mask=ok, other=0.0).to(WORK)
    b1 = tl.load(fir_bias + column + W, mask=ok, other=0.0).to(WORK)
    bv = tl.load(fir_bias + column + 2 * W, mask=ok, other=0.0).to(WORK)
    return column, w2, w1, wv, b2, b1, bv


@triton.jit
def three_of(row, column, W, kept, WORK: tl.constexpr):
    """x2, x1 and v of a row of z."""
    return (
        tl.load(row + column, mask=kept, other=0.0).to(WORK),
        tl.load(row + column + W, mask=kept, other=0.0).to(WORK),
        tl.load(row + column + 2 * W, mask=kept, other=0.0).to(WORK),
    )


@triton.jit
def modes_at(place, stride, ok, N: tl.constexpr, WORK: tl.constexpr):
    """N complex numbers of a channel, which lie as (N, 2) with a stride."""
    found = ()
    for i in tl.static_range(2 * N):
        found = found + (tl.load(place + (i % N * 2 + i // N) * stride, mask=ok, other=0.0).to(WORK),)
    return found


@triton.jit
def put_modes(place, stride, modes, ok, N: tl.constexpr):
    """Such numbers, to where they lie."""
    for i in tl.static_range(2 * N):
        tl.store(place + (i % N * 2 + i // N) * stride, modes[i], mask=ok)


@triton.jit
def is_real(real, t, L, MASKED: tl.constexpr):
    """Whether a row is one of the sequence and no padding."""
    inside = (t >= 0) & (t < L)
    if MASKED:
        return inside & (tl.load(real + t, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def row_of(z, before, row_stride, t, L, column, ok, real, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr):
    """A column's number in row t of a batch row's z; of the given FIR state (3H, K-1) where t < 0; else 0."""
    kept = ok & is_real(real, t, L, MASKED)
    value = tl.load(z + t.to(tl.int64) * row_stride + column, mask=kept, other=0.0).to(WORK)
    if K > 1:
        early = ok & (t < 0) & (t > -K)
        value += tl.load(before + column * (K - 1) + (t + K - 1), mask=early, other=0.0).to(WORK)
    return value


@triton.jit
def window_of(z, before, row_stride, t, L, column, ok, real, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr):
    """A column's numbers in the K-1 rows from t on; one that counts for nothing where K is 1."""
    found = ()
    if K == 1:
        found = (tl.zeros_like(column).to(WORK),)
    for k in tl.static_range(K - 1):
        found = found + (row_of(z, before, row_stride, t + k, L, column, ok, real, K, MASKED, WORK),)
    return found


@triton.jit
def windows_of(
    z, before, row_stride, t, L, column, W, ok, real, K: tl.constexpr, MASKED: tl.constexpr, WORK: tl.constexpr
):
    """The windows of x2, x1 and v."""
    return (
        window_of(z, before, row_stride, t, L, column, ok, real, K, MASKED, WORK),
        window_of(z, before, row_stride, t, L, column + W, ok, real, K, MASKED, WORK),
        window_of(z, before, row_stride, t, L, column + 2 * W, ok, real, K, MASKED, WORK),
    )


@triton.jit
def convolved(window, now, taps, bias, K: tl.constexpr):
    """c_t = Σ_k w_k z_{t-K+1+k} + b."""
    c = bias + taps[K - 1] * now
    for k in tl.static_range(K - 1):
        c += taps[k] * window[k]
    return c


@triton.jit
def later(window, new, K: tl.constexpr):
    """The window of K-1 rows that ends with the row `new`."""
    moved = ()
    for k in tl.static_range(1, K - 1):
        moved = moved + (window[k],)
    return moved + (new,)


@triton.jit
def earlier(window, new, K: tl.constexpr):
    """The window of K-1 rows that begins with the row `new`."""
    moved = (new,)
    for k in tl.static_range(0, K - 2):
        moved = moved + (window[k],)
    return moved


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr, WORK: tl.constexpr):
    """So many zeros a channel, at least one: a tuple that a loop carries is never empty."""
    found = (tl.zeros([BLOCK], WORK),)
    for _ in tl.static_range(COUNT - 1):
        found = found + (tl.zeros([BLOCK], WORK),)
    return found


@triton.jit
def advanced(s, p, u, N: tl.constexpr):
    """p s + u, in every mode."""
    re, im = (), ()
    for n in tl.static_range(N):
        re = re + (p[n] * s[n] + (u - p[N + n] * s[N + n]),)  # two fused multiply-adds
        im = im + (p[n] * s[N + n] + p[N + n] * s[n],)
    return re + im


@triton.jit
def emitted(s, r, skip, u, N: tl.constexpr):
    """f = Re Σ R s + D u."""
    f = skip * u
    for n in tl.static_range(N):
        f += r[n] * s[n]
        f -= r[N + n] * s[N + n]
    return f
