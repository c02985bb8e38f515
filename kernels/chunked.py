"""The `torch` backend: the Hyena operator as batched matrix products over chunks of time, differentiable, any device.

A chunk of C tokens is a lower-triangular Toeplitz product with the impulse response inside, and a modal state between
(the duality of Mamba-2, Dao & Gu 2024, for a diagonal complex system). With S the state that enters a chunk:

    y_i = Σ_{j≤i} h_{i-j} u_j + Re Σ_n R_n p_n^{i+1} S_n      h_t = Re Σ_n R_n p_n^t, and D added to h_0
    S'  = p^C S + Σ_j p^{C-1-j} u_j

O(B L (C + N) H) operations and O(H (C² + B · segment)) extra memory: no FFT of length 2L, whose fp32 error also
grows with L.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stripedrag.kernels.operands import (
    FilterParameters,
    HyenaState,
    per_channel,
    split_channels,
    working_dtype,
)

CHUNK_TOKENS = 64  # the Toeplitz work grows with it, the scan over chunks shrinks: 32 and 128 were slower on a CPU
SEGMENT_CHUNKS = 64  # chunks whose buffers live at once


def refuses(device: torch.device, taps: int = 3, modes: int = 1) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    del taps, modes
    if device.type == "mps":
        return "it builds its tables in float64, which MPS does not have"
    return None


def hyena_filter(
    z: Tensor, parameters: FilterParameters, state: HyenaState, padding_mask: Tensor | None
) -> tuple[Tensor, HyenaState]:
    """y (B, L, H) and the state after the last token, for z (B, L, 3H); differentiable in every input."""
    work, length = working_dtype(z), z.shape[1]
    tables = _Tables(parameters, min(CHUNK_TOKENS, length), work)
    outputs = []
    for start in range(0, length, SEGMENT_CHUNKS * CHUNK_TOKENS):
        stop = min(start + SEGMENT_CHUNKS * CHUNK_TOKENS, length)
        mask = None if padding_mask is None else padding_mask[:, start:stop, None]
        y, state = _segment(z[:, start:stop], parameters, state, mask, tables)
        outputs.append(y)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def hyena_step(z: Tensor, parameters: FilterParameters, state: HyenaState) -> Tensor:
    """y (B, H) for one token z (B, 3H); the state is overwritten."""
    work = working_dtype(z)
    window = torch.cat([state.fir, z.unsqueeze(-1)], dim=-1)
    state.fir.copy_(window[..., 1:])
    c = torch.addcmul(parameters.fir_bias.to(work), window[..., -1].to(work), parameters.fir_weight[:, 0, -1].to(work))
    for k in range(parameters.taps - 1):
        c.addcmul_(window[..., k].to(work), parameters.fir_weight[:, 0, k].to(work))
    x2, x1, v = split_channels(c, parameters.heads)
    u = x1 * v
    modes = torch.view_as_complex(state.iir)
    modes.mul_(per_channel(parameters.poles, parameters.channels, work)).add_(u.unsqueeze(-1))
    residues = per_channel(parameters.residues, parameters.channels, work)
    return (x2 * torch.addcmul((residues * modes).real.sum(-1), parameters.skip.to(work), u)).to(z.dtype)


class _Tables:
    """What depends on the parameters alone, for chunks of up to `tokens` tokens.

    Powers are taken in float64 by doubling: exact where a pole is 0 (a formula through log p is not) and without the
    error that repeated squaring in float32 piles up near the unit circle.
    """

    def __init__(self, parameters: FilterParameters, tokens: int, work: torch.dtype) -> None:
        channels = parameters.channels
        residues = per_channel(parameters.residues, channels, torch.float64).unsqueeze(-1)
        powers = _powers(per_channel(parameters.poles, channels, torch.float64), tokens)  # (H, N, tokens + 1)
        response = (residues * powers[..., :-1]).real.sum(1)
        response = torch.cat([response[:, :1] + parameters.skip.to(torch.float64)[:, None], response[:, 1:]], dim=1)
        self.tokens = tokens
        self.powers = powers
        self.toeplitz = _toeplitz(response.to(work))  # (H, C, C)
        self.gather = _real_rows(powers[..., :-1].flip(-1)).to(work)  # (H, 2N, C): chunk → its end state
        emit = (residues * powers[..., 1:]).conj()  # Re(a s) = Re a Re s - Im a Im s
        self.emit = _real_rows(emit).transpose(1, 2).to(work)  # (H, C, 2N): entering state → outputs


def _segment(
    z: Tensor, parameters: FilterParameters, state: HyenaState, mask: Tensor | None, tables: _Tables
) -> tuple[Tensor, HyenaState]:
    work, length, taps = working_dtype(z), z.shape[1], parameters.taps
    if mask is not None:
        z = z.masked_fill(~mask, 0)
    rows = torch.cat([state.fir.transpose(1, 2), z], dim=1)  # (B, K-1+L, 3H)
    weight = parameters.fir_weight.to(work)
    c = parameters.fir_bias.to(work) + rows[:, taps - 1 :].to(work) * weight[:, 0, -1]
    for k in range(taps - 1):
        c = c + rows[:, k : k + length].to(work) * weight[:, 0, k]
    if mask is not None:
        c = c.masked_fill(~mask, 0)
    x2, x1, v = split_channels(c, parameters.heads)
    u = x1 * v

    whole = length - length % tables.tokens
    parts, modes = [], torch.view_as_complex(state.iir.to(work).contiguous()).permute(1, 2, 0)  # (H, N, B)
    for piece, chunk in ((u[:, :whole], tables.tokens), (u[:, whole:], length - whole)):
        if piece.shape[1]:
            out, modes = _chunks(piece, modes, chunk, tables)
            parts.append(out)
    filtered = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    after = HyenaState(
        rows[:, length:].transpose(1, 2).contiguous(), torch.view_as_real(modes.permute(2, 0, 1)).contiguous()
    )
    return (x2 * filtered).to(z.dtype), after


def _chunks(u: Tensor, modes: Tensor, chunk: int, tables: _Tables) -> tuple[Tensor, Tensor]:
    """Outputs like u (B, M·chunk, H), and the state after it, from the entering state `modes` (H, N, B)."""
    batch, length, channels = u.shape
    count = length // chunk
    columns = u.view(batch, count, chunk, channels).permute(3, 2, 0, 1).reshape(channels, chunk, batch * count)
    ends = torch.bmm(tables.gather[..., tables.tokens - chunk :], columns)  # (H, 2N, B·M)
    ends = torch.complex(*ends.unflatten(2, (batch, count)).unflatten(1, (2, -1)).unbind(1))  # (H, N, B, M)
    # In complex128: the scan squares the pole again and again, and in complex64 slow poles would lose precision.
    pole = tables.powers[..., chunk]
    states = _scan(torch.cat([modes.unsqueeze(-1), ends], dim=-1).to(pole.dtype), pole)
    entering = _real_rows(states[..., :-1].flatten(2)).to(u.dtype)
    out = torch.baddbmm(
        torch.bmm(tables.toeplitz[:, :chunk, :chunk], columns), tables.emit[:, :chunk], entering
    )  # (H, chunk, B·M)
    out = out.unflatten(2, (batch, count)).permute(2, 3, 1, 0).reshape(batch, length, channels)
    return out, states[..., -1].to(modes.dtype)


def _scan(x: Tensor, pole: Tensor) -> Tensor:
    """s_k = pole · s_{k-1} + x_k along the last axis of x (H, N, B, M), pole (H, N); log₂ M doubling steps."""
    reach, factor = 1, pole[..., None, None]
    while reach < x.shape[-1]:
        x = torch.cat([x[..., :reach], x[..., reach:] + factor * x[..., :-reach]], dim=-1)
        reach, factor = 2 * reach, factor * factor
    return x


def _powers(base: Tensor, highest: int) -> Tensor:
    """base⁰ … base^highest on a new last axis; 0⁰ is 1."""
    powers = torch.stack([torch.ones_like(base), base], dim=-1)
    while powers.shape[-1] <= highest:
        powers = torch.cat([powers, powers[..., 1:] * powers[..., -1:]], dim=-1)
    return powers[..., : highest + 1]


def _toeplitz(response: Tensor) -> Tensor:
    """The lower-triangular T (H, C, C), T[i, j] = h[i - j], of responses h (H, C)."""
    size = response.shape[-1]
    return F.pad(response, (size - 1, 0)).unfold(-1, size, 1).flip(-1)


def _real_rows(x: Tensor) -> Tensor:
    """Complex (H, N, C) as real (H, 2N, C): the real parts of all modes, then the imaginary ones."""
    return torch.cat([x.real, x.imag], dim=1)
