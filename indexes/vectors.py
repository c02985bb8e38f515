"""The passages' vectors, searched by FAISS: a file that is derived from the store and mapped into memory.

Contract: rows of a store are never used twice and the store names the file that belongs to it, so the two cannot
disagree: rows that are newer than the file are searched beside it, rows that are gone are passed over, and a file that
is missing, cut short or mostly out of date is built again, by one process of those that have the index open. A wrong
byte inside it is found by `verify` alone. Below `SMALL` vectors there is no file, and search is exact.

| vectors | FAISS | a vector's bytes | recall@500, measured at |
|---|---|---|---|
| to `FLAT_UP_TO` | flat | 4 d | 1 |
| to `SQ8_UP_TO` | flat, 8-bit scalar quantizer | d | .9953, 100,552 |
| above | IVF, 8-bit scalar quantizer; all lists under a filter | d | .9877, 1,004,572 |
"""

import hashlib
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stripedrag.errors import StoreError
from stripedrag.files import locked
from stripedrag.indexes.sqlite import VectorFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.sqlite import SQLiteStore

SMALL = 16_384
FLAT_UP_TO = 65_536
SQ8_UP_TO = 500_000
# Of the lists of an IVF: the 500 nearest of a million vectors are spread widely. Less than all, and by all threads.
PROBED = 0.7
_STALE = 0.1  # of a file's vectors that are gone or newer than it: above, it is built again
_ROWS_KEPT = 1024  # that are gone from the rows in memory, before they are dropped
_TRAINING = 40  # vectors a list of an IVF
_SUFFIX = ".faiss"


