"""Which backend computes the Hyena operator. A new backend is one module and one line in `BACKENDS`.

A backend is a module with `hyena_filter`, `hyena_step` and `refuses(device, taps, modes) -> reason | None`. One that is
asked for by name and cannot run raises; only the automatic choice moves on to the next.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import torch
from torch import Tensor

from stripedrag.errors import BackendError
from stripedrag.kernels import chunked, cpu, gpu, reference
from stripedrag.kernels.operands import FilterParameters, HyenaState


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of the operator; `automatic` says whether it may be chosen unasked.

    `refuses(device, taps, modes)` says why it cannot run there with such a filter, or None. `hyena_filter_out` writes y
    into memory that it is given; where a backend has none, the door copies.
    """

    name: str
    hyena_filter: Callable[[Tensor, FilterParameters, HyenaState, Tensor | None], tuple[Tensor, HyenaState]]
    hyena_step: Callable[[Tensor, FilterParameters, HyenaState], Tensor]
    refuses: Callable[..., str | None]
    hyena_filter_out: Callable[[Tensor, FilterParameters, HyenaState, Tensor | None, Tensor], HyenaState] | None = None
    device_type: str | None = None  # the only one that it is for; None: any
    automatic: bool = True

    def is_for(self, device: torch.device) -> bool:
        """Whether it may be chosen unasked for tensors there."""
        return self.automatic and self.device_type in (None, device.type)


BACKENDS: dict[str, Backend] = {  # in order of preference
    "cpu": Backend(
        "cpu", cpu.hyena_filter, cpu.hyena_step, cpu.refuses, hyena_filter_out=cpu.hyena_filter_out, device_type="cpu"
    ),
    "triton": Backend("triton", gpu.hyena_filter, gpu.hyena_step, gpu.refuses, device_type="cuda"),
    "torch": Backend("torch", chunked.hyena_filter, chunked.hyena_step, chunked.refuses),
    "reference": Backend("reference", reference.hyena_filter, reference.hyena_step, reference.refuses, automatic=False),
}


def select(name: str | None, device: torch.device, taps: int = 3, modes: int = 1) -> Backend:
    """The backend of that name, or with None the first automatic one that runs on `device` with such a filter.

    Where one that is made for this kind of device cannot run and another serves in its place, a warning says so, once.
    Raises `BackendError` naming the choices and, for each that cannot run here, its reason.
    """
    choose = _choose if torch.compiler.is_compiling() else _chosen  # a compiler looks through a cache, and warns of it
    return choose(name, device, taps, modes)


def _choose(name: str | None, device: torch.device, taps: int, modes: int) -> Backend:
    if name is not None and name not in BACKENDS:
        near = get_close_matches(name, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise BackendError(f"no kernel backend {name!r}{hint} On this machine: {_available(device)}.")
    candidates = [BACKENDS[name]] if name is not None else [b for b in BACKENDS.values() if b.is_for(device)]
    passed_over = ""
    for backend in candidates:
        reason = backend.refuses(device, taps, modes)
        if reason is None:
            if passed_over:
                warnings.warn(f"the {passed_over}. The {backend.name} backend serves, more slowly.", stacklevel=4)
            return backend
        if backend.device_type == device.type:
            passed_over = f"{backend.name} kernels cannot be used: {reason}"
    reasons = "; ".join(f"{b.name} refused: {b.refuses(device, taps, modes)}" for b in candidates)
    raise BackendError(f"no kernel backend runs on {device}: {reasons}. On this machine: {_available(device)}.")


_chosen = cache(_choose)


def _available(device: torch.device) -> str:
    return ", ".join(b.name for b in BACKENDS.values() if b.refuses(device, 3, 1) is None)
