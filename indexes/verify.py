"""Reads an index whole and tells what is not as it was written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from stripedrag.errors import StoreError
from stripedrag.indexes.checks import content_sha256

if TYPE_CHECKING:
    from stripedrag.indexes.store import Store

MOST_FAULTS = 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a `verify` read, the first `MOST_FAULTS` faults in words, and what could not be read, with the reason."""

    documents: int
    passages: int
    chunks: int
    faults: tuple[str, ...]
    unread: tuple[str, ...] = ()


def verify(store: "Store", progress: Callable[[int], None] | None = None) -> VerifyReport:
    """Checks the store's own structure, every document against its hash, every vector, and the text index."""
    counts, faults, unread = (0, 0, 0), list[str](), list[str]()
    try:
        with store.snapshot():
            for fault in islice(_faults(store, progress), MOST_FAULTS):
                faults.append(fault)
            counts = store.document_count(), store.passage_count(), store.chunk_count()
    except StoreError as error:
        faults.append(f"it cannot be read further: {_told(error)}")
    try:
        faults += islice(store.text_faults(), MOST_FAULTS - len(faults))
    except StoreError as error:
        unread.append(f"the text index: {error}")
    return VerifyReport(*counts, tuple(faults), tuple(unread))


def _faults(store: "Store", progress: Callable[[int], None] | None) -> Iterator[str]:
    yield from store.faults()
    for doc_id in store.document_ids():
        try:
            chunks = store.chunks(doc_id)
            starts, ends = [chunk.start for chunk in chunks], [chunk.end for chunk in chunks]
            if not chunks or starts != [0, *ends[:-1]]:
                yield f"the chunks of document {doc_id!r} leave a gap or overlap"
            elif content_sha256(store.document(doc_id)) != store.document_sha256(doc_id):
                yield f"document {doc_id!r} is not what was added: its hash differs"
        except StoreError as error:
            yield f"document {doc_id!r} cannot be read: {_told(error)}"
        if progress is not None:
            progress(1)
    for rows, vectors in store.vectors():
        wrong = ~np.isclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
        yield from (f"the vector of passage {row} is no unit vector" for row in rows[wrong])


def _told(error: StoreError) -> str:
    """What is wrong, without the advice to run `verify`."""
    return str(error.__cause__ or error).removesuffix(" Run `stripedrag verify` on it.")
