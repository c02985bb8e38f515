"""Scores chunks by the words of a query, each word felt in the chunks around it: positional BM25.

A chunk of 64 wordpieces is small enough to fill a budget well and too small to hold all the words of a question. So a
word counts in its neighbours too: with x_t(i) = 1 where chunk i holds the stem t, over the chunks of one document,

    y_t(i) = Σ_{|j| ≤ REACH} exp(-|j| / DECAY) x_t(i + j)       (a propagated count; Lv & Zhai, SIGIR 2009)
             + TITLE where the title of the document holds t
    score(i) = Σ_t idf_t · y_t(i) (K1 + 1) / (y_t(i) + K1)       (BM25; Robertson & Zaragoza 2009, eq. 3.15)
    idf_t = log(1 + (n - n_t + .5) / (n_t + .5))                 n chunks; n_t with the stem, or titles if more

Words that more than `COMMON` of the chunks hold (but at least 1,000, at most 50,000 of them) are left out: they decide
nothing and cost the most.
"""

import math
import re
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.layout import Groups, Layout
    from stripedrag.indexes.store import Store

REACH = 6
DECAY = 1.5
K1 = 1.2
TITLE = 0.5
COMMON = 0.1
_FEWEST_COMMON, _MOST_COMMON = 1000, 50_000  # chunks; in a small index no word is common, in a large one sooner
_WORD = re.compile(r"[^\W_]+")


class Lexical:
    """Remembers between the searches of one generation which words are common."""

    def __init__(self) -> None:
        self._generation = -1
        self._common: set[str] = set()

    def scores(self, query: str, store: "Store", layout: "Layout") -> "NDArray[np.float32]":
        """The score of each chunk (n,), by position; 0 where none of the query's words is near."""
        if self._generation != layout.generation:
            self._generation, self._common = layout.generation, set()
        n = len(layout)
        limit = int(min(max(COMMON * n, _FEWEST_COMMON), _MOST_COMMON))
        scores, near = np.zeros(n, dtype=np.float32), np.zeros(n, dtype=np.float32)
        asked = words(query)
        by_stem = dict(zip(store.stems(asked), asked, strict=True))
        for stem, word in sorted(by_stem.items()):  # sums depend on their order
            if not stem or stem in self._common:
                continue
            rows = store.chunk_rows_with(word, limit=limit)
            titled = store.document_rows_with(word, limit=limit)
            if rows is None or titled is None:
                self._common.add(stem)
                continue
            holding = max(len(rows), len(titled))
            idf = math.log(1 + (n - holding + 0.5) / (holding + 0.5))
            documents = np.searchsorted(layout.documents.rows, titled)
            _add(scores, near, layout.documents, layout.positions(rows), layout.documents.positions(documents), idf)
        return scores


def words(query: str) -> list[str]:
    """The words of a query, letters and digits alone, each once, in their order."""
    return list(dict.fromkeys(_WORD.findall(unicodedata.normalize("NFC", query))))


def _add(
    scores: "NDArray[np.float32]",
    near: "NDArray[np.float32]",
    documents: "Groups",
    holding: "NDArray[np.int64]",
    titled: "NDArray[np.int64]",
    idf: float,
) -> None:
    """Adds a word's part to `scores`, given the positions that hold it and those of documents whose title does.

    `near` is zeros before and after.
    """
    near[titled] = TITLE
    reached = [titled]
    for distance in range(-REACH, REACH + 1):
        positions = holding + distance
        inside = (positions >= 0) & (positions < len(scores))
        positions, source = positions[inside], holding[inside]
        positions = positions[documents.of[positions] == documents.of[source]]
        near[positions] += math.exp(-abs(distance) / DECAY)  # no position comes twice at one distance
        reached.append(positions)
    for positions in reached:  # one that is reached several times is taken the first time and is zero after that
        counts = near[positions]
        scores[positions] += idf * (K1 + 1) * counts / (counts + K1)
        near[positions] = 0
