"""The Hyena operator as its definition: one plain loop over time, any floating dtype. Every backend is tested on it.

StripedHyena (Together AI, 2023), modal form of the Hyena filter (Massaroli et al., "Laughing Hyena Distillery", 2023):

    c_t = Σ_k w_k z_{t-K+1+k} + b          causal depthwise FIR; the last tap multiplies the current sample
    x2_t, x1_t, v_t = split(c_t)           the output gate, the input gate, the value
    u_t = x1_t v_t
    s_t = p s_{t-1} + u_t                  N complex modes a channel
    y_t = x2_t (Re Σ_n R_n s_{t,n} + D u_t)

A padded token has z and c of zero. Not fast, and never to become clever.
"""

import torch
from torch import Tensor

from stripedrag.kernels.operands import (
    FilterParameters,
    HyenaState,
    per_channel,
    split_channels,
    working_dtype,
)


def refuses(device: torch.device, taps: int = 3, modes: int = 1) -> str | None:
    """Why this backend cannot run on `device`: it always can."""
    del device, taps, modes
    return None


def hyena_filter(
    z: Tensor, parameters: FilterParameters, state: HyenaState, padding_mask: Tensor | None
) -> tuple[Tensor, HyenaState]:
    """y (B, L, H) and the state after the last token, for z (B, L, 3H); differentiable in every input."""
    system = _System(parameters, working_dtype(z))
    outputs = []
    for t in range(z.shape[1]):
        real = None if padding_mask is None else padding_mask[:, t, None]
        y, state = _token(z[:, t], system, state, real)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def hyena_step(z: Tensor, parameters: FilterParameters, state: HyenaState) -> Tensor:
    """y (B, H) for one token z (B, 3H); the state is overwritten."""
    y, after = _token(z, _System(parameters, working_dtype(z)), state, None)
    state.fir.copy_(after.fir)
    state.iir.copy_(after.iir)
    return y


class _System:
    """The parameters in the dtype of the arithmetic, converted once so that gradients accumulate in it too."""

    def __init__(self, parameters: FilterParameters, work: torch.dtype) -> None:
        self.work, self.heads = work, parameters.heads
        self.fir_weight = parameters.fir_weight.squeeze(1).to(work)  # (3H, K)
        self.fir_bias = parameters.fir_bias.to(work)
        self.poles = per_channel(parameters.poles, parameters.channels, work)  # (H, N) complex
        self.residues = per_channel(parameters.residues, parameters.channels, work)
        self.skip = parameters.skip.to(work)


def _token(z: Tensor, system: _System, state: HyenaState, real: Tensor | None) -> tuple[Tensor, HyenaState]:
    if real is not None:
        z = z.masked_fill(~real, 0)
    window = torch.cat([state.fir, z.unsqueeze(-1)], dim=-1)
    c = (window.to(system.work) * system.fir_weight).sum(-1) + system.fir_bias
    if real is not None:
        c = c.masked_fill(~real, 0)
    x2, x1, v = split_channels(c, system.heads)
    u = x1 * v
    modes = system.poles * torch.view_as_complex(state.iir.contiguous()) + u.unsqueeze(-1)
    y = x2 * ((system.residues * modes).real.sum(-1) + system.skip * u)
    return y.to(z.dtype), HyenaState(window[..., 1:], torch.view_as_real(modes))
