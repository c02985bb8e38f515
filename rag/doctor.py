"""What runs on this machine, what does not, and why: one look for a user and for a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from stripedrag import __version__, weights
from stripedrag.errors import SetupError

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "llama-index-core", "faiss-cpu", "sentence-transformers", "triton")


def examine() -> dict[str, dict[str, str]]:
    """Findings by section, in words."""
    import torch

    from stripedrag.hardware import fast_dtype
    from stripedrag.kernels.cpu import has_attention, instruction_set
    from stripedrag.kernels.dispatch import BACKENDS
    from stripedrag.model.baselines import BASELINES, at_hand
    from stripedrag.model.loading import default_dtype
    from stripedrag.model.smollm2 import PREPARED, prepared_dir

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = {
        name: f"refused: {reason}" if (reason := backend.refuses(device)) else "runs"
        for name, backend in BACKENDS.items()
    }
    if backends["cpu"] == "runs":
        attention = "its own" if has_attention() else "torch's"
        backends["cpu"] += f" (instruction set {instruction_set()}, {attention} attention)"
    places = {}
    for carrier in weights.CARRIERS:
        try:
            places[carrier.distribution] = str(weights.find(carrier))
        except SetupError:
            places[carrier.distribution] = "missing: run `stripedrag setup`"
    for name in PREPARED:
        try:
            places[name] = str(prepared_dir(name))
        except SetupError:
            places[name] = "not prepared: run `stripedrag setup`"
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
            "fast dtype": f"{_name(default_dtype(device))} on {device}, {_name(fast_dtype(device))} for transformers",
        },
        f"kernel backends on {device}": backends,
        "weights": {"cache": str(weights.cache_dir()), **places},
        "baselines": {"at hand": ", ".join(filter(at_hand, BASELINES)) or "none in the hub's cache"},
        "packages": {"stripedrag": __version__, **{name: _installed(name) for name in _PACKAGES}},
    }


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
