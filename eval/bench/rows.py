"""The root-mean-square norm and the gate of the MLP, forward and with their gradients, against torch's own operators.

The limit is bandwidth: either side has to read its operands and write its results once, at the rate of a copy of a
tensor of the same size, which may lie in a cache as theirs may.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stripedrag.eval.bench.report import Report, interleaved, machine, medians
from stripedrag.kernels import ops

ROWS = 4096
WIDTHS = {"norm": 576, "gate": 1536}  # of the default model
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5
_MOVED = {"forward": {"norm": 2, "gate": 3}, "gradient": {"norm": 5, "gate": 8}}  # tensors read and written, at least


def run(repeats: int) -> Report:
    """Milliseconds of either side, their ratio, and the share of the bandwidth that ours reaches."""
    here = machine()
    rows = [_row(name, dtype, turn, repeats) for name in WIDTHS for dtype in DTYPES for turn in ("forward", "gradient")]
    figures = {"bench": "rows", "machine": here, "repeats": repeats, "rows": rows}
    return Report(figures, _table(figures))


def _row(name: str, dtype: torch.dtype, turn: str, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTHS[name]), (WIDTHS[name],) if name == "norm" else (ROWS, WIDTHS[name]))
    a, b = (torch.randn(shape, generator=generator).to(dtype).requires_grad_(turn == "gradient") for shape in shapes)
    dy, copied = torch.ones_like(a), torch.empty_like(a)

    def side(operator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def forward() -> object:
            y = operator(a, b)
            return torch.autograd.grad(y, (a, b), dy) if turn == "gradient" else y

        return forward

    ours, rival = _SIDES[name]
    with torch.set_grad_enabled(turn == "gradient"):
        seconds = interleaved(repeats, ours=side(ours), torch=side(rival), copy=lambda: copied.copy_(a.detach()))
    middle = medians(seconds)
    return {
        "operator": name,
        "shape": list(a.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward" if turn == "forward" else "forward and backward",
        "ours_ms": 1e3 * middle["ours"],
        "torch_ms": 1e3 * middle["torch"],
        "torch_over_ours": middle["torch"] / middle["ours"],
        "share_of_copy": _MOVED[turn][name] / 2 * middle["copy"] / middle["ours"],
        "seconds": seconds,
    }


_Sides = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
_SIDES: dict[str, _Sides] = {
    "norm": (lambda x, scale: ops.rms_norm(x, scale, EPS), lambda x, scale: F.rms_norm(x, scale.shape, scale, EPS)),
    "gate": (ops.swiglu, lambda a, b: F.silu(a) * b),
}


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, kernels {here['kernels']}, "
        f"{here['commit']}",
        "",
        f"{'':6}{'shape':>14}{'dtype':>10}{'pass':>22}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}{'of copy':>9}",
    ]
    for row in figures["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(
            f"{row['operator']:6}{shape:>14}{row['dtype']:>10}{row['pass']:>22}{row['ours_ms']:>9.2f}"
            f"{row['torch_ms']:>10.2f}{row['torch_over_ours']:>7.1f}{row['share_of_copy']:>9.0%}"
        )
    lines += ["", f"Medians of {figures['repeats']}, interleaved. of copy: bytes that have to move, by its rate."]
    return "\n".join(lines)
