"""What a bench of hours has measured so far, so that a run which is cut goes on."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from stripedrag.errors import UsageError


def told(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same, of `report.machine` and of versions, for one run to go on with another's measurements."""
    same = {key: machine[key] for key in ("commit", "stripedrag", "processor", "threads", "kernels", "torch")}
    return same | {"transformers": transformers.__version__}


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
                scratch = self._path.with_name(f"{self._path.name}.new")
                with scratch.open("w") as file:
                    json.dump({"run": self._run, "measured": self._measured}, file)
                    file.flush()
                    os.fsync(file.fileno())
                scratch.replace(self._path)
        return self._measured[name]
