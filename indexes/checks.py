"""What may go into an index: documents that can be stored and found again, vectors that can be compared."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from stripedrag.errors import CorpusError, UsageError
from stripedrag.indexes.documents import Document

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stripedrag.indexes.embedding import Embedder


def metadata_json(document: Document) -> str:
    """The document's metadata as JSON; raises `CorpusError` where the document cannot be stored and found again."""
    if not document.id:
        raise CorpusError(f"a document has an empty id (its title is {document.title!r}). Give it one.")
    if not document.text.strip():
        raise CorpusError(f"document {document.id!r} holds only white space. Leave it out.")
    if "\0" in document.id:
        raise CorpusError(f"document {document.id!r} has a NUL character in its id. Leave it out of the id.")
    for field, value in (("id", document.id), ("title", document.title), ("text", document.text)):
        if surrogate := lone_surrogate(value):
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
        if isinstance(scalar, float) and not math.isfinite(scalar):
            raise CorpusError(
                f"document {document.id!r} has metadata {key!r} of {scalar}, which is no number that can be compared. "
                f"Leave it out."
            )
    return json.dumps(dict(document.metadata))


def content_sha256(document: Document) -> str:
    """Hexadecimal sha256 of a document's title, text and metadata."""
    content = json.dumps([document.title, document.text, dict(document.metadata)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def lone_surrogate(text: str) -> str:
    r"""The first lone surrogate in words, or "". JSON's "\ud800" makes one; neither SQLite nor a tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X} at character {error.start}"
    return ""


@contextmanager
def encodable() -> Iterator[None]:
    """Raises `UsageError` where a text that a database is given has a lone surrogate."""
    try:
        yield
    except UnicodeEncodeError as error:
        text = error.object
        raise UsageError(
            f"{text!r} has {lone_surrogate(text)}, which is no character. Decode it as UTF-8 first."
        ) from error


def unit_vectors(embedder: "Embedder", vectors: "NDArray[np.float32]", count: int) -> "NDArray[np.float32]":
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
