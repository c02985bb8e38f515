"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, *, by_many: bool = False) -> Iterator[Path]:
    """A place beside `path` to write to; what was written takes its name when the block ends well.

    A kill leaves `path` as it was. `by_many` gives each process a place of its own.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part" if by_many else f".{path.name}.part")
    yield scratch
    scratch.replace(path)
