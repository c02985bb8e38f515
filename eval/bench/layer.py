"""A whole Hyena layer against a whole attention layer of the same widths, forward and with its gradient."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stripedrag.eval.bench.report import Report, interleaved, machine, medians, plot
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.layers import StripedHyenaBlock
from stripedrag.model.modeling import StripedHyenaModel

LENGTHS = (8192, 32_768)
WIDTHS: tuple[dict[str, Any], ...] = (
    {"hidden_size": 576, "num_attention_heads": 9, "proj_groups": 3, "state_size": 8, "inner_mlp_size": 1536},
    {"hidden_size": 1024, "num_attention_heads": 8, "proj_groups": 4, "state_size": 2, "inner_mlp_size": 2816},
)
DTYPE = torch.bfloat16


def run(repeats: int) -> Report:
    """Seconds of both layers at several lengths, their ratio, and the share of the operator in the Hyena layer."""
    rows = [
        _layers(widths, length, with_gradient, repeats)
        for widths in WIDTHS
        for length in LENGTHS
        for with_gradient in (False, True)
    ]
    figures = {"bench": "layer", "machine": machine(), "repeats": repeats, "rows": rows}
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def _layers(widths: dict[str, Any], length: int, with_gradient: bool, repeats: int) -> dict[str, Any]:
    config = StripedHyenaConfig(
        vocab_size=16, num_layers=2, attn_layer_idxs=[1], hyena_layer_idxs=[0], column_split_hyena=False, **widths
    )
    torch.manual_seed(0)
    model = StripedHyenaModel(config).to(DTYPE)
    hyena, attention = model.blocks
    assert isinstance(hyena, StripedHyenaBlock)
    x = torch.randn(1, length, config.hidden_size).to(DTYPE).requires_grad_(with_gradient)
    rotary = model._rotary(torch.arange(length).unsqueeze(0), DTYPE)
    dx = torch.ones_like(x)
    z = hyena.projections(x).detach().requires_grad_(with_gradient)
    dy = torch.ones_like(x)

    def layer(block: StripedHyenaBlock) -> None:
        out = block(x, rotary)
        if with_gradient:
            torch.autograd.grad(out, (x, *block.parameters()), dx)

    def operator() -> None:
        # As the layer runs it; without a gradient y then stands in z, whose numbers no longer matter.
        out: Tensor = hyena.filter(z, None, None, may_overwrite=True)[0]
        if with_gradient:
            torch.autograd.grad(out, (z, *hyena.filter.parameters()), dy)

    with torch.set_grad_enabled(with_gradient):
        seconds = interleaved(
            repeats, hyena_layer=lambda: layer(hyena), attention_layer=lambda: layer(attention), operator=operator
        )
    middle = medians(seconds)
    return {
        "channels": config.hidden_size,
        "head_width": config.head_dim,
        "length": length,
        "pass": "forward and backward" if with_gradient else "forward",
        "hyena_ms": 1e3 * middle["hyena_layer"],
        "attention_ms": 1e3 * middle["attention_layer"],
        "attention_over_hyena": middle["attention_layer"] / middle["hyena_layer"],
        "operator_share": middle["operator"] / middle["hyena_layer"],
        "seconds": seconds,
    }


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, bfloat16, torch {here['torch']}, kernels {here['kernels']}, "
        f"{here['commit']}",
        f"multiplies {here['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s",
        "",
        f"{'':22}{'H':>5}{'head':>6}{'L':>7}{'Hyena ms':>11}{'attention ms':>14}{'ratio':>7}{'operator':>10}",
    ]
    for row in figures["rows"]:
        lines.append(
            f"{row['pass']:22}{row['channels']:>5}{row['head_width']:>6}{row['length']:>7}{row['hyena_ms']:>11.0f}"
            f"{row['attention_ms']:>14.0f}{row['attention_over_hyena']:>7.1f}{row['operator_share']:>10.1%}"
        )
    lines += ["", f"Medians of {figures['repeats']}, interleaved. operator: the Hyena operator's share of its layer."]
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in figures["rows"]:
        series.setdefault(f"H {row['channels']}, {row['pass']}", []).append(
            (row["length"], row["attention_over_hyena"])
        )
    plot(path, series, "attention layer over Hyena layer", "tokens", "times as long", log_x=True)
