"""An index in a folder: one SQLite file that holds all of it.

What SQLite refuses (a full disk, a damaged file) is raised as `StoreError`.
Limits: who meets a lock waits up to `TIMEOUT_S` and then raises `StoreError`: a second writer, and every reader while a
merge is written out, or earlier where the merge changes more than `MERGE_CACHE_KIB`.

A rollback journal and not WAL: an index at rest is then one plain file, which opens from a read-only disk and can be
copied. WAL's gain, that readers go on during a long write, is had by staging: an `add` collects in temporary tables,
which lock nothing while the embedder works for hours, and only the merge into the index is a transaction.
"""

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stripedrag.errors import StoreError, UsageError
from stripedrag.indexes import checks
from stripedrag.indexes.documents import Chunk, Document
from stripedrag.indexes.manifest import Manifest, parse
from stripedrag.indexes.store import ROWS_AT_ONCE, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.vectors import Vectors

FILE = "index.sqlite"
TIMEOUT_S = 600.0
# What a transaction changes beyond this goes to the file before its end, and from then on readers wait for that.
MERGE_CACHE_KIB = 262_144
_CACHE_KIB = 2_000  # SQLite's own
VECTOR_DTYPE = np.dtype("<f4")

_TOKENIZER = "porter unicode61 remove_diacritics 2"

# AUTOINCREMENT keeps a deleted row's number from ever meaning another row. A NULL vector: white space, never found.
# `words` holds no text and no positions of its own (detail=none): which chunks hold a word is all that is asked of it.
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
    f"""CREATE VIRTUAL TABLE words USING fts5 (
        text, content = 'chunks', content_rowid = 'id', detail = none, columnsize = 0,
        tokenize = '{_TOKENIZER}')""",
    f"""CREATE VIRTUAL TABLE title_words USING fts5 (
        title, content = 'documents', content_rowid = 'key', detail = none, columnsize = 0,
        tokenize = '{_TOKENIZER}')""",
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
_COMPARED = {"$eq": "IS ?", "$gt": "> ?", "$gte": ">= ?", "$lt": "< ?", "$lte": "<= ?"}
_UNSTAGE = tuple(f"DROP TABLE IF EXISTS temp.staged_{name}" for name in ("documents", "passages", "chunks"))


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


