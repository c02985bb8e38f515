"""What benchmarks share: timing in turn, what of the machine every figure must be read beside, tables and plots."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stripedrag import __version__
from stripedrag.errors import UsageError
from stripedrag.eval.meter import peak_resident_bytes, reset_peak
from stripedrag.hardware import fast_dtype
from stripedrag.kernels.cpu import instruction_set
from stripedrag.model.loading import default_dtype

_SLEEP_CYCLES = 10_000_000  # some milliseconds


@dataclass(frozen=True, slots=True)
class Report:
    """The raw figures, for a JSON file, and a table and perhaps a plot of them, for people."""

    figures: dict[str, Any]
    table: str
    plot: Callable[[Path], None] | None = None  # draws into a file whose suffix names the format


def interleaved(
    repeats: int,
    warm_ups: int = 1,
    clock: "Callable[[Callable[[], object]], float] | None" = None,
    /,
    **sides: Callable[[], object],
) -> dict[str, list[float]]:
    """Seconds of each side in every repetition by `clock` (None: wall time), the sides taken in turn, after rounds that
    do not count.
    """
    clock = clock or seconds_of
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(warm_ups + repeats):
        for name, side in sides.items():
            taken = clock(side)
            if repetition >= warm_ups:
                seconds[name].append(taken)
    return seconds


def quantiles_ms(runs: Sequence[Callable[[], object]], repeats: int) -> dict[str, float]:
    """Over these runs, of each one's median of `repeats`, in milliseconds."""
    each = 1e3 * np.median([[seconds_of(run) for run in runs] for _ in range(repeats)], axis=0)
    return {"p50_ms": float(np.median(each)), "p95_ms": float(np.quantile(each, 0.95))}


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}


class Bandwidth:
    """STREAM's copy and triad (McCalpin 1995) by torch's own operations, over three arrays of 128 MiB.

    Bytes are counted as STREAM counts them: what is read and what is written, not the lines that a write first reads.
    """

    def __init__(self) -> None:
        self._a, self._b, self._c = (torch.ones(2**25) for _ in range(3))
        self.copy_bytes, self.triad_bytes = 2 * self._a.nbytes, 3 * self._a.nbytes

    def copy(self) -> None:
        """c = a."""
        self._c.copy_(self._a)

    def triad(self) -> None:
        """c = a + 3 b."""
        torch.add(self._a, self._b, alpha=3.0, out=self._c)

    def read(self) -> None:
        """Reads a and b, after which the caches hold nothing else, and nothing that is still to be written."""
        self._a.sum(), self._b.sum()


def peak_bytes(run: Callable[[], object]) -> int | None:
    """How far the process's resident memory rises during `run`, its results included; None where nothing tells."""
    before = reset_peak()
    if before is None:
        return None
    result = run()
    peak = peak_resident_bytes()
    del result
    return peak - before


def plot(
    path: Path,
    series: Mapping[str, Sequence[tuple[Any, float]]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    bars: bool = False,
    bottom: float = 0,
) -> None:
    """Draw lines, or bars, of (x, y) points into `path`, y from `bottom` on or by its logarithm.

    Needs matplotlib (the `bench` extra).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        x, y = zip(*points, strict=True)
        if bars:
            axes.bar(x, y, label=name)
        else:
            axes.plot(x, y, marker="o", label=name)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=bottom)
    axes.grid(alpha=0.3)
    if not bars:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def machine() -> dict[str, Any]:
    """What ran it: commit, versions, processor, threads, the dtype that torch multiplies fastest and that of a
    StripedHyena, and its measured limits.
    """
    dtype = fast_dtype()
    return {
        "commit": commit(),
        "stripedrag": __version__,
        "torch": torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "default_dtype": str(default_dtype(torch.device("cpu"))).removeprefix("torch."),
        "kernels": instruction_set() or "torch",
        "read_bytes_per_s": _read_bandwidth(),
        "matmul_flop_per_s": matmul_rate(dtype),
    }


def _read_bandwidth() -> float:
    """Bytes a second of a sum over 512 MiB, the best of five: how fast a decode step can read its weights, at most."""
    data = torch.ones(2**27)
    return data.nbytes / min(seconds_of(data.sum) for _ in range(5))


def device_of(name: str) -> torch.device:
    """The device of that name. Raises `UsageError` for a CUDA device where there is none."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        others = f" of that number, but {count}" if count else ""
        raise UsageError(f"the device is {name!r}, and torch finds no CUDA device here{others}; take cpu")
    return device


def matmul_rate(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """Operations a second of a (2048, 2048) product, on a GPU (8192, 8192), the best of five: what arithmetic can
    reach, at most.
    """
    device = device or torch.device("cpu")
    size = 2048 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(seconds_on(device, lambda: a @ a) for _ in range(5))


def seconds_on(device: torch.device, side: Callable[[], object]) -> float:
    """Seconds of one run, on a GPU by its own events."""
    if device.type != "cuda":
        return seconds_of(side)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_SLEEP_CYCLES)  # while which the launches queue up, so that none is waited for
    begin.record()
    side()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def seconds_of(run: Callable[[], object]) -> float:
    """Wall seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """The checkout's commit, where files of it were changed with "+" and a digest of how; "not a checkout" for an
    installed package.
    """
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "diff", "HEAD"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
    return commit.stdout.strip() + (f"+{sha256(changes).hexdigest()[:8]}" if changes else "")
