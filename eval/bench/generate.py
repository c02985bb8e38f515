"""Reading a prompt and writing an answer: the default model, the transformer it was made from in torch, and that in
llama.cpp, in turn; and needles in a prompt of 131,072 tokens, which the default model reads once and is asked three
times.

Prompts are text of novels, the same ids for all. The default model is run as a pipeline runs it. The transformer reads
its prompt at once, without a mask: in segments, as the pipeline would, it takes longer, and less memory. Its cache is
ours, which does not copy itself. llama.cpp's context is made before its time begins. llama.cpp is left out where
`llama-cpp-python` (the extra `llama-cpp`) is not installed.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Protocol, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stripedrag.eval.bench import SHORTEST_PROMPT
from stripedrag.eval.bench.report import Report, plot
from stripedrag.eval.bench.so_far import going_on
from stripedrag.eval.data_formats import Chapter
from stripedrag.eval.haystack import Haystack, plant, with_margin
from stripedrag.eval.meter import Meter
from stripedrag.eval.metrics import string_match_all
from stripedrag.eval.resources import span_of
from stripedrag.eval.tasks.needle import needle
from stripedrag.eval.tasks.planted import HAYSTACK
from stripedrag.eval.tasks.vocabulary import ADJECTIVES, NOUNS
from stripedrag.jsonl import read_lines
from stripedrag.model import generation
from stripedrag.model.cache import cache_bytes, new_cache
from stripedrag.model.generation import Sampling, decode, decode_together, prefill
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import BASELINE, STRIPED
from stripedrag.rag.prompt import PromptFormat

LENGTHS = (SHORTEST_PROMPT, 8192, 32_768)
LONGEST = 131_072  # for ours alone; attention alone would take the others hours
ROWS, ROW_TOKENS = 8, 1024  # of a batch
ANSWER_TOKENS = 32
DEPTHS = (0.1, 0.5, 0.9)
GGUF, GGUF_8 = "llama.cpp, Q4_1 as published", "llama.cpp, Q8_0"
_HOURS = 6 * 3600.0  # that a reading may take


class System(Protocol):
    """What is measured."""

    weight_bytes: int
    weights: str  # what they are stored in

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, tell: Callable[[float], None]) -> int:
        """Read prompts of one length, then write so many tokens after each, greedily and side by side. `tell` hears
        the time when reading begins, when the first are there, and when all are. Gives the bytes of the cache.
        """


class InTorch:
    """A model in torch, as the pipeline runs it; a transformer without segments."""

    def __init__(self, model: PreTrainedModel, *, at_once: bool) -> None:
        self.model = model
        self.weight_bytes = sum(tensor.nbytes for tensor in model.parameters())
        self.weights = str(model.dtype).removeprefix("torch.")
        self._at_once = at_once

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, tell: Callable[[float], None]) -> int:
        """See `System`."""
        ids = torch.tensor(prompts)
        cache = new_cache(self.model.config, expected_tokens=ids.shape[1] + new_tokens)
        tell(time.perf_counter())
        if self._at_once:
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        else:
            logits = prefill(self.model, ids, cache)
        tokens = logits.argmax(-1, keepdim=True)
        tell(time.perf_counter())
        for _ in range(new_tokens - 1):
            logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
            tokens = logits.argmax(-1, keepdim=True)
        tell(time.perf_counter())
        return cache_bytes(cache)


class InLlamaCpp:
    """A GGUF in llama.cpp, with as many threads as torch has."""

    def __init__(self, path: Path) -> None:
        from stripedrag.eval.bench.llama_cpp import LlamaCpp

        self._runs = LlamaCpp(path, torch.get_num_threads())
        self.weight_bytes = self._runs.weight_bytes
        self.weights = "its file's"

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, tell: Callable[[float], None]) -> int:
        """See `System`."""
        self._runs.generate(prompts, new_tokens, tell)
        tokens: int = len(prompts) * (len(prompts[0]) + new_tokens)
        return tokens * int(self._runs.token_bytes)


def run(repeats: int, so_far: Path | None = None, longest: int = LONGEST) -> Report:
    """For each system and length tokens a second of both, seconds to the first token, bytes of the cache and peak.

    Prompts longer than `longest` tokens are left out, the one with needles among them. What is measured goes to
    `so_far` as it comes, from which a run that was cut goes on. Raises `StoreError` where the system does not tell of a
    process's memory, `UsageError` where `so_far` is of another run.
    """
    systems, tokenizer = _systems()
    asked = [(1, length) for length in LENGTHS[:-1]] + [(ROWS, ROW_TOKENS), (1, LENGTHS[-1])]
    asked = [(batch, length) for batch, length in asked if length <= longest]
    ids = novel_ids(tokenizer, max(batch * length for batch, length in asked))
    measured, here = going_on(so_far, llama_cpp=_llama_cpp(), repeats=repeats, longest=longest)
    limits = {name: _limits(system, here) for name, system in systems.items() if isinstance(system, InTorch)}
    ours, rows = cast(InTorch, systems[STRIPED]), list[dict[str, Any]]()
    for batch, length in track(asked, "reading", console=Console(stderr=True)):
        if length == LENGTHS[-1] and GGUF in systems:  # the slower in llama.cpp would take another hour
            slower = max((GGUF, GGUF_8), key=lambda name: _first_token_s(rows, name, LENGTHS[-2]))
            systems = {name: system for name, system in systems.items() if name != slower}
        measure = functools.partial(_measured, systems, ids, batch, length, repeats)
        rows += measured.measured(f"{batch} x {length} tokens", measure)
    found = None
    if longest >= LONGEST:
        found = measured.measured("needles", lambda: needles(ours.model, tokenizer, LONGEST))
    figures = {
        "bench": "generate",
        "machine": here,
        "llama_cpp": _llama_cpp(),
        "repeats": repeats,
        "longest": longest,
        "resumed": measured.resumed,
        "limits": limits,
        "rows": rows,
        "needles": found,
    }
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def needles(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> dict[str, Any]:
    """A prompt of up to so many tokens with a number planted at each of `DEPTHS`, read once; each is then asked for by
    a fork of what was read. What reading took, decoding after it, and the answers.
    """
    prompt = PromptFormat(tokenizer)
    rng = Random(0)
    names = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], len(DEPTHS))
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), len(DEPTHS))]
    planted = [needle(name, number) for name, number in zip(names, numbers, strict=True)]
    questions = [prompt.question_ids(f"{question} Answer with the number only.") for _, question in planted]
    room = tokens - max(map(len, questions))
    haystack = Haystack.read(HAYSTACK, lambda text: len(prompt.encode(text)))
    (window,) = haystack.windows(rng, 1, with_margin(tokens))
    facts = [(depth, sentence) for depth, (sentence, _) in zip(DEPTHS, planted, strict=True)]
    passage, _ = plant(
        window, facts, fits=lambda passage: len(prompt.prefix_ids([span_of(passage)])) <= room, capacity_tokens=tokens
    )
    ids, cache = torch.tensor([prompt.prefix_ids([span_of(passage)])]), new_cache(model.config)
    meter, stop = Meter(trim=True), generation.stop_ids(model)
    with meter.running(_HOURS):
        times = [time.perf_counter()]
        logits = prefill(model, ids, cache)
        times.append(time.perf_counter())
        answers = decode_together(
            model, cache, questions, max_new_tokens=ANSWER_TOKENS, stop_ids=stop, sampling=Sampling()
        )
        times.append(time.perf_counter())
        made = list(decode(model, logits, cache, max_new_tokens=ANSWER_TOKENS, stop_ids=(), sampling=Sampling()))
        times.append(time.perf_counter())
    read_s, asked_s, wrote_s = (end - begin for begin, end in itertools.pairwise(times))
    texts = [tokenizer.decode(answer) for answer in answers]
    return {
        "tokens": ids.shape[1] + max(map(len, questions)),
        "first_token_s": read_s,
        "prefill_tokens_per_s": ids.shape[1] / read_s,
        "decode_tokens_per_s": (len(made) - 1) / wrote_s,
        "asked_s": asked_s,
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": meter.told_peak_bytes(),
        "answers": [
            {"depth": depth, "number": number, "answer": text, "right": string_match_all(text, [number]) == 1}
            for depth, number, text in zip(DEPTHS, numbers, texts, strict=True)
        ],
    }


def _systems() -> tuple[dict[str, System], PreTrainedTokenizerBase]:
    systems: dict[str, System] = {}
    for name in (STRIPED, BASELINE):  # nothing here waits for a GPU: its times would be wrong
        model, tokenizer = load_model(
            name, device="cpu", window_tokens=LONGEST + ANSWER_TOKENS if name == STRIPED else None
        )
        systems[name] = InTorch(model, at_once=name == BASELINE)
    if find_spec("llama_cpp") is not None:
        from stripedrag.eval.bench.llama_cpp import published, requantised

        systems |= {GGUF: InLlamaCpp(published()), GGUF_8: InLlamaCpp(requantised())}
    return systems, tokenizer


def novel_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """So many ids of novels."""
    prompt = PromptFormat(tokenizer)
    ids: list[int] = []
    for chapter in itertools.cycle(read_lines(HAYSTACK, Chapter)):
        ids += prompt.encode(chapter.text)
        if len(ids) >= tokens:
            return ids[:tokens]
    raise AssertionError("there is text")


def _measured(systems: dict[str, System], ids: list[int], rows: int, length: int, repeats: int) -> list[dict[str, Any]]:
    """Each system's figures at one length, from runs in turn."""
    prompts = [ids[row * length : (row + 1) * length] for row in range(rows)]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for system in systems.values():
        system.generate([prompt[:64] for prompt in prompts], 4, lambda _: None)  # weights come into memory
    for _ in range(repeats):
        for name, system in systems.items():
            runs[name].append(timed(system, prompts))
    return [
        {
            "system": name,
            "rows": rows,
            "prompt_tokens": length,
            "weight_bytes": systems[name].weight_bytes,
            "weights": systems[name].weights,
            **{key: median(run[key] for run in taken) for key in taken[0]},
            "runs": taken,
        }
        for name, taken in runs.items()
    ]


