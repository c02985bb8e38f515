"""How much of the evidence fits a budget: filling it with our ranking, against fusion over passages and its parts.

Recall at a budget is the share of questions whose whole evidence (white space aside) lies in the context. Ours is
`Retriever.retrieve` as it ships, at each budget. The rivals rank the passages of the same index, which the same vectors
stand for: BM25 (FTS5, Porter stems, titles with each passage), the cosine, and the fusion of both by reciprocal ranks;
they take passages in rank order while these fit. A reranker is bounded by an oracle: of the best 100 passages by
fusion, those with evidence come first. Differences are paired and intervals clustered by document.
"""

import sqlite3
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from stripedrag.eval.bench.report import Report, machine, plot, quantiles_ms
from stripedrag.eval.data_formats import DATA, Claim, CorpusQuestion, file_sha256
from stripedrag.eval.metrics import ndcg
from stripedrag.eval.places import holds, touches
from stripedrag.eval.resources import read_corpus
from stripedrag.eval.schema import Stretch
from stripedrag.eval.statistics import difference, estimate
from stripedrag.eval.tasks.corpus import refuse_places_outside
from stripedrag.indexes.embedding import MiniLMEmbedder
from stripedrag.indexes.fusion import reciprocal_ranks
from stripedrag.indexes.index import Index
from stripedrag.indexes.lexical import words
from stripedrag.jsonl import read_lines
from stripedrag.rag.retriever import Retriever
from stripedrag.weights import cache_dir

CORPUS, QUESTIONS = DATA / "rag_qa" / "corpus.jsonl.xz", DATA / "rag_qa" / "questions.jsonl.xz"
ABSTRACTS, CLAIMS = DATA / "scifact" / "corpus.jsonl.xz", DATA / "scifact" / "queries.jsonl.xz"
BUDGETS = (1024, 2048, 4096, 8192, 16_384, 32_768, 131_072)
DEPTH = 3000  # passages of each ranking: more than the largest budget takes
RERANKED = 100  # passages that the oracle sees
TOPS = (1, 2, 5, 10, 20, 50)
K = 500  # of the searches that are timed
OURS, RIVAL = "filled (ours)", "passages, fusion"

T = TypeVar("T")
Evidence = tuple[Stretch, ...]


def run(repeats: int, corpus: Path = CORPUS, questions: Path = QUESTIONS) -> Report:
    """Recall against budget of every method on `corpus`, and the time of a search; on our own data SciFact, too."""
    asked = list(read_lines(questions, CorpusQuestion))
    embedder = CachingEmbedder()
    with cached_index(corpus, embedder) as index:
        evidence = [_evidence(question, index) for question in asked]
        clusters = [places[0].doc_id for places in evidence]
        passages = _Passages(index)
        found = _Recalls(passages, Retriever(index))
        for question, places in zip(_tracked(asked, "asking"), evidence, strict=True):
            found.ask(question.question, places)
        figures = {
            "bench": "recall",
            "machine": machine(),
            "corpus": {"file": corpus.name, "sha256": file_sha256(corpus), "documents": index.document_count}
            | {"passages": len(passages.chunks), "chunks": len(index)},
            "questions": {"file": questions.name, "sha256": file_sha256(questions), "number": len(asked)}
            | {"documents": len(set(clusters))},
            "curves": found.curves(clusters),
            "ours_less_fusion": found.differences(clusters),
            "top_k": found.tops(clusters),
            "search": _times(index, [question.question for question in asked], repeats),
        }
    if corpus == CORPUS:
        figures["scifact"] = _judged(embedder)
    return Report(figures, _table(figures), lambda path: _plot(figures, path))


