"""How fast passages are embedded: the embedder and the whole of indexing, against the encoder alone.

The encoder alone reads batches that are tokenized, padded and sorted by length already: no embedder can be faster with
this model and these batches. Stock is what `SentenceTransformer(model).encode(texts)` does by default, in float32. All
read the passages of our corpus under their titles, and are taken in turn.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from stripedrag import weights
from stripedrag.eval.bench.recall import CORPUS
from stripedrag.eval.bench.report import Report, interleaved, machine, medians, plot
from stripedrag.eval.resources import read_corpus
from stripedrag.indexes.documents import Document
from stripedrag.indexes.embedding import BATCH_TEXTS, MiniLMEmbedder
from stripedrag.indexes.index import CHUNK_TOKENS, Index
from stripedrag.indexes.preparing import PASSAGES_AT_ONCE, Cutter

DOCUMENTS = 400


def run(repeats: int) -> Report:
    """Passages and tokens a second of every side, and the share of the encoder's rate that each reaches."""
    from sentence_transformers import SentenceTransformer

    embedder = MiniLMEmbedder()
    documents = Random(0).sample(read_corpus(CORPUS), DOCUMENTS)
    cutter = Cutter(embedder.tokenizer, embedder.max_tokens, CHUNK_TOKENS)
    texts = [passage.heading + passage.text for document in documents for passage in cutter.cut(document)]
    lengths = [len(e) + 2 for e in embedder.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    encoder, batches = embedder._model, _batches(embedder, texts, lengths)
    stock = SentenceTransformer(str(weights.find(weights.MINILM).parent), device=encoder.device.type)

    def encode() -> None:
        with torch.inference_mode():
            for batch in batches:
                encoder(dict(batch))

    sides: dict[str, Callable[[], object]] = {
        "encoder": encode,
        "embedder": lambda: [
            embedder.embed(texts[at : at + PASSAGES_AT_ONCE]) for at in range(0, len(texts), PASSAGES_AT_ONCE)
        ],
        "indexing": lambda: _index(documents, embedder),
        "encoder_1_thread": lambda: _alone(encode),
        "stock": lambda: stock.encode(texts, show_progress_bar=False),
    }
    seconds = interleaved(repeats, **sides)
    each = medians(seconds)
    config = encoder[0].auto_model.config
    flop = sum(_flop(config, n) for n in lengths)
    here = machine()
    figures = {
        "bench": "embed",
        "machine": here,
        "repeats": repeats,
        "passages": len(texts),
        "tokens": sum(lengths),
        "dtype": str(next(encoder.parameters()).dtype).removeprefix("torch."),
        "seconds": seconds,
        "passages_per_s": {name: len(texts) / taken for name, taken in each.items()},
        "tokens_per_s": {name: sum(lengths) / taken for name, taken in each.items()},
        "share_of_encoder": {name: each["encoder"] / taken for name, taken in each.items()},
        "encoder_share_of_matmul_rate": flop / each["encoder"] / here["matmul_flop_per_s"],
    }
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


def _batches(embedder: MiniLMEmbedder, texts: list[str], lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    """The batches that the embedder makes of these texts, `PASSAGES_AT_ONCE` of them at a time, ready for the model."""
    model, batches = embedder._model, []
    for at in range(0, len(texts), PASSAGES_AT_ONCE):
        some = sorted(range(at, min(at + PASSAGES_AT_ONCE, len(texts))), key=lambda n: -lengths[n])
        for first in range(0, len(some), BATCH_TEXTS):
            features = model.preprocess([texts[n] for n in some[first : first + BATCH_TEXTS]])
            batches.append({name: value.to(model.device) for name, value in features.items() if hasattr(value, "to")})
    return batches


def _index(documents: list[Document], embedder: MiniLMEmbedder) -> None:
    with tempfile.TemporaryDirectory() as folder, Index.create(Path(folder, "index"), embedder=embedder) as index:
        index.add(documents)


def _alone(encode: Callable[[], None]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encode()
    finally:
        torch.set_num_threads(threads)


def _flop(config: Any, tokens: int) -> int:
    """Operations of the matrix products of one text: 2 a weight and token, and attention's scores and sums."""
    width, layers = config.hidden_size, config.num_hidden_layers
    weights_a_layer = 4 * width**2 + 2 * width * config.intermediate_size
    return int(layers * tokens * (2 * weights_a_layer + 4 * tokens * width))


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['commit']}; {figures['passages']:,} passages, "
        f"{figures['tokens']:,} tokens, {figures['dtype']}",
        f"{'':18}{'passages/s':>12}{'tokens/s':>12}{'of the encoder':>16}",
    ]
    for name, rate in figures["passages_per_s"].items():
        share = figures["share_of_encoder"][name]
        lines.append(f"{name:18}{rate:12.0f}{figures['tokens_per_s'][name]:12,.0f}{share:16.3f}")
    lines.append(f"the encoder reaches {figures['encoder_share_of_matmul_rate']:.0%} of the rate of matrix products")
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series = {name: [(name, rate)] for name, rate in figures["passages_per_s"].items()}
    plot(path, series, "Embedding passages", "", "passages a second", bars=True)
