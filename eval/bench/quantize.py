"""Weights of 8 and 4 bits: what the default model loses by them on articles that it was not trained on, and what
decoding and prompts gain, beside torchao's of as many bits where that is installed.
"""

import importlib.util
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from stripedrag.eval.bench.generate import ANSWER_TOKENS, InTorch, timed
from stripedrag.eval.bench.recall import CORPUS
from stripedrag.eval.bench.report import Report, machine
from stripedrag.eval.corpus.build import parts_of_documents
from stripedrag.eval.data_formats import CorpusDocument
from stripedrag.jsonl import read_lines
from stripedrag.model.loading import load_model, load_tokenizer
from stripedrag.model.smollm2 import STRIPED

WINDOWS, WINDOW_TOKENS = 16, 2048
PROMPT_TOKENS = 1024


@torch.no_grad()
def run(repeats: int) -> Report:
    """Perplexity, divergence from the model as it is, bytes, and tokens/s of prompts and replies, in turn."""
    models = dict(_models())
    ids = load_tokenizer(STRIPED)("\n\n".join(unseen_articles()), return_tensors="pt", verbose=False).input_ids
    prompts = [ids[0, :PROMPT_TOKENS].tolist()]
    apart = (ids.shape[1] - WINDOW_TOKENS) // max(1, WINDOWS - 1)  # all over the text
    windows = ids.unfold(1, WINDOW_TOKENS, apart).transpose(0, 1)[:WINDOWS]
    losses = [_losses(models, window) for window in track(windows, "reading", console=Console(stderr=True))]
    rows = [
        {name: timed(InTorch(model, at_once=False), prompts) for name, model in models.items()}
        for _ in track(range(repeats), "timing", console=Console(stderr=True))
    ]
    figures: dict[str, Any] = {
        "bench": "quantize",
        "machine": machine(),
        "repeats": repeats,
        "windows": WINDOWS,
        "window_tokens": WINDOW_TOKENS,
        "bytes": {name: sum(tensor.nbytes for tensor in _stored(model)) for name, model in models.items()},
        "losses": losses,
        "speeds": rows,
    }
    return Report(figures, _table(figures))


def unseen_articles() -> Iterator[str]:
    """The articles of `rag_qa` that are asked about and may not be trained on."""
    parts = parts_of_documents()
    return (one.text for one in read_lines(CORPUS, CorpusDocument) if parts.get(one.id, "train") != "train")


def _models() -> Iterator[tuple[str, PreTrainedModel]]:
    yield "as it is", load_model(STRIPED, device="cpu")[0]
    yield "int8", load_model(STRIPED, device="cpu", quantize="int8")[0]
    yield "int4", load_model(STRIPED, device="cpu", quantize="int4")[0]
    if importlib.util.find_spec("torchao") is None:
        return
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for name, kind in (
        ("torchao int8", Int8WeightOnlyConfig()),
        ("torchao int4", PrototypeInt4WeightOnlyConfig(group_size=32)),
    ):
        model = load_model(STRIPED, device="cpu")[0]
        quantize_(model, kind)  # linear layers, the output among them
        yield name, model


def _losses(models: dict[str, PreTrainedModel], ids: Tensor) -> dict[str, dict[str, float]]:
    """Nats a token of each model in one window, and of its divergence from the first: KL(first ‖ model)."""
    first: Tensor | None = None
    losses = {}
    for name, model in models.items():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        first = logits if first is None else first
        losses[name] = {
            "nats": float(F.nll_loss(logits, ids[0, 1:])),
            "divergence": float(F.kl_div(logits, first, reduction="batchmean", log_target=True)),
        }
    return losses


def _stored(model: PreTrainedModel) -> Iterator[Tensor]:
    """What a model's parameters are made of: torchao's are tensors of several."""
    for parameter in model.parameters():
        parts = getattr(parameter, "__tensor_flatten__", None)
        if parts is None:
            yield parameter
        else:
            yield from (getattr(parameter, name) for name in parts()[0])


def _table(figures: dict[str, Any]) -> str:
    here, names = figures["machine"], list(figures["bytes"])
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['default_dtype']}, "
        f"torch {here['torch']}, {here['commit']}",
        f"{STRIPED}, {figures['windows']} windows of {figures['window_tokens']:,} tokens of articles not trained on",
        "",
        f"{'weights':14}{'MB':>7}{'perplexity':>12}{'divergence':>12}"
        f"{'prefill':>10}{'decoding':>10}{'limit':>9}  tokens/s",
    ]
    for name in names:
        nats, divergence = (
            sum(row[name][key] for row in figures["losses"]) / len(figures["losses"]) for key in ("nats", "divergence")
        )
        prefill_speed, decode_speed = (
            median(row[name][key] for row in figures["speeds"])
            for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
        )
        limit = here["read_bytes_per_s"] / figures["bytes"][name]
        lines.append(
            f"{name:14}{figures['bytes'][name] / 1e6:>7.0f}{torch.tensor(nats).exp():>12.2f}{divergence:>12.4f}"
            f"{prefill_speed:>10.0f}{decode_speed:>10.1f}{limit:>9.0f}"
        )
    lines += [
        "",
        f"Speeds: {PROMPT_TOKENS} tokens read and {ANSWER_TOKENS} made, medians of {figures['repeats']} in turn.",
        "divergence: nats a token, of the model as it is from this one. limit: all bytes at the rate that memory is",
        "read; the embedding, of which one row is read, is among them where it is no copy of the output.",
    ]
    return "\n".join(lines)
