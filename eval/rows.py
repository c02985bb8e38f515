"""The rows of an analysis: predictions with their samples, scores and timings, and what is asked of many of them."""

import math
import statistics as plain
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stripedrag.eval.schema import Failure, SampleRecord, Timing
from stripedrag.eval.statistics import Difference, Estimate, estimate


@dataclass(frozen=True, slots=True)
class Row:
    """A prediction with its sample, scores and timing."""

    sample: SampleRecord
    system: str
    output: Any
    scores: Mapping[str, float]
    timing: Timing | None


def groups(rows: Iterable[Row], *axes: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by system and the values of some axes of their cells (all axes where none is named)."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        place = tuple(row.sample.cell.get(axis) for axis in axes) if axes else tuple(row.sample.cell.items())
        found[row.system, *place].append(row)
    return found


def first_metric(rows: Iterable[Row]) -> str | None:
    """The metric by which a task is judged; None where nothing has a score."""
    return next((next(iter(row.scores)) for row in rows if row.scores), None)


def mean_score(rows: Sequence[Row], metric: str) -> Estimate:
    """The mean of the rows that have the metric, with its interval."""
    known = [(row.scores[metric], row.sample.cluster) for row in rows if metric in row.scores]
    values = [value for value, _ in known]
    bounded = all(0 <= value <= 1 for value in values) and not metric.startswith("nats")
    return estimate(values, [cluster for _, cluster in known], bounded=bounded)


def failures_of(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows failed, by reason."""
    return dict(Counter(row.output.reason for row in rows if isinstance(row.output, Failure)))


def interval_fields(mean: Estimate | Difference) -> dict[str, float]:
    """The fields of a record that are an estimate, or a difference, and its interval."""
    return {"mean": mean.mean, "low": mean.low, "high": mean.high}


def median(values: Sequence[float | None]) -> float:
    """The median of the values that are known, NaN where none is."""
    known = [value for value in values if value is not None]
    return float(plain.median(known)) if known else math.nan


def by_system(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by system."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.system].append(row)
    return found
