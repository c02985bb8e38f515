"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path, *, by_many: bool = False) -> Iterator[Path]:
    """A place beside `path` to write to; what was written takes its name when the block ends well, and can be read by
    whom any new file can.

    A kill leaves `path` as it was, and so does a power cut, but for `by_many`, which is for many small files: each
    process has a place of its own, and a cut can leave an empty file.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part" if by_many else f".{path.name}.part")
    scratch.unlink(missing_ok=True)  # of a process that was killed
    scratch.touch()
    mode = scratch.stat().st_mode
    try:
        yield scratch
        scratch.chmod(mode)  # some writers make files that nobody else can read
        if not by_many:
            with scratch.open("rb") as written:
                os.fsync(written.fileno())
        scratch.replace(path)
    except BaseException:  # a full disk, say
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


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