class SQLiteStore(Store):
    """An open index file in `folder`. Made by `create` and `open`."""

    _AMONG = "IN (SELECT value FROM json_each(?))"

    def __init__(self, folder: Path, database: sqlite3.Connection, manifest: Manifest) -> None:
        super().__init__(folder, folder.name, manifest, database)
        self.folder = folder
        database.execute("PRAGMA foreign_keys = ON")

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> "SQLiteStore":
        """A new store without documents; makes the folder and its parents where they are missing.

        Schema and manifest are one transaction, so a create that is killed leaves an empty file at most, which the next
        one takes over, and of two creates at once the second is told. Raises `UsageError` where something is there.
        """
        try:
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"cannot create an index at {folder}: a file is there. Choose another path.")
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
    def open(cls, folder: Path) -> "SQLiteStore":
        """The store in `folder`. Raises `UsageError` where there is none, `IndexMismatchError` for another schema."""
        if not cls.is_at(folder):
            if not folder.exists():
                raise UsageError(
                    f"no index at {folder}: there is no such folder. `stripedrag index` or Index.create makes one."
                )
            raise UsageError(
                f"{folder} is no index: it has no file {FILE}, or an empty one. Create one in an empty folder."
            )
        with _connected(folder / FILE, mode="rw", doing=f"cannot open {folder} as an index") as database:
            if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise UsageError(f"{folder} is no index: the process that created it was ended. Create it again.")
            (text,) = database.execute("SELECT json FROM manifest").fetchone() or ("null",)
            return cls(folder, database, parse(text, index=folder.name))

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether `folder` holds an index, not an empty file, as a create leaves that was killed.

        Raises `UsageError` for a folder that cannot be looked into.
        """
        try:
            return (folder / FILE).is_file() and (folder / FILE).stat().st_size > 0
        except OSError as error:
            raise UsageError(
                f"cannot look into {folder}: {error.strerror}. Check the path and its permissions."
            ) from error

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See `Store.snapshot`."""
        with self._transaction("DEFERRED"):
            self.generation()
            yield

    def generation(self) -> int:
        """See `Store.generation`."""
        return self._number("PRAGMA user_version")

    def execute(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """See `Store.execute`. Raises `StoreError` for what SQLite refuses."""
        with self._told(), checks.encodable():
            cursor: sqlite3.Cursor = self._database.execute(query, values)
        return cursor

    @staticmethod
    def _listed(values: Collection[Any]) -> str:
        return json.dumps(list(values))

    @staticmethod
    def _compared(operator: str, value: Any) -> tuple[str, list[Any]]:
        if operator == "$in":
            among = "value IN (SELECT value FROM json_each(?))"
            return (f"{among} OR value IS NULL" if None in value else among), [json.dumps(list(value))]
        # A comparison of a number with a text would hold for every text: SQLite sorts texts above all numbers.
        kind = "= 'text'" if isinstance(value, str) else "IN ('integer', 'real')"
        bound = float(value) if isinstance(value, int) and abs(value) >= 2**63 else value  # as `json_each` stored it
        return f"value {_COMPARED[operator]}" + ("" if operator == "$eq" else f" AND typeof(value) {kind}"), [bound]

    def stems(self, words: Sequence[str]) -> list[str]:
        """See `Store.stems`."""
        with closing(sqlite3.connect(":memory:")) as memory:
            memory.execute(f"CREATE VIRTUAL TABLE words USING fts5 (word, tokenize = '{_TOKENIZER}')")
            memory.execute("CREATE VIRTUAL TABLE stems USING fts5vocab (words, instance)")
            memory.executemany("INSERT INTO words VALUES (?)", [(word,) for word in words])
            found = dict(memory.execute("SELECT doc, min(term) FROM stems GROUP BY doc HAVING count(*) = 1"))
        return [found.get(row, "") for row in range(1, len(words) + 1)]

    def chunk_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """See `Store.chunk_rows_with`."""
        return self._rows_with(word, "words", limit)

    def document_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """See `Store.document_rows_with`."""
        return self._rows_with(word, "title_words", limit)

    def _rows_with(self, word: str, table: str, limit: int) -> "NDArray[np.int64] | None":
        rows = self._rows(f"SELECT rowid FROM {table} WHERE {table} MATCH ? LIMIT ?", (f'"{word}"', limit + 1))
        return None if len(rows) > limit else rows

    def vectors(self, *, after: int = 0) -> "Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]":
        """See `Store.vectors`."""
        query = "SELECT id, vector FROM passages WHERE id > ? AND vector IS NOT NULL ORDER BY id LIMIT ?"
        while True:
            with self._told():
                batch = self._database.execute(query, (after, ROWS_AT_ONCE)).fetchall()
            if not batch:
                return
            rows, blobs = zip(*batch, strict=True)
            after = rows[-1]
            size = VECTOR_DTYPE.itemsize * self.manifest.embedder.dimension
            if wrong := next((row for row, blob in batch if not isinstance(blob, bytes) or len(blob) != size), None):
                raise self._damaged(f"the vector of passage {wrong} has another size")
            vectors = np.frombuffer(b"".join(blobs), dtype=VECTOR_DTYPE).reshape(len(rows), -1)
            yield np.asarray(rows, dtype=np.int64), vectors.astype(np.float32)

    def passage_vectors(self, doc_id: str) -> "dict[str, NDArray[np.float32]]":
        """See `Store.passage_vectors`."""
        query = """SELECT passages.id, passages.vector, chunks.text FROM documents
            JOIN passages ON passages.document = documents.key JOIN chunks ON chunks.passage = passages.id
            WHERE documents.id = ? AND passages.vector IS NOT NULL ORDER BY chunks.id"""
        vectors = {}
        for (_, blob), rows in groupby(self._database.execute(query, (doc_id,)), key=itemgetter(0, 1)):
            vectors["".join(text for _, _, text in rows)] = np.frombuffer(blob, dtype=VECTOR_DTYPE).astype(np.float32)
        return vectors

    @contextmanager
    def staging(self) -> "Iterator[SQLiteStaging]":
        """See `Store.staging`."""
        database = self._database
        with self._told():
            for statement in (*_UNSTAGE, *_STAGING):
                database.execute(statement)
            try:
                yield SQLiteStaging(self, database)
            finally:
                for statement in _UNSTAGE:
                    database.execute(statement)

    def nearest(self) -> "Vectors":
        """See `Store.nearest`."""
        from stripedrag.indexes.vectors import Vectors

        return Vectors(self)

    def vector_file(self) -> VectorFile | None:
        """The file of vectors that was derived from this index; None where there is none."""
        row = self.execute("SELECT name, bytes, sha256, newest_row, passages FROM vector_file").fetchone()
        return None if row is None else VectorFile(*row)

    def put_vector_file(self, file: VectorFile) -> None:
        """Names the file of vectors in place of the one before. Not a write: the index holds what it held."""
        with self._transaction("IMMEDIATE"):
            self._database.execute("DELETE FROM vector_file")
            self._database.execute("INSERT INTO vector_file VALUES (?, ?, ?, ?, ?)", astuple(file))

    def compact(self) -> None:
        """See `Store.compact`."""
        with self._told():
            for table in ("words", "title_words"):
                self._database.execute(f"INSERT INTO {table} ({table}) VALUES ('optimize')")
            self._database.execute("VACUUM")

    def size_bytes(self) -> int:
        """See `Store.size_bytes`."""
        sizes = 0
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a journal ends with its transaction
                sizes += file.stat().st_size
        return sizes

    def faults(self) -> Iterator[str]:
        """What is wrong with SQLite's file, the references and the file of vectors."""
        for (fault,) in self.execute("PRAGMA integrity_check(5)"):
            if fault != "ok":
                yield f"{FILE} is damaged: {fault}"
        for table, row, parent, _ in self.execute("PRAGMA foreign_key_check"):
            yield f"row {row} of {table} refers to a row of {parent} that is missing"
        file = self.vector_file()
        if file is not None and (self.folder / file.name).exists():  # a missing one is made anew by the next search
            with (self.folder / file.name).open("rb") as written:
                if hashlib.file_digest(written, "sha256").hexdigest() != file.sha256:
                    yield f"{file.name} is damaged; delete it, and the next search makes it anew"

    def text_faults(self) -> Iterator[str]:
        """See `Store.text_faults`. Raises `StoreError` where the index may only be read."""
        for table, content in (("words", "chunks"), ("title_words", "titles")):
            try:
                self._database.execute(f"INSERT INTO {table} ({table}, rank) VALUES ('integrity-check', 1)")
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY):
                    with self._told():
                        raise
                is_known = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CORRUPT
                yield f"the text index does not match the {content}" + ("" if is_known else f": {error}")

    @contextmanager
    def _write(self) -> Iterator[None]:
        self.execute(f"PRAGMA cache_size = -{MERGE_CACHE_KIB}")
        try:
            with self._transaction("IMMEDIATE"):
                yield
                self._database.execute(f"PRAGMA user_version = {self.generation() + 1}")
        finally:
            self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")

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
            if _is_full(error):
                waiting = tempfile.gettempdir()
                here, there = (shutil.disk_usage(folder).free / 1e6 for folder in (self.folder, waiting))
                mend = (
                    f"{self.folder} has {here:,.0f} MB free, and {waiting}, where documents wait until all are read, "
                    f"{there:,.0f} MB. Free some, or set SQLITE_TMPDIR to a folder that has more"
                )
            elif "locked" in what:
                mend = f"Another process has held it for {TIMEOUT_S:.0f} s. Wait for its end"
            elif "readonly" in what:
                mend = f"Mend the permissions of {self.folder}"
            raise StoreError(f"index {self.name!r} is as it was: {what}. {mend}.") from error


