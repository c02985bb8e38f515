"""Which backend computes the Hyena operator. A new backend is one module and one line in `BACKENDS`.

A backend is a module with `hyena_filter`, `hyena_step` and `refuses(device) -> reason | None`. One that is asked for by
name and cannot run raises; only the automatic choice moves on to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import torch
from torch import Tensor

from stripedrag.errors import BackendError
from stripedrag.kernels import chunked, reference
from stripedrag.kernels.operands import FilterParameters, HyenaState


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of the operator; `automatic` says whether it may be chosen unasked."""

    name: str
    hyena_filter: Callable[[Tensor, FilterParameters, HyenaState, Tensor | None], tuple[Tensor, HyenaState]]
    hyena_step: Callable[[Tensor, FilterParameters, HyenaState], Tensor]
    refuses: Callable[[torch.device], str | None]
    automatic: bool = True


BACKENDS: dict[str, Backend] = {  # in order of preference
    "torch": Backend("torch", chunked.hyena_filter, chunked.hyena_step, chunked.refuses),
    "reference": Backend("reference", reference.hyena_filter, reference.hyena_step, reference.refuses, automatic=False),
}


@cache
def select(name: str | None, device: torch.device) -> Backend:
    """The backend of that name, or with None the first automatic one that runs on `device`.

    Raises `BackendError` naming the choices and, for each that cannot run here, its reason.
    """
    if name is not None and name not in BACKENDS:
        near = get_close_matches(name, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise BackendError(f"no kernel backend {name!r}{hint} On this machine: {_available(device)}.")
    candidates = [BACKENDS[name]] if name is not None else [b for b in BACKENDS.values() if b.automatic]
    for backend in candidates:
        if backend.refuses(device) is None:
            return backend
    reasons = "; ".join(f"{b.name} refused: {b.refuses(device)}" for b in candidates)
    raise BackendError(f"no kernel backend runs on {device}: {reasons}. On this machine: {_available(device)}.")


def _available(device: torch.device) -> str:
    return ", ".join(b.name for b in BACKENDS.values() if b.refuses(device) is None)
