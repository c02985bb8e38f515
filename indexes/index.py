"""The index: documents in, scored chunks out. The one class of this room that others need to know.

Contract: `add` and `delete` happen as a whole or not at all, whatever ends the process; `search` sees every committed
change, this process's and others'. Holds no SQL and no model of its own.
Limits: one process writes at a time. Threads may share an `Index`; their calls take turns.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from stripedrag import __version__
from stripedrag.errors import CorpusError, UsageError
from stripedrag.indexes.chunking import TileChunker
from stripedrag.indexes.documents import Chunk, Document, Scored
from stripedrag.indexes.embedding import Embedder, MiniLMEmbedder
from stripedrag.indexes.manifest import SCHEMA_VERSION, EmbedderRecord, Manifest, refuse_mismatch
from stripedrag.indexes.store import Staging, Store
from stripedrag.indexes.vectors import Vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Chunks embedded and staged together: enough to sort by length, few enough (under 2 MB of text and vectors) to hold.
CHUNKS_AT_ONCE = 512

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class AddReport:
    """What an `add` did: documents that were new, replaced or already there as they are; chunks it embedded."""

    added: int
    updated: int
    unchanged: int
    chunks: int


class Index:
    """A searchable folder of documents. Made by `create` and `open`; close it, or use it in a `with` statement.

    `path` is its folder, `embedder` the embedder in use, `manifest` what it was made with. `len(index)` counts chunks.
    """

    def __init__(self, path: Path, store: Store, embedder: Embedder) -> None:
        self.path = path
        self.embedder = embedder
        self.manifest = store.manifest
        self._store = store
        self._chunker = TileChunker(embedder.tokenizer, store.manifest.chunk_tokens)
        self._vectors: Vectors | None = None
        self._lock = threading.RLock()

    @classmethod
    def create(cls, path: str | Path, *, embedder: Embedder | None = None, chunk_tokens: int | None = None) -> "Index":
        """A new index without documents in the folder `path`, which must be missing or empty.

        `embedder` None is MiniLM; `chunk_tokens` None is all that the embedder reads at once. Raises `UsageError` where
        the folder holds something or the chunks do not fit the embedder, `SetupError` where its weights are missing.
        """
        embedder = MiniLMEmbedder() if embedder is None else embedder
        chunk_tokens = embedder.max_tokens if chunk_tokens is None else chunk_tokens
        if chunk_tokens > embedder.max_tokens:
            raise UsageError(
                f"chunk_tokens is {chunk_tokens}; {embedder.name} reads {embedder.max_tokens} wordpieces. Lower it."
            )
        chunker = TileChunker(embedder.tokenizer, chunk_tokens)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            embedder=EmbedderRecord(name=embedder.name, sha256=embedder.sha256, dimension=embedder.dimension),
            chunker=chunker.name,
            chunk_tokens=chunk_tokens,
            created_by=f"stripedrag {__version__}",
        )
        folder = Path(path).resolve()
        return cls(folder, Store.create(folder, manifest), embedder)

    @classmethod
    def open(cls, path: str | Path, *, embedder: Embedder | None = None) -> "Index":
        """The index in the folder `path`; `embedder` None is MiniLM. Loads no model yet.

        Raises `UsageError` where there is no index, `IndexMismatchError` where it was made by another embedder, other
        weights, another chunker or another schema.
        """
        folder = Path(path).resolve()
        with ExitStack() as unless_well:
            store = Store.open(folder)
            unless_well.callback(store.close)
            embedder = MiniLMEmbedder() if embedder is None else embedder
            refuse_mismatch(store.manifest, embedder, TileChunker.name, index=folder.name)
            index = cls(folder, store, embedder)
            unless_well.pop_all()
        return index

    def close(self) -> None:
        """Closes the file and frees the vectors; harmless the second time."""
        with self._lock:
            self._store.close()
            self._vectors = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        with self._lock:
            return self._store.chunk_count()

    def __bool__(self) -> bool:
        # Without it an index that is still empty would be false, and `index or …` would take something else.
        return True

    @property
    def document_count(self) -> int:
        """How many documents it holds."""
        with self._lock:
            return self._store.document_count()

    def document_ids(self) -> list[str]:
        """The ids of all documents, sorted."""
        with self._lock:
            return self._store.document_ids()

    def document(self, doc_id: str) -> Document:
        """The document as it was added. Raises `UsageError` where there is none of that id."""
        with self._lock:
            return self._store.document(doc_id)

    def chunks(self, doc_id: str) -> list[Chunk]:
        """The document's chunks in order: they tile its text. Raises `UsageError` where there is none of that id."""
        with self._lock:
            found = self._store.chunks(doc_id)
        if not found:
            raise UsageError(f"index {self._store.name!r} has no document {doc_id!r}. Add it first.")
        return found

    def add(self, documents: Iterable[Document], *, progress: Progress | None = None) -> AddReport:
        """Adds documents, or replaces those with the same ids; one that is there as it is costs no embedding.

        All of them come in at once when the last is embedded; an error, Ctrl-C or a kill before that leaves the index
        as it was. `progress` is called with the number of chunks embedded since its last call. Raises `CorpusError` for
        no document at all, an id that comes twice, and a document without id, with white space only, with lone
        surrogates or with metadata that are not scalars.
        """
        seen: set[str] = set()
        added = updated = chunks = 0
        with self._lock, self._store.staging() as staging:
            pending: list[Chunk] = []
            for document in documents:
                metadata = _checked_metadata(document)
                if document.id in seen:
                    raise CorpusError(f"document {document.id!r} comes twice in one add. Make the ids unique.")
                seen.add(document.id)
                sha256 = _content_sha256(document)
                stored = self._store.document_sha256(document.id)
                if stored == sha256:
                    continue
                added, updated = (added + 1, updated) if stored is None else (added, updated + 1)
                staging.put_document(document, metadata, sha256)
                for chunk in self._chunker.cut(document):
                    pending.append(chunk)
                    if len(pending) == CHUNKS_AT_ONCE:
                        chunks += self._stage(staging, pending, progress)
                        pending = []
            if not seen:
                raise CorpusError("the corpus is empty: there is no document to add. Give at least one.")
            chunks += self._stage(staging, pending, progress)
            if added or updated:
                staging.merge()
        return AddReport(added=added, updated=updated, unchanged=len(seen) - added - updated, chunks=chunks)

    def delete(self, doc_ids: Iterable[str]) -> int:
        """Deletes documents and returns how many. Raises `UsageError`, and deletes none, where one is not there."""
        if isinstance(doc_ids, str):
            raise UsageError(f"doc_ids is the string {doc_ids!r}; it must be a list of ids. Write [{doc_ids!r}].")
        unique = set(doc_ids)
        with self._lock:
            self._store.delete(sorted(unique))
        return len(unique)

    def search(self, query: str, *, k: int) -> list[Scored]:
        """The `k` chunks with the highest cosine, best first, ties by (doc_id, start); all chunks where `k` is larger.

        Chunks of nothing but white space are never among them. Raises `UsageError` for `k` below 1 and for a query that
        is blank or longer than the embedder reads, `CorpusError` where the index holds no document.
        """
        if k < 1:
            raise UsageError(f"k is {k}; a search returns at least 1 chunk. Raise it.")
        if not query.strip():
            raise UsageError(f"the query {query!r} is blank. Ask something.")
        if surrogate := _lone_surrogate(query):
            raise UsageError(f"the query has {surrogate}, which is no character. Decode it as UTF-8 first.")
        with self._lock:
            if not self._store.document_count():
                raise CorpusError(f"index {self._store.name!r} holds no document to search. Add some first.")
            (vector,) = _checked_vectors(self.embedder, self.embedder.embed_query(query)[None], 1)
            with self._store.snapshot():
                if self._vectors is None:
                    self._vectors = Vectors(self.embedder.dimension)
                self._vectors.sync(self._store)
                hits = self._vectors.search(vector, k)
                chunks = self._store.chunks_at(row for row, _ in hits)
        ordered = sorted(hits, key=lambda hit: (-hit[1], chunks[hit[0]].doc_id, chunks[hit[0]].start))
        return [Scored(chunks[row], score, rank) for rank, (row, score) in enumerate(ordered[:k], start=1)]

    def _stage(self, staging: Staging, chunks: list[Chunk], progress: Progress | None) -> int:
        """Embeds and stages chunks; returns how many were embedded. White space has no meaning and gets no vector."""
        texts = [chunk.text for chunk in chunks if not chunk.text.isspace()]
        if texts:
            vectors = iter(_checked_vectors(self.embedder, self.embedder.embed(texts, progress=progress), len(texts)))
            staging.put_chunks(chunks, (None if chunk.text.isspace() else next(vectors) for chunk in chunks))
        else:
            staging.put_chunks(chunks, [None] * len(chunks))
        return len(texts)