class CachingEmbedder(MiniLMEmbedder):
    """MiniLM that keeps the questions' vectors, so that many searches of one question embed it once."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, NDArray[np.float32]] = {}

    def embed_query(self, query: str) -> "NDArray[np.float32]":
        """The vector of a query."""
        if query not in self._kept:
            self._kept[query] = super().embed_query(query)
        return self._kept[query]


class _Passages:
    """The passages of an index in the order of (document, start), ranked in the ways that are compared with ours."""

    def __init__(self, index: Index) -> None:
        self._index = index
        # A dense search for everything returns every passage once, with the index's own cuts.
        whole = index.search("everything", k=len(index), unit="passage", method="dense")
        self.chunks = sorted((scored.chunk for scored in whole), key=lambda chunk: (chunk.doc_id, chunk.start))
        self._at = {chunk.id: place for place, chunk in enumerate(self.chunks)}
        self._of: dict[str, list[int]] = {}
        for place, chunk in enumerate(self.chunks):
            self._of.setdefault(chunk.doc_id, []).append(place)
        encode = index.embedder.tokenizer.encode_batch_fast
        self.tokens = np.array([len(e) for e in encode([c.text for c in self.chunks], add_special_tokens=False)])
        titles = index.titles({chunk.doc_id for chunk in self.chunks})
        self._words = _Bm25(f"{titles[chunk.doc_id]}\n{chunk.text}" for chunk in self.chunks)

    def rankings(self, query: str) -> "dict[str, NDArray[np.int64]]":
        """Places in `chunks`, best first, by method."""
        hits = self._index.search(query, k=DEPTH, unit="passage", method="dense")
        dense = np.array([self._at[scored.chunk.id] for scored in hits])
        lexical = self._words.ranking(query)
        scores = reciprocal_ranks([dense, lexical], len(self.chunks))
        fused = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores)]
        return {"passages, BM25": lexical, "passages, cosine": dense, RIVAL: fused}

    def needed(self, ranking: "NDArray[np.int64]", evidence: Evidence) -> float:
        """How many tokens the passages have, best first, until they hold all the evidence; infinite if never."""
        near = [at for doc_id in {stretch.doc_id for stretch in evidence} for at in self._of[doc_id]]
        places = np.array([at for at in near if touches(self.chunks[at], evidence)])
        ranks = np.flatnonzero(np.isin(ranking, places))
        if len(ranks) < len(places):
            return float("inf")
        return float(self.tokens[ranking[: ranks[-1] + 1]].sum())


class _Bm25:
    """Okapi BM25 of texts by SQLite's FTS5: k1 = 1.2, b = .75."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._database = sqlite3.connect(":memory:")
        self._database.execute("CREATE VIRTUAL TABLE texts USING fts5 (text, tokenize = 'porter unicode61')")
        self._database.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", enumerate(texts))

    def ranking(self, query: str) -> "NDArray[np.int64]":
        """Places of the texts that hold a word of the query, best first."""
        terms = " OR ".join(f'"{word}"' for word in words(query))
        query_text = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank, rowid"
        rows = self._database.execute(query_text, (terms,)) if terms else ()
        return np.fromiter((row for (row,) in rows), dtype=np.int64)