class SQLiteStaging:
    """See `Staging`."""

    def __init__(self, store: SQLiteStore, database: sqlite3.Connection) -> None:
        self._store = store
        self._database = database

    def put_document(self, document: Document, metadata: str, sha256: str) -> None:
        """See `Staging.put_document`."""
        self._database.execute(
            "INSERT INTO temp.staged_documents VALUES (?, ?, ?, ?)", (document.id, document.title, metadata, sha256)
        )

    def put_passage(self, chunks: Sequence[Chunk], vector: "NDArray[np.float32] | None") -> None:
        """See `Staging.put_passage`."""
        blob = None if vector is None else vector.astype(VECTOR_DTYPE).tobytes()
        staged = self._database.execute(
            "INSERT INTO temp.staged_passages (doc_id, vector) VALUES (?, ?)", (chunks[0].doc_id, blob)
        )
        rows = ((staged.lastrowid, chunk.start, chunk.text, chunk.text.isspace()) for chunk in chunks)
        self._database.executemany("INSERT INTO temp.staged_chunks VALUES (?, ?, ?, ?)", rows)

    def merge(self) -> None:
        """See `Staging.merge`."""
        with self._store._write():
            newest = self._database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'passages'").fetchone()
            above = {"newest": newest[0] if newest else 0}
            for statement in _MERGE:
                self._database.execute(statement, above if ":newest" in statement else {})


def _is_full(error: sqlite3.DatabaseError) -> bool:
    """Whether SQLite may mean a full disk, which it calls either."""
    code = getattr(error, "sqlite_errorcode", 0)  # the module's own errors have none
    return code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


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
        if "locked" in str(error):
            raise StoreError(
                f"{doing}: another process has held it for {TIMEOUT_S:.0f} s. Wait for its end."
            ) from error
        if _is_full(error):
            raise StoreError(f"{doing}: {error}. Free some space.") from error
        raise UsageError(
            f"{doing}: {path.name} is no index that can be read ({error}). Check the path and its permissions."
        ) from error