def timed(system: System, prompts: list[list[int]]) -> dict[str, float]:
    """Seconds to the first token, tokens a second of both, bytes of the cache and at most, of one run."""
    told: list[float] = []
    meter = Meter(trim=True)
    with meter.running(_HOURS):
        held = system.generate(prompts, ANSWER_TOKENS, told.append)
    begun, first, last = told
    tokens, made = sum(map(len, prompts)), len(prompts) * (ANSWER_TOKENS - 1)
    return {
        "first_token_s": first - begun,
        "prefill_tokens_per_s": tokens / (first - begun),
        "decode_tokens_per_s": made / (last - first),
        "cache_bytes": held,
        "peak_bytes": meter.told_peak_bytes(),
    }


def _first_token_s(rows: list[dict[str, Any]], name: str, length: int) -> float:
    places = {(row["system"], row["rows"], row["prompt_tokens"]): float(row["first_token_s"]) for row in rows}
    return places[name, 1, length]


def _limits(system: InTorch, here: dict[str, Any]) -> dict[str, float]:
    """What products with the weights alone allow when a prompt is read, and reading them when a token is written."""
    model = system.model
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    parameters = sum(tensor.numel() for tensor in model.parameters()) - embedding.numel()  # its output is one row
    return {
        "prefill_tokens_per_s": here["matmul_flop_per_s"] / (2 * parameters),
        "decode_tokens_per_s": here["read_bytes_per_s"] / system.weight_bytes,
    }