class _Recalls:
    """What each method found, question by question."""

    def __init__(self, passages: _Passages, retriever: Retriever) -> None:
        self._passages, self._retriever = passages, retriever
        self._hits: dict[str, list[list[bool]]] = {}
        self._tops: dict[int, list[tuple[bool, bool, float]]] = {k: [] for k in TOPS}

    def ask(self, question: str, evidence: Evidence) -> None:
        """Asks one question of every method."""
        contexts = (self._retriever.retrieve(question, budget_tokens=budget).spans for budget in BUDGETS)
        ours = [bool(holds(spans, evidence)) for spans in contexts]
        self._hits.setdefault(OURS, []).append(ours)
        rankings = self._passages.rankings(question)
        for method, ranking in rankings.items():
            needed = self._passages.needed(ranking, evidence)
            self._hits.setdefault(method, []).append([needed <= budget for budget in BUDGETS])
        best, chunks = rankings[RIVAL][:RERANKED], self._passages.chunks
        reranked = sorted(best.tolist(), key=lambda at: not touches(chunks[at], evidence))
        for k in TOPS:
            plain, ideal = (holds([chunks[at] for at in order[:k]], evidence) for order in (best.tolist(), reranked))
            self._tops[k].append((bool(plain), bool(ideal), float(self._passages.tokens[reranked[:k]].sum())))

    def curves(self, clusters: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """Recall with its 95 % interval, by method and budget."""
        return {
            method: [
                {"budget_tokens": budget} | _share([hit[at] for hit in hits], clusters)
                for at, budget in enumerate(BUDGETS)
            ]
            for method, hits in self._hits.items()
        }

    def differences(self, clusters: Sequence[str]) -> list[dict[str, float]]:
        """Ours less the fusion over passages, at each budget."""
        ours, theirs = (np.array(self._hits[method], dtype=float) for method in (OURS, RIVAL))
        return [
            {"budget_tokens": budget, **asdict(difference(ours[:, at].tolist(), theirs[:, at].tolist(), clusters))}
            for at, budget in enumerate(BUDGETS)
        ]

    def tops(self, clusters: Sequence[str]) -> list[dict[str, Any]]:
        """Recall of the best k passages, as they are and behind a reranker that cannot err, and their mean tokens."""
        return [
            {
                "k": k,
                "tokens": statistics.mean(tokens for _, _, tokens in found),
                "top_k": _share([plain for plain, _, _ in found], clusters),
                "oracle_reranked": _share([reranked for _, reranked, _ in found], clusters),
            }
            for k, found in self._tops.items()
        ]


def cached_index(corpus: Path, embedder: MiniLMEmbedder) -> Index:
    """The index of a corpus file, kept in the cache: embedding it is what takes long."""
    place = cache_dir() / "bench" / f"recall-{file_sha256(corpus)[:12]}"
    index = (Index.open if Index.is_at(place) else Index.create)(place, embedder=embedder)
    index.add(_tracked(read_corpus(corpus), f"indexing {corpus.name}"))
    return index


def _tracked(items: Sequence[T], what: str) -> Iterable[T]:
    return track(items, what, console=Console(stderr=True), transient=True)


def _evidence(question: CorpusQuestion, index: Index) -> Evidence:
    """The places of a question's evidence without the white space at their ends."""
    refuse_places_outside(question, index)
    places = []
    for span in question.gold_spans:
        text = index.document(span.doc_id).text[span.start : span.end]
        if inner := text.strip():
            start = span.start + text.index(inner)
            places.append(Stretch(doc_id=span.doc_id, start=start, end=start + len(inner)))
    return tuple(places)


def _share(hits: Sequence[bool], clusters: Sequence[str]) -> dict[str, float]:
    found = estimate([float(hit) for hit in hits], clusters)
    return {"recall": found.mean, "low": found.low, "high": found.high}


def _times(index: Index, queries: Sequence[str], repeats: int) -> dict[str, float]:
    """Milliseconds of a search for `K` chunks, the query's embedding apart: the median of `repeats` of each query."""
    searches = [partial(index.search, query, k=K) for query in queries[:200]]
    return {"k": K, "queries": len(searches)} | quantiles_ms(searches, repeats)


def _judged(embedder: CachingEmbedder) -> dict[str, Any]:
    """nDCG@10 of documents on SciFact's public test claims, each by its best chunk, against BM25 over documents."""
    claims = [claim for claim in read_lines(CLAIMS, Claim) if claim.split == "test"]
    with cached_index(ABSTRACTS, embedder) as index:
        documents = [index.document(doc_id) for doc_id in index.document_ids()]
        bm25 = _Bm25(f"{document.title}\n{document.text}" for document in documents)
        scores: dict[str, list[float]] = {"ours": [], "BM25": []}
        for claim in _tracked(claims, "asking SciFact"):
            relevant = {doc_id for doc_id, grade in claim.qrels.items() if grade > 0}
            found = dict.fromkeys(scored.chunk.doc_id for scored in index.search(claim.query, k=K))
            scores["ours"].append(ndcg(list(found), relevant, 10))
            ranked = [documents[at].id for at in bm25.ranking(claim.query)[:10]]
            scores["BM25"].append(ndcg(ranked, relevant, 10))
    ids = [claim.id for claim in claims]
    return {
        "claims": len(claims),
        "ndcg@10": {name: asdict(estimate(values, ids)) for name, values in scores.items()},
        "difference": asdict(difference(scores["ours"], scores["BM25"], ids)),
    }


def _table(figures: dict[str, Any]) -> str:
    corpus, questions, curves = figures["corpus"], figures["questions"], figures["curves"]
    lines = [
        f"{corpus['file']}: {corpus['documents']:,} documents, {corpus['passages']:,} passages, {corpus['chunks']:,} "
        f"chunks; {questions['number']:,} questions on {questions['documents']} documents",
        "",
        f"{'recall at a budget of tokens':32}" + "".join(f"{budget:>10,}" for budget in BUDGETS),
    ]
    for method, curve in curves.items():
        lines.append(f"{method:32}" + "".join(f"{point['recall']:10.3f}" for point in curve))
    lines.append(f"{'  95 % of ours, from':32}" + "".join(f"{point['low']:10.3f}" for point in curves[OURS]))
    lines.append(f"{'  to':32}" + "".join(f"{point['high']:10.3f}" for point in curves[OURS]))
    apart = figures["ours_less_fusion"]
    lines.append(f"{'ours less fusion':32}" + "".join(f"{point['mean']:+10.3f}" for point in apart))
    lines.append(f"{'  p':32}" + "".join(f"{point['p']:10.4f}" for point in apart))
    lines += ["", f"{'passages':>8} {'tokens':>8} {'as ranked':>10} {f'oracle over the best {RERANKED}':>28}"]
    for top in figures["top_k"]:
        recalls = top["top_k"]["recall"], top["oracle_reranked"]["recall"]
        lines.append(f"{top['k']:8} {top['tokens']:8,.0f} {recalls[0]:10.3f} {recalls[1]:28.3f}")
    search = figures["search"]
    lines += [
        "",
        f"a search for {search['k']} chunks, beyond the query's embedding: p50 {search['p50_ms']:.1f} ms, "
        f"p95 {search['p95_ms']:.1f} ms",
    ]
    if scifact := figures.get("scifact"):
        ours, theirs = (scifact["ndcg@10"][name]["mean"] for name in ("ours", "BM25"))
        apart = scifact["difference"]
        lines.append(
            f"SciFact, {scifact['claims']} claims, nDCG@10: ours {ours:.4f}, BM25 {theirs:.4f}, difference "
            f"{apart['mean']:+.4f} [{apart['low']:+.4f}, {apart['high']:+.4f}], p {apart['p']:.4f}"
        )
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: Path) -> None:
    series = {
        method: [(point["budget_tokens"], point["recall"]) for point in curve]
        for method, curve in figures["curves"].items()
    }
    series[f"top-k behind an oracle over {RERANKED}"] = [
        (top["tokens"], top["oracle_reranked"]["recall"]) for top in figures["top_k"]
    ]
    title = f"Evidence inside a budget, {figures['corpus']['file']}"
    plot(path, series, title, "tokens", "share of questions with all evidence", log_x=True, bottom=0.5)
