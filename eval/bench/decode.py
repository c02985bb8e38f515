"""One token: the operator's step against eager torch, and where the default model's whole step goes."""

import statistics
from pathlib import Path
from typing import Any

import torch

from stripedrag.errors import BackendError
from stripedrag.eval.bench.filter import SHAPES, parameters
from stripedrag.eval.bench.generate import novel_ids
from stripedrag.eval.bench.report import Report, interleaved, machine, medians, plot, seconds_of
from stripedrag.kernels import ops
from stripedrag.kernels.cpu import refuses
from stripedrag.model.cache import cache_bytes, new_cache
from stripedrag.model.generation import prefill
from stripedrag.model.loading import default_dtype, load_model
from stripedrag.model.smollm2 import STRIPED

CALLS = 100  # of each side in a repetition: a step takes microseconds
PROMPT_TOKENS = (1024, 8000)
TEXT_TOKENS = 512


@torch.no_grad()
def run(repeats: int) -> Report:
    """Microseconds of a step through the public op, native and eager, and the profile of a model's decode step."""
    steps = [_step(*shape, dtype, repeats) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    models = [_model(tokens, repeats) for tokens in PROMPT_TOKENS]
    figures = {
        "bench": "decode",
        "machine": machine(),
        "repeats": repeats,
        "steps": steps,
        "models": models,
        "nats": _nats(),
    }
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


def _model(tokens: int, repeats: int) -> dict[str, Any]:
    """What a decode step of the default model takes after so many tokens, where, and against its modules one by one.

    Raises `BackendError` where the native kernels are not there.
    """
    model, _ = load_model(STRIPED, device="cpu")
    cache = new_cache(model.config)
    ids = torch.arange(tokens).unsqueeze(0) % model.config.vocab_size
    prefill(model, ids, cache)
    backbone, token = model.backbone, ids[:, :1]

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)

    def by_modules() -> None:
        hook = backbone.blocks[0].register_forward_hook(lambda *arguments: None)  # which the native step would pass by
        step()
        hook.remove()

    step()
    native = backbone.decode_step.native if backbone.decode_step is not None else None
    if native is None:
        raise BackendError(f"there is no native decode step to time here: {refuses(torch.device('cpu'))}")
    native._native = timed = _Timed(native._native)
    x = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype)
    seconds = interleaved(4 * repeats, step=step, unembedding=lambda: backbone.unembed(x), step_by_modules=by_modules)
    middle = medians(seconds)
    blocks = statistics.median(timed.seconds)
    read = sum(p.nbytes for p in model.parameters()) + cache_bytes(cache)
    outside = middle["step"] - blocks - middle["unembedding"]
    return {
        "name": STRIPED,
        "context_tokens": tokens,
        "step_ms": 1e3 * middle["step"],
        "share": {
            "blocks": blocks / middle["step"],
            "unembedding": middle["unembedding"] / middle["step"],
            "python": outside / middle["step"],
        },
        "by_modules_over_step": middle["step_by_modules"] / middle["step"],
        "bytes_read": read,
        "seconds": seconds | {"blocks": timed.seconds},
    }


def _nats() -> dict[str, float]:
    """Nats a token of a novel, read at once and token by token, in the default's dtype and in float32."""
    nats = {}
    for dtype in {default_dtype(torch.device("cpu")), torch.float32}:
        model, tokenizer = load_model(STRIPED, device="cpu", dtype=dtype)
        ids = torch.tensor([novel_ids(tokenizer, 2 * TEXT_TOKENS)])
        at_once = model(input_ids=ids).logits[0, TEXT_TOKENS - 1 : -1]
        cache, logits = new_cache(model.config), []
        logits.append(prefill(model, ids[:, :TEXT_TOKENS], cache))
        for token in ids[:, TEXT_TOKENS:-1].split(1, dim=1):
            logits.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1])
        for way, of_way in (("read at once", at_once), ("token by token", torch.cat(logits))):
            loss = torch.nn.functional.cross_entropy(of_way.float(), ids[0, TEXT_TOKENS:])
            nats[f"{str(dtype).removeprefix('torch.')}, {way}"] = float(loss)
    return nats


class _Timed:
    """Blocks of the extension, and how long each of their runs took."""

    def __init__(self, blocks: Any) -> None:
        self._blocks = blocks
        self.seconds: list[float] = []

    def run(self, *arguments: Any) -> None:
        """A run, timed."""
        self.seconds.append(seconds_of(lambda: self._blocks.run(*arguments)))


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
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
    for model in figures["models"]:
        least_ms = 1e3 * model["bytes_read"] / here["read_bytes_per_s"]
        lines += [
            "",
            f"{model['name']}, a decode step at {model['context_tokens']:,} tokens: {model['step_ms']:.1f} ms "
            f"(reading weights and cache once: {least_ms:.1f}); by its modules one by one "
            f"{model['by_modules_over_step']:.2f}x as long",
        ]
        lines += [f"  {part:24}{share:>6.1%}" for part, share in model["share"].items()]
    lines += ["", f"nats a token of a novel's {TEXT_TOKENS} tokens after as many:"]
    lines += [f"  {way:28}{nats:.4f}" for way, nats in figures["nats"].items()]
    lines += ["", f"Medians of {figures['repeats']}, interleaved. python: all outside the two native calls."]
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series = {
        f"at {model['context_tokens']:,} tokens": [
            (f"{part}, {model['context_tokens']:,}", 100 * share) for part, share in model["share"].items()
        ]
        for model in figures["models"]
    }
    plot(path, series, "the default model: where a decode step goes", "", "% of the step", bars=True)
