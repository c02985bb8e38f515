"""What a task is: a validated declaration that makes samples from data and a seed, and scores what came back.

Adding a task: a module with a subclass of `Task` whose `kind` is its own, and its name in `eval/tasks/__init__.py`.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from stripedrag.eval.metrics import METRICS
from stripedrag.eval.schema import Answered, Axis, Overflow, Question, Record, Sample, SampleRecord


class Task(Record):
    """A declaration. `systems` None means every system that can do the task's operation.

    `metrics` are names of `stripedrag.eval.metrics.METRICS`, the first one being the task's headline.
    """

    kind: str
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    systems: tuple[str, ...] | None = None

    operation: ClassVar[str] = "answer"

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for name in type(self).model_fields:
            values = getattr(self, name)
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"{name} has something twice: {', '.join(map(str, values))}")
        return self

    def sample_id(self, cell: Mapping[str, Axis], name: object) -> str:
        """The id of what `name` is in a cell."""
        return f"{self.name}/{','.join(f'{axis}={value}' for axis, value in cell.items())}/{name}"

    @abstractmethod
    def samples(self, resources: Any) -> Iterator[Sample]:
        """The task's samples, the same for the same declaration, data and seed."""

    @abstractmethod
    def score(self, sample: SampleRecord, output: Any) -> dict[str, float]:
        """Scores by metric, the headline first, of an output that is no `Failure`."""

    def known_metrics(self) -> tuple[str, ...] | None:
        """The names of its scores; None where only the data tell."""
        return None

    def data(self) -> Mapping[str, str]:
        """Files that the samples are made of, by what they are: hashed into the manifest."""
        return {}


class ReadingTask(Task):
    """A task that is answered in words."""

    answer_tokens: int = Field(default=32, ge=1)
    overflow: Overflow = "refuse"
    metrics: tuple[str, ...]

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if not metrics:
            raise ValueError("a task needs at least one metric")
        for name in metrics:
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}; there is {', '.join(METRICS)}")
        return metrics

    def known_metrics(self) -> tuple[str, ...] | None:
        """The declared ones."""
        return self.metrics

    def score(self, sample: SampleRecord, output: Answered) -> dict[str, float]:
        """Each metric of the answer against the references."""
        return {name: METRICS[name](output.text, sample.references) for name in self.metrics}

    def oracle(self, sample: Question) -> str:
        """An answer that scores 1 by every metric of the task."""
        return " ".join(sample.references) if "string_match_all" in self.metrics else sample.references[0]
