"""The formats of evaluation data, and how such files are read: JSON lines, plain or compressed by gzip or xz.

Keys that a format does not name are ignored, so that a file may carry its sources and licences.
"""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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


Line = TypeVar("Line", bound=_Line)
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}


def read_lines(path: Path, kind: type[Line]) -> Iterator[Line]:
    """The lines of a data file. Raises `CorpusError` for a file that cannot be read, and names the line at fault."""
    opener = _OPENERS.get(path.suffix, open)
    number, seen = 0, set()
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = kind.model_validate_json(line)
                identity = getattr(record, "id", None)
                if identity in seen:
                    raise CorpusError(f"{path}, line {number}: the id {identity!r} came before. Make ids unique.")
                seen.add(identity)
                yield record
    except CorpusError:
        raise
    except ValidationError as error:
        faults = error.errors()
        if faults[0]["type"] == "json_invalid":
            raise CorpusError(f"{path}, line {number} cannot be read: {faults[0]['msg']}") from error
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in faults)
        raise CorpusError(f"{path}, line {number} is no {kind.__name__}: {problems}") from error
    except (ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CorpusError(f"{path}, line {number + 1} cannot be read: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
