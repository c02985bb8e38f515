"""The rival of the scan: the Hyena operator through the FFT, as the public reference implementation formulates it.

Written from its description (Poli et al. 2023, "Hyena Hierarchy"; Massaroli et al. 2023, "Laughing Hyena
Distillery") in plain torch: the short filter is a depthwise convolution, the long one a product of spectra of length
2L, and prefill takes the modal state from the spectrum of every mode.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def hyena_fft(z: Tensor, fir_weight: Tensor, fir_bias: Tensor, poles: Tensor, residues: Tensor, skip: Tensor) -> Tensor:
    """y (B, L, H) for z (B, L, 3H) in the plain layout, from a zero state; differentiable. Arguments as in `ops`."""
    x2, u = _gates(z, fir_weight, fir_bias)
    powers = _powers(poles, z.shape[1])
    response = (torch.view_as_complex(residues.squeeze(2)).unsqueeze(-1) * powers).real.sum(1)  # (H, L)
    spectrum = torch.fft.rfft(u, n=2 * u.shape[-1]) * torch.fft.rfft(response, n=2 * u.shape[-1])
    filtered = torch.fft.irfft(spectrum, n=2 * u.shape[-1])[..., : u.shape[-1]]
    y: Tensor = (x2 * (filtered + skip.float().unsqueeze(-1) * u)).transpose(1, 2).to(z.dtype)
    return y


def hyena_fft_prefill(
    z: Tensor, fir_weight: Tensor, fir_bias: Tensor, poles: Tensor, residues: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """y (B, L, H) and the modal state (B, H, N) complex after the last token, each mode by a convolution of its own."""
    x2, u = _gates(z, fir_weight, fir_bias)
    length = u.shape[-1]
    modes = torch.fft.fft(_powers(poles, length), n=2 * length)  # (H, N, 2L)
    states = torch.fft.ifft(torch.fft.fft(u.to(torch.complex64), n=2 * length).unsqueeze(2) * modes)[..., :length]
    filtered = (torch.view_as_complex(residues.squeeze(2)).unsqueeze(-1) * states).real.sum(2)
    y = (x2 * (filtered + skip.float().unsqueeze(-1) * u)).transpose(1, 2).to(z.dtype)
    return y, states[..., -1].clone()


def _gates(z: Tensor, fir_weight: Tensor, fir_bias: Tensor) -> tuple[Tensor, Tensor]:
    """x2 and u = x1 v, each (B, H, L) float32."""
    columns, taps = fir_weight.shape[0], fir_weight.shape[2]
    rows = F.conv1d(z.transpose(1, 2).float(), fir_weight.float(), fir_bias.float(), padding=taps - 1, groups=columns)
    x2, x1, v = rows[..., : z.shape[1]].chunk(3, dim=1)
    return x2, x1 * v


def _powers(poles: Tensor, length: int) -> Tensor:
    """p^t for t < length: (H, N, L) complex."""
    logarithm = torch.view_as_complex(poles.squeeze(2)).log()
    return (logarithm.unsqueeze(-1) * torch.arange(length, device=poles.device)).exp()
