"""Where evidence stands and what passages hold of it, in characters of documents."""

from collections.abc import Sequence
from typing import Protocol


class Located(Protocol):
    """Something that stands at characters [start, end) of a document: a passage, a retrieved span, evidence."""

    @property
    def doc_id(self) -> str:
        """The document."""

    @property
    def start(self) -> int:
        """The first character."""

    @property
    def end(self) -> int:
        """The character after the last."""


def holds(passages: Sequence[Located], evidence: Sequence[Located]) -> bool | None:
    """Whether every stretch of `evidence` lies in passages (joined ones count as one); None where there is none."""
    share = share_held(passages, evidence)
    return None if share is None else share == 1


def touches(passage: Located, evidence: Sequence[Located]) -> bool:
    """Whether a passage has a character of the evidence."""
    return any(s.doc_id == passage.doc_id and s.start < passage.end and passage.start < s.end for s in evidence)


def share_held(passages: Sequence[Located], evidence: Sequence[Located]) -> float | None:
    """How many of the characters of `evidence` lie in passages, from 0 to 1 (all of them); None where there is none."""
    if not evidence:
        return None
    held = sum(_held(stretch, [p for p in passages if p.doc_id == stretch.doc_id]) for stretch in evidence)
    return held / sum(stretch.end - stretch.start for stretch in evidence)


def _held(stretch: Located, passages: Sequence[Located]) -> int:
    """The characters of a stretch that lie in passages of its document, each once."""
    held, at = 0, stretch.start
    for passage in sorted(passages, key=lambda p: p.start):
        start, end = max(at, passage.start), min(stretch.end, passage.end)
        if start < end:
            held, at = held + end - start, end
    return held
