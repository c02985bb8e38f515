"""Memory of reading a prompt, against its length: the default model and a slice of the published 7B, each beside a
Llama of its widths in the same loop with transformers' own DynamicCache; and seconds of reading against the length of
the segments that prompts are read in. Every reading has a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from stripedrag.errors import StoreError
from stripedrag.eval.bench.load import published
from stripedrag.eval.bench.report import Report, machine, plot
from stripedrag.eval.bench.train import llama
from stripedrag.eval.meter import Meter
from stripedrag.model import generation
from stripedrag.model.cache import cache_bytes, new_cache
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.loading import load_model
from stripedrag.model.memory import state_bytes, token_bytes
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.smollm2 import BASELINE, STRIPED

LENGTHS = (2048, 8192, 32_768, 131_072)
SLICE, LLAMA_SLICE = "7B, 2 layers", "Llama of its widths"
OURS = {STRIPED: BASELINE, SLICE: LLAMA_SLICE}  # and their rivals
RIVALS_UP_TO = 32_768  # at 131,072 attention alone would take a rival more than an hour
SEGMENTS, SEGMENTED = (256, 512, 1024, 2048, 4096, 8192), 8192  # tokens at once, of a prompt of so many
_TIMES = 3  # since seconds differ more than bytes
DTYPE = torch.bfloat16
_HOURS = 6 * 3600.0  # that a reading may take


def run(repeats: int) -> Report:
    """Peak bytes beyond the weights, what of them the cache holds, and seconds, for each model, length and segment."""
    usual = generation.SEGMENT_TOKENS
    asked = [
        (name, length, usual)
        for length in LENGTHS
        for pair in OURS.items()
        for name in pair
        if name in OURS or length <= RIVALS_UP_TO
    ]
    asked += _TIMES * [(name, SEGMENTED, segment) for segment in SEGMENTS for name in OURS]
    rows = [_in_a_process(*each) for each in track(asked * repeats, "reading", console=Console(stderr=True))]
    figures = {"bench": "memory", "machine": machine(), "repeats": repeats, "segment": usual, "rows": rows}
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def read(name: str, length: int) -> dict[str, Any]:
    """What reading a prompt of so many tokens takes in this process."""
    model = _model(name)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ours = isinstance(model, StripedHyenaForCausalLM)

    def empty() -> DynamicCache:
        return new_cache(model.config) if ours else DynamicCache(config=model.config)

    generation.prefill(model, ids[:, :64], empty())  # the weights come into memory
    cache, meter = empty(), Meter(trim=True)
    with meter.running(_HOURS):
        generation.prefill(model, ids, cache)
    return {
        "model": name,
        "length": length,
        "segment": generation.SEGMENT_TOKENS,
        "weight_bytes": sum(tensor.nbytes for tensor in model.parameters()),
        "peak_bytes": meter.told_peak_bytes(),
        "cache_bytes": cache_bytes(cache),
        "formula_bytes": length * token_bytes(model) + state_bytes(model),
        "token_bytes": token_bytes(model),
        "state_bytes": state_bytes(model),
        "seconds": meter.total_s,
    }


def _model(name: str) -> PreTrainedModel:
    if name in (STRIPED, BASELINE):
        return load_model(name, device="cpu", dtype=DTYPE, window_tokens=max(LENGTHS))[0]
    layers = {"num_layers": 2, "attn_layer_idxs": [1], "hyena_layer_idxs": [0], "max_seqlen": max(LENGTHS)}
    config = StripedHyenaConfig(**published() | layers)
    torch.manual_seed(0)
    if name == SLICE:
        return StripedHyenaForCausalLM(config).to(DTYPE).eval()
    return LlamaForCausalLM(llama(config)).to(DTYPE).eval()


def _in_a_process(name: str, length: int, segment: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "stripedrag.eval.bench.memory", name, str(length), str(segment)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        raise StoreError(
            f"the process that reads {length} tokens ended with {done.returncode}; -9 is for want of memory"
        )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    usual = figures["segment"]
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in figures["rows"]:
        groups.setdefault((row["model"], row["length"], row["segment"]), []).append(row)
    ordered = sorted(groups.items(), key=lambda group: _order(*group[0]))
    lines = [
        f"{here['processor']}, {here['threads']} threads, bfloat16, torch {here['torch']}, {here['commit']}",
        f"prompts in segments of {usual:,} tokens; MB beyond the weights",
        "",
        f"{'':24}{'weights':>9}{'tokens':>9}{'peak':>8}{'cache':>8}{'by formula':>12}{'else':>7}{'seconds':>9}",
    ]
    for (name, length, segment), rows in ordered:
        if segment != usual:
            continue
        peak, seconds = (median(row[key] for row in rows) for key in ("peak_bytes", "seconds"))
        row = rows[0]
        lines.append(
            f"{name:24}{row['weight_bytes'] / 1e6:>9.0f}{length:>9}{peak / 1e6:>8.0f}{row['cache_bytes'] / 1e6:>8.0f}"
            f"{row['formula_bytes'] / 1e6:>12.0f}{median(map(_else, rows)) / 1e6:>7.0f}{seconds:>9.1f}"
        )
    lines += ["", "by formula: bytes a token in the attention layers, and of the Hyena states, which do not grow:"]
    firsts = {row["model"]: row for row in figures["rows"]}
    lines += [
        f"  {name:24}{firsts[name]['token_bytes']:>9,} a token{firsts[name]['state_bytes']:>12,} of states"
        for name in sorted(firsts, key=_order)
    ]
    lines += ["", f"{SEGMENTED:,} tokens in segments of so many:", f"{'':24}{'segment':>9}{'seconds':>9}{'else':>7}"]
    for (name, length, segment), rows in ordered:
        if name in OURS and length == SEGMENTED:
            seconds = median(row["seconds"] for row in rows)
            lines.append(f"{name:24}{segment:>9,}{seconds:>9.1f}{median(map(_else, rows)) / 1e6:>7.0f}")
    return "\n".join(lines)


def _else(row: dict[str, Any]) -> float:
    """Bytes that neither the weights nor the cache hold."""
    return float(row["peak_bytes"] - row["cache_bytes"])


def _order(name: str, *numbers: int) -> tuple[int, ...]:
    return [each for pair in OURS.items() for each in pair].index(name), *numbers


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(figures["rows"], key=lambda row: _order(row["model"], row["length"])):
        if row["segment"] == figures["segment"]:
            series.setdefault(row["model"], []).append((row["length"], row["peak_bytes"] / 1e9))
    plot(path, series, "memory of reading a prompt", "tokens", "GB beyond the weights", log_x=True)


if __name__ == "__main__":
    generation.SEGMENT_TOKENS = int(sys.argv[3])
    print(json.dumps(read(sys.argv[1], int(sys.argv[2]))))
