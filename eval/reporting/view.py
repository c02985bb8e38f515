"""A run as the report's sections see it: models first, each in a colour of its own, cells by task."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from stripedrag.eval import plots
from stripedrag.eval.analysis import analyse
from stripedrag.eval.findings import Cell
from stripedrag.eval.run_files import Run


class _Measured(Protocol):
    @property
    def task(self) -> str:
        """The task."""

    @property
    def system(self) -> str:
        """The system."""


Figure = TypeVar("Figure", bound=_Measured)


class View:
    """The analysis of a run with its suite and manifest, and the questions that several sections have of them."""

    def __init__(self, run: Run) -> None:
        self.analysis, self.suite, self.manifest = analyse(run), run.suite(), run.manifest()
        self.models = [system.name for system in self.suite.systems if system.kind == "model"]
        self.stubs = [system.name for system in self.suite.systems if system.kind == "stub"]
        others = [system.name for system in self.suite.systems if system.kind not in ("model", "stub")]
        self.readers = [*self.models, *others]
        self.systems = [*self.readers, *self.stubs]
        self.styles = plots.styles(self.models)
        self._kinds = {task.name: task.kind for task in self.suite.tasks}
        self._first_metric: dict[str, str] = {}
        for cell in self.analysis.cells:
            if cell.metric:
                self._first_metric.setdefault(cell.task, cell.metric)

    def kind(self, task: str) -> str:
        """The kind of a task."""
        return self._kinds[task]

    def first_metric(self, task: str) -> str:
        """The metric by which a task is judged; empty where nothing was scored."""
        return self._first_metric.get(task, "")

    def drawn(self, records: Iterable[_Measured]) -> dict[str, plots.Style]:
        """The styles of those models that have a record."""
        found = {record.system for record in records}
        return {system: style for system, style in self.styles.items() if system in found}

    def cells(self, *kinds: str) -> dict[str, list[Cell]]:
        """The models' cells of tasks of these kinds, by task, the first metric alone; no task without any."""
        cells = [c for c in self.analysis.cells if self.kind(c.task) in kinds and c.metric == self.first_metric(c.task)]
        return self.by_task(cells, self.models)

    def length_cells(self) -> dict[str, list[Cell]]:
        """The models' cells of tasks whose axes are a length and perhaps a depth."""
        found = self.cells(*set(self._kinds.values()))
        return {task: cells for task, cells in found.items() if all(_is_of_length(cell) for cell in cells)}

    def by_task(self, records: Iterable[Figure], systems: Sequence[str]) -> dict[str, list[Figure]]:
        """Records of some systems, by task, in the order of the suite."""
        found: dict[str, list[Figure]] = {task: [] for task in self._kinds}
        for record in records:
            if record.system in systems:
                found[record.task].append(record)
        return {task: of_task for task, of_task in found.items() if of_task}


def _is_of_length(cell: Cell) -> bool:
    return "length_tokens" in cell.cell and cell.cell.keys() <= {"length_tokens", "depth"}
