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


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock file `path`, until the block or the process ends.

    Without `wait` it does not where another holds it. Where a system has no such locks (Windows), every process holds
    it. Raises `OSError` where the file cannot be made.
    """
    holds = True
    with path.open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:
            pass
        except BlockingIOError:
            holds = False
        yield holds
