"""What a benchmark hands over, and what of the machine every figure must be read beside."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stripedrag import __version__
from stripedrag.hardware import fast_dtype


@dataclass(frozen=True, slots=True)
class Report:
    """The raw figures, for a JSON file, and a table of them, for people."""

    figures: dict[str, Any]
    table: str


def machine() -> dict[str, Any]:
    """What ran it: commit, versions, processor, threads, and its measured limits."""
    dtype = fast_dtype()
    return {
        "commit": _commit(),
        "stripedrag": __version__,
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "read_bytes_per_s": _read_bandwidth(),
        "matmul_flop_per_s": _matmul_rate(dtype),
    }


def _read_bandwidth() -> float:
    """Bytes a second of a sum over 512 MiB, the best of five: how fast a decode step can read its weights, at most."""
    data = torch.ones(2**27)
    return data.nbytes / min(_seconds(data.sum) for _ in range(5))


def _matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of a (2048, 2048) product, the best of five: what a prefill can reach, at most."""
    a = torch.ones(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / min(_seconds(lambda: a @ a) for _ in range(5))


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """The checkout's commit, with "+" where files were changed; "not a checkout" for an installed package."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
