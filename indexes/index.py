"""The index: documents in, scored chunks out. The one class of this room that others need to know.

A document is cut into *passages*, as long as the embedder reads, which are embedded under the document's title; a
passage into *chunks* of some 64 wordpieces, which are found by their words and are what a search returns: a budget is
filled more closely with them.

Contract: `add` and `delete` happen as a whole or not at all, whatever ends the process; `search` sees every committed
change, this process's and others'. Holds no SQL and no model of its own.
Limits: one process writes at a time. Threads may share an `Index`; their calls take turns.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, get_args

from stripedrag import __version__
from stripedrag.errors import CorpusError, StoreError, UsageError
from stripedrag.indexes import checks
from stripedrag.indexes.chunking import TileChunker
from stripedrag.indexes.documents import Chunk, Document, Scored
from stripedrag.indexes.embedding import Embedder, MiniLMEmbedder, embedder_named
from stripedrag.indexes.filters import Where
from stripedrag.indexes.manifest import SCHEMA_VERSION, EmbedderRecord, Manifest, refuse_mismatch
from stripedrag.indexes.postgres import PostgresStore
from stripedrag.indexes.postgres_server import is_postgres
from stripedrag.indexes.preparing import Changed, Cutter, Prepare, Progress, prepare
from stripedrag.indexes.search import Method, Searcher, Unit
from stripedrag.indexes.sqlite import SQLiteStore
from stripedrag.indexes.store import Store
from stripedrag.indexes.verify import VerifyReport, verify

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

CHUNK_TOKENS = 64


def planned(embedder: Embedder, *, passage_tokens: int | None = None, chunk_tokens: int | None = None) -> Manifest:
    """The manifest that `Index.create` would give an index; raises what it raises of these."""
    passage_tokens = embedder.max_tokens if passage_tokens is None else passage_tokens
    if passage_tokens > embedder.max_tokens:
        raise UsageError(
            f"passage_tokens is {passage_tokens}; {embedder.name} reads {embedder.max_tokens} wordpieces. Lower it."
        )
    chunk_tokens = min(CHUNK_TOKENS, passage_tokens) if chunk_tokens is None else chunk_tokens
    if chunk_tokens > passage_tokens:
        raise UsageError(f"chunk_tokens is {chunk_tokens}; a passage has {passage_tokens} wordpieces. Lower it.")
    TileChunker(embedder.tokenizer, chunk_tokens)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        embedder=EmbedderRecord(name=embedder.name, sha256=embedder.sha256, dimension=embedder.dimension),
        chunker=TileChunker.name,
        passage_tokens=passage_tokens,
        chunk_tokens=chunk_tokens,
        created_by=f"stripedrag {__version__}",
    )


@dataclass(frozen=True, slots=True)
class AddReport:
    """What an `add` did: documents that were new, replaced or already there as they are; passages it embedded."""

    added: int
    updated: int
    unchanged: int
    passages: int


class Index:
    """Searchable documents in a folder or over Postgres. Made by `create` and `open`; close it, or use it in a `with`.

    `place` is its folder, or its URI without a password; `embedder` the embedder in use, `manifest` what it was made
    with. `len(index)` counts chunks.
    """

    def __init__(self, store: Store, embedder: Embedder) -> None:
        self.place: Path | str = store.place
        self.embedder = embedder
        self.manifest = store.manifest
        self._store = store
        self._cutter = Cutter(embedder.tokenizer, store.manifest.passage_tokens, store.manifest.chunk_tokens)
        self._searcher = Searcher(store)
        self._lock = threading.RLock()
        self._is_adding = False

    @classmethod
    def create(
        cls,
        place: str | Path,
        *,
        embedder: Embedder | None = None,
        passage_tokens: int | None = None,
        chunk_tokens: int | None = None,
    ) -> "Index":
        """A new index without documents at `place`, a folder or a schema, which must be missing or empty.

        `place` is a path, or for Postgres a string `postgresql://user:password@host:port/database?index=NAME`.
        `embedder` None is MiniLM; `passage_tokens` None is all that the embedder reads at once, `chunk_tokens` None is
        `CHUNK_TOKENS`, or a passage where that is less. Raises `UsageError` where `place` holds something, a passage
        does not fit the embedder or a chunk a passage, `SetupError` where the weights are missing or, for Postgres, the
        extra `stripedrag[postgres]`, and `StoreError` where the server refuses.
        """
        embedder = MiniLMEmbedder() if embedder is None else embedder
        manifest = planned(embedder, passage_tokens=passage_tokens, chunk_tokens=chunk_tokens)
        if is_postgres(place):
            return cls(PostgresStore.create(place, manifest), embedder)
        return cls(SQLiteStore.create(_folder(place), manifest), embedder)

    @classmethod
    def open(cls, place: str | Path, *, embedder: Embedder | None = None) -> "Index":
        """The index at `place`, as `create` takes it; loads no model yet.

        `embedder` None is the one that made it, by its name; one that does not know its dimension loads its model.
        Raises `UsageError` where there is no index, `IndexMismatchError` where it was made by another embedder, other
        weights, another chunker or another schema, and `StoreError` where a server refuses.
        """
        with ExitStack() as unless_well:
            store: Store = PostgresStore.open(place) if is_postgres(place) else SQLiteStore.open(_folder(place))
            unless_well.callback(store.close)
            if embedder is None:
                record = store.manifest.embedder
                embedder = embedder_named(record.name, dimension=record.dimension)
            refuse_mismatch(store.manifest, embedder, TileChunker.name, index=store.name)
            index = cls(store, embedder)
            unless_well.pop_all()
        return index

    @staticmethod
    def is_at(place: str | Path) -> bool:
        """Whether there is an index at `place`, as `create` takes it.

        Raises `StoreError` where a server refuses, `UsageError` for a folder that cannot be looked into.
        """
        return PostgresStore.is_at(place) if is_postgres(place) else SQLiteStore.is_at(_folder(place))

    @property
    def path(self) -> Path:
        """Its folder. Raises `UsageError` for an index over Postgres, which has none."""
        if isinstance(self.place, str):
            raise UsageError(f"index {self._store.name!r} is over Postgres and has no folder. Use its place.")
        return self.place

    def close(self) -> None:
        """Closes the file and frees the vectors; harmless the second time."""
        with self._lock:
            self._store.close()
            self._searcher = Searcher(self._store)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        with self._reading():
            return self._store.chunk_count()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, self._store.snapshot():
            yield

    def __bool__(self) -> bool:
        # Without it an index that is still empty would be false, and `index or …` would take something else.
        return True

    @property
    def tokenizer(self) -> "Tokenizer":
        """The embedder's."""
        return self.embedder.tokenizer

    @property
    def chunk_tokens(self) -> int:
        """The most wordpieces that a chunk has."""
        return self.manifest.chunk_tokens

    @property
    def document_count(self) -> int:
        """How many documents it holds."""
        with self._reading():
            return self._store.document_count()

    @property
    def size_bytes(self) -> int:
        """What it takes of the disk."""
        with self._lock:
            return self._store.size_bytes()

    def document_ids(self, where: Where | None = None) -> list[str]:
        """The ids of all documents, or of those that a filter admits (as in `search`), sorted."""
        with self._reading():
            return self._store.document_ids(where)

    def document(self, doc_id: str) -> Document:
        """The document as it was added. Raises `UsageError` where there is none of that id."""
        with self._reading():
            return self._store.document(doc_id)

    def chunks(self, doc_id: str) -> list[Chunk]:
        """The document's chunks in order: they tile its text. Raises `UsageError` where there is none of that id."""
        with self._reading():
            found = self._store.chunks(doc_id)
        if not found:
            raise UsageError(f"index {self._store.name!r} has no document {doc_id!r}. Add it first.")
        return found

    def titles(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """The titles of those of these documents that it holds."""
        with self._reading():
            return self._store.titles(list(doc_ids))

    def add(
        self, documents: Iterable[Document], *, progress: Progress | None = None, prepare: Prepare = prepare
    ) -> AddReport:
        """Adds documents, or replaces those with the same ids; one that is there as it is costs no embedding.

        All of them come in at once when the last is embedded; an error, Ctrl-C or a kill before that leaves the index
        as it was. Of a document that changed only the passages that are new are embedded. `progress` is called with the
        number of passages embedded since its last call; `prepare` embeds them elsewhere (see
        `stripedrag.indexes.ray_workers`). Of two adds of one document at once the later merge holds; what is there as
        it is when it is read is not written. Raises `CorpusError` for no document at all, an id that comes twice, and a
        document without id, with white space only, with lone surrogates or with metadata that are not finite
        scalars; `StoreError` where the disk is full.
        """
        seen: set[str] = set()
        added = updated = passages = 0
        with self._lock, self._alone(), self._store.staging() as staging:

            def changed() -> Iterator[Changed]:
                nonlocal added, updated
                for document in documents:
                    metadata = checks.metadata_json(document)
                    if document.id in seen:
                        raise CorpusError(f"document {document.id!r} comes twice in one add. Make the ids unique.")
                    seen.add(document.id)
                    sha256 = checks.content_sha256(document)
                    stored = self._store.document_sha256(document.id)
                    if stored == sha256:
                        continue
                    added, updated = (added + 1, updated) if stored is None else (added, updated + 1)
                    staging.put_document(document, metadata, sha256)
                    yield Changed(document, {} if stored is None else self._known(document))

            for chunks, vector, is_new in prepare(changed(), self._cutter, self.embedder, progress):
                staging.put_passage(chunks, vector)
                passages += is_new
            if not seen:
                raise CorpusError("the corpus is empty: there is no document to add. Give at least one.")
            if added or updated:
                staging.merge()
                with suppress(StoreError):  # the documents are in; the next search does what this could not
                    self._searcher.refresh()
        return AddReport(added=added, updated=updated, unchanged=len(seen) - added - updated, passages=passages)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._is_adding:
            raise UsageError("the documents of an add come from another add to the same Index. Open it a second time.")
        self._is_adding = True
        try:
            yield
        finally:
            self._is_adding = False

    def _known(self, document: Document) -> "dict[str, NDArray[np.float32]]":
        """The vectors of the stored document's passages, where they were embedded under the heading of this one."""
        with self._store.snapshot():
            title = self._store.titles([document.id]).get(document.id)  # None: deleted since it was asked for
            if title is None or self._cutter.heading(title) != self._cutter.heading(document.title):
                return {}
            return self._store.passage_vectors(document.id)

    def delete(self, doc_ids: Iterable[str]) -> int:
        """Deletes documents and returns how many. Raises `UsageError`, and deletes none, where one is not there."""
        unique = set(_listed(doc_ids))
        with self._lock:
            self._store.delete(sorted(unique))
        return len(unique)

    def compact(self) -> None:
        """Gives the space of deleted and replaced documents back to the disk.

        It may need twice as much free as the index has. Raises `StoreError` where there is less; nothing is lost then.
        """
        with self._lock:
            self._store.compact()

    def verify(self, *, progress: Progress | None = None) -> VerifyReport:
        """Reads all of the index and tells what is not as it was written; changes nothing.

        `progress` is called with the number of documents read since its last call.
        """
        with self._lock:
            return verify(self._store, progress)

    def search(
        self,
        query: str,
        *,
        k: int,
        where: Where | None = None,
        doc_ids: Iterable[str] | None = None,
        unit: Unit = "chunk",
        method: Method = "hybrid",
    ) -> list[Scored]:
        """The `k` best chunks for a query, best first, ties by (doc_id, start); all there are where `k` is larger.

        "hybrid" combines the scores by words and by meaning, 1 for what is best by both (`stripedrag.indexes.fusion`);
        "dense" scores by the cosine of the passage, "lexical" by positional BM25 and finds only what has a word of the
        query. `where` narrows the search to documents by their metadata (see `stripedrag.indexes.filters`), `doc_ids`
        to these documents. `unit` "passage" returns whole passages, each ranked by its best chunk. White space is never
        found. Raises `UsageError` for `k` below 1, a query that is blank or (not by words alone) longer than the
        embedder reads, a filter that is none and a document that is not there; `CorpusError` where the index holds no
        document.
        """
        if k < 1:
            raise UsageError(f"k is {k}; a search returns at least 1 chunk. Raise it.")
        for name, value, choices in (("method", method, get_args(Method)), ("unit", unit, get_args(Unit))):
            if value not in choices:
                raise UsageError(f"no {name} {value!r}; choose one of {', '.join(choices)}")
        if not query.strip():
            raise UsageError(f"the query {query!r} is blank. Ask something.")
        if surrogate := checks.lone_surrogate(query):
            raise UsageError(f"the query has {surrogate}, which is no character. Decode it as UTF-8 first.")
        with self._lock:
            if self._store.is_empty():
                raise CorpusError(f"index {self._store.name!r} holds no document to search. Add some first.")
            vector = None
            if method != "lexical":
                (vector,) = checks.unit_vectors(self.embedder, self.embedder.embed_query(query)[None], 1)
            return self._searcher.search(
                None if method == "dense" else query,
                vector,
                k=k,
                unit=unit,
                where=where,
                doc_ids=None if doc_ids is None else _listed(doc_ids),
            )


def _listed(doc_ids: Iterable[str]) -> Sequence[str]:
    if isinstance(doc_ids, str):
        raise UsageError(f"doc_ids is the string {doc_ids!r}; it must be a list of ids. Write [{doc_ids!r}].")
    return list(doc_ids)


def _folder(place: str | Path) -> Path:
    try:
        if str(place):
            return Path(place).resolve()
        reason = "it is empty"
    except (OSError, ValueError, RuntimeError) as error:  # a NUL character, links that go round
        reason = str(error)
    raise UsageError(f"{str(place)!r} is no place for an index: {reason}. Give the path of a folder.")