class Vectors:
    """A store's vectors. Empty until the first `sync`; not safe for two threads at once."""

    def __init__(self, store: "SQLiteStore") -> None:
        self._store, self._folder, self._dimension = store, store.folder, store.manifest.embedder.dimension
        self._seen: tuple[int, VectorFile | None] | None = None  # generation and file at the last refresh
        self._file: VectorFile | None = None
        self._filed: Any = None  # the FAISS index of the file
        self._tail: Any = _empty(self._dimension)  # that of newer rows
        self._newest_row = 0

    def refresh(self) -> None:
        """Loads the store's file, or builds it where that is due. Takes long then: call it outside a snapshot."""
        store = self._store
        seen = store.generation(), store.vector_file()
        if seen == self._seen:
            return
        if self._seen is None or seen[1] != self._seen[1]:
            self._load(seen[1])
        newest, counted = (self._file.newest_row, self._file.passages) if self._file else (0, 0)
        new = store.passage_count(after=newest)
        gone = counted - (store.passage_count() - new)
        self._seen = seen
        if new + gone > max(SMALL, _STALE * counted):
            self._build(*seen)
        elif self._tail.ntotal > 2 * new + _ROWS_KEPT:  # rows that are gone
            self._use(self._file, self._filed)

    def sync(self) -> None:
        """Takes over the rows that are newer than the file. Call it inside the store's snapshot."""
        for rows, vectors in self._store.vectors(after=self._newest_row):
            self._tail.add_with_ids(vectors, rows)
            self._newest_row = int(rows[-1])

    def search(
        self, query: "NDArray[np.float32]", k: int, rows: "NDArray[np.int64]", *, filtered: bool = False
    ) -> "tuple[NDArray[np.int64], NDArray[np.float32]]":
        """See `Nearest.search`. Under a filter no list of an IVF is left out: few of `rows` may be near the query."""
        chosen = np.zeros(max(self._newest_row, rows[-1] if len(rows) else 0) + 1, dtype=np.bool_)
        chosen[rows] = True
        selector = _faiss().IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        plain = _faiss().SearchParameters(sel=selector)
        found = [_search(self._tail, query, k, plain)]
        if isinstance(self._filed, _faiss().IndexIVF):
            lists = self._filed.nlist
            for probed in (lists,) if filtered else (math.ceil(PROBED * lists), lists):
                probing = _faiss().SearchParametersIVF(sel=selector, nprobe=probed)
                hits = _search(self._filed, query, k, probing)
                if len(hits[0]) == k:
                    break
            found.append(hits)
        elif self._filed is not None:
            found.append(_search(self._filed, query, k, plain))
        hit_rows, cosines = (np.concatenate(parts) for parts in zip(*found, strict=True))
        best = np.argpartition(-cosines, k - 1)[:k] if len(cosines) > k else slice(None)
        return hit_rows[best], cosines[best]

    def _load(self, file: VectorFile | None) -> None:
        filed = None
        if file is not None:
            path = self._folder / file.name
            # A mapped file that is shorter than FAISS takes it for would end the process at some later read.
            if path.is_file() and path.stat().st_size == file.bytes:
                with suppress(RuntimeError):
                    filed = _faiss().read_index(str(path), _faiss().IO_FLAG_MMAP_IFC)
        self._use(file if filed is not None else None, filed)

    def _use(self, file: VectorFile | None, filed: Any) -> None:
        self._file, self._filed, self._tail = file, filed, _empty(self._dimension)
        self._newest_row = file.newest_row if file else 0

    def _build(self, generation: int, known: VectorFile | None) -> None:
        """Builds the file of all vectors anew in the place of `known`, or takes the one that another process built.

        While another builds it, who has a file goes on with that, and who has none waits.
        """
        with _turn(self._folder, wait=self._filed is None) as has_turn:
            if not has_turn:
                return
            if (file := self._store.vector_file()) != known:
                self._load(file)
            if file == known or self._filed is None:
                self._put(*self._built())
            self._seen = generation, self._store.vector_file()

    def _built(self) -> tuple[Any, int]:
        """The FAISS index of all vectors, and the newest row in it."""
        self._use(None, None)
        built, newest_row = _trained(self._store, self._dimension), 0
        for rows, vectors in self._store.vectors():
            built.add_with_ids(vectors, rows)
            newest_row = int(rows[-1])
        return built, newest_row

    def _put(self, built: Any, newest_row: int) -> None:
        """Puts a FAISS index into the folder and maps it; keeps it in memory where the folder is read-only."""
        store = self._store
        passages = store.passage_count() - store.passage_count(after=newest_row)
        path = self._folder / f"vectors-{secrets.token_hex(8)}{_SUFFIX}"
        partial = path.with_suffix(".partial")
        file = VectorFile(path.name, 0, "", newest_row, passages)
        try:
            _faiss().write_index(built, str(partial))
            with partial.open("rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
                os.fsync(written.fileno())  # before the store names it
            file = VectorFile(path.name, partial.stat().st_size, sha256, newest_row, passages)
            partial.rename(path)
            store.put_vector_file(file)
        except (OSError, RuntimeError, StoreError):
            for left in (partial, path):
                with suppress(OSError):  # of a read-only disk also for what is not there
                    left.unlink()
            self._use(file, built)
            return
        for old in self._folder.glob("vectors-*"):
            if old != path:
                with suppress(OSError):
                    old.unlink()
        self._load(file)


def _faiss() -> Any:
    """The module, loaded when it is needed; its type stubs know nothing of what its Python layer adds."""
    import faiss

    return faiss


def _empty(dimension: int) -> Any:
    return _faiss().IndexIDMap(_faiss().IndexFlatIP(dimension))


@contextmanager
def _turn(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether it is this process that builds the file now. In a read-only folder each builds its own, in memory."""
    with ExitStack() as stack:
        try:
            has_turn = stack.enter_context(locked(folder / "vectors.lock", wait=wait))
        except OSError:
            has_turn = True
        yield has_turn


def _trained(store: "SQLiteStore", dimension: int) -> Any:
    """An empty index of the kind that suits the number of vectors, trained on a part of them."""
    n = store.passage_count()
    lists = round(2 * math.sqrt(n))
    kind = "IDMap,Flat" if n <= FLAT_UP_TO else "IDMap,SQ8" if n <= SQ8_UP_TO else f"IVF{lists},SQ8"
    index = _faiss().index_factory(dimension, kind, _faiss().METRIC_INNER_PRODUCT)
    step = max(1, n // max(_TRAINING * lists, 10_000))
    if some := [vectors[::step] for _, vectors in store.vectors()]:
        index.train(np.concatenate(some))
    return index


def _search(
    index: Any, query: "NDArray[np.float32]", k: int, parameters: Any
) -> "tuple[NDArray[np.int64], NDArray[np.float32]]":
    k = min(k, index.ntotal)
    if not k:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    cosines, rows = index.search(query[None, :], k, params=parameters)
    found = rows[0] >= 0
    return rows[0][found], cosines[0][found]
