"""How a search grows: indexes of 10,000 to 1,000,000 chunks, each a passage with a vector, built and searched.

The texts join the first half of one real chunk to the second half of another, so that words are as frequent as they
are; the vectors mix real ones of MiniLM: unit(v_i + u v_j + .3 g), u uniform in [0, 1], g a random direction. Each size
is built by `Index.add` and searched in a process of its own, whose resident memory is told; recall is against exact
cosines. What a search cannot beat: reading all vectors at the machine's bandwidth.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stripedrag.eval.bench.recall import CORPUS, QUESTIONS, CachingEmbedder, cached_index
from stripedrag.eval.bench.report import Report, machine, plot, quantiles_ms, seconds_of
from stripedrag.eval.data_formats import CorpusQuestion
from stripedrag.eval.meter import resident_bytes
from stripedrag.indexes.documents import Document
from stripedrag.indexes.embedding import MiniLMEmbedder
from stripedrag.indexes.index import Index
from stripedrag.indexes.layout import Layout
from stripedrag.indexes.sqlite import SQLiteStore
from stripedrag.jsonl import read_lines
from stripedrag.weights import cache_dir

SIZES = (10_000, 100_000, 1_000_000)
K = 500
QUERIES = 100
_PARAGRAPHS = 100  # of a document; a short one shares a chunk with its neighbour
_CHUNKS_A_DOCUMENT = 95
_NOISE = 0.3


def run(repeats: int) -> Report:
    """Build and search times, recall and memory at every size."""
    home = cache_dir() / "bench" / "scale"
    embedder = CachingEmbedder()
    queries = [line.question for line in read_lines(QUESTIONS, CorpusQuestion)]
    queries = random.Random(0).sample(queries, QUERIES)
    with cached_index(CORPUS, embedder) as index:
        ids = random.Random(0).sample(index.document_ids(), min(3000, index.document_count))
        texts = [chunk.text for doc_id in ids for chunk in index.chunks(doc_id) if len(chunk.text) > 80]
        with closing(SQLiteStore.open(index.path)) as store:
            vectors = np.concatenate([block for _, block in store.vectors()])
    asked = np.stack([embedder.embed_query(query) for query in queries])
    rows = []
    for size in SIZES:
        place = home / str(size)
        shutil.rmtree(place, ignore_errors=True)
        start = time.perf_counter()
        with Index.create(place, embedder=_Mixing(vectors), passage_tokens=64, chunk_tokens=64) as built:
            built.add(_documents(texts, size))
        build_s = time.perf_counter() - start
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            row = apart.submit(_measure, place, queries, asked, repeats).result()
        rows.append(row | {"build_s": build_s})
        shutil.rmtree(place)
    figures = {"bench": "scale", "machine": machine(), "k": K, "queries": QUERIES, "repeats": repeats, "rows": rows}
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


class _Mixing(MiniLMEmbedder):
    """Gives each text a vector that has nothing to do with it and is like MiniLM's."""

    def __init__(self, vectors: "NDArray[np.float32]") -> None:
        super().__init__()
        self._real, self._draws = vectors, np.random.default_rng(0)

    def embed(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> "NDArray[np.float32]":
        n, (first, second) = len(texts), self._draws.integers(len(self._real), size=(2, len(texts)))
        noise = self._draws.standard_normal((n, self.dimension), dtype=np.float32)
        share = self._draws.random((n, 1), dtype=np.float32)
        mixed: NDArray[np.float32] = self._real[first] + share * self._real[second]
        mixed += _NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        if progress is not None:
            progress(n)
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        return mixed


class _Asked(MiniLMEmbedder):
    """Knows the vectors of the queries, so that a search costs no embedding."""

    def __init__(self, known: dict[str, NDArray[np.float32]]) -> None:
        super().__init__()
        self._known = known

    def embed_query(self, query: str) -> "NDArray[np.float32]":
        return self._known[query]


def _documents(texts: Sequence[str], chunks: int) -> Iterator[Document]:
    draws = random.Random(0)

    def paragraph() -> str:
        first, second = (draws.choice(texts).split() for _ in range(2))
        return " ".join([*first[: len(first) // 2], *second[len(second) // 2 :]])

    for number in range(math.ceil(chunks / _CHUNKS_A_DOCUMENT)):
        text = "\n\n".join(paragraph() for _ in range(_PARAGRAPHS))
        yield Document(f"d{number:06}", "", text, {"tenth": number % 10})


def _measure(place: Path, queries: Sequence[str], vectors: "NDArray[np.float32]", repeats: int) -> dict[str, Any]:
    before = resident_bytes()
    with Index.open(place, embedder=_Asked(dict(zip(queries, vectors, strict=True)))) as index:
        opened = seconds_of(partial(index.search, queries[0], k=K))
        row: dict[str, Any] = {"chunks": len(index), "first_search_s": opened, "bytes": _sizes(place)}
        options: dict[str, dict[str, Any]] = {name: {"method": name} for name in ("dense", "lexical", "hybrid")}
        options["hybrid, a tenth of the documents"] = {"where": {"tenth": 3}}
        row["search_ms"] = {
            name: quantiles_ms([partial(index.search, query, k=K, **how) for query in queries], repeats)
            for name, how in options.items()
        }
        row["found"] = {name: len(index.search(queries[0], k=1000, **how)) for name, how in options.items()}
        row["resident_bytes"] = {kind: after - before[kind] for kind, after in resident_bytes().items()}
    return row | {"recall": _recall(place, vectors)}


def _recall(place: Path, queries: "NDArray[np.float32]") -> float:
    """Share of the exact `K` nearest passages that the index finds."""
    with closing(SQLiteStore.open(place)) as store:
        layout, searched = Layout.of(store), store.nearest()
        searched.refresh()
        searched.sync()
        blocks = list(store.vectors())
        rows = np.concatenate([rows for rows, _ in blocks])
        cosines = np.concatenate([vectors @ queries.T for _, vectors in blocks])
        shares = []
        for query, column in zip(queries, cosines.T, strict=True):
            nearest = rows[np.argpartition(-column, K)[:K]]
            found, _ = searched.search(query, K, layout.passages.rows)
            shares.append(len(np.intersect1d(nearest, found)) / K)
    return float(np.mean(shares))


def _sizes(place: Path) -> dict[str, int]:
    files = {file.name: file.stat().st_size for file in place.iterdir()}
    return {"index": files["index.sqlite"], "vectors": sum(files.values()) - files["index.sqlite"]}


def _table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['commit']}; k = {figures['k']}, p50 / p95 ms",
        f"{'chunks':>9} {'build s':>8} {'index GB':>9} {'vectors GB':>10} {'recall':>7} {'dense':>13} {'lexical':>13} "
        f"{'hybrid':>13} {'filtered':>13} {'own GB':>7} {'mapped GB':>9}",
    ]
    for row in figures["rows"]:
        times = "".join(f"{ms['p50_ms']:7.1f} / {ms['p95_ms']:<5.1f}" for ms in row["search_ms"].values())
        resident = row["resident_bytes"]
        lines.append(
            f"{row['chunks']:9,} {row['build_s']:8.1f} {row['bytes']['index'] / 1e9:9.2f} "
            f"{row['bytes']['vectors'] / 1e9:10.2f} {row['recall']:7.4f} {times} "
            f"{resident.get('own', 0) / 1e9:6.2f} {resident.get('mapped', 0) / 1e9:9.2f}"
        )
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series = {
        name: [(row["chunks"], row["search_ms"][name]["p50_ms"]) for row in figures["rows"]]
        for name in figures["rows"][0]["search_ms"]
    }
    plot(path, series, f"A search for {figures['k']} chunks", "chunks", "median milliseconds", log_x=True)
