"""The Hyena operator on a GPU: its rate against copying memory, the prediction of `roofline`, and torch's backend.

Results are compared with those of torch's backend first. Timed by the device's own events, after a warm-up in which
kernels are compiled and tuned, over as many inputs in turn as pass the second-level cache. Run by
`stripedrag bench filter --device cuda`.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from stripedrag.errors import BackendError
from stripedrag.eval.bench.filter import parameters, rows_of
from stripedrag.eval.bench.report import Report, commit, interleaved, medians, plot, seconds_on
from stripedrag.eval.bench.roofline import DEVICES, TAPS, Device, backward, forward, passes
from stripedrag.kernels import ops

SHAPES = ((4096, 2), (4096, 8), (576, 8))  # channels, modes: the 7B's, Evo's, the default model's
LENGTHS = (2048, 8192, 32_768, 131_072)
DTYPES = (torch.bfloat16, torch.float32)
GRADIENT_LENGTH = 8192
WARM_UPS = 3
SIDES = ("triton", "torch")
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def run(repeats: int, device: torch.device) -> Report:
    """Seconds of a forward run by length, dtype and shape, and of forward and backward, for each backend and a copy.

    Raises `BackendError` where the Triton kernels cannot run there.
    """
    with torch.cuda.device(device if device.type == "cuda" else -1):
        return _run(repeats, device)


def _run(repeats: int, device: torch.device) -> Report:
    asked = [(*shape, length, dtype) for shape in SHAPES for dtype in DTYPES for length in LENGTHS]
    console = Console(stderr=True)
    rows = [_forward(*one, repeats, device) for one in track(asked, "forward", console=console)]
    gradients = [_gradient(*shape, DTYPES[0], repeats, device) for shape in track(SHAPES, "backward", console=console)]
    figures = {
        "bench": "filter",
        "device": _name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "repeats": repeats,
        "forward": rows,
        "gradient": gradients,
    }
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def _inputs(channels: int, modes: int, length: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Inputs in turn, of which any two uses of one are farther apart than the cache is large; the parameters."""
    one = rows_of(channels, length, dtype).to(device)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    several = [one, *(one.clone() for _ in range(2 * cache_bytes // one.nbytes))]
    given = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in parameters(channels, modes, dtype).items()
    }
    return several, given


def _forward(
    channels: int, modes: int, length: int, dtype: torch.dtype, repeats: int, device: torch.device
) -> dict[str, Any]:
    several, given = _inputs(channels, modes, length, dtype, device)
    turn = cycle(several)

    def filtered(backend: str) -> Callable[[], object]:
        return lambda: ops.hyena_filter(next(turn), **given, backend=backend)

    with torch.no_grad():
        apart = _apart(
            dtype,
            *((y, *state) for y, state in (ops.hyena_filter(several[0], **given, backend=side) for side in SIDES)),
        )
        seconds = interleaved(
            repeats,
            WARM_UPS,
            partial(seconds_on, device),
            copy=lambda: next(turn).clone(),
            **{side: filtered(side) for side in SIDES},
        )
    middle = medians(seconds)
    z_bytes = several[0].nbytes
    copied = 2 * z_bytes / middle["copy"]
    return {
        "channels": channels,
        "modes": modes,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "inputs": len(several),
        "apart": apart,
        "copy_bytes_per_s": copied,
        "least_s": 4 / 3 * z_bytes / copied,
        "of_least": 4 / 3 * z_bytes / copied / middle["triton"],
        "predicted_s": _predicted(forward(modes, TAPS), channels, length, dtype, device),
        "times_faster_than_torch": middle["torch"] / middle["triton"],
        "seconds": seconds,
    }


def _gradient(channels: int, modes: int, dtype: torch.dtype, repeats: int, device: torch.device) -> dict[str, Any]:
    several, given = _inputs(channels, modes, GRADIENT_LENGTH, dtype, device)
    names = [name for name, value in given.items() if isinstance(value, Tensor)]
    turn = cycle(several)

    def gradients(backend: str, z: Tensor, dy: Tensor | None = None, **more: Any) -> Sequence[Tensor]:
        leaves = {name: given[name].detach().requires_grad_() for name in names}
        z = z.detach().requires_grad_()
        y, _ = ops.hyena_filter(z, **(given | leaves), **more, backend=backend)
        return torch.autograd.grad(y, [z, *leaves.values()], y.detach() if dy is None else dy)

    def trained(backend: str) -> Callable[[], object]:
        return lambda: gradients(backend, next(turn))

    one = several[0]
    more = {"padding_mask": torch.arange(one.shape[1], device=device).expand(one.shape[:2]) >= one.shape[1] // 3}
    with torch.no_grad():
        dy, more["state"] = ops.hyena_filter(one, **given, backend="torch")
    apart = _apart(dtype, *(gradients(side, one, dy, **more) for side in SIDES))
    seconds = interleaved(repeats, WARM_UPS, partial(seconds_on, device), **{side: trained(side) for side in SIDES})
    middle = medians(seconds)
    listed = forward(modes, TAPS) + backward(modes, TAPS)
    return {
        "channels": channels,
        "modes": modes,
        "length": GRADIENT_LENGTH,
        "apart": apart,
        "dtype": str(dtype).removeprefix("torch."),
        "predicted_s": _predicted(listed, channels, GRADIENT_LENGTH, dtype, device),
        "times_faster_than_torch": middle["torch"] / middle["triton"],
        "seconds": seconds,
    }


def _apart(dtype: torch.dtype, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far the first of the `SIDES` is from the other, of the largest number.

    Raises `BackendError` where that is more than rounding.
    """
    least = torch.finfo(torch.float32).tiny
    each = [
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=least)
        for a, b in zip(found, expected, strict=True)
    ]
    apart = float(torch.stack(each).max())  # no number where one of them is none
    if not apart <= ROUNDING[dtype]:
        raise BackendError(
            f"the {SIDES[0]} backend is {apart:.1e} of the largest number from the {SIDES[1]} backend, and rounding is "
            f"at most {ROUNDING[dtype]:.0e}: its kernels are wrong on this device. Please report it with the output of "
            "`stripedrag doctor`"
        )
    return apart


def _predicted(listed: Any, channels: int, length: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """By published peaks, of a device and a dtype that `roofline` knows."""
    known: list[Device] = [peaks for peaks in DEVICES.values() if peaks.name == _name(device)]
    if not known or dtype != torch.bfloat16:
        return None
    return float(sum(one["seconds"] for one in passes(listed, known[0], length, channels=channels)))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _table(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['device']}, torch {figures['torch']}, {figures['commit']}, medians of {figures['repeats']}",
        "",
        f"{'':9}{'H':>5}{'N':>4}{'L':>8}{'ms':>9}{'predicted':>11}{'least':>9}{'of least':>10}{'copy GB/s':>11}"
        f"{'over torch':>12}{'apart':>9}",
    ]
    for row in figures["forward"]:
        lines.append(
            f"{row['dtype']:9}{row['channels']:>5}{row['modes']:>4}{row['length']:>8}"
            f"{1e3 * statistics.median(row['seconds']['triton']):>9.3f}{_ms(row['predicted_s']):>11}"
            f"{1e3 * row['least_s']:>9.3f}{row['of_least']:>10.0%}{row['copy_bytes_per_s'] / 1e9:>11.0f}"
            f"{row['times_faster_than_torch']:>11.1f}x{row['apart']:>9.0e}"
        )
    lines += ["", "forward and backward"]
    for row in figures["gradient"]:
        lines.append(
            f"{row['dtype']:9}{row['channels']:>5}{row['modes']:>4}{row['length']:>8}"
            f"{1e3 * statistics.median(row['seconds']['triton']):>9.3f}{_ms(row['predicted_s']):>11}"
            f"{row['times_faster_than_torch']:>11.1f}x over torch{row['apart']:>9.0e} apart"
        )
    lines += [
        "",
        f"Timed by the device's events after {WARM_UPS} rounds, over inputs in turn that pass its cache. least: z read",
        "and y written once, at the rate of the copy. predicted: `stripedrag bench roofline`, by published peaks,",
        "without latencies and small launches. apart: from torch's results, of the largest number; gradients with a",
        "mask and a state.",
    ]
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in figures["forward"]:
        name = f"{row['dtype']} H {row['channels']} N {row['modes']}"
        series.setdefault(name, []).append((row["length"], 100 * row["of_least"]))
    plot(path, series, "the Hyena operator, forward", "tokens", "% of the rate of a copy", log_x=True)
