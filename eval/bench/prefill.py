"""Where the reading of a prompt goes in the default model, beside what its arithmetic takes at the rate of a large
product.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stripedrag.eval.bench import SHORTEST_PROMPT
from stripedrag.eval.bench.generate import novel_ids
from stripedrag.eval.bench.report import Report, interleaved, machine, medians, plot, seconds_of
from stripedrag.model.cache import new_cache
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.generation import prefill
from stripedrag.model.layers import Attention, GatedMLP, HyenaFilter, Linear, RMSNorm
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import STRIPED

PROMPT_TOKENS = (SHORTEST_PROMPT, 8192, 32_768)
PARTS: dict[str, type[nn.Module]] = {
    "products with weights": Linear,
    "attention": Attention,  # and the rotation of its positions, and its cache
    "Hyena operator": HyenaFilter,
    "gates of the MLPs": GatedMLP,
    "norms": RMSNorm,
}
REST = "the rest"  # sums of blocks, the embedding, the last token's logits


def run(repeats: int, longest: int = PROMPT_TOKENS[-1]) -> Report:
    """Seconds of a prefill by its parts, their shares, and of the machine's rate what products and attention reach;
    of prompts up to `longest` tokens.
    """
    here, lengths = machine(), [tokens for tokens in PROMPT_TOKENS if tokens <= longest]
    model, tokenizer = load_model(STRIPED, device="cpu", window_tokens=max(lengths))
    ids = torch.tensor([novel_ids(tokenizer, max(lengths))])
    rows = [_row(model, ids[:, :tokens], here["matmul_flop_per_s"], repeats) for tokens in lengths]
    figures = {"bench": "prefill", "machine": here, "repeats": repeats, "name": STRIPED, "rows": rows}
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def _row(model: PreTrainedModel, ids: torch.Tensor, flop_per_s: float, repeats: int) -> dict[str, Any]:
    runs: list[dict[str, float]] = []

    blocks = model.base_model.blocks
    assert isinstance(blocks, nn.ModuleList)

    def read() -> None:
        prefill(model, ids, new_cache(model.config, expected_tokens=ids.shape[1]))

    def divided() -> None:
        with own_seconds(blocks) as parts:
            whole = seconds_of(read)
        runs.append({**parts, REST: whole - sum(parts.values())})

    seconds = interleaved(repeats, plain=read, divided=divided)
    del runs[0]  # the warm-up
    whole, flop = median(seconds["plain"]), flops(blocks, model.config, ids.shape[1])
    share = {name: median(run[name] / sum(run.values()) for run in runs) for name in (*PARTS, REST)}
    return {
        "tokens": ids.shape[1],
        "seconds": seconds,
        "parts": runs,
        "share": share,
        "flop": flop,
        "of_rate": {name: of_part / flop_per_s / (share[name] * whole) for name, of_part in flop.items()},
        "of_limit": sum(flop.values()) / flop_per_s / whole,
    }


def flops(blocks: nn.Module, config: StripedHyenaConfig, tokens: int) -> dict[str, int]:
    """Multiplications and additions of the products with weights, and of attention, of reading so many tokens."""
    weights = sum(module.weight.numel() for module in blocks.modules() if isinstance(module, Linear))
    pairs = tokens * (tokens + 1) // 2
    attention = len(config.attn_layer_idxs) * 4 * config.hidden_size * pairs
    return {"products with weights": 2 * tokens * weights, "attention": attention}


@contextmanager
def own_seconds(blocks: nn.Module) -> Iterator[dict[str, float]]:
    """Wall seconds that modules of each of `PARTS` take themselves, without what others inside them take."""
    seconds = dict.fromkeys(PARTS, 0.0)
    inside = [0.0]  # for each part under way what parts in it took; at the bottom what all took

    def timed(part: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inside.append(0.0)
        out: list[Any] = []
        taken = seconds_of(lambda: out.append(forward(*args, **kwargs)))
        seconds[part] += taken - inside.pop()
        inside[-1] += taken
        return out[0]

    modules = [(module, name) for module in blocks.modules() for name, kind in PARTS.items() if type(module) is kind]
    for module, name in modules:
        module.forward = functools.partial(timed, name, module.forward)
    try:
        yield seconds
    finally:
        for module, _ in modules:
            del module.forward


def _table(figures: dict[str, Any]) -> str:
    here, rows = figures["machine"], figures["rows"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['default_dtype']}, torch {here['torch']}, "
        f"kernels {here['kernels']}, {here['commit']}",
        f"multiplies {here['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s",
        "",
        f"{figures['name']}, a prompt of{'':4}" + "".join(f"{row['tokens']:>18,}" for row in rows),
    ]
    width = len(lines[-1]) - 18 * len(rows)

    def line(name: str, cells: Callable[[dict[str, Any]], str]) -> str:
        return f"{name:{width}}" + "".join(f"{cells(row):>18}" for row in rows)

    def of_part(name: str, row: dict[str, Any]) -> str:
        rate = f" at {row['of_rate'][name]:.0%}" if name in row["of_rate"] else ""
        return f"{row['share'][name]:.1%}{rate}"

    lines.append(line("seconds", lambda row: f"{median(row['seconds']['plain']):.2f}"))
    lines += [line(f"  {name}", functools.partial(of_part, name)) for name in (*PARTS, REST)]
    lines += [
        line("of what both products allow", lambda row: f"{row['of_limit']:.0%}"),
        line("timing its parts takes", lambda row: f"{_overhead(row):+.1%}"),
        "",
        f"Medians of {figures['repeats']}, in turn with whole runs. at: of the rate of a large product.",
    ]
    return "\n".join(lines)


def _overhead(row: dict[str, Any]) -> float:
    middle = medians(row["seconds"])
    return middle["divided"] / middle["plain"] - 1


def _plot(figures: dict[str, Any], path: Path) -> None:
    series = {
        name: [(row["tokens"], row["share"][name] * median(row["seconds"]["plain"])) for row in figures["rows"]]
        for name in (*PARTS, REST)
    }
    plot(path, series, "the default model: where a prefill goes", "tokens of prompt", "seconds", log_x=True, log_y=True)
