"""A whole Hyena layer against a whole attention layer of the same widths, forward and with its gradient."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stripedrag.eval.bench.report import Report, interleaved, machine, medians, plot
from stripedrag.hardware import fast_dtype
from stripedrag.kernels import ops
from stripedrag.kernels.attention import by_whole_heads
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.layers import Attention, StripedHyenaBlock
from stripedrag.model.modeling import StripedHyenaModel

LENGTHS = (8192, 32_768)
WIDTHS: tuple[dict[str, Any], ...] = (
    {"hidden_size": 576, "num_attention_heads": 9, "proj_groups": 3, "state_size": 8, "inner_mlp_size": 1536},
    {"hidden_size": 1024, "num_attention_heads": 8, "proj_groups": 4, "state_size": 2, "inner_mlp_size": 2816},
)


class TorchsAttention(Attention):
    """Attention by torch's kernels alone, on a CPU by the faster of its two ways: what a model has that is not ours."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See `Attention`; of whole sequences alone."""
        assert mask is None and q.shape[2] == k.shape[2]
        return by_whole_heads(q, k, v) if q.is_cpu else ops.attend(q, k, v)


class Side(NamedTuple):
    """What is timed: a forward run, and what its gradient is taken of."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]

    def backward(self, out: Tensor) -> None:
        """The gradient, given what a run gave."""
        torch.autograd.grad(out, self.leaves, out.detach())

    def with_gradient(self) -> None:
        """Forward and backward."""
        self.backward(self.run())


class Layers:
    """A Hyena and an attention layer of these widths, in the words of a configuration, on a device, in the narrowest
    dtype that torch multiplies natively there.
    """

    def __init__(self, widths: dict[str, Any], device: torch.device) -> None:
        self.config = StripedHyenaConfig(
            vocab_size=16, num_layers=2, attn_layer_idxs=[1], hyena_layer_idxs=[0], **widths
        )
        torch.manual_seed(0)
        self._device, self._dtype = device, fast_dtype(device)
        self._model = StripedHyenaModel(self.config).to(self._dtype).to(device)
        blocks = [block for block in self._model.blocks if isinstance(block, StripedHyenaBlock)]
        self._hyena, self._attention = blocks

    def sides(self, length: int, *, gradient: bool, torchs: bool = False) -> dict[str, Side]:
        """Both layers on so many tokens, and where it is asked for an attention layer by torch's kernels."""
        x = self._made(length, self.config.hidden_size, gradient=gradient)
        rotary = self._model._rotary(torch.arange(length, device=self._device).unsqueeze(0), self._dtype)
        blocks = {"hyena_layer": self._hyena, "attention_layer": self._attention}
        if torchs:
            blocks["llama_layer"] = deepcopy(self._attention)
            blocks["llama_layer"].inner_mha_cls.__class__ = TorchsAttention
        return {
            name: Side(lambda block=block: block(x, rotary), (x, *block.parameters()))  # type: ignore[misc]
            for name, block in blocks.items()
        }

    def operator(self, length: int, *, gradient: bool) -> Side:
        """The Hyena operator as its layer runs it; without a gradient y then stands in z."""
        width, operator = self.config.hidden_size, self._hyena.filter
        z = self._made(length, 3 * width, gradient=gradient)
        return Side(lambda: operator(z, None, None, may_overwrite=True)[0], (z, *operator.parameters()))

    def last_product(self, length: int) -> Side:
        """The MLP's last product. A layer whose activations are made again goes without: torch ends the second forward
        run where nothing more is kept for the gradient.
        """
        l3 = self._hyena.mlp.l3
        gated = self._made(length, l3.in_features)
        return Side(lambda: l3(gated), (gated, l3.weight))

    def core(self, length: int, kv_heads: int) -> dict[str, Side]:
        """Attention alone, of so many key/value heads and the queries that share them: ours, and torch's."""
        group, width = self.config.proj_groups, self.config.head_dim
        q, k, v = (self._made(heads, length, width) for heads in (group * kv_heads, kv_heads, kv_heads))
        torchs = by_whole_heads if q.is_cpu else ops.attend
        return {
            "core": Side(lambda: ops.attend(q, k, v), (q, k, v)),
            "llama_core": Side(lambda: torchs(q, k, v), (q, k, v)),
        }

    def _made(self, *shape: int, gradient: bool = True) -> Tensor:
        """Random numbers of batch 1."""
        return torch.randn(1, *shape, device=self._device, dtype=self._dtype, requires_grad=gradient)


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
    layers = Layers({"column_split_hyena": False, **widths}, torch.device("cpu"))
    sides = layers.sides(length, gradient=with_gradient)
    sides["operator"] = layers.operator(length, gradient=with_gradient)
    with torch.set_grad_enabled(with_gradient):
        runs = {name: side.with_gradient if with_gradient else side.run for name, side in sides.items()}
        seconds = interleaved(repeats, **runs)
    middle, config = medians(seconds), layers.config
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
        f"{here['processor']}, {here['threads']} threads, {here['dtype']}, torch {here['torch']}, "
        f"kernels {here['kernels']}, {here['commit']}",
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
