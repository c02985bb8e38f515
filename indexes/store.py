"""What every store of an index is: the one truth, which holds documents, passages with vectors, chunks and manifest.

Contract: a write happens in one transaction, as a whole or not at all; a reader elsewhere sees the contents before it
or after it. Knows nothing of models. What the database refuses is raised as `StoreError`, and the contents are those
from before. `stripedrag.indexes.sqlite` keeps one in a folder, `stripedrag.indexes.postgres` on a server.
Limits: one writer at a time, the next one waits; a store is not safe for two threads at once.

A chunk stores no end (its start and text give it) and a document no text (its chunks, which tile it, give it). A
deleted row's number never means another row, so what is derived from a row that is still there is still right; a merge
numbers a document's chunks one after the other, which is how neighbours are told.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from stripedrag.errors import StoreError, UsageError
from stripedrag.indexes import filters
from stripedrag.indexes.documents import Chunk, Document
from stripedrag.indexes.manifest import Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS_AT_ONCE = 8192
_CHUNKS = """SELECT chunks.id, documents.id, chunks.start, chunks.text FROM chunks
    JOIN passages ON passages.id = chunks.passage JOIN documents ON documents.key = passages.document"""


class Nearest(Protocol):
    """What a store has its vectors searched by."""

    def refresh(self) -> None:
        """Outside a snapshot: does what takes long."""

    def sync(self) -> None:
        """Inside a snapshot: takes over what that holds."""

    def search(
        self, query: "NDArray[np.float32]", k: int, rows: "NDArray[np.int64]", *, filtered: bool = False
    ) -> "tuple[NDArray[np.int64], NDArray[np.float32]]":
        """The `k` of these `rows` with the highest cosines (fewer where there are fewer), and the cosines; unordered.

        `rows` ascend; those that have no vector are passed over. `filtered` says that they are a part of all there are.
        """


class Staging(Protocol):
    """Documents and chunks that are not in the index yet. Made by `Store.staging`."""

    def put_document(self, document: Document, metadata: str, sha256: str) -> None:
        """Stages a document without its text; `metadata` is its JSON, `sha256` its content hash.

        Raises `CorpusError` for what the database cannot hold.
        """

    def put_passage(self, chunks: Sequence[Chunk], vector: "NDArray[np.float32] | None") -> None:
        """Stages the chunks of a passage, in order, with its vector; None for a passage that is not to be found."""

    def merge(self) -> None:
        """Puts all that was staged into the index in one transaction, in place of documents with the same ids."""


class Store(ABC):
    """An open store: `place` is its folder or its URI without a password, `name` what people are told."""

    _AMONG: ClassVar[str]  # the condition that a value is in the list which `_listed` makes

    def __init__(self, place: Path | str, name: str, manifest: Manifest, connection: Any) -> None:
        self.place, self.name, self.manifest = place, name, manifest
        self._connection = connection  # of PEP 249; None once it is closed

    @property
    def _database(self) -> Any:
        if self._connection is None:
            raise UsageError(f"index {self.name!r} is closed. Open it again with Index.open.")
        return self._connection

    def close(self) -> None:
        """Ends the connection; harmless the second time."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[None]:
        """Inside it every read sees the same contents, whatever other processes commit."""

    @abstractmethod
    def generation(self) -> int:
        """Counts the writes that were committed, whoever made them; stored with them."""

    @abstractmethod
    def execute(self, query: str, values: Sequence[Any] = ()) -> Any:
        """A cursor (PEP 249) over the rows of a query in which `?` stands for each value."""

    @staticmethod
    @abstractmethod
    def _listed(values: Collection[Any]) -> Any:
        """A list as one value of a query."""

    @abstractmethod
    def stems(self, words: "Sequence[str]") -> list[str]:
        """The stem of each word, letters and digits alone: words of one stem find the same rows.

        "" for a word that finds none: what Postgres takes for a stop word, what SQLite's tokenizer splits.
        """

    @abstractmethod
    def chunk_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """The rows, ascending, of the chunks that hold `word`, letters and digits alone; None where more than `limit`.

        A word is found by its stem and without its accents. Limits of SQLite's tokenizer: Greek and Cyrillic keep
        theirs, and scripts are not found where NFC writes them in another way than the text does (Bengali, Hindi).
        Limit of Postgres's parser: it may take a word of letters and digits for several, which all have to be there.
        """

    @abstractmethod
    def document_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """The rows, ascending, of the documents that hold `word` in their title; else as `chunk_rows_with`."""

    @abstractmethod
    def vectors(self, *, after: int = 0) -> "Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]":
        """The rows above `after` of passages that have a vector, ascending, and their vectors, thousands at a time.

        Outside a snapshot nobody is locked out meanwhile; a row that is deleted on the way may come or not.
        """

    @abstractmethod
    def passage_vectors(self, doc_id: str) -> "dict[str, NDArray[np.float32]]":
        """The vectors of a document's passages by their texts; those of white space are left out."""

    @abstractmethod
    def nearest(self) -> Nearest:
        """What searches the vectors of this store; empty until it is refreshed."""

    @abstractmethod
    def _write(self) -> AbstractContextManager[None]:
        """A transaction that counts as a write, see `generation`."""

    @abstractmethod
    def staging(self) -> AbstractContextManager[Staging]:
        """A place beside the index for documents to come; gone at the end, merged or not."""

    @abstractmethod
    def compact(self) -> None:
        """Gives the space of what was deleted back to the disk; may need twice as much free as the index has."""

    @abstractmethod
    def size_bytes(self) -> int:
        """What it takes of the disk, files that are derived from it included."""

    @abstractmethod
    def faults(self) -> Iterator[str]:
        """What is wrong with the store's own structure, in words; inside a snapshot."""

    @abstractmethod
    def text_faults(self) -> Iterator[str]:
        """Where the text index does not match the texts, in words; outside a snapshot, since writers may have to wait.

        Raises `StoreError` where that cannot be read.
        """

    def delete(self, doc_ids: Collection[str]) -> None:
        """Deletes documents and their chunks. Raises `UsageError`, and deletes none, where one is not stored."""
        with self._write():
            if missing := set(doc_ids) - self.titles(doc_ids).keys():
                raise UsageError(
                    f"index {self.name!r} has no document {min(missing)!r}; nothing was deleted. Drop the id."
                )
            self.execute(f"DELETE FROM documents WHERE id {self._AMONG}", [self._listed(doc_ids)])

    def is_empty(self) -> bool:
        """Whether it holds no document."""
        return not self._number("SELECT count(*) FROM (SELECT 1 FROM documents LIMIT 1) AS first")

    def document_count(self) -> int:
        """How many documents are stored."""
        return self._number("SELECT count(*) FROM documents")

    def passage_count(self, *, after: int = 0) -> int:
        """How many passages above row `after` are stored, those of white space included."""
        if not after:  # an index answers, which is a hundredth of the table
            return self._number("SELECT count(*) FROM passages")
        return self._number("SELECT count(*) FROM passages WHERE id > ?", [after])

    def chunk_count(self) -> int:
        """How many chunks are stored, those of white space included."""
        return self._number("SELECT count(*) FROM chunks")

    def document_ids(self, where: filters.Where | None = None) -> list[str]:
        """The ids of all documents, or of those that a filter admits, sorted. Raises as `documents_where`."""
        condition, values = filters.sql({} if where is None else where, self._compared)
        return [i for (i,) in self.execute(f"SELECT id FROM documents WHERE {condition} ORDER BY id", values)]

    def document_sha256(self, doc_id: str) -> str | None:
        """The content hash a document was stored with; None where it is not stored."""
        row = self.execute("SELECT sha256 FROM documents WHERE id = ?", [doc_id]).fetchone()
        return None if row is None else str(row[0])

    def document(self, doc_id: str) -> Document:
        """A stored document, as it was added. Raises `UsageError` where it is not stored."""
        with self.snapshot():
            row = self.execute("SELECT title, metadata FROM documents WHERE id = ?", [doc_id]).fetchone()
            if row is None:
                raise self._missing(doc_id)
            title, metadata = row
            text = "".join(chunk.text for chunk in self.chunks(doc_id))
        try:
            return Document(id=doc_id, title=title, text=text, metadata=json.loads(metadata))
        except ValueError as error:
            raise self._damaged(f"the metadata of document {doc_id!r} is no JSON") from error

    def titles(self, doc_ids: Collection[str]) -> dict[str, str]:
        """The titles of those of these documents that are stored."""
        query = f"SELECT id, title FROM documents WHERE id {self._AMONG}"
        return dict(self.execute(query, [self._listed(doc_ids)]).fetchall())

    def chunks(self, doc_id: str) -> list[Chunk]:
        """A document's chunks in order; none where it is not stored."""
        found = self.execute(f"{_CHUNKS} WHERE documents.id = ? ORDER BY chunks.id", [doc_id])
        return [self._chunk(*row) for row in found]

    def chunks_at(self, rows: Collection[int]) -> dict[int, Chunk]:
        """The chunks of these rows, by row."""
        found = self.execute(f"{_CHUNKS} WHERE chunks.id {self._AMONG}", [self._listed(rows)])
        chunks = {row: self._chunk(row, *rest) for row, *rest in found}
        if missing := set(rows) - chunks.keys():
            raise self._damaged(f"chunk {min(missing)} belongs to no document")
        return chunks

    def _chunk(self, row: int, doc_id: str, start: Any, text: Any) -> Chunk:
        if not isinstance(start, int) or not isinstance(text, str):
            raise self._damaged(f"chunk {row} has a start or a text of another type")
        return Chunk.at(doc_id, start, text)

    def document_rows(self) -> "NDArray[np.int64]":
        """Every document's row, in the order of the ids."""
        return self._rows("SELECT key FROM documents ORDER BY id")

    def documents_where(self, where: filters.Where) -> "NDArray[np.int64]":
        """The rows of the documents that a filter admits, ascending. Raises `UsageError` for what is no filter."""
        condition, values = filters.sql(where, self._compared)
        return self._rows(f"SELECT key FROM documents WHERE {condition} ORDER BY key", values)

    @staticmethod
    @abstractmethod
    def _compared(operator: str, value: Any) -> tuple[str, list[Any]]:
        """See `stripedrag.indexes.filters.Comparison`."""

    def documents_named(self, doc_ids: Collection[str]) -> "NDArray[np.int64]":
        """The rows of these documents, ascending. Raises `UsageError` where one is not stored."""
        query = f"SELECT key FROM documents WHERE id {self._AMONG} ORDER BY key"
        rows = self._rows(query, [self._listed(doc_ids)])
        if len(rows) < len(set(doc_ids)):
            raise self._missing(next(doc_id for doc_id in doc_ids if self.document_sha256(doc_id) is None))
        return rows

    def passage_rows(self) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
        """Every passage's row, ascending, and its document's."""
        return self._pairs("SELECT id, document FROM passages ORDER BY document, id")

    def chunk_rows(self) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
        """Every chunk's row, ascending, and its passage's."""
        return self._pairs("SELECT id, passage FROM chunks ORDER BY passage, id")

    def blank_chunk_rows(self) -> "NDArray[np.int64]":
        """The rows of the chunks that are white space, ascending."""
        return self._rows("SELECT id FROM chunks WHERE blank ORDER BY id")

    def _number(self, query: str, values: Sequence[Any] = ()) -> int:
        return int(self.execute(query, values).fetchone()[0])

    def _rows(self, query: str, values: Sequence[Any] = ()) -> "NDArray[np.int64]":
        return np.fromiter((row for (row,) in self.execute(query, values)), dtype=np.int64)

    def _pairs(self, query: str) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
        """Both columns of a query that an index answers; a merge numbers in the order that both queries sort by."""
        cursor, blocks = self.execute(query), [np.empty((0, 2), dtype=np.int64)]
        while batch := cursor.fetchmany(ROWS_AT_ONCE):
            blocks.append(np.array(batch, dtype=np.int64))
        pairs = np.concatenate(blocks)
        return pairs[:, 0].copy(), pairs[:, 1].copy()

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"index {self.name!r} is damaged: {what}. Run `stripedrag verify` on it.")

    def _missing(self, doc_id: str) -> UsageError:
        return UsageError(f"index {self.name!r} has no document {doc_id!r}. Add it first.")
