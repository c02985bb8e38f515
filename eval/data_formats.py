"""The formats of evaluation data, and how such files are read: JSON lines, plain or compressed by gzip or xz.

Keys that a format does not name are ignored, so that a file may carry its sources and licences.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stripedrag.errors import CorpusError
from stripedrag.weights import sha256

DATA = Path(__file__).parent / "data"


Words = Annotated[str, Field(pattern=r"\S")]  # not blank


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Place(_Line):
    """Characters [start, end) of a document of the corpus; without `doc_id`, of the document at hand."""

    doc_id: str = ""
    start: int = Field(ge=0)
    end: int

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"end is {self.end} and start {self.start}; a place has at least one character")
        return self


class CorpusDocument(_Line):
    """A document of a corpus."""

    id: str
    title: str = ""
    text: str


class CorpusQuestion(_Line):
    """A question about a corpus: `gold_spans` are the answer's own characters, `gold_passages` what an answer needs."""

    id: str
    question: Words
    answers: tuple[Words, ...] = Field(min_length=1)
    gold_spans: tuple[Place, ...] = Field(min_length=1)
    gold_passages: tuple[Place, ...] = ()
    split: str = ""


class LongTask(_Line):
    """A question or a wish for a summary over one long document."""

    id: str
    query: Words
    references: tuple[Words, ...] = Field(min_length=1)
    evidence: tuple[Place, ...] = ()


class LongDocument(_Line):
    """A long document with its tasks."""

    id: str
    title: str = ""
    document: str
    source: str = ""
    tasks: tuple[LongTask, ...]


class Chapter(_Line):
    """A chapter of a book, in the book's order."""

    id: str
    book: str
    text: str


class Claim(_Line):
    """A query with judged documents: those of grade above 0 are relevant."""

    id: str
    query: Words
    qrels: dict[str, int]
    split: str = ""


def file_sha256(path: Path) -> str:
    """A data file's hash. Raises `CorpusError` where it cannot be read."""
    try:
        return sha256(path.resolve())
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
