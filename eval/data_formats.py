"""The formats of evaluation data, and how such files are read: JSON lines, plain or compressed by gzip or xz.

Keys that a format does not name are ignored, so that a file may carry its sources and licences.
"""

import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stripedrag.errors import CorpusError

DATA = Path(__file__).parent / "data"


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Place(_Line):
    """Characters [start, end) of a document of the corpus; without `doc_id`, of the document at hand."""

    doc_id: str = ""
    start: int = Field(ge=0)
    end: int


class CorpusDocument(_Line):
    """A document of a corpus."""

    id: str
    title: str = ""
    text: str


class CorpusQuestion(_Line):
    """A question about a corpus: `gold_spans` are the answer's own characters, `gold_passages` what an answer needs."""

    id: str
    question: str
    answers: tuple[str, ...] = Field(min_length=1)
    gold_spans: tuple[Place, ...] = Field(min_length=1)
    gold_passages: tuple[Place, ...] = ()
    split: str = ""


class LongTask(_Line):
    """A question or a wish for a summary over one long document."""

    id: str
    query: str
    references: tuple[str, ...] = Field(min_length=1)
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
    query: str
    qrels: dict[str, int]
    split: str = ""


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
                record = kind.model_validate(json.loads(line))
                identity = getattr(record, "id", None)
                if identity in seen:
                    raise CorpusError(f"{path}, line {number}: the id {identity!r} came before. Make ids unique.")
                seen.add(identity)
                yield record
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CorpusError(f"{path}, line {number} is no {kind.__name__}: {problems}") from error
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {number} cannot be read: {error.msg} at character {error.pos}") from error
    except (UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        raise CorpusError(f"{path}, line {number + 1} cannot be read: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
