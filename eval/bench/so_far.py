"""What a bench of hours has measured so far, so that a run which is cut goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stripedrag.errors import UsageError


class SoFar:
    """Measurements by name, kept in a JSON file as they come (None: in no file)."""

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        """`run` is what one run differs from another by; an empty file is a run that measured nothing yet.

        Raises `UsageError` where the file holds what another run measured.
        """
        self._path, self._run = path, dict(run)
        self._measured: dict[str, Any] = {}
        if path is not None and path.exists() and (text := path.read_text()):
            found = json.loads(text)
            if found["run"] != self._run:
                theirs = ", ".join(f"{key} {value}" for key, value in found["run"].items() if value != run.get(key))
                raise UsageError(f"{path} is of a run with {theirs}; go on with that one, or remove the file")
            self._measured = found["measured"]
        self.resumed = len(self._measured)  # measurements that were there already

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gave, now or in the run that goes on here: what JSON can hold."""
        if name not in self._measured:
            self._measured[name] = measure()
            if self._path is not None:
                scratch = self._path.with_suffix(".new")
                scratch.write_text(json.dumps({"run": self._run, "measured": self._measured}))
                scratch.replace(self._path)
        return self._measured[name]
