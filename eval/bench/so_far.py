"""What a bench of hours has measured so far, so that a run which is cut goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from stripedrag.errors import UsageError
from stripedrag.eval.bench.report import machine
from stripedrag.files import written_whole

_SAME = ("commit", "stripedrag", "processor", "threads", "kernels", "torch")  # of the machine


def going_on(path: Path | None, **run: Any) -> "tuple[SoFar, dict[str, Any]]":
    """What a run with these settings measured here so far, and the machine as it was when it began.

    Raises `UsageError` where the file is of another run, commit, version, processor or number of threads, or of none.
    """
    here = machine()
    same = {key: here[key] for key in _SAME}
    so_far = SoFar(path, same | {"transformers": transformers.__version__} | run)
    return so_far, so_far.measured("machine", lambda: here)


class SoFar:
    """Measurements by name, kept in a JSON file as they come (None: in no file)."""

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        """`run` is what one run differs from another by.

        Raises `UsageError` where the file is of another run, or of none.
        """
        self._path, self._run = path, dict(run)
        self._measured: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text())
                theirs, self._measured = found["run"], found["measured"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path} does not hold what a run measured so far; remove it") from error
            if theirs != self._run:
                other = ", ".join(f"{key} {value}" for key, value in theirs.items() if value != run.get(key))
                raise UsageError(f"{path} is of a run with {other}; go on with that one, or remove the file")
        self.resumed = len(self._measured)  # measurements that were there already

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gave, now or in the run that goes on here: what JSON can hold. None is not kept."""
        if name not in self._measured:
            value = measure()
            if value is None:
                return None
            self._measured[name] = value
            if self._path is not None:
                with written_whole(self._path) as scratch:
                    scratch.write_text(json.dumps({"run": self._run, "measured": self._measured}))
        return self._measured[name]
