"""Causal attention of new tokens over a context, as the model asks for it, against torch's two ways of it; and its
gradient, against torch's faster one.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stripedrag.eval.bench.report import Report, interleaved, machine, medians, plot
from stripedrag.hardware import fast_dtype
from stripedrag.kernels import cpu
from stripedrag.kernels.attention import attend, by_whole_heads, in_parts

DTYPE = torch.bfloat16
SHAPES = {"default model": (9, 3, 64), "published 7B": (32, 8, 128)}  # heads, heads of keys, head width
LENGTHS = ((1, 8192), (32, 8192), (256, 8192), (2048, 6144), (2048, 0), (8192, 0))  # new tokens, after how many
OF_GRADIENT = (2048, 8192)  # tokens of a sequence


def run(repeats: int) -> Report:
    """Milliseconds of the model's attention and of torch's, in parts and whole, and of both gradients; operations a
    second.
    """
    rows = [_attention(name, *lengths, repeats) for name in SHAPES for lengths in LENGTHS]
    gradients = [_gradient(name, tokens, repeats) for name in SHAPES for tokens in OF_GRADIENT]
    figures = {
        "bench": "attention",
        "machine": machine(),
        "native": cpu.has_attention(),
        "repeats": repeats,
        "rows": rows,
        "gradients": gradients,
    }
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def _attention(name: str, new: int, past: int, repeats: int) -> dict[str, Any]:
    heads, kv_heads, width = SHAPES[name]
    torch.manual_seed(0)
    q = torch.randn(1, new, heads, width, dtype=DTYPE).transpose(1, 2)
    k, v = torch.randn(2, 1, kv_heads, past + new, width, dtype=DTYPE)  # as a cache has them
    of_torch = [t.to(fast_dtype()) for t in (q, k, v)]  # in which torch is quickest
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past) if past and new > 1 else None

    def sdpa() -> Tensor:
        q, k, v = of_torch
        if new == 1:  # the heads that share keys as rows of one product, faster than enable_gqa
            return F.scaled_dot_product_attention(q.reshape(1, kv_heads, -1, width), k, v).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    calls = max(1, 2**28 // (heads * new * (past + new) * width))  # of what is over in microseconds
    with torch.inference_mode():
        seconds = interleaved(
            repeats,
            ours=lambda: [attend(q, k, v) for _ in range(calls)],
            in_parts=lambda: [in_parts(*of_torch) for _ in range(calls)],
            sdpa=lambda: [sdpa() for _ in range(calls)],
        )
    middle = medians(seconds)
    operations = 4 * heads * width * (new * past + new * (new + 1) / 2)
    return {
        "shape": name,
        "new": new,
        "past": past,
        "calls": calls,
        **{f"{side}_ms": 1e3 * middle[side] / calls for side in seconds},
        "torch_over_ours": min(middle["in_parts"], middle["sdpa"]) / middle["ours"],
        "flop_per_s": operations * calls / middle["ours"],
        "seconds": seconds,
    }


def _gradient(name: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Of a whole sequence, the forward pass not counted; torch's with keys and values repeated for the heads that share
    them, which is its faster way.
    """
    heads, kv_heads, width = SHAPES[name]
    torch.manual_seed(0)
    made = [torch.randn(1, tokens, some, width, dtype=DTYPE).transpose(1, 2) for some in (heads, kv_heads, kv_heads)]
    dy = torch.randn_like(made[0])
    taken = {}
    for side, run, dtype in (("ours", attend, DTYPE), ("torch", by_whole_heads, fast_dtype())):
        operands = [t.to(dtype).requires_grad_() for t in made]
        taken[side] = partial(torch.autograd.grad, run(*operands), operands, dy.to(dtype), retain_graph=True)
    seconds = interleaved(repeats, **taken)
    middle = medians(seconds)
    return {
        "shape": name,
        "tokens": tokens,
        **{f"{side}_ms": 1e3 * middle[side] for side in seconds},
        "torch_over_ours": middle["torch"] / middle["ours"],
        "flop_per_s": 2.5 * 4 * heads * width * tokens * (tokens + 1) / 2 / middle["ours"],  # five products for two
        "seconds": seconds,
    }


def _table(figures: dict[str, Any]) -> str:
    here, limit = figures["machine"], figures["machine"]["matmul_flop_per_s"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, bfloat16 (torch {here['dtype']}), torch {here['torch']}, "
        f"{here['commit']}; "
        f"{'native' if figures['native'] else 'no native attention here: torch'}",
        f"multiplies {limit / 1e9:.0f} GFLOP/s, reads {here['read_bytes_per_s'] / 1e9:.0f} GB/s",
        "",
        f"{'':15}{'new':>6}{'after':>7}{'ours ms':>10}{'in parts':>10}{'sdpa':>9}{'ratio':>7}"
        f"{'GFLOP/s':>9}{'of product':>12}",
    ]
    lines += [
        f"{row['shape']:15}{row['new']:>6}{row['past']:>7}{row['ours_ms']:>10.2f}{row['in_parts_ms']:>10.2f}"
        f"{row['sdpa_ms']:>9.2f}{row['torch_over_ours']:>7.2f}{row['flop_per_s'] / 1e9:>9.0f}"
        f"{row['flop_per_s'] / limit:>12.0%}"
        for row in figures["rows"]
    ]
    lines += [
        "",
        f"{'gradient':15}{'tokens':>13}{'ours ms':>10}{'torch':>19}{'ratio':>7}{'GFLOP/s':>9}{'of product':>12}",
    ]
    lines += [
        f"{row['shape']:15}{row['tokens']:>13}{row['ours_ms']:>10.2f}{row['torch_ms']:>19.2f}"
        f"{row['torch_over_ours']:>7.2f}{row['flop_per_s'] / 1e9:>9.0f}{row['flop_per_s'] / limit:>12.0%}"
        for row in figures["gradients"]
    ]
    lines += [
        "",
        f"Medians of {figures['repeats']}, interleaved. ratio: torch's time, the better of its two ways, over ours.",
    ]
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[str, float]]] = {}
    for row in figures["rows"]:
        series.setdefault(row["shape"], []).append((f"{row['new']} after {row['past']}", row["torch_over_ours"]))
    for row in figures["gradients"]:
        series[row["shape"]].append((f"gradient, {row['tokens']}", row["torch_over_ours"]))
    plot(path, series, "torch's attention over ours", "tokens", "times as long")
