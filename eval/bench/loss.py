"""The cross-entropy of a vocabulary with its gradient: ours, torch's function of this name, which has logits in parts,
too, and the loss of whole logits.

The limit is three products at the rate of a large one: the logits, and the gradients of both of their operands.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stripedrag.errors import BackendError
from stripedrag.eval.bench.report import Report, interleaved, machine, medians, peak_bytes
from stripedrag.hardware import fast_dtype
from stripedrag.kernels import ops

ROWS = 8192
SHAPES = {"the default model": (576, 49_152), "the 7B": (4096, 32_000)}  # width, vocabulary


def run(repeats: int) -> Report:
    """Seconds of each side's forward and backward run, and bytes at most beyond its operands.

    Raises `BackendError` where torch is older than its function.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise BackendError(f"torch {torch.__version__} has no linear_cross_entropy to compare with; install torch 2.13")
    here = machine()
    rows = [_row(name, repeats, here["matmul_flop_per_s"]) for name in SHAPES]
    figures = {"bench": "loss", "machine": here, "repeats": repeats, "tokens": ROWS, "rows": rows}
    return Report(figures, _table(figures))


def _row(name: str, repeats: int, flop_per_s: float) -> dict[str, Any]:
    width, vocabulary = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, width, generator=generator).mul_(scale).to(fast_dtype()).requires_grad_()
        for size, scale in ((ROWS, 1), (vocabulary, width**-0.5))
    )
    labels = torch.randint(vocabulary, (ROWS,), generator=generator)
    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ops.linear_cross_entropy(hidden, weight, labels),
        "torch": lambda: F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions()),
        "whole logits": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels),
    }

    def both_passes(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (hidden, weight))

    sides = {side: both_passes(loss) for side, loss in losses.items()}
    peaks = {side: peak_bytes(run) for side, run in sides.items()}
    seconds = interleaved(repeats, **sides)
    return {
        "name": name,
        "width": width,
        "vocabulary": vocabulary,
        "least_s": 3 * 2 * ROWS * width * vocabulary / flop_per_s,
        "median_s": medians(seconds),
        "seconds": seconds,
        "peak_bytes": peaks,
    }


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['dtype']}, torch {here['torch']}, {here['commit']}",
        f"multiplies {here['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s; {figures['tokens']:,} tokens",
        "",
        f"{'':20}{'H':>6}{'V':>8}  {'':14}{'seconds':>9}{'ours is':>9}{'of limit':>10}{'peak MB':>9}",
    ]
    for row in figures["rows"]:
        for side, seconds in row["median_s"].items():
            faster = "" if side == "ours" else f"{seconds / row['median_s']['ours']:.2f}x"
            peak = row["peak_bytes"][side]
            lines.append(
                f"{row['name']:20}{row['width']:>6}{row['vocabulary']:>8}  {side:14}{seconds:>9.2f}{faster:>9}"
                f"{row['least_s'] / seconds:>10.0%}{'unknown' if peak is None else f'{peak / 1e6:.0f}':>9}"
            )
    lines += ["", f"Medians of {figures['repeats']}, interleaved, forward and backward; peak MB beyond the operands."]
    return "\n".join(lines)
