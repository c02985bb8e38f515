"""The one truth of an index that several machines share: a schema of a Postgres database with pgvector 0.8 or later.

Readers go on during a write; writers take turns, each until its commit. No `StoreError` has a password.
Limits: the connection is kept, so a pooler that changes it between transactions breaks staging; NUL characters, which
Postgres cannot hold, and ids above 2000 bytes are refused; what Postgres takes for an English stop word finds nothing.
The room of a write that failed is free again after a vacuum or `compact`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from unicodedata import combining, normalize

import numpy as np

from stripedrag.errors import CorpusError, UsageError
from stripedrag.indexes import checks
from stripedrag.indexes.documents import Chunk, Document
from stripedrag.indexes.lexical import words
from stripedrag.indexes.manifest import Manifest, parse
from stripedrag.indexes.postgres_server import Address, connected, enter, told
from stripedrag.indexes.postgres_vectors import GRAPH_DIMENSIONS, INLINE, PostgresVectors, build_graph
from stripedrag.indexes.store import ROWS_AT_ONCE, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from psycopg import Connection, Cursor

_PASSAGES_AT_ONCE = 512
_MOST_ID_BYTES = 2000  # a B-tree's entry has 2704 at most

# Cf. the schema of `stripedrag.indexes.sqlite`. The one row of `state` is the lock of the writers, too: each begins by
# its generation. `words` are those that `_plain` leaves of a text, so that both stores find nearly the same: Postgres's
# parser takes "end.Next" for the name of a host and keeps accents. An index has the beginning of a text of metadata: an
# entry cannot be as long as a text.
_WORDS = "strip(to_tsvector('pg_catalog.english', plain))"
_SCHEMA = (
    "CREATE TABLE manifest (json text NOT NULL)",
    """CREATE TABLE state (generation bigint NOT NULL,
        newest_document bigint NOT NULL, newest_passage bigint NOT NULL, newest_chunk bigint NOT NULL)""",
    "INSERT INTO state VALUES (1, 0, 0, 0)",
    """CREATE TABLE documents (
        key bigint PRIMARY KEY, id text COLLATE "C" UNIQUE NOT NULL,
        title text NOT NULL, metadata text NOT NULL, sha256 text NOT NULL, words tsvector NOT NULL)""",
    """CREATE TABLE metadata (
        document bigint NOT NULL REFERENCES documents (key) ON DELETE CASCADE,
        name text COLLATE "C" NOT NULL, text text COLLATE "C", number numeric)""",
    """CREATE TABLE passages (
        id bigint PRIMARY KEY, document bigint NOT NULL REFERENCES documents (key) ON DELETE CASCADE,
        vector vector({dimension}))""",
    """CREATE TABLE chunks (
        id bigint PRIMARY KEY, passage bigint NOT NULL REFERENCES passages (id) ON DELETE CASCADE,
        start bigint NOT NULL, text text NOT NULL, blank boolean NOT NULL, words tsvector NOT NULL)""",
    "CREATE INDEX metadata_by_text ON metadata (name, left(text, 64), document)",
    "CREATE INDEX metadata_by_number ON metadata (name, number, document)",
    "CREATE INDEX metadata_by_document ON metadata (document)",
    "CREATE INDEX passages_by_document ON passages (document, id)",
    "CREATE INDEX chunks_by_passage ON chunks (passage, id)",
    "CREATE INDEX blank_chunks ON chunks (id) WHERE blank",
    "CREATE INDEX chunks_by_word ON chunks USING gin (words)",
    "CREATE INDEX documents_by_word ON documents USING gin (words)",
)
_IS_THERE = "SELECT FROM pg_tables WHERE schemaname = %s AND tablename = 'manifest'"
_HELD = "SELECT relname FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s) LIMIT 1"
_STAGING = (
    f"""CREATE TEMP TABLE staged_documents (key bigint, id text COLLATE "C", title text, metadata text, sha256 text,
        plain text, words tsvector GENERATED ALWAYS AS ({_WORDS}) STORED)""",
    "CREATE TEMP TABLE staged_metadata (document bigint, name text, text text, number numeric)",
    """CREATE TEMP TABLE staged_passages (id bigint, doc_id text COLLATE "C", vector vector)""",
    f"""CREATE TEMP TABLE staged_chunks (id bigint, passage bigint, start bigint, text text, blank boolean,
        plain text, words tsvector GENERATED ALWAYS AS ({_WORDS}) STORED)""",
)
_MERGE = (
    "DELETE FROM documents WHERE id IN (SELECT id FROM staged_documents)",
    """INSERT INTO documents (key, id, title, metadata, sha256, words)
        SELECT key + newest_document, id, title, metadata, sha256, words
        FROM staged_documents CROSS JOIN state ORDER BY key""",
    """INSERT INTO metadata (document, name, text, number)
        SELECT document + newest_document, name, text, number FROM staged_metadata CROSS JOIN state""",
    """INSERT INTO passages (id, document, vector)
        SELECT staged.id + newest_passage, new.key, staged.vector FROM staged_passages AS staged
        JOIN documents AS new ON new.id = staged.doc_id CROSS JOIN state ORDER BY staged.id""",
    """INSERT INTO chunks (id, passage, start, text, blank, words)
        SELECT id + newest_chunk, passage + newest_passage, start, text, blank, words
        FROM staged_chunks CROSS JOIN state ORDER BY id""",
    """UPDATE state SET newest_document = newest_document + (SELECT count(*) FROM staged_documents),
        newest_passage = newest_passage + (SELECT count(*) FROM staged_passages),
        newest_chunk = newest_chunk + (SELECT count(*) FROM staged_chunks)""",
)
_UNSTAGE = "DROP TABLE IF EXISTS staged_documents, staged_metadata, staged_passages, staged_chunks"
_COMPARED = {"$eq": "=", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}


class PostgresStore(Store):
    """An open index in a schema of a database. Made by `create` and `open`."""

    _AMONG = "= ANY(?)"

    def __init__(self, address: Address, database: "Connection", manifest: Manifest) -> None:
        super().__init__(address.shown, address.index, manifest, database)

    @classmethod
    def create(cls, uri: str, manifest: Manifest) -> "PostgresStore":
        """A new store without documents in the schema that `uri` names, which must be missing or empty.

        Makes the extension and the schema where they are missing; all of it is one transaction. Raises `UsageError`
        where something is there, `StoreError` where the server refuses.
        """
        address = Address.parse(uri)
        dimension = manifest.embedder.dimension
        with connected(address) as database, told(f"cannot create {address.shown}"):
            with database.transaction():
                database.execute("SELECT pg_advisory_xact_lock(hashtext('stripedrag: create'))")
                if database.execute(_IS_THERE, (address.index,)).fetchone() is not None:
                    raise UsageError(f"{address.shown} holds an index already. Open it with Index.open.")
                if strangers := database.execute(_HELD, (address.index,)).fetchall():
                    raise UsageError(
                        f"cannot create {address.shown}: the schema is not empty (it holds {strangers[0][0]!r}). "
                        f"Choose another name."
                    )
                if database.execute("SELECT FROM pg_namespace WHERE nspname = %s", (address.index,)).fetchone() is None:
                    database.execute(f"CREATE SCHEMA {address.schema}")
                enter(database, address, create=True)
                for statement in _SCHEMA:
                    database.execute(statement.format(dimension=dimension))
                if dimension <= GRAPH_DIMENSIONS:
                    database.execute(INLINE)
                database.execute("INSERT INTO manifest VALUES (%s)", (manifest.model_dump_json(),))
            return cls(address, database, manifest)

    @classmethod
    def open(cls, uri: str) -> "PostgresStore":
        """The store that `uri` names. Raises `UsageError` where there is none, `IndexMismatchError` for another schema.

        Raises `StoreError` where the server cannot be reached or refuses.
        """
        address = Address.parse(uri)
        with connected(address) as database, told(f"cannot open {address.shown}"):
            if database.execute(_IS_THERE, (address.index,)).fetchone() is None:
                raise UsageError(f"no index at {address.shown}. Create it with Index.create.")
            enter(database, address)
            (text,) = database.execute(f"SELECT json FROM {address.schema}.manifest").fetchone() or ("null",)
            return cls(address, database, parse(text, index=address.index))

    @staticmethod
    def is_at(uri: str) -> bool:
        """Whether the schema that `uri` names holds an index. Raises as `open` does where the server does not say."""
        address = Address.parse(uri)
        with ExitStack() as stack:
            database = stack.enter_context(connected(address))
            stack.callback(database.close)
            stack.enter_context(told(f"cannot open {address.shown}"))
            return database.execute(_IS_THERE, (address.index,)).fetchone() is not None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See `Store.snapshot`."""
        with self._transaction() as is_outermost:
            if is_outermost:
                self.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield

    def generation(self) -> int:
        """See `Store.generation`."""
        return self._number("SELECT generation FROM state")

    def execute(self, query: str, values: Sequence[Any] = ()) -> "Cursor":
        """See `Store.execute`; the schema is the index's. Raises `StoreError` for what the server refuses."""
        with told(f"index {self.name!r} is as it was"), checks.encodable():
            cursor: Cursor = self._database.execute(query.replace("?", "%s"), values or None, binary=True)
        return cursor

    @staticmethod
    def _listed(values: Collection[Any]) -> list[Any]:
        return list(values)

    @staticmethod
    def _compared(operator: str, value: Any) -> tuple[str, list[Any]]:
        # The table `metadata` has texts and numbers in columns of their own; None is neither.
        if operator == "$in":
            texts = [one for one in value if isinstance(one, str)]
            numbers = [_decimal(one) for one in value if not isinstance(one, str | None)]
            among = "left(text, 64) = ANY(?) AND text = ANY(?) OR number = ANY(?::numeric[])"
            among += " OR text IS NULL AND number IS NULL" if None in value else ""
            return among, [[text[:64] for text in texts], texts, numbers]
        if value is None:
            return ("text IS NULL AND number IS NULL" if operator == "$eq" else "FALSE"), []
        if not isinstance(value, str):
            return f"number {_COMPARED[operator]} ?", [_decimal(value)]
        if operator == "$eq":
            return "left(text, 64) = left(?, 64) AND text = ?", [value, value]
        return f"text {_COMPARED[operator]} ?", [value]

    def stems(self, words: Sequence[str]) -> list[str]:
        """See `Store.stems`."""
        query = """SELECT plainto_tsquery('pg_catalog.english', word)::text
            FROM unnest(%s::text[]) WITH ORDINALITY AS asked (word, place) ORDER BY place"""
        return [stem for (stem,) in self.execute(query, ([_plain(word) for word in words],))]

    def chunk_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """See `Store.chunk_rows_with`."""
        return self._rows_with(word, "SELECT id FROM chunks", limit)

    def document_rows_with(self, word: str, *, limit: int) -> "NDArray[np.int64] | None":
        """See `Store.document_rows_with`."""
        return self._rows_with(word, "SELECT key FROM documents", limit)

    def _rows_with(self, word: str, select: str, limit: int) -> "NDArray[np.int64] | None":
        query = f"{select} WHERE words @@ plainto_tsquery('pg_catalog.english', %s) LIMIT %s"
        rows = self._rows(query, (_plain(word), limit + 1))
        return None if len(rows) > limit else np.sort(rows)

    def vectors(self, *, after: int = 0) -> "Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]":
        """See `Store.vectors`."""
        query = """SELECT id, vector::real[] FROM passages
            WHERE id > %s AND vector IS NOT NULL ORDER BY id LIMIT %s"""
        while batch := self.execute(query, (after, ROWS_AT_ONCE)).fetchall():
            rows, vectors = zip(*batch, strict=True)
            after = rows[-1]
            yield np.array(rows, dtype=np.int64), np.array(vectors, dtype=np.float32)

    def passage_vectors(self, doc_id: str) -> "dict[str, NDArray[np.float32]]":
        """See `Store.passage_vectors`."""
        query = """SELECT string_agg(chunks.text, '' ORDER BY chunks.id), passages.vector::real[] FROM documents
            JOIN passages ON passages.document = documents.key JOIN chunks ON chunks.passage = passages.id
            WHERE documents.id = %s AND passages.vector IS NOT NULL GROUP BY passages.id"""
        return {text: np.array(vector, dtype=np.float32) for text, vector in self.execute(query, (doc_id,))}

    def nearest(self) -> "PostgresVectors":
        """See `Store.nearest`."""
        return PostgresVectors(self)

    @contextmanager
    def staging(self) -> "Iterator[PostgresStaging]":
        """See `Store.staging`."""
        for statement in (_UNSTAGE, *_STAGING):
            self.execute(statement)
        try:
            yield PostgresStaging(self)
        finally:
            if not self._database.closed:  # else they are gone with the connection
                self.execute(_UNSTAGE)

    def compact(self) -> None:
        """See `Store.compact`. Waits for the readers and locks them out meanwhile."""
        for how in ("", "(FULL, ANALYZE)"):  # the first gives back what a write left that failed
            self.execute(f"VACUUM {how} documents, metadata, passages, chunks")

    def size_bytes(self) -> int:
        """See `Store.size_bytes`."""
        tables = "pg_class WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
        return self._number(f"SELECT sum(pg_total_relation_size(oid)) FROM {tables}")

    def faults(self) -> Iterator[str]:
        """None: for the server's own files there is `pg_amcheck`."""
        return iter(())

    def text_faults(self) -> Iterator[str]:
        """See `Store.text_faults`."""
        for table, row, text, content in (("chunks", "id", "text", "chunks"), ("documents", "key", "title", "titles")):
            read = f"SELECT {row}, {text} FROM {table} WHERE {row} > %s ORDER BY {row} LIMIT %s"
            differing = f"""SELECT count(*) FROM {table}
                JOIN unnest(%s::bigint[], %s::text[]) AS given (row, plain) ON given.row = {table}.{row}
                WHERE words <> {_WORDS}"""
            after = wrong = 0
            while batch := self.execute(read, (after, ROWS_AT_ONCE)).fetchall():
                rows, texts = zip(*batch, strict=True)
                after = rows[-1]
                wrong += self._number(differing, (list(rows), [_plain(text) for text in texts]))
            if wrong:
                yield f"the text index does not match the {content}"

    def _copy(self, columns: str, types: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Puts rows of these types into `columns`, a table and its columns."""
        with ExitStack() as stack:
            stack.enter_context(told(f"index {self.name!r} is as it was"))
            cursor = stack.enter_context(self._database.cursor())
            copy = stack.enter_context(cursor.copy(f"COPY {columns} FROM STDIN (FORMAT BINARY)"))
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    @contextmanager
    def _write(self) -> Iterator[None]:
        with self._transaction():
            self.execute("UPDATE state SET generation = generation + 1")
            yield

    @contextmanager
    def _transaction(self) -> Iterator[bool]:
        """Gives True where it is one of its own, False where it is a part of the one around it."""
        database = self._database
        if database.info.transaction_status != database.info.transaction_status.IDLE:
            yield False
            return
        with told(f"index {self.name!r} is as it was"), database.transaction():
            yield True


class PostgresStaging:
    """See `Staging`."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store
        self._documents: list[tuple[Any, ...]] = []
        self._metadata: list[tuple[Any, ...]] = []
        self._passages: list[tuple[Any, ...]] = []
        self._chunks: list[tuple[Any, ...]] = []
        self._document = self._passage = self._chunk = 0  # the last numbers given

    def put_document(self, document: Document, metadata: str, sha256: str) -> None:
        """See `Staging.put_document`. Raises `CorpusError` for a NUL character and an id above 2000 bytes."""
        names = {f"metadata {name!r}": f"{name}{value}" for name, value in document.metadata.items()}
        for field, value in {"title": document.title, "text": document.text, **names}.items():
            if "\0" in value:
                raise CorpusError(f"document {document.id!r} has a NUL character in its {field}. Take it out.")
        if len(document.id.encode()) > _MOST_ID_BYTES:
            raise CorpusError(
                f"document {document.id[:40] + '…'!r} has an id of {len(document.id.encode())} bytes; over Postgres "
                f"it has at most {_MOST_ID_BYTES}. Shorten it."
            )
        self._document += 1
        row = (self._document, document.id, document.title, metadata, sha256, _plain(document.title))
        self._documents.append(row)
        for name, scalar in document.metadata.items():
            text, number = (scalar, None) if isinstance(scalar, str) else (None, _decimal(scalar))
            self._metadata.append((self._document, name, text, number))

    def put_passage(self, chunks: Sequence[Chunk], vector: "NDArray[np.float32] | None") -> None:
        """See `Staging.put_passage`."""
        self._passage += 1
        self._passages.append((self._passage, chunks[0].doc_id, vector))
        for chunk in chunks:
            self._chunk += 1
            self._chunks.append(
                (self._chunk, self._passage, chunk.start, chunk.text, chunk.text.isspace(), _plain(chunk.text))
            )
        if len(self._passages) >= _PASSAGES_AT_ONCE:
            self._flush()

    def merge(self) -> None:
        """See `Staging.merge`. Builds the graph when the index has become large enough for one."""
        self._flush()
        store = self._store
        with store._write():
            for statement in _MERGE:
                store.execute(statement)
            build_graph(store)

    def _flush(self) -> None:
        for columns, types, rows in (
            ("documents (key, id, title, metadata, sha256, plain)", "int8 text text text text text", self._documents),
            ("metadata (document, name, text, number)", "int8 text text numeric", self._metadata),
            ("passages (id, doc_id, vector)", "int8 text vector", self._passages),
            ("chunks (id, passage, start, text, blank, plain)", "int8 int8 int8 text bool text", self._chunks),
        ):
            self._store._copy(f"staged_{columns}", types.split(), rows)
            rows.clear()


def _decimal(value: float | bool | None) -> Decimal | None:
    """The number exactly as JSON writes it, so that 0.1 is 0.1 and True is 1."""
    return None if value is None else Decimal(repr(value + 0))


def _plain(text: str) -> str:
    """The words of a text in lower case, each once and without its accents."""
    if not text.isascii():
        text = "".join(character for character in normalize("NFD", text) if not combining(character))
    return " ".join(words(text)).lower()
