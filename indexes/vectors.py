"""The vectors of a store in memory, searched by FAISS.

Contract: derived from the store and never written anywhere, so the two cannot disagree; exact cosine, every row is
compared. Limit: 4 bytes a dimension for each chunk in memory, and a search takes time linear in the chunks.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.store import Store


class Vectors:
    """A flat FAISS index over a store's chunk rows, empty until the first `sync`."""

    def __init__(self, dimension: int) -> None:
        import faiss

        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._newest_row = 0
        self._version: tuple[int, int] | None = None

    def sync(self, store: "Store") -> None:
        """Takes over what this and other processes committed since the last call; reads only the rows that are new.

        Call it inside the store's `snapshot`. Rows are never used twice, so one that is still there is unchanged.
        """
        import faiss

        version = store.version()
        if version == self._version:
            return
        gone = np.setdiff1d(faiss.vector_to_array(self._index.id_map), store.rows(), assume_unique=True)
        if gone.size:
            self._index.remove_ids(faiss.IDSelectorBatch(gone))
        for rows, vectors in store.vectors_after(self._newest_row):
            self._index.add_with_ids(vectors, rows)
            self._newest_row = int(rows[-1])
        self._version = version

    def search(self, query: "NDArray[np.float32]", k: int) -> list[tuple[int, float]]:
        """(row, cosine) of the `k` best rows, and of every further row that ties with the last of them.

        FAISS breaks ties by insertion order; with all of them at hand the caller can break them by document instead.
        """
        total = self._index.ntotal
        k = min(k, total)
        asked = min(k + 1, total)
        while True:
            scores, rows = self._index.search(query[None, :], asked)
            if asked == total or scores[0, -1] < scores[0, k - 1]:
                return [
                    (row, score)
                    for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
                    if score >= scores[0, k - 1]
                ]
            asked = min(2 * asked, total)
