"""The one truth of an index: a SQLite file that holds documents, passages with their vectors, chunks and manifest.

Contract: a write happens in one short transaction, as a whole or not at all; a reader in another process sees the
contents before it or after it. Knows nothing of models: vectors are bytes here. What SQLite refuses (a full disk, a
damaged file) is raised as `StoreError`, and the contents are those from before.
Limit: one writer at a time; a second one waits up to `TIMEOUT_S` and then raises `StoreError`.

A rollback journal and not WAL: an index at rest is then one plain file, which opens from a read-only disk and can be
copied. WAL's gain, that readers go on during a long write, is had by staging: an `add` collects in temporary tables,
which lock nothing while the embedder works for hours, and only the merge into the index is a transaction.
"""

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stripedrag.errors import StoreError, UsageError
from stripedrag.indexes import filters
from stripedrag.indexes.documents import Chunk, Document
from stripedrag.indexes.manifest import Manifest, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.vectors import Vectors

FILE = "index.sqlite"
TIMEOUT_S = 30.0
VECTOR_DTYPE = np.dtype("<f4")
_ROWS_AT_ONCE = 8192

# A chunk stores no end (its start and text give it) and a document no text (its chunks, which tile it, give it).
# AUTOINCREMENT keeps a deleted row's number from ever meaning another row, so what is derived from a row that is still
# there is still right; a merge numbers a document's chunks one after the other, which is how neighbours are told.
# A NULL vector: white space, never found. `words` holds no text and no positions of its own (detail=none): which chunks
# hold a word is all that is asked of it.
_SCHEMA = (
    "CREATE TABLE manifest (id INTEGER PRIMARY KEY CHECK (id = 1), json TEXT NOT NULL)",
    """CREATE TABLE documents (
        key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL,
        title TEXT NOT NULL, metadata TEXT NOT NULL, sha256 TEXT NOT NULL)""",
    """CREATE TABLE metadata (
        name TEXT NOT NULL, value, document INTEGER NOT NULL REFERENCES documents (key) ON DELETE CASCADE)""",
    """CREATE TABLE passages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        document INTEGER NOT NULL REFERENCES documents (key) ON DELETE CASCADE, vector BLOB)""",
    """CREATE TABLE chunks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        passage INTEGER NOT NULL REFERENCES passages (id) ON DELETE CASCADE,
        start INTEGER NOT NULL, text TEXT NOT NULL, blank INTEGER NOT NULL)""",
    # The file of vectors that is derived from this index, see `stripedrag.indexes.vectors`; one row at most.
    """CREATE TABLE vector_file (name TEXT NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
        newest_row INTEGER NOT NULL, passages INTEGER NOT NULL)""",
    "CREATE INDEX metadata_by_value ON metadata (name, value, document)",
    "CREATE INDEX metadata_by_document ON metadata (document)",
    "CREATE INDEX passages_by_document ON passages (document)",
    "CREATE INDEX chunks_by_passage ON chunks (passage)",
    "CREATE INDEX blank_chunks ON chunks (id) WHERE blank",
    """CREATE VIRTUAL TABLE words USING fts5 (
        text, content = 'chunks', content_rowid = 'id', detail = none, columnsize = 0,
        tokenize = 'porter unicode61 remove_diacritics 2')""",
    """CREATE VIRTUAL TABLE title_words USING fts5 (
        title, content = 'documents', content_rowid = 'key', detail = none, columnsize = 0,
        tokenize = 'porter unicode61 remove_diacritics 2')""",
    """CREATE TRIGGER chunk_added AFTER INSERT ON chunks BEGIN
        INSERT INTO words (rowid, text) VALUES (new.id, new.text); END""",
    """CREATE TRIGGER chunk_deleted AFTER DELETE ON chunks BEGIN
        INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text); END""",
    """CREATE TRIGGER document_added AFTER INSERT ON documents BEGIN
        INSERT INTO title_words (rowid, title) VALUES (new.key, new.title); END""",
    """CREATE TRIGGER document_deleted AFTER DELETE ON documents BEGIN
        INSERT INTO title_words (title_words, rowid, title) VALUES ('delete', old.key, old.title); END""",
    "PRAGMA user_version = 1",  # counts the writes, in the same transactions
)
_STAGING = (
    "CREATE TEMP TABLE staged_documents (id TEXT, title TEXT, metadata TEXT, sha256 TEXT)",
    "CREATE TEMP TABLE staged_passages (id INTEGER PRIMARY KEY, doc_id TEXT, vector BLOB)",
    "CREATE TEMP TABLE staged_chunks (passage INTEGER, start INTEGER, text TEXT, blank INTEGER)",
)
_MERGE = (
    "DELETE FROM main.documents WHERE id IN (SELECT id FROM temp.staged_documents)",
    """INSERT INTO main.documents (id, title, metadata, sha256)
        SELECT id, title, metadata, sha256 FROM temp.staged_documents ORDER BY rowid""",
    """INSERT INTO main.metadata (name, value, document)
        SELECT each.key, each.value, new.key FROM temp.staged_documents AS staged
        JOIN main.documents AS new ON new.id = staged.id, json_each(staged.metadata) AS each""",
    """INSERT INTO main.passages (id, document, vector)
        SELECT staged.id + :newest, new.key, staged.vector FROM temp.staged_passages AS staged
        JOIN main.documents AS new ON new.id = staged.doc_id ORDER BY staged.id""",
    """INSERT INTO main.chunks (passage, start, text, blank)
        SELECT passage + :newest, start, text, blank FROM temp.staged_chunks ORDER BY rowid""",
)
_UNSTAGE = tuple(f"DROP TABLE IF EXISTS temp.staged_{name}" for name in ("documents", "passages", "chunks"))
_CHUNKS = """SELECT chunks.id, documents.id, chunks.start, chunks.text FROM chunks
    JOIN passages ON passages.id = chunks.passage JOIN documents ON documents.key = passages.document"""


