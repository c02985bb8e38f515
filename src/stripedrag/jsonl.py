"""Files of JSON lines, plain or compressed by gzip or xz, each line a record that pydantic checks."""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from stripedrag.errors import CorpusError, faults

Line = TypeVar("Line", bound=BaseModel)
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}


def read_lines(path: Path, kind: type[Line]) -> Iterator[Line]:
    """The lines of a file. Raises `CorpusError` for a file that cannot be read, a line that is no
    record of `kind`, and an id that came before; each names its line."""
    opener = _OPENERS.get(path.suffix, open)
    number, seen = 0, set()
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
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
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise CorpusError(f"{path}, line {number} cannot be read: {first['msg']}") from error
        raise CorpusError(f"{path}, line {number} is no {kind.__name__}: {faults(error)}") from error
    except (ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CorpusError(f"{path}, line {number + 1} cannot be read: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
