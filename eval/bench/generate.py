"""Prefill and decoding of the default model against the transformer it was made from, in the same pipeline loop."""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stripedrag.eval.bench.report import Report, machine
from stripedrag.model.cache import cache_bytes, new_cache
from stripedrag.model.generation import Sampling, decode, prefill
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import BASELINE, STRIPED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = (1024, 4096, 8000)
ANSWER_TOKENS = 32
CORPUS = Path(__file__).parents[1] / "data" / "xquad"


def run(repeats: int) -> Report:
    """Tokens a second of prefill and of decoding, and cache bytes, at several prompt lengths, with their ratios."""
    systems, ids = {}, torch.empty(1, 0, dtype=torch.long)
    for name in (STRIPED, BASELINE):
        model, tokenizer = load_model(name, device="cpu")  # nothing here waits for a GPU: its times would be wrong
        systems[name] = model
        text = "\n\n".join(path.read_text() for path in sorted(CORPUS.glob("*.txt"))[:12])
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    rows = []
    for length in PROMPT_TOKENS:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for _ in range(repeats):
            for name, model in systems.items():
                runs[name].append(speed(model, ids[:, :length]))
        rows.append({"prompt_tokens": length, "runs": runs, "medians": {n: _medians(r) for n, r in runs.items()}})
    here = machine()
    weights = {name: sum(p.nbytes for p in model.parameters()) for name, model in systems.items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in systems.items()}
    limits = {
        name: {
            "prefill_tokens_per_s": here["matmul_flop_per_s"] / (2 * parameters[name]),
            "decode_tokens_per_s": here["read_bytes_per_s"] / weights[name],
        }
        for name in systems
    }
    figures = {"bench": "generate", "machine": here, "repeats": repeats, "limits": limits, "lengths": rows}
    return Report(figures, _table(figures))


def speed(model: "PreTrainedModel", ids: Tensor) -> dict[str, float]:
    """Tokens a second of reading ids (1, L) and of writing `ANSWER_TOKENS` more, and the cache's bytes after them."""
    cache = new_cache(model.config)
    start = time.perf_counter()
    logits = prefill(model, ids, cache)
    prefilled = time.perf_counter()
    steps = decode(model, logits, cache, max_new_tokens=ANSWER_TOKENS + 1, stop_ids=(), sampling=Sampling())
    made = sum(1 for _ in steps) - 1  # the first token is the prefill's
    end = time.perf_counter()
    return {
        "prefill_tokens_per_s": ids.shape[1] / (prefilled - start),
        "decode_tokens_per_s": made / (end - prefilled),
        "cache_bytes": cache_bytes(cache),
    }


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _table(figures: dict[str, Any]) -> str:
    here, limits = figures["machine"], figures["limits"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['dtype']}, torch {here['torch']}, {here['commit']}",
        f"reads {here['read_bytes_per_s'] / 1e9:.1f} GB/s, multiplies {here['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s",
        "",
        f"{'prompt':>7}  {'':24}{STRIPED:>24}{BASELINE:>24}{'ratio':>8}{'limit':>9}",
    ]
    for row in figures["lengths"]:
        ours, theirs = row["medians"][STRIPED], row["medians"][BASELINE]
        for key, label in (("prefill_tokens_per_s", "prefill tokens/s"), ("decode_tokens_per_s", "decode tokens/s")):
            lines.append(
                f"{row['prompt_tokens']:>7}  {label:24}{ours[key]:>24.1f}{theirs[key]:>24.1f}"
                f"{ours[key] / theirs[key]:>8.2f}{limits[STRIPED][key]:>9.0f}"
            )
        cache = ours["cache_bytes"], theirs["cache_bytes"]
        lines.append(
            f"{row['prompt_tokens']:>7}  {'cache MB':24}{cache[0] / 1e6:>24.1f}{cache[1] / 1e6:>24.1f}"
            f"{cache[0] / cache[1]:>8.2f}"
        )
    lines += [
        "",
        f"medians of {figures['repeats']}, interleaved. limit: weights at the read rate, products at the other;",
    ]
    lines += ["attention and the Hyena operator come on top of both."]
    return "\n".join(lines)
