"""Ranks the chunks of a store for a query: by meaning, by words, or by both.

Contract: the same vectors and query give the same ranking; equal scores are told apart by (document id, start). A
passage's cosine counts for each of its chunks; the two scores of a chunk are combined (`fusion.py`), so that of the
chunks of one passage that is near in meaning those with the query's words come first.
Limits: which of equal cosines are found at the depth max(k, FLOOR) depends on their age; above 65,536 passages (over
Postgres 200,000) cosines are those of 8-bit vectors or of a graph, and depend on when these were made.
"""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from stripedrag.indexes import filters
from stripedrag.indexes.documents import Chunk, Scored
from stripedrag.indexes.fusion import FLOOR, combined
from stripedrag.indexes.layout import Groups, Layout
from stripedrag.indexes.lexical import Lexical

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.store import Nearest, Store

Method = Literal["hybrid", "dense", "lexical"]
Unit = Literal["chunk", "passage"]


class Searcher:
    """What is kept between the searches of one index."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._lexical = Lexical()
        self._vectors: Nearest = store.nearest()
        self._layout: Layout | None = None

    def refresh(self) -> None:
        """Brings the file of vectors up to date where that is due, which takes minutes in a large index."""
        self._vectors.refresh()

    def search(
        self,
        query: str | None,
        vector: "NDArray[np.float32] | None",
        *,
        k: int,
        unit: Unit,
        where: filters.Where | None,
        doc_ids: Sequence[str] | None,
    ) -> list[Scored]:
        """The `k` best chunks or passages by the words of `query` and by `vector`; one of the two may be None.

        Scores are cosines, positional BM25's, or, of both, their combination (1: best by both). Raises `UsageError`
        for a filter that is none and for a document that is not stored.
        """
        self.refresh()
        with self._store.snapshot():
            if self._layout is None or self._layout.generation != self._store.generation():
                self._layout = Layout.of(self._store)
            layout = self._layout
            k = min(k, len(layout))
            allowed = self._allowed(layout, where, doc_ids)
            filtered = where is not None or doc_ids is not None
            wanted = len(layout) if unit == "passage" else k
            if vector is not None:
                depth = max(k, FLOOR)  # what is best is then the same for every k up to FLOOR
                passages = depth if unit == "passage" else layout.passages_with(depth)
                order, scores = self._by_meaning(layout, vector, passages, allowed, filtered=filtered)
            if query is not None:
                lexical = self._lexical.scores(query, self._store, layout)
                lexical[~allowed] = 0
                if vector is None:
                    order, scores = _best(lexical, np.flatnonzero(lexical), wanted)
                else:
                    both = combined(order, scores, lexical)
                    order, scores = _best(both, np.flatnonzero(both > -np.inf), wanted)
            if unit == "passage":
                return self._passages(layout, order, scores, k)
            order = order[:k]
            found = self._store.chunks_at(layout.rows[order].tolist())
            chunks = [found[row] for row in layout.rows[order].tolist()]
        return _ranked(chunks, scores)

    def _allowed(
        self, layout: Layout, where: filters.Where | None, doc_ids: Sequence[str] | None
    ) -> "NDArray[np.bool_]":
        """By position: is no white space, and is in a document that the filters admit."""
        allowed = ~layout.blank
        if where is not None:
            allowed &= _in(layout.documents, self._store.documents_where(where))
        if doc_ids is not None:
            allowed &= _in(layout.documents, self._store.documents_named(doc_ids))
        return allowed

    def _by_meaning(
        self, layout: Layout, vector: "NDArray[np.float32]", k: int, allowed: "NDArray[np.bool_]", *, filtered: bool
    ) -> "tuple[NDArray[np.int64], NDArray[np.float32]]":
        """The positions in the `k` best passages, best first, and the cosines of their passages."""
        self._vectors.sync()
        passages = layout.passages
        admitted = np.zeros(len(passages.rows), dtype=np.bool_)
        admitted[passages.of[allowed]] = True
        rows, cosines = self._vectors.search(vector, k, passages.rows[admitted], filtered=filtered)
        found = np.searchsorted(passages.rows, rows)
        order = np.lexsort((passages.first[found], -cosines))
        positions = passages.positions(found[order])
        cosines = np.repeat(cosines[order], passages.count[found[order]])
        return positions[allowed[positions]], cosines[allowed[positions]]

    def _passages(
        self, layout: Layout, order: "NDArray[np.int64]", scores: "NDArray[np.float32]", k: int
    ) -> list[Scored]:
        """The passages of a ranking of chunks, each where its best chunk is and with that one's score."""
        passages, best = np.unique(layout.passages.of[order], return_index=True)
        ranked = np.argsort(best)[:k]
        passages, best = passages[ranked], best[ranked]
        rows = layout.rows[layout.passages.positions(passages)].tolist()
        found, chunks, left = self._store.chunks_at(rows), [], iter(rows)
        for count in layout.passages.count[passages].tolist():
            parts = [found[row] for row in islice(left, count)]
            chunks.append(Chunk.at(parts[0].doc_id, parts[0].start, "".join(part.text for part in parts)))
        return _ranked(chunks, scores[best])


def _in(documents: Groups, rows: "NDArray[np.int64]") -> "NDArray[np.bool_]":
    """By position: is in a document of these rows, which are there."""
    admitted = np.zeros(len(documents.rows), dtype=np.bool_)
    admitted[np.searchsorted(documents.rows, rows)] = True
    chosen: NDArray[np.bool_] = admitted[documents.of]
    return chosen


def _best(
    scores: "NDArray[np.float32]", of: "NDArray[np.int64]", k: int
) -> "tuple[NDArray[np.int64], NDArray[np.float32]]":
    """The `k` of the positions `of` with the highest scores, highest first and equal ones in order, and the scores."""
    if k < len(of):
        own = scores[of]
        of = of[own >= np.partition(own, len(own) - k)[len(own) - k]]
    order = of[np.argsort(-scores[of], kind="stable")][:k]
    return order, scores[order]


def _ranked(chunks: list[Chunk], scores: "NDArray[np.float32]") -> list[Scored]:
    return [
        Scored(chunk, score, rank)
        for rank, (chunk, score) in enumerate(zip(chunks, scores.tolist(), strict=False), start=1)
    ]
