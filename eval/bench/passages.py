"""What recall against budget is measured beside: the passages of an index, ranked in the ways of the field."""

import sqlite3
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from stripedrag.indexes.documents import Chunk
from stripedrag.indexes.index import Index
from stripedrag.indexes.lexical import words

DEPTH = 3000  # passages of the cosine's ranking: more than the largest budget takes
K = 60  # of the fusion: Cormack, Clarke & Büttcher, SIGIR 2009


class Passages:
    """The passages of an index in the order of (document, start), ranked by words, by meaning and by both."""

    def __init__(self, index: Index) -> None:
        self._index = index
        # A dense search for everything returns every passage once, with the index's own cuts.
        whole = index.search("everything", k=len(index), unit="passage", method="dense")
        self.chunks = sorted((scored.chunk for scored in whole), key=lambda chunk: (chunk.doc_id, chunk.start))
        self._at = {chunk.id: place for place, chunk in enumerate(self.chunks)}
        encode = index.embedder.tokenizer.encode_batch_fast
        self.tokens = np.array([len(e) for e in encode([c.text for c in self.chunks], add_special_tokens=False)])
        titles = index.titles({chunk.doc_id for chunk in self.chunks})
        self._words = Bm25(f"{titles[chunk.doc_id]}\n{chunk.text}" for chunk in self.chunks)

    def rankings(self, query: str) -> "dict[str, NDArray[np.int64]]":
        """Places in `chunks`, best first, by "BM25", by "cosine", and by their "fusion" through reciprocal ranks."""
        hits = self._index.search(query, k=DEPTH, unit="passage", method="dense")
        dense = np.array([self._at[scored.chunk.id] for scored in hits])
        lexical = self._words.ranking(query)
        scores = reciprocal_ranks([dense, lexical], len(self.chunks))
        fused = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores)]
        return {"BM25": lexical, "cosine": dense, "fusion": fused}

    def filling(self, ranking: "NDArray[np.int64]", budget_tokens: int) -> list[Chunk]:
        """The passages of a ranking, best first, up to the first that does not fit."""
        fitting = int(np.searchsorted(np.cumsum(self.tokens[ranking]), budget_tokens, side="right"))
        return [self.chunks[at] for at in ranking[:fitting]]


class Bm25:
    """Okapi BM25 of texts by SQLite's FTS5, with Porter stems: k1 = 1.2, b = .75."""

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


def reciprocal_ranks(rankings: "Sequence[NDArray[np.int64]]", n: int) -> "NDArray[np.float64]":
    """Scores (n,) of the items 0…n-1: Σ 1 / (K + rank) over the rankings that hold an item; 0 for what is in none."""
    scores = np.zeros(n)
    for ranking in rankings:
        scores[ranking] += 1 / (K + np.arange(1, len(ranking) + 1))
    return scores
