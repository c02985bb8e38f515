"""The Hyena operator alone: its rate against memory bandwidth, and against the FFT, forward and backward."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stripedrag.eval.bench.fft import hyena_fft, hyena_fft_prefill
from stripedrag.eval.bench.report import (
    Bandwidth,
    Report,
    device_of,
    interleaved,
    machine,
    matmul_rate,
    medians,
    peak_bytes,
    plot,
)
from stripedrag.kernels import ops

SHAPES = ((576, 8), (1024, 2), (4096, 2))  # channels, modes: the default model's first
LENGTHS = (2048, 8192, 32_768, 131_072)
DTYPES = (torch.float32, torch.bfloat16)
FFT_LENGTH, GRADIENT_LENGTH = 32_768, 8192
FFT_BYTES = 9e9  # what the FFT prefill may take: it keeps several spectra of 2 L complex numbers a mode


def run(repeats: int, device: str = "cpu") -> Report:
    """Forward rates on the CPU, or on a GPU those of `filter_gpu`. Raises `UsageError` where there is none."""
    if (place := device_of(device)).type == "cpu":
        return _on_cpu(repeats)
    from stripedrag.eval.bench import filter_gpu

    return filter_gpu.run(repeats, place)


def _on_cpu(repeats: int) -> Report:
    """Forward rates at 1 and all threads over lengths, dtypes and shapes; then prefill and gradient against the FFT."""
    here, all_threads = machine(), torch.get_num_threads()
    bandwidth = Bandwidth()
    forward: list[dict[str, Any]] = []
    try:
        for threads in dict.fromkeys((1, all_threads)):
            torch.set_num_threads(threads)
            multiply_adds = matmul_rate(torch.float32) / 2
            for dtype in DTYPES:
                for channels, modes in SHAPES:
                    for length in LENGTHS:
                        row = _forward(channels, modes, length, dtype, repeats, bandwidth, multiply_adds)
                        forward.append({"threads": threads} | row)
    finally:
        torch.set_num_threads(all_threads)
    against_fft = [_prefill(*shape, repeats) for shape in SHAPES if _fft_bytes(*shape) <= FFT_BYTES]
    left_out = [shape for shape in SHAPES if _fft_bytes(*shape) > FFT_BYTES]
    gradient = [_gradient(*shape, dtype, repeats) for shape in SHAPES for dtype in DTYPES]
    figures = {
        "bench": "filter",
        "machine": here,
        "repeats": repeats,
        "forward": forward,
        "prefill_against_fft": against_fft,
        "prefill_left_out": left_out,
        "gradient": gradient,
    }
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def parameters(channels: int, modes: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random parameters of a filter with poles like the default model's: slow, at small angles."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    decay = torch.logspace(0, -3, modes).expand(channels, modes)
    radius = 1 - decay * (0.5 + 0.5 * torch.rand(channels, modes, generator=rng))
    poles = torch.polar(radius.clamp(0.05), torch.rand(channels, modes, generator=rng) * 0.2)
    return {
        "fir_weight": (normal(3 * channels, 1, 3) / 2).to(dtype),
        "fir_bias": (normal(3 * channels) / 10).to(dtype),
        "poles": torch.view_as_real(poles).unsqueeze(2).contiguous(),
        "residues": normal(channels, modes, 1, 2) / modes,
        "skip": normal(channels).to(dtype),
    }


def rows_of(channels: int, length: int, dtype: torch.dtype) -> Tensor:
    """z (1, L, 3H): random rows, repeated, since drawing gigabytes would take longer than the benchmark."""
    tile = torch.randn(1, min(length, 1024), 3 * channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    return tile.repeat(1, length // tile.shape[1], 1)


def _forward(
    channels: int,
    modes: int,
    length: int,
    dtype: torch.dtype,
    repeats: int,
    bandwidth: Bandwidth,
    multiply_adds: float,
) -> dict[str, Any]:
    z, given = rows_of(channels, length, dtype), parameters(channels, modes, dtype)
    out = torch.zeros(1, length, channels, dtype=dtype)
    with torch.no_grad():
        ops.hyena_filter(z, **given, out=out)
        seconds = interleaved(
            repeats,
            copy=bandwidth.copy,
            triad=bandwidth.triad,
            read=bandwidth.read,  # so that the caches hold nothing of z, and nothing that is still to be written
            filter=lambda: ops.hyena_filter(z, **given, out=out),
            read_again=bandwidth.read,
            filter_into_new_memory=lambda: ops.hyena_filter(z, **given),
        )
    middle, moved = medians(seconds), z.nbytes + out.nbytes
    rate, triad = moved / middle["filter"], bandwidth.triad_bytes / middle["triad"]
    # FIR, two gates, skip, six multiply-adds a mode: what arithmetic alone allows, at the rate of a float32 product.
    ceiling = moved * multiply_adds / (length * channels * (3 * 3 + 3 + 6 * modes))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "channels": channels,
        "modes": modes,
        "length": length,
        "bytes_per_s": rate,
        "bytes_per_s_into_new_memory": moved / middle["filter_into_new_memory"],
        "copy_bytes_per_s": bandwidth.copy_bytes / middle["copy"],
        "triad_bytes_per_s": triad,
        "arithmetic_bytes_per_s": ceiling,
        "of_triad": rate / triad,
        "of_limit": rate / min(triad, ceiling),
        "seconds": seconds,
    }


def _fft_bytes(channels: int, modes: int) -> float:
    return 3 * 8.0 * channels * modes * 2 * FFT_LENGTH


def _prefill(channels: int, modes: int, repeats: int) -> dict[str, Any]:
    z, given = rows_of(channels, FFT_LENGTH, torch.float32), parameters(channels, modes, torch.float32)
    with torch.no_grad():
        ours, (theirs, _) = ops.hyena_filter(z, **given)[0], hyena_fft_prefill(z, **given)
        apart = ((ours - theirs).abs().max() / ours.abs().max()).item()
        del ours, theirs
        memory = {
            "ours": peak_bytes(lambda: ops.hyena_filter(z, **given)),
            "fft": peak_bytes(lambda: hyena_fft_prefill(z, **given)),
        }
        seconds = interleaved(
            repeats, ours=lambda: ops.hyena_filter(z, **given), fft=lambda: hyena_fft_prefill(z, **given)
        )
    middle = medians(seconds)
    return {
        "channels": channels,
        "modes": modes,
        "length": FFT_LENGTH,
        "largest_difference": apart,
        "times_faster": middle["fft"] / middle["ours"],
        "extra_bytes_over_z": {side: None if b is None else b / z.nbytes for side, b in memory.items()},
        "seconds": seconds,
    }


def _gradient(channels: int, modes: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    given = {name: p.requires_grad_() for name, p in parameters(channels, modes, dtype).items()}
    z = rows_of(channels, GRADIENT_LENGTH, dtype).requires_grad_()
    dy, leaves = torch.ones(1, GRADIENT_LENGTH, channels, dtype=dtype), (z, *given.values())
    kept: dict[str, Tensor] = {}

    def forward() -> None:
        kept["y"] = ops.hyena_filter(z, **given)[0]

    def backward() -> None:
        torch.autograd.grad(kept.pop("y"), leaves, dy)

    seconds = interleaved(
        repeats,
        forward=forward,
        backward=backward,
        fft=lambda: torch.autograd.grad(hyena_fft(z, **given), leaves, dy),
    )
    middle = medians(seconds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "channels": channels,
        "modes": modes,
        "length": GRADIENT_LENGTH,
        "times_faster": middle["fft"] / (middle["forward"] + middle["backward"]),
        "backward_over_forward": middle["backward"] / middle["forward"],
        # Multiply-adds: 18 a mode and 35 around them against 6 and 12; bytes: z, dy and dz against z and y.
        "least_backward_over_forward": {"arithmetic": (18 * modes + 35) / (6 * modes + 12), "bytes": 7 / 4},
        "seconds": seconds,
    }


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, torch {here['torch']}, kernels {here['kernels']}, {here['commit']}",
        "",
        "forward, into memory that exists (as triad writes); GB/s of z read once and y written once",
        f"{'':9}{'H':>5}{'N':>4}{'thr':>4}{'L':>8}{'GB/s':>8}{'new mem':>9}{'copy':>7}{'triad':>7}{'arith':>7}"
        f"{'of triad':>10}{'of limit':>10}",
    ]
    for row in figures["forward"]:
        lines.append(
            f"{row['dtype']:9}{row['channels']:>5}{row['modes']:>4}{row['threads']:>4}{row['length']:>8}"
            f"{row['bytes_per_s'] / 1e9:>8.1f}{row['bytes_per_s_into_new_memory'] / 1e9:>9.1f}"
            f"{row['copy_bytes_per_s'] / 1e9:>7.1f}{row['triad_bytes_per_s'] / 1e9:>7.1f}"
            f"{row['arithmetic_bytes_per_s'] / 1e9:>7.1f}{row['of_triad']:>10.0%}{row['of_limit']:>10.0%}"
        )
    lines += ["", f"{here['threads']} threads, float32, forward and final state against the FFT prefill"]
    for row in figures["prefill_against_fft"]:
        extra = row["extra_bytes_over_z"]
        shown = ", ".join(f"{side} {'?' if b is None else format(b, '.2f')}" for side, b in extra.items())
        lines.append(
            f"H {row['channels']:>4} N {row['modes']} L {row['length']}: {row['times_faster']:.0f}x as fast; "
            f"extra memory over z: {shown}; largest difference {row['largest_difference']:.0e}"
        )
    for channels, modes in figures["prefill_left_out"]:
        lines.append(
            f"H {channels:>4} N {modes}: left out, the FFT would take {_fft_bytes(channels, modes) / 1e9:.0f} GB"
        )
    lines += ["", f"{here['threads']} threads, forward and backward against autograd through the FFT"]
    for row in figures["gradient"]:
        least = row["least_backward_over_forward"]
        lines.append(
            f"{row['dtype']:9} H {row['channels']:>4} N {row['modes']} L {row['length']}: "
            f"{row['times_faster']:.0f}x as fast; backward {row['backward_over_forward']:.1f}x forward "
            f"(by arithmetic {least['arithmetic']:.1f}, by bytes {least['bytes']:.2f})"
        )
    lines += [
        "",
        f"Medians of {figures['repeats']}, interleaved, the operator after a read of other memory, which empties",
        "the caches. arith: what the multiply-adds of one pass allow at the rate of a float32 product; limit: the",
        "lesser of triad and that.",
    ]
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in figures["forward"]:
        name = f"{row['dtype']} H {row['channels']} N {row['modes']}, {row['threads']} thr"
        series.setdefault(name, []).append((row["length"], 100 * row["of_triad"]))
    plot(path, series, "the Hyena operator, forward", "tokens", "% of triad bandwidth", log_x=True)
