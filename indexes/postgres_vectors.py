"""The search by meaning in Postgres: exact, or by pgvector's HNSW graph where there are many vectors.

Contract: as many rows as were asked for, whatever the graph leads to; the search is exact up to `EXACT_UP_TO` vectors,
for a `k` that is a large part of them, under a filter, and above `GRAPH_DIMENSIONS` dimensions.
Limits: the merge that first passes `EXACT_UP_TO` builds the graph, which takes minutes (a `maintenance_work_mem` that
holds all vectors makes it several times as fast); vectors that come later cost milliseconds each, so add the bulk at
once. Measured with 300,000 vectors of 384 dimensions that mix MiniLM's, on two busy cores, built in 208 s with 2 GB:

| k | exact | graph | its recall |
|---|---|---|---|
| 500 | 0.21 s | 0.06 s | .998 |
| 1000 | 0.21 s | 0.04 s | .994 |
| 2048 | 0.21 s | 0.12 s | .999 |

Of vectors in tight clusters the graph finds less: .74 to .91 of 120,000 in 400 random ones.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.postgres import PostgresStore

EXACT_UP_TO = 200_000
EXACT_TO_K = 80  # times k: of fewer vectors the graph would take longer
GRAPH_DIMENSIONS = 2000  # that pgvector's HNSW takes at most
EF_SEARCH = 1000  # as many as pgvector takes
_GRAPH = """CREATE INDEX IF NOT EXISTS passages_by_vector ON passages
    USING hnsw (vector vector_ip_ops) WITH (ef_construction = 128)"""
# Vectors in the rows: a scan that fetched each from beside the table would take several times as long.
INLINE = "ALTER TABLE passages ALTER COLUMN vector SET STORAGE PLAIN"
_DISTANCES = "SELECT id, vector <#> %s AS distance FROM passages WHERE"


class PostgresVectors:
    """The vectors of a store, searched by the server: an object as `stripedrag.indexes.vectors.Vectors`."""

    def __init__(self, store: "PostgresStore") -> None:
        self._store = store

    def refresh(self) -> None:
        """Nothing: the server keeps its index up to date."""

    def sync(self) -> None:
        """Nothing: a search sees what its snapshot holds."""

    def search(
        self, query: "NDArray[np.float32]", k: int, rows: "NDArray[np.int64]", *, filtered: bool = False
    ) -> "tuple[NDArray[np.int64], NDArray[np.float32]]":
        """See `Nearest.search`."""
        k = min(k, len(rows))
        by_graph = not filtered and len(rows) > max(EXACT_UP_TO, EXACT_TO_K * k)
        with self._store.snapshot():
            found = self._by_graph(query, k) if by_graph else []
            if len(found) < k:  # there is no graph, or it does not lead to so many
                found = self._exactly(query, k, rows if filtered else None)
        pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0].astype(np.int64), -pairs[:, 1].astype(np.float32)

    def _by_graph(self, query: "NDArray[np.float32]", k: int) -> list[tuple[int, float]]:
        """The first `k` rows that the graph leads to, and their distances."""
        # Relaxed: a strict order leaves out what is found late. The scan ends when it has as many as it is asked for.
        settings = {"ef_search": EF_SEARCH, "max_scan_tuples": 2**31 - 1, "scan_mem_multiplier": 16}
        for name, value in {**settings, "iterative_scan": "relaxed_order"}.items():
            self._store.execute(f"SET LOCAL hnsw.{name} = {value}")
        near = f"{_DISTANCES} vector IS NOT NULL ORDER BY vector <#> %s LIMIT %s"
        return self._store.execute(near, (query, query, k)).fetchall()

    def _exactly(
        self, query: "NDArray[np.float32]", k: int, rows: "NDArray[np.int64] | None"
    ) -> list[tuple[int, float]]:
        """Of all passages, or of `rows`, the best `k` and their distances."""
        condition, values = "vector IS NOT NULL", []
        if rows is not None:
            condition, values = "id = ANY(%s::bigint[])", ["{" + ",".join(map(str, rows.tolist())) + "}"]
        best = f"{_DISTANCES} {condition} ORDER BY 0 + (vector <#> %s), id LIMIT %s"  # a sum, which no graph gives
        return self._store.execute(best, (query, *values, query, k)).fetchall()


def build_graph(store: "PostgresStore") -> None:
    """Builds the graph where the store is large enough for one and has none; call it inside a write."""
    if store.passage_count() > EXACT_UP_TO and store.manifest.embedder.dimension <= GRAPH_DIMENSIONS:
        store.execute(_GRAPH)