def _checked_metadata(document: Document) -> str:
    """The document's metadata as JSON; raises `CorpusError` where the document cannot be stored and found again."""
    if not document.id:
        raise CorpusError(f"a document has an empty id (its title is {document.title!r}). Give it one.")
    if not document.text.strip():
        raise CorpusError(f"document {document.id!r} holds only white space. Leave it out.")
    for field, value in (("id", document.id), ("title", document.title), ("text", document.text)):
        if surrogate := _lone_surrogate(value):
            raise CorpusError(
                f"document {document.id!r} has {surrogate} in its {field}, which is no character. "
                f"Decode it as UTF-8 first."
            )
    for key, scalar in document.metadata.items():
        if not isinstance(scalar, str | int | float | bool | None):
            raise CorpusError(
                f"document {document.id!r} has metadata {key!r} of type {type(scalar).__name__}; "
                f"values are str, int, float, bool or None. Convert it or leave it out."
            )
    return json.dumps(dict(document.metadata))


def _content_sha256(document: Document) -> str:
    content = json.dumps([document.title, document.text, dict(document.metadata)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _lone_surrogate(text: str) -> str:
    r"""The first lone surrogate in words, or "". JSON's "\ud800" makes one; neither SQLite nor a tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X} at character {error.start}"
    return ""


def _checked_vectors(embedder: Embedder, vectors: "NDArray[np.float32]", count: int) -> "NDArray[np.float32]":
    """`vectors` as they are; raises `UsageError` where they are not unit vectors of the stated shape (NaN is not)."""
    expected = (count, embedder.dimension)
    if vectors.shape != expected:
        raise UsageError(
            f"embedder {embedder.name!r} gave vectors of shape {vectors.shape}; an index needs {expected}. "
            f"Mend its embed method."
        )
    norms = np.linalg.norm(vectors, axis=1)
    if not np.allclose(norms, 1.0, atol=1e-3):
        worst = norms[np.argmax(np.abs(norms - 1.0))]
        raise UsageError(
            f"embedder {embedder.name!r} gave a vector of norm {worst:.4g}; an index needs unit vectors. "
            f"Normalise them in its embed method."
        )
    return vectors