def _llama_cpp() -> str | None:
    if find_spec("llama_cpp") is None:
        return None
    from stripedrag.eval.bench.llama_cpp import built_for

    return built_for()


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, kernels {here['kernels']}, "
        f"{here['commit']}",
        ", ".join(f"{row['system']} in {row['weights']}" for row in figures["rows"][:2]),
        f"llama-cpp-python {figures['llama_cpp'] or 'is not installed'}",
        f"reads {here['read_bytes_per_s'] / 1e9:.1f} GB/s, multiplies {here['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s",
        "",
        f"{'':30}{'rows':>5}{'prompt':>8}{'first, s':>10}{'prefill/s':>11}{'ours is':>9}{'decode/s':>10}{'ours is':>9}"
        f"{'cache MB':>10}{'peak MB':>9}",
    ]
    ours = {(row["rows"], row["prompt_tokens"]): row for row in figures["rows"] if row["system"] == STRIPED}
    for row in figures["rows"]:
        own = ours[row["rows"], row["prompt_tokens"]]
        faster = [own[key] / row[key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        times = [f"{ratio:.2f}x" if row is not own else "" for ratio in faster]
        lines.append(
            f"{row['system']:30}{row['rows']:>5}{row['prompt_tokens']:>8}{row['first_token_s']:>10.2f}"
            f"{row['prefill_tokens_per_s']:>11.0f}{times[0]:>9}{row['decode_tokens_per_s']:>10.1f}{times[1]:>9}"
            f"{row['cache_bytes'] / 1e6:>10.0f}{row['peak_bytes'] / 1e6:>9.0f}"
        )
    lines += ["", "limits by the weights alone, tokens/s of prefill and of decoding:"]
    lines += [
        f"  {name:30}{limit['prefill_tokens_per_s']:>8.0f}{limit['decode_tokens_per_s']:>8.0f}"
        for name, limit in figures["limits"].items()
    ]
    if (found := figures["needles"]) is not None:
        lines += ["", *_table_of_needles(found)]
    lines += [
        "",
        *([f"{figures['resumed']} measurements are of earlier runs that were cut;"] if figures["resumed"] else []),
        f"medians of {figures['repeats']} in turn, up to {figures['longest']:,} tokens (at {LENGTHS[-1]:,} without the "
        "slower of llama.cpp's two);",
        f"peak MB beyond what the process had before, of {BASELINE} with the activations of a whole prompt",
    ]
    return "\n".join(lines)


def _table_of_needles(found: dict[str, Any]) -> list[str]:
    return [
        f"needles in {found['tokens']:,} tokens: read in {found['first_token_s']:.0f} s "
        f"({found['prefill_tokens_per_s']:.0f} tokens/s), then {found['decode_tokens_per_s']:.1f} tokens/s; cache "
        f"{found['cache_bytes'] / 1e6:.0f} MB, peak {found['peak_bytes'] / 1e6:.0f} MB beyond the weights; all three "
        f"asked in {found['asked_s']:.1f} s:",
        *(
            f"  at {one['depth']:.0%}: {one['number']}, answered {one['answer']!r}{'' if one['right'] else ' (wrong)'}"
            for one in found["answers"]
        ),
    ]


def _plot(figures: dict[str, Any], path: Path) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in figures["rows"]:
        if row["rows"] == 1:
            series.setdefault(row["system"], []).append((row["prompt_tokens"], row["first_token_s"]))
    if (found := figures["needles"]) is not None:
        series[STRIPED].append((found["tokens"], found["first_token_s"]))
    plot(path, series, "time to the first token", "tokens of prompt", "seconds", log_x=True, log_y=True)
