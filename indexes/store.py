"""The one truth of an index: a SQLite file that holds documents, chunks, vectors and manifest.

Contract: a write happens in one short transaction, as a whole or not at all; a reader in another process sees the
contents before it or after it. Knows nothing of models: vectors are bytes here.
Limit: one writer at a time; a second one waits up to `TIMEOUT_S` and then raises `sqlite3.OperationalError`.

A rollback journal and not WAL: an index at rest is then one plain file, which opens from a read-only disk and can be
copied. WAL's gain, that readers go on during a long write, is had by staging: an `add` collects in temporary tables,
which lock nothing while the embedder works for hours, and only the merge into the index is a transaction.
"""

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stripedrag.errors import UsageError
from stripedrag.indexes.documents import Chunk, Document
from stripedrag.indexes.manifest import Manifest, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "index.sqlite"
TIMEOUT_S = 30.0
VECTOR_DTYPE = np.dtype("<f4")
_ROWS_AT_ONCE = 8192

# A chunk stores no end (its start and text give it) and a document no text (its chunks, which tile it, give it).
# AUTOINCREMENT keeps a deleted row's number from ever meaning another chunk. A NULL vector: white space, never found.
_SCHEMA = (
    "CREATE TABLE manifest (id INTEGER PRIMARY KEY CHECK (id = 1), json TEXT NOT NULL)",
    """CREATE TABLE documents (
        id TEXT PRIMARY KEY NOT NULL, title TEXT NOT NULL, metadata TEXT NOT NULL, sha256 TEXT NOT NULL)""",
    """CREATE TABLE chunks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        doc_id TEXT NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
        start INTEGER NOT NULL, text TEXT NOT NULL, vector BLOB,
        UNIQUE (doc_id, start))""",
)
_STAGING = (
    "CREATE TEMP TABLE staged_documents (id TEXT, title TEXT, metadata TEXT, sha256 TEXT)",
    "CREATE TEMP TABLE staged_chunks (doc_id TEXT, start INTEGER, text TEXT, vector BLOB)",
)
_MERGE = (
    "DELETE FROM main.documents WHERE id IN (SELECT id FROM temp.staged_documents)",
    "INSERT INTO main.documents SELECT id, title, metadata, sha256 FROM temp.staged_documents ORDER BY rowid",
    """INSERT INTO main.chunks (doc_id, start, text, vector)
        SELECT doc_id, start, text, vector FROM temp.staged_chunks ORDER BY rowid""",
)
_UNSTAGE = ("DROP TABLE IF EXISTS temp.staged_documents", "DROP TABLE IF EXISTS temp.staged_chunks")


