"""One token: the decode step of the operator against eager torch, and its share of the default model's whole step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stripedrag.eval.bench.filter import SHAPES, parameters
from stripedrag.eval.bench.report import Report, interleaved, machine, medians, plot
from stripedrag.kernels import ops
from stripedrag.model.cache import hyena_state, new_cache
from stripedrag.model.generation import prefill
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import STRIPED

CALLS = 100  # of each side in a repetition: a step takes microseconds
PROMPT_TOKENS = 1024


@torch.no_grad()
def run(repeats: int) -> Report:
    """Microseconds of a step through the public op, native and eager, and the profile of a model's decode step."""
    steps = [_step(*shape, dtype, repeats) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    figures = {"bench": "decode", "machine": machine(), "repeats": repeats, "steps": steps, "model": _model(repeats)}
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def _step(channels: int, modes: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    given = parameters(channels, modes, dtype)
    z = torch.randn(1, 3 * channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    state = ops.HyenaState(torch.zeros(1, 3 * channels, 2, dtype=dtype), torch.zeros(1, channels, modes, 2))

    def calls(backend: str | None) -> None:
        for _ in range(CALLS):
            ops.hyena_step(z, **given, state=state, backend=backend)

    seconds = interleaved(repeats, ours=lambda: calls(None), eager=lambda: calls("torch"))
    middle = medians(seconds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "channels": channels,
        "modes": modes,
        "ours_us": 1e6 * middle["ours"] / CALLS,
        "eager_us": 1e6 * middle["eager"] / CALLS,
        "times_faster": middle["eager"] / middle["ours"],
        "seconds": seconds,
    }


def _model(repeats: int) -> dict[str, Any]:
    """What one decode step of the default model spends where, each part run as the model runs it, interleaved."""
    model, _ = load_model(STRIPED, device="cpu")
    cache = new_cache(model.config)
    ids = torch.arange(PROMPT_TOKENS).unsqueeze(0) % model.config.vocab_size
    prefill(model, ids, cache)
    token, blocks, backbone = ids[:, :1], list(model.backbone.blocks), model.backbone
    x = backbone.embedding_layer(token)
    hyena = [(b, hyena_state(cache, b.layer_idx), b.projections(x)[:, 0]) for b in blocks if not b.is_attention]
    wide = [torch.zeros(1, 1, b.mlp.l3.in_features, dtype=x.dtype) for b in blocks]

    def filters() -> None:
        for block, state, z in hyena:
            assert state is not None
            block.filter.step(z, state)

    def norms() -> None:
        for block in blocks:
            block.pre_norm(x)
            block.post_norm(x)
        backbone.norm(x)

    def products(apply: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        for block, hidden in zip(blocks, wide, strict=True):
            for linear in (block.mlp.l1, block.mlp.l2):
                apply(linear, x)
            apply(block.mlp.l3, hidden)
            for linear in (
                (block.inner_mha_cls.Wqkv, block.inner_mha_cls.out_proj)
                if block.is_attention
                else (block.projections, block.out_filter_dense)
            ):
                apply(linear, x)
        apply(backbone.unembed, x)

    seconds = interleaved(
        4 * repeats,
        step=lambda: model(input_ids=token, past_key_values=cache, use_cache=True),
        hyena_operators=filters,
        norms=norms,
        linear_layers=lambda: products(lambda linear, row: linear(row)),
        linear_layers_by_torch=lambda: products(lambda linear, row: F.linear(row, linear.weight, linear.bias)),
    )
    middle = medians(seconds)
    by_torch = middle.pop("linear_layers_by_torch")
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "name": STRIPED,
        "context_tokens": PROMPT_TOKENS,
        "step_ms": 1e3 * middle["step"],
        "share": {part: middle[part] / middle["step"] for part in middle if part != "step"},
        "linear_layers_by_torch_over_ours": by_torch / middle["linear_layers"],
        "step_over_ours_with_torchs_linear_layers": 1 + (by_torch - middle["linear_layers"]) / middle["step"],
        "weight_bytes": weights,
        "seconds": seconds,
    }


def _table(figures: dict[str, Any]) -> str:
    here, model = figures["machine"], figures["model"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, kernels {here['kernels']}, "
        f"{here['commit']}",
        "",
        f"{'one token, public op':24}{'H':>5}{'N':>4}{'ours µs':>10}{'eager µs':>10}{'ratio':>8}",
    ]
    for row in figures["steps"]:
        lines.append(
            f"{row['dtype']:24}{row['channels']:>5}{row['modes']:>4}{row['ours_us']:>10.1f}{row['eager_us']:>10.1f}"
            f"{row['times_faster']:>8.1f}"
        )
    least_ms = 1e3 * model["weight_bytes"] / here["read_bytes_per_s"]
    lines += [
        "",
        f"{model['name']}, a decode step at {model['context_tokens']} tokens of context: {model['step_ms']:.1f} ms "
        f"(reading the weights once takes {least_ms:.1f})",
    ]
    lines += [f"  {part.replace('_', ' '):24}{share:>6.1%}" for part, share in model["share"].items()]
    lines += [
        f"  torch's linear layers take {model['linear_layers_by_torch_over_ours']:.1f}x as long; with them the step "
        f"would take {model['step_over_ours_with_torchs_linear_layers']:.1f}x as long",
        "  attention, rotary, cache, Python: the rest. Each part was run by itself: operators and norms found their",
        "  numbers in the caches more often than in a whole step.",
        "",
        f"Medians of {figures['repeats']}, interleaved.",
    ]
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    share = figures["model"]["share"]
    bars = {part.replace("_", " "): 100 * part_share for part, part_share in share.items()}
    bars["rest"] = max(0.0, 100 - sum(bars.values()))
    series = {"decode step": list(bars.items())}
    plot(path, series, f"{figures['model']['name']}: where a decode step goes", "", "% of the step", bars=True)
