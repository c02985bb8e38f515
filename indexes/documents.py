"""What goes into an index and what comes out of it: plain values that validate nothing.

Offsets count characters (Unicode code points, as Python does) of `Document.text`, from 0, the end exclusive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Document:
    """A text under a name. `id` is unique in an index; adding another text under the same id replaces the first."""

    id: str
    title: str
    text: str
    metadata: Mapping[str, Scalar] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one document: `text == document.text[start:end]`, always."""

    id: str
    doc_id: str
    start: int
    end: int
    text: str

    @classmethod
    def at(cls, doc_id: str, start: int, text: str) -> "Chunk":
        """The chunk of `doc_id` that begins at character `start` and reads `text`. Its id is `doc_id#start-end`."""
        end = start + len(text)
        return cls(id=f"{doc_id}#{start}-{end}", doc_id=doc_id, start=start, end=end, text=text)


@dataclass(frozen=True, slots=True)
class Scored:
    """A chunk that a search found: `score` is what the search's method gives, `rank` counts from 1."""

    chunk: Chunk
    score: float
    rank: int
