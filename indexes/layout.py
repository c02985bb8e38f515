"""Which chunk belongs to which passage and document, as arrays: what a search computes with.

A *position* numbers the chunks by (document id, start), the order in which equal scores are told apart; chunks next to
each other in a document have positions next to each other. Rows are the store's. Memory: 50 bytes a chunk.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.store import Store


@dataclass(frozen=True, slots=True)
class Groups:
    """Runs of positions: those of passage or document `rows[i]` (ascending) are `count[i]` from `first[i]` on.

    `of` (n,) is the `i` of each position.
    """

    rows: "NDArray[np.int64]"
    of: "NDArray[np.int64]"
    first: "NDArray[np.int64]"
    count: "NDArray[np.int64]"

    @classmethod
    def gathered(cls, rows: "NDArray[np.int64]", of: "NDArray[np.int64]") -> "Groups":
        """The groups of `rows`, given the group of each position; the positions of a group are a run."""
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        first = np.zeros(len(rows), dtype=np.int64)
        first[of[starts]] = starts
        return cls(rows, of, first, np.bincount(of, minlength=len(rows)))

    def positions(self, groups: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """The positions of these groups, group by group in the order given."""
        first, count = self.first[groups], self.count[groups]
        ends = np.cumsum(count)
        within: NDArray[np.int64] = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)
        return within + np.repeat(first, count)


@dataclass(frozen=True, slots=True)
class Layout:
    """One generation of a store; by position (n,): the `rows` of the chunks, and which are `blank`, white space."""

    generation: int
    rows: "NDArray[np.int64]"
    blank: "NDArray[np.bool_]"
    passages: Groups
    documents: Groups
    _rows_ascending: "NDArray[np.int64]"
    _by_row: "NDArray[np.int64]"
    _fewest: "NDArray[np.int64]"

    @classmethod
    def of(cls, store: "Store") -> "Layout":
        """The layout of what `store` holds now; call it inside a snapshot."""
        rows, passages = store.chunk_rows()
        passage_rows, passage_documents = store.passage_rows()
        by_id = store.document_rows()
        document_rows = np.sort(by_id)
        place = np.empty_like(by_id)  # of a document among the sorted ids
        place[np.searchsorted(document_rows, by_id)] = np.arange(len(by_id))
        passages = np.searchsorted(passage_rows, passages)
        documents = np.searchsorted(document_rows, passage_documents)[passages]
        order = np.argsort(place[documents], kind="stable")  # the rows of one document ascend already
        by_row = np.empty_like(order)
        by_row[order] = np.arange(len(order))
        blank = np.zeros(len(rows), dtype=np.bool_)
        blank[by_row[np.searchsorted(rows, store.blank_chunk_rows())]] = True
        passages = passages[order]
        return cls(
            generation=store.generation(),
            rows=rows[order],
            blank=blank,
            passages=Groups.gathered(passage_rows, passages),
            documents=Groups.gathered(document_rows, documents[order]),
            _rows_ascending=rows,
            _by_row=by_row,
            _fewest=np.cumsum(np.sort(np.bincount(passages[~blank], minlength=len(passage_rows)))),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def positions(self, rows: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """The positions of chunks by their rows, which must be there."""
        found: NDArray[np.int64] = self._by_row[np.searchsorted(self._rows_ascending, rows)]
        return found

    def passages_with(self, chunks: int) -> int:
        """How many passages have so many chunks between them, whichever they are; white space is not counted."""
        return int(np.searchsorted(self._fewest, chunks)) + 1
