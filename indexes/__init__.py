"""Documents in, the chunks that answer a query out: readers, chunker, embedder, SQLite store and vector search.

Contract: chunks carry exact character offsets, one document's chunks tile its text without gap or overlap, an `add` or
a `delete` happens as a whole or not at all, and `search` returns chunks in rank order, the same order every time.
Limits: search by meaning is exact up to 65,536 passages and by 8-bit codes above (`vectors`); nothing here knows of
prompts, budgets or language models. Public names are loaded when they are first used, so that importing this room costs
milliseconds.
"""

from typing import TYPE_CHECKING

from stripedrag.exports import lazy

if TYPE_CHECKING:
    from stripedrag.indexes.chunking import TileChunker
    from stripedrag.indexes.documents import Chunk, Document, Scalar, Scored
    from stripedrag.indexes.embedding import Embedder, MiniLMEmbedder, OnnxEmbedder, SentenceTransformerEmbedder
    from stripedrag.indexes.index import AddReport, Index
    from stripedrag.indexes.manifest import Manifest
    from stripedrag.indexes.readers import Skipped, read_documents
    from stripedrag.indexes.verify import VerifyReport

_HOMES = {
    "AddReport": "stripedrag.indexes.index",
    "Chunk": "stripedrag.indexes.documents",
    "Document": "stripedrag.indexes.documents",
    "Embedder": "stripedrag.indexes.embedding",
    "Index": "stripedrag.indexes.index",
    "Manifest": "stripedrag.indexes.manifest",
    "MiniLMEmbedder": "stripedrag.indexes.embedding",
    "OnnxEmbedder": "stripedrag.indexes.embedding",
    "Scalar": "stripedrag.indexes.documents",
    "Scored": "stripedrag.indexes.documents",
    "SentenceTransformerEmbedder": "stripedrag.indexes.embedding",
    "Skipped": "stripedrag.indexes.readers",
    "TileChunker": "stripedrag.indexes.chunking",
    "VerifyReport": "stripedrag.indexes.verify",
    "read_documents": "stripedrag.indexes.readers",
}

__all__ = [
    "AddReport",
    "Chunk",
    "Document",
    "Embedder",
    "Index",
    "Manifest",
    "MiniLMEmbedder",
    "OnnxEmbedder",
    "Scalar",
    "Scored",
    "SentenceTransformerEmbedder",
    "Skipped",
    "TileChunker",
    "VerifyReport",
    "read_documents",
]

__getattr__ = lazy(__name__, _HOMES)
