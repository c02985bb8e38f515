"""What the Hyena operator is given and what it carries: parameters in checkpoint layout, and the state.

Shape letters: B batch, L length, H channels, G filter groups, N modes, K taps. Shared by every backend, so that one
place says how checkpoint layout is read; the arithmetic itself is each backend's own.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class HyenaState(NamedTuple):
    """What the operator remembers of a sequence, whatever its length.

    `fir` (B, 3H, K-1), dtype of z: the last K-1 rows of z before the FIR, oldest first. `iir` (B, H, N, 2) float32
    (float64 where z is): the modal state, last axis (re, im).
    """

    fir: Tensor
    iir: Tensor


class FilterParameters(NamedTuple):
    """The operator's parameters as a checkpoint stores them; `heads` is None for the plain channel layout.

    `fir_weight` (3H, 1, K), `fir_bias` (3H,), `poles` and `residues` (G, N, 1, 2) with G a divisor of H, `skip` (H,).
    """

    fir_weight: Tensor
    fir_bias: Tensor
    poles: Tensor
    residues: Tensor
    skip: Tensor
    heads: int | None

    @property
    def channels(self) -> int:
        """H."""
        return self.skip.shape[0]

    @property
    def taps(self) -> int:
        """K."""
        return self.fir_weight.shape[-1]

    @property
    def modes(self) -> int:
        """N."""
        return self.poles.shape[1]


def working_dtype(z: Tensor) -> torch.dtype:
    """The dtype of the operator's arithmetic and of its modal state: float64 where z is, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def zero_state(z: Tensor, parameters: FilterParameters) -> HyenaState:
    """The state before the first token, for a z of shape (B, …, 3H)."""
    batch, channels = z.shape[0], parameters.channels
    return HyenaState(
        z.new_zeros(batch, 3 * channels, parameters.taps - 1),
        z.new_zeros(batch, channels, parameters.modes, 2, dtype=working_dtype(z)),
    )


def per_channel(system: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Poles or residues (G, N, 1, 2) as complex numbers of shape (H, N): group g serves H/G neighbouring channels."""
    per_group = torch.view_as_complex(system.to(dtype).squeeze(2).contiguous())
    groups = per_group.shape[0]
    return per_group if groups == channels else per_group.repeat_interleave(channels // groups, dim=0)


def split_channels(rows: Tensor, heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The output gate x2, the input gate x1 and the value v, each (…, H), of rows (…, 3H).

    With `heads`, the 3H channels are laid out as [head][x2|x1|v][head width]; without, as [x2|x1|v].
    """
    channels = rows.shape[-1] // 3
    grouped = rows.unflatten(-1, (heads or 1, 3, channels // (heads or 1)))
    x2, x1, v = grouped.unbind(-2)
    return x2.flatten(-2), x1.flatten(-2), v.flatten(-2)
