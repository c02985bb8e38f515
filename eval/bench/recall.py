"""How much of the evidence fits a budget: filling it with our ranking, against fusion over passages and its parts.

Recall at a budget is the share of questions whose whole evidence (white space aside) lies in the context, at its own
place or repeated with the words around it (`stripedrag.eval.bench.repeats`). Ours is `Retriever.retrieve` as it ships,
at each budget. The rivals take passages of some 256 tokens in rank order while these fit: by BM25 (FTS5, Porter stems),
by MiniLM's cosine, and by the fusion of both through reciprocal ranks. Titled passages are the same with the document's
title before each, as ours have it. A reranker is bounded by an oracle: of the best 100 titled passages by fusion, those
with evidence come first. Differences are paired and intervals clustered by document.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from stripedrag.errors import CorpusError
from stripedrag.eval.bench.passages import Bm25, Passages
from stripedrag.eval.bench.repeats import Repeats
from stripedrag.eval.bench.report import Report, machine, plot, quantiles_ms
from stripedrag.eval.data_formats import DATA, Claim, CorpusQuestion, file_sha256
from stripedrag.eval.metrics import ndcg
from stripedrag.eval.places import Located, touches
from stripedrag.eval.resources import read_corpus
from stripedrag.eval.schema import Stretch
from stripedrag.eval.statistics import difference, estimate
from stripedrag.eval.tasks.corpus import refuse_places_outside
from stripedrag.indexes.embedding import MiniLMEmbedder
from stripedrag.indexes.index import CHUNK_TOKENS, Index
from stripedrag.indexes.manifest import SCHEMA_VERSION
from stripedrag.indexes.preparing import HEADING_TOKENS
from stripedrag.jsonl import read_lines
from stripedrag.rag.retriever import Retriever
from stripedrag.weights import cache_dir

CORPUS, QUESTIONS = DATA / "rag_qa" / "corpus.jsonl.xz", DATA / "rag_qa" / "questions.jsonl.xz"
ABSTRACTS, CLAIMS = DATA / "scifact" / "corpus.jsonl.xz", DATA / "scifact" / "queries.jsonl.xz"
BUDGETS = (1024, 2048, 4096, 8192, 16_384, 32_768, 131_072)
CHOSE = "dev"  # the part of our own questions by which the ranking was chosen; the others are told apart, too
RERANKED = 100  # passages that the oracle sees
TOPS = (1, 2, 5, 10, 20, 50)
K = 500  # of the searches that are timed
OURS, RIVALS = "filled (ours)", ("passages, fusion", "titled passages, fusion")

T = TypeVar("T")
Evidence = tuple[Stretch, ...]


def run(repeats: int, corpus: Path = CORPUS, questions: Path = QUESTIONS) -> Report:
    """Recall against budget of every method on `corpus`, and the time of a search; on our own data SciFact, too."""
    asked = list(read_lines(questions, CorpusQuestion))
    embedder = CachingEmbedder()
    with cached_index(corpus, embedder) as index, cached_index(corpus, embedder, titles=False) as untitled:
        here, search = machine(), _times(index, [question.question for question in asked], repeats)
        evidence = [_evidence(question, index) for question in asked]
        clusters = [places[0].doc_id for places in evidence]
        apart = [at for at, question in enumerate(asked) if question.split != CHOSE]
        repeated = Repeats(index, (piece for places in evidence for piece in places))
        titled = Passages(index)
        found = _Recalls(Retriever(index), repeated, Passages(untitled), titled)
        for question, places in zip(_tracked(asked, "asking"), evidence, strict=True):
            found.ask(question.question, places)
        figures = {
            "bench": "recall",
            "machine": here,
            "corpus": {"file": corpus.name, "sha256": file_sha256(corpus), "documents": index.document_count}
            | {"passages": len(titled.chunks), "chunks": len(index)},
            "questions": {"file": questions.name, "sha256": file_sha256(questions), "number": len(asked)}
            | {"documents": len(set(clusters))},
            "curves": found.curves(clusters),
            "ours_less": found.differences(clusters),
            "top_k": found.tops(clusters),
            "search": search,
        }
        if 0 < len(apart) < len(asked):
            figures["apart"] = {"without": CHOSE, "number": len(apart), "curves": found.curves(clusters, apart)}
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


class _Recalls:
    """What each method found, question by question."""

    def __init__(self, retriever: Retriever, repeats: Repeats, plain: Passages, titled: Passages) -> None:
        self._retriever, self._repeats, self._plain, self._titled = retriever, repeats, plain, titled
        self._hits: dict[str, list[list[bool]]] = {}
        self._tops: dict[int, list[tuple[bool, bool, float]]] = {k: [] for k in TOPS}

    def ask(self, question: str, evidence: Evidence) -> None:
        """Asks one question of every method."""
        contexts: dict[str, Iterable[Sequence[Located]]] = {
            OURS: [self._retriever.retrieve(question, budget_tokens=budget).spans for budget in BUDGETS]
        }
        rankings = self._titled.rankings(question)
        for passages, ranked, name in (
            (self._plain, self._plain.rankings(question), "passages"),
            (self._titled, rankings, "titled passages"),
        ):
            contexts |= {
                f"{name}, {method}": [passages.filling(ranking, budget) for budget in BUDGETS]
                for method, ranking in ranked.items()
            }
        for method, filled in contexts.items():
            self._hits.setdefault(method, []).append([self._repeats.found(context, evidence) for context in filled])
        best = rankings["fusion"][:RERANKED].tolist()
        chunks = self._titled.chunks
        reranked = sorted(best, key=lambda at: not touches(chunks[at], evidence))
        for k in TOPS:
            plain, ideal = (
                self._repeats.found([chunks[at] for at in order[:k]], evidence) for order in (best, reranked)
            )
            self._tops[k].append((plain, ideal, float(self._titled.tokens[reranked[:k]].sum())))

    def curves(self, clusters: Sequence[str], of: Iterable[int] | None = None) -> dict[str, list[dict[str, float]]]:
        """Recall with its 95 % interval, by method and budget: of all questions, or of those of these numbers."""
        asked = list(range(len(clusters)) if of is None else of)
        documents = [clusters[number] for number in asked]
        return {
            method: [
                {"budget_tokens": budget} | _share([hits[number][at] for number in asked], documents)
                for at, budget in enumerate(BUDGETS)
            ]
            for method, hits in self._hits.items()
        }

    def differences(self, clusters: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """Ours less each of the `RIVALS`, at each budget."""
        hits = {method: np.array(self._hits[method], dtype=float).T.tolist() for method in (OURS, *RIVALS)}
        return {
            rival: [
                {"budget_tokens": budget, **asdict(difference(ours, theirs, clusters))}
                for budget, ours, theirs in zip(BUDGETS, hits[OURS], hits[rival], strict=True)
            ]
            for rival in RIVALS
        }

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


def cached_index(corpus: Path, embedder: MiniLMEmbedder, *, titles: bool = True) -> Index:
    """The index of a corpus file, with its titles or without, kept in the cache: embedding it is what takes long."""
    made_by = f"{SCHEMA_VERSION}-{embedder.max_tokens}-{CHUNK_TOKENS}-{HEADING_TOKENS}{'' if titles else '-untitled'}"
    place = cache_dir() / "bench" / f"recall-{file_sha256(corpus)[:12]}-{made_by}"
    documents = read_corpus(corpus)
    if not titles:
        documents = [replace(document, title="") for document in documents]
    index = (Index.open if Index.is_at(place) else Index.create)(place, embedder=embedder)
    index.add(_tracked(documents, f"indexing {corpus.name}"))
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
    if not places:
        raise CorpusError(f"the evidence of question {question.id!r} is white space. Mend its gold_spans.")
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
        bm25 = Bm25(f"{document.title}\n{document.text}" for document in documents)
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
        f"{'recall at a budget of tokens':34}" + "".join(f"{budget:>10,}" for budget in BUDGETS),
    ]
    for method, curve in curves.items():
        lines.append(f"{method:34}" + "".join(f"{point['recall']:10.3f}" for point in curve))
    if apart := figures.get("apart"):
        name = f"  ours, {apart['number']:,} not of {apart['without']!r}"
        lines.append(f"{name:34}" + "".join(f"{point['recall']:10.3f}" for point in apart["curves"][OURS]))
    lines.append(f"{'  95 % of ours, from':34}" + "".join(f"{point['low']:10.3f}" for point in curves[OURS]))
    lines.append(f"{'  to':34}" + "".join(f"{point['high']:10.3f}" for point in curves[OURS]))
    for rival, points in figures["ours_less"].items():
        lines.append(f"{f'ours less {rival}':34}" + "".join(f"{point['mean']:+10.3f}" for point in points))
        lines.append(f"{'  p':34}" + "".join(f"{point['p']:10.4f}" for point in points))
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