@dataclass(frozen=True, slots=True)
class VectorFile:
    """A file of vectors that was derived from a store: its name in the folder, its size and hash, and what it covers.

    `newest_row` is the highest row of a passage in it, `passages` how many passages the store had up to that row.
    """

    name: str
    bytes: int
    sha256: str
    newest_row: int
    passages: int


class Store:
    """An open index file in `folder`. Made by `create` and `open`; not safe for two threads at once."""

    def __init__(self, folder: Path, database: sqlite3.Connection, manifest: Manifest) -> None:
        self.place = self.folder = folder
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
            database.execute("PRAGMA page_size = 16384")  # a vector has 1.5 KB: at 4096 much of each page is lost
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
            self.generation()
            yield

    def generation(self) -> int:
        """Counts the writes that were committed, whoever made them; stored with them."""
        return int(self._database.execute("PRAGMA user_version").fetchone()[0])

    def document_count(self) -> int:
        """How many documents are stored."""
        return int(self._database.execute("SELECT count(*) FROM documents").fetchone()[0])

    def passage_count(self, *, after: int = 0) -> int:
        """How many passages above row `after` are stored, those of white space included."""
        newer = " WHERE id > ?" if after else ""  # without it an index answers, which is a hundredth of the table
        query = self._database.execute(f"SELECT count(*) FROM passages{newer}", (after,) if after else ())
        return int(query.fetchone()[0])

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

    def titles(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """The titles of those of these documents that are stored."""
        query = "SELECT id, title FROM documents WHERE id IN (SELECT value FROM json_each(?))"
        return dict(self._database.execute(query, (json.dumps(list(doc_ids)),)).fetchall())

    def chunks(self, doc_id: str) -> list[Chunk]:
        """A document's chunks in order; none where it is not stored."""
        found = self._database.execute(f"{_CHUNKS} WHERE documents.id = ? ORDER BY chunks.id", (doc_id,))
        return [Chunk.at(doc_id, start, text) for _, doc_id, start, text in found]

    def chunks_at(self, rows: Iterable[int]) -> dict[int, Chunk]:
        """The chunks of these rows, by row."""
        query = f"{_CHUNKS} WHERE chunks.id IN (SELECT value FROM json_each(?))"
        found = self._database.execute(query, (json.dumps(list(rows)),))
        return {row: Chunk.at(doc_id, start, text) for row, doc_id, start, text in found}

    def document_rows(self) -> "NDArray[np.int64]":
        """Every document's row, in the order of the ids."""
        return self._rows("SELECT key FROM documents ORDER BY id")

    def documents_where(self, where: filters.Where) -> "NDArray[np.int64]":
        """The rows of the documents that a filter admits, ascending. Raises `UsageError` for what is no filter."""
        condition, values = filters.sql(where)
        return self._rows(f"SELECT key FROM documents WHERE {condition} ORDER BY key", values)

    def documents_named(self, doc_ids: Collection[str]) -> "NDArray[np.int64]":
        """The rows of these documents, ascending. Raises `UsageError` where one is not stored."""
        named = "SELECT value FROM json_each(?)"
        rows = self._rows(f"SELECT key FROM documents WHERE id IN ({named}) ORDER BY key", [json.dumps(list(doc_ids))])
        if len(rows) < len(set(doc_ids)):
            missing = next(doc_id for doc_id in doc_ids if self.document_sha256(doc_id) is None)
            raise UsageError(f"index {self.name!r} has no document {missing!r}. Add it first.")
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

    def chunk_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """The rows, ascending, of the chunks that hold `word`, letters and digits alone; None where more than `limit`.

        A word is found by its stem and without its accents.
        """
        return self._rows_with(word, "words", limit)

    def document_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """The rows, ascending, of the documents that hold `word` in their title; else as `chunk_rows_with`."""
        return self._rows_with(word, "title_words", limit)

    def _rows_with(self, word: str, table: str, limit: int) -> "NDArray[np.int64] | None":
        rows = self._rows(f"SELECT rowid FROM {table} WHERE {table} MATCH ? LIMIT ?", (f'"{word}"', limit + 1))
        return None if len(rows) > limit else rows

    def _rows(self, query: str, values: Sequence[Any] = ()) -> "NDArray[np.int64]":
        return np.fromiter((row for (row,) in self._database.execute(query, values)), dtype=np.int64)

    def _pairs(self, query: str) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
        """Both columns of a query that an index answers; a merge numbers in the order that both queries sort by."""
        cursor, blocks = self._database.execute(query), [np.empty((0, 2), dtype=np.int64)]
        while batch := cursor.fetchmany(_ROWS_AT_ONCE):
            blocks.append(np.array(batch, dtype=np.int64))
        pairs = np.concatenate(blocks)
        return pairs[:, 0].copy(), pairs[:, 1].copy()

    def vectors(self, *, after: int = 0) -> "Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]":
        """The rows above `after` of passages that have a vector, ascending, and their vectors, thousands at a time.

        Outside a snapshot nobody is locked out meanwhile; a row that is deleted on the way may come or not.
        """
        query = "SELECT id, vector FROM passages WHERE id > ? AND vector IS NOT NULL ORDER BY id LIMIT ?"
        while batch := self._database.execute(query, (after, _ROWS_AT_ONCE)).fetchall():
            rows, blobs = zip(*batch, strict=True)
            after = rows[-1]
            vectors = np.frombuffer(b"".join(blobs), dtype=VECTOR_DTYPE).reshape(len(rows), -1)
            yield np.asarray(rows, dtype=np.int64), vectors.astype(np.float32)

    def passage_vectors(self, doc_id: str) -> "dict[str, NDArray[np.float32]]":
        """The vectors of a document's passages by their texts; those of white space are left out."""
        query = """SELECT passages.id, passages.vector, chunks.text FROM documents
            JOIN passages ON passages.document = documents.key JOIN chunks ON chunks.passage = passages.id
            WHERE documents.id = ? AND passages.vector IS NOT NULL ORDER BY chunks.id"""
        vectors = {}
        for (_, blob), rows in groupby(self._database.execute(query, (doc_id,)), key=itemgetter(0, 1)):
            vectors["".join(text for _, _, text in rows)] = np.frombuffer(blob, dtype=VECTOR_DTYPE).astype(np.float32)
        return vectors

    def delete(self, doc_ids: Collection[str]) -> None:
        """Deletes documents and their chunks. Raises `UsageError`, and deletes none, where one is not stored."""
        with self._write():
            for doc_id in doc_ids:
                if self._database.execute("DELETE FROM documents WHERE id = ?", (doc_id,)).rowcount == 0:
                    raise UsageError(
                        f"index {self.name!r} has no document {doc_id!r}; nothing was deleted. Drop the id."
                    )

    @contextmanager
    def staging(self) -> "Iterator[Staging]":
        """A place beside the index for documents to come; gone at the end, merged or not."""
        database = self._database
        with self._told():
            for statement in (*_UNSTAGE, *_STAGING):
                database.execute(statement)
            try:
                yield Staging(self, database)
            finally:
                for statement in _UNSTAGE:
                    database.execute(statement)

    def nearest(self, dimension: int) -> "Vectors":
        """What searches the vectors of this store; empty until it is refreshed."""
        from stripedrag.indexes.vectors import Vectors

        return Vectors(dimension, self.folder)

    def vector_file(self) -> VectorFile | None:
        """The file of vectors that was derived from this index; None where there is none."""
        row = self._database.execute("SELECT name, bytes, sha256, newest_row, passages FROM vector_file").fetchone()
        return None if row is None else VectorFile(*row)

    def put_vector_file(self, file: VectorFile) -> None:
        """Names the file of vectors in place of the one before. Not a write: the index holds what it held."""
        with self._transaction("IMMEDIATE"):
            self._database.execute("DELETE FROM vector_file")
            self._database.execute("INSERT INTO vector_file VALUES (?, ?, ?, ?, ?)", astuple(file))

    def compact(self) -> None:
        """Gives the space of what was deleted back to the disk; needs as much free as the index has."""
        with self._told():
            for table in ("words", "title_words"):
                self._database.execute(f"INSERT INTO {table} ({table}) VALUES ('optimize')")
            self._database.execute("VACUUM")

    def faults(self) -> Iterator[str]:
        """What is wrong with SQLite's file, the references, the text index and the file of vectors."""
        for (fault,) in self._database.execute("PRAGMA integrity_check(5)"):
            if fault != "ok":
                yield f"{FILE} is damaged: {fault}"
        for table, row, parent, _ in self._database.execute("PRAGMA foreign_key_check"):
            yield f"row {row} of {table} refers to a row of {parent} that is missing"
        for table, content in (("words", "chunks"), ("title_words", "titles")):
            try:
                self._database.execute(f"INSERT INTO {table} ({table}, rank) VALUES ('integrity-check', 1)")
            except sqlite3.DatabaseError as error:
                if "malformed" not in str(error):
                    raise
                yield f"the text index does not match the {content}"
        file = self.vector_file()
        if file is not None and (self.folder / file.name).exists():  # a missing one is made anew by the next search
            with (self.folder / file.name).open("rb") as written:
                if hashlib.file_digest(written, "sha256").hexdigest() != file.sha256:
                    yield f"{file.name} is damaged; delete it, and the next search makes it anew"

    @contextmanager
    def _write(self) -> Iterator[None]:
        with self._transaction("IMMEDIATE"):
            yield
            self._database.execute(f"PRAGMA user_version = {self.generation() + 1}")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        database = self._database
        if database.in_transaction:  # part of the one around it
            yield
            return
        with self._told():
            database.execute(f"BEGIN {kind}")
            try:
                yield
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite refuses, told with its mend; the contents of the index are those from before."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            what, mend = str(error), "Run `stripedrag verify` on it"
            if "full" in what or "disk I/O" in what:  # SQLite calls a full disk either
                waiting = tempfile.gettempdir()
                here, there = (shutil.disk_usage(folder).free / 1e6 for folder in (self.folder, waiting))
                mend = (
                    f"{self.folder} has {here:,.0f} MB free, and {waiting}, where documents wait until all are read, "
                    f"{there:,.0f} MB. Free some, or set SQLITE_TMPDIR to a folder that has more"
                )
            elif "locked" in what:
                mend = f"Another process has been writing to it for {TIMEOUT_S:.0f} s. Wait for its end"
            elif "readonly" in what:
                mend = f"Mend the permissions of {self.folder}"
            raise StoreError(f"index {self.name!r} is as it was: {what}. {mend}.") from error


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

    def put_passage(self, chunks: Sequence[Chunk], vector: "NDArray[np.float32] | None") -> None:
        """Stages the chunks of a passage, in order, with its vector; None for a passage that is not to be found."""
        blob = None if vector is None else vector.astype(VECTOR_DTYPE).tobytes()
        staged = self._database.execute(
            "INSERT INTO temp.staged_passages (doc_id, vector) VALUES (?, ?)", (chunks[0].doc_id, blob)
        )
        rows = ((staged.lastrowid, chunk.start, chunk.text, chunk.text.isspace()) for chunk in chunks)
        self._database.executemany("INSERT INTO temp.staged_chunks VALUES (?, ?, ?, ?)", rows)

    def merge(self) -> None:
        """Puts all that was staged into the index in one transaction, in place of documents with the same ids."""
        with self._store._write():
            newest = self._database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'passages'").fetchone()
            above = {"newest": newest[0] if newest else 0}
            for statement in _MERGE:
                self._database.execute(statement, above if ":newest" in statement else {})


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
