"""What the machine computes natively."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fast_dtype(device: "str | torch.device | None" = None) -> "torch.dtype":
    """The narrowest dtype whose matrix products are native on `device` (None: the CPU): bfloat16, or else float32.

    On CPUs with avx512_bf16 or AMX a bfloat16 product runs several times as fast as a float32 one; without them it is
    emulated and slower, which is why this asks torch and assumes nothing.
    """
    import torch

    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32
