"""What the machine computes natively."""

import ctypes
import platform
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


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for a loop that asks for the same sizes again and again; glibc only.

    glibc hands freed memory of more than a few megabytes back to the system, and the next tensor pays for every page
    anew: a tenth of a training step. The process stays as large as it once was.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28), (_MMAP_THRESHOLD, 2**25)):
        libc.mallopt(parameter, value)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