class Store:
    """An open index file in `folder`. Made by `create` and `open`; not safe for two threads at once."""

    def __init__(self, folder: Path, database: sqlite3.Connection, manifest: Manifest) -> None:
        self.name = folder.name
        self.manifest = manifest
        self._connection: sqlite3.Connection | None = database
        database.execute("PRAGMA foreign_keys = ON")

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> "Store":
        """A new store without documents; makes the folder and its parents where they are missing.

        Schema and manifest are one transaction, so a create that is killed leaves an empty file at most, which the next
        one takes over, and of two creates at once the second is told. Raises `UsageError` where something is there.
        """
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"cannot create an index at {folder}: a file is there. Choose another path.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot create an index at {folder}: {error.strerror}. Choose another path.") from error
        strangers = sorted({entry.name for entry in folder.iterdir()} - {FILE, f"{FILE}-journal"})
        if strangers and not (folder / FILE).exists():
            raise UsageError(
                f"cannot create an index in {folder}: the folder is not empty (it holds {strangers[0]!r}). "
                f"Choose an empty or a new one."
            )
        with _connected(folder / FILE, mode="rwc", doing=f"cannot create an index in {folder}") as database:
            database.execute("PRAGMA page_size = 16384")  # a row is about 3 KB: at 4096 a quarter of each page is lost
            database.execute("BEGIN EXCLUSIVE")
            if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise UsageError(f"{folder} holds an index already. Open it with Index.open, or choose another path.")
            for statement in _SCHEMA:
                database.execute(statement)
            database.execute("INSERT INTO manifest VALUES (1, ?)", (manifest.model_dump_json(),))
            database.execute("COMMIT")
            return cls(folder, database, manifest)

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """The store in `folder`. Raises `UsageError` where there is none, `IndexMismatchError` for another schema."""
        if not folder.exists():
            raise UsageError(f"no index at {folder}: there is no such folder. Create it with Index.create.")
        if not (folder / FILE).is_file():
            raise UsageError(f"{folder} is no index: it has no file {FILE}. Create one in an empty folder.")
        with _connected(folder / FILE, mode="rw", doing=f"cannot open {folder} as an index") as database:
            (text,) = database.execute("SELECT json FROM manifest").fetchone() or ("null",)
            return cls(folder, database, parse(text, index=folder.name))

    @property
    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            raise UsageError(f"index {self.name!r} is closed. Open it again with Index.open.")
        return self._connection

    def close(self) -> None:
        """Closes the file; harmless the second time."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Inside it every read sees the same contents, whatever other processes commit."""
        with self._transaction("DEFERRED"):
            self._database.execute("SELECT id FROM manifest").fetchone()
            yield

    def version(self) -> tuple[int, int]:
        """Changes with every committed write: of others (the first number) and of this store (the second)."""
        (others,) = self._database.execute("PRAGMA data_version").fetchone()
        return others, self._database.total_changes

    def document_count(self) -> int:
        """How many documents are stored."""
        return int(self._database.execute("SELECT count(*) FROM documents").fetchone()[0])

    def chunk_count(self) -> int:
        """How many chunks are stored, those of white space included."""
        return int(self._database.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def document_ids(self) -> list[str]:
        """The ids of all documents, sorted."""
        return [doc_id for (doc_id,) in self._database.execute("SELECT id FROM documents ORDER BY id")]

    def document_sha256(self, doc_id: str) -> str | None:
        """The content hash a document was stored with; None where it is not stored."""
        row = self._database.execute("SELECT sha256 FROM documents WHERE id = ?", (doc_id,)).fetchone()
        return None if row is None else str(row[0])

    def document(self, doc_id: str) -> Document:
        """A stored document, as it was added. Raises `UsageError` where it is not stored."""
        with self.snapshot():
            row = self._database.execute("SELECT title, metadata FROM documents WHERE id = ?", (doc_id,)).fetchone()
            if row is None:
                raise UsageError(f"index {self.name!r} has no document {doc_id!r}. Add it first.")
            title, metadata = row
            text = "".join(chunk.text for chunk in self.chunks(doc_id))
        return Document(id=doc_id, title=title, text=text, metadata=json.loads(metadata))

    def chunks(self, doc_id: str) -> list[Chunk]:
        """A document's chunks in order; none where it is not stored."""
        query = "SELECT start, text FROM chunks WHERE doc_id = ? ORDER BY start"
        return [Chunk.at(doc_id, start, text) for start, text in self._database.execute(query, (doc_id,))]

    def chunks_at(self, rows: Iterable[int]) -> dict[int, Chunk]:
        """The chunks of these rows, by row."""
        query = "SELECT id, doc_id, start, text FROM chunks WHERE id IN (SELECT value FROM json_each(?))"
        found = self._database.execute(query, (json.dumps(list(rows)),))
        return {row: Chunk.at(doc_id, start, text) for row, doc_id, start, text in found}

    def rows(self) -> "NDArray[np.int64]":
        """The row of every chunk."""
        return np.fromiter((row for (row,) in self._database.execute("SELECT id FROM chunks")), dtype=np.int64)

    def vectors_after(self, row: int) -> "Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]":
        """Rows above `row` that have a vector, ascending, and their vectors, a few thousand at a time."""
        query = "SELECT id, vector FROM chunks WHERE id > ? AND vector IS NOT NULL ORDER BY id"
        cursor = self._database.execute(query, (row,))
        while batch := cursor.fetchmany(_ROWS_AT_ONCE):
            rows, blobs = zip(*batch, strict=True)
            vectors = np.frombuffer(b"".join(blobs), dtype=VECTOR_DTYPE).reshape(len(rows), -1)
            yield np.asarray(rows, dtype=np.int64), vectors.astype(np.float32)

    def delete(self, doc_ids: Collection[str]) -> None:
        """Deletes documents and their chunks. Raises `UsageError`, and deletes none, where one is not stored."""
        with self._transaction("IMMEDIATE"):
            for doc_id in doc_ids:
                if self._database.execute("DELETE FROM documents WHERE id = ?", (doc_id,)).rowcount == 0:
                    raise UsageError(
                        f"index {self.name!r} has no document {doc_id!r}; nothing was deleted. Drop the id."
                    )

    @contextmanager
    def staging(self) -> "Iterator[Staging]":
        """A place beside the index for documents to come; gone at the end, merged or not."""
        database = self._database
        for statement in (*_UNSTAGE, *_STAGING):
            database.execute(statement)
        try:
            yield Staging(self, database)
        finally:
            for statement in _UNSTAGE:
                database.execute(statement)

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        database = self._database
        if database.in_transaction:  # part of the one around it
            yield
            return
        database.execute(f"BEGIN {kind}")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise


class Staging:
    """Documents and chunks that are not in the index yet. Made by `Store.staging`."""

    def __init__(self, store: Store, database: sqlite3.Connection) -> None:
        self._store = store
        self._database = database

    def put_document(self, document: Document, metadata: str, sha256: str) -> None:
        """Stages a document without its text; `metadata` is its JSON, `sha256` its content hash."""
        self._database.execute(
            "INSERT INTO temp.staged_documents VALUES (?, ?, ?, ?)", (document.id, document.title, metadata, sha256)
        )

    def put_chunks(self, chunks: Iterable[Chunk], vectors: "Iterable[NDArray[np.float32] | None]") -> None:
        """Stages chunks with their vectors; None for a chunk that is not to be found."""
        rows: Iterator[tuple[Any, ...]] = (
            (chunk.doc_id, chunk.start, chunk.text, None if vector is None else vector.astype(VECTOR_DTYPE).tobytes())
            for chunk, vector in zip(chunks, vectors, strict=True)
        )
        self._database.executemany("INSERT INTO temp.staged_chunks VALUES (?, ?, ?, ?)", rows)

    def merge(self) -> None:
        """Puts all that was staged into the index in one transaction, in place of documents with the same ids."""
        with self._store._transaction("IMMEDIATE"):
            for statement in _MERGE:
                self._database.execute(statement)


@contextmanager
def _connected(path: Path, *, mode: str, doing: str) -> Iterator[sqlite3.Connection]:
    """A connection that outlives the block, unless an error ends it: then it is closed, and SQLite's is a `UsageError`.

    It is in autocommit mode, so transactions are written out; `Index` has the lock that threads need.
    """
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        with ExitStack() as unless_well:
            database = sqlite3.connect(uri, uri=True, timeout=TIMEOUT_S, isolation_level=None, check_same_thread=False)
            unless_well.callback(database.close)
            yield database
            unless_well.pop_all()
    except sqlite3.DatabaseError as error:
        raise UsageError(f"{doing}: {path.name} is no index that can be read ({error}). Check the path.") from error
