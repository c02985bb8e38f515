"""What a run shows, as numbers: means with intervals, paired differences, the gap taken apart, cost against length.

Reads the files of a run and nothing else. What was not measured is NaN (null in JSON), never 0.
"""

import math
import statistics as plain
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stripedrag.errors import UsageError
from stripedrag.eval.runs import Run, turns_of
from stripedrag.eval.schema import (
    SCHEMA_VERSION,
    Answered,
    Axis,
    Carried,
    Failure,
    Prediction,
    Record,
    SampleRecord,
    Score,
    Timing,
    agrees,
)
from stripedrag.eval.statistics import (
    NOLIMA_SHARE,
    RULER_THRESHOLD,
    Estimate,
    difference,
    effective_length,
    estimate,
    holm,
)
from stripedrag.eval.suite import Contrast, Suite

_RIGHT = 0.5  # an answer counts as right from this score on, where the gap is taken apart


class Cell(Record):
    """One system in one cell of a task by one metric: the mean with its 95 % interval over what was answered.

    `answered` of `samples` have a score; failures are counted by reason, answers whose passages were cut in `cut`, and
    those of them whose evidence went with it in `gold_lost`. `prompt_tokens` and `prefill_s` are medians.
    """

    task: str
    system: str
    cell: dict[str, Axis]
    metric: str
    mean: float
    low: float
    high: float
    samples: int
    answered: int
    clusters: int
    failures: dict[str, int]
    cut: int
    gold_lost: int
    prompt_tokens: float
    prefill_s: float


class HeadlineScore(Record):
    """One system in one column of the first table."""

    label: str
    system: str
    metric: str
    mean: float
    low: float
    high: float
    answered: int
    samples: int


class ContrastResult(Record):
    """A paired difference with its interval; `p_holm` is corrected over the family. `left_out` pairs lacked a score."""

    family: str
    label: str
    metric: str
    first: str
    second: str
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    pairs: int
    clusters: int
    left_out: int


class LengthScore(Record):
    """A task's first metric at one length, over all depths."""

    task: str
    system: str
    metric: str
    length_tokens: int
    mean: float
    low: float
    high: float
    answered: int
    samples: int


class EffectiveLength(Record):
    """The longest length up to which a system holds a task: absolutely (RULER) and against its own base (NoLiMa).

    The base is the score at the shortest length.
    """

    task: str
    system: str
    absolute_tokens: int | None
    own_base_tokens: int | None
    base: float
    base_low: float
    base_high: float
    longest_measured: int


class Gap(Record):
    """Where the answers of a system come from, as shares of all questions of a cell.

    `known`: right, and right without any context too. `used`: right, the evidence in the context. `guessed`: right,
    and it was not. `unused`: wrong though the evidence was there. `missed`: wrong, and retrieval had missed it.
    """

    task: str
    system: str
    cell: dict[str, Axis]
    questions: int
    known: float
    used: float
    guessed: float
    unused: float
    missed: float


class Recall(Record):
    """How much of the evidence the context held, in characters, whatever was made of it; `samples` have evidence."""

    task: str
    cell: dict[str, Axis]
    mean: float
    low: float
    high: float
    samples: int


class PositionScore(Record):
    """The task's first metric where the evidence begins between two places of the context (0 its start, 1 its end)."""

    task: str
    system: str
    metric: str
    start: float
    end: float
    mean: float
    low: float
    high: float
    samples: int


class Loss(Record):
    """Nats for each reference token of the stretch that ends at `position`; exp of it is the perplexity."""

    task: str
    system: str
    position: int
    nats: float
    low: float
    high: float
    samples: int


class Cost(Record):
    """Medians over the rounds, with their ranges: seconds to the first token, tokens a second; bytes and joules.

    `peak_bytes` is from the round for memory, above what the process held with the models loaded.
    """

    task: str
    system: str
    length_tokens: int
    rounds: int
    first_token_s: float
    first_token_s_min: float
    first_token_s_max: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_tokens_per_s_min: float
    decode_tokens_per_s_max: float
    peak_bytes: float
    cache_bytes: float
    joules: float
    failures: dict[str, int]


class CostFit(Record):
    """The exponent of a quantity against length, least squares on logarithms, with its 95 % interval."""

    task: str
    system: str
    quantity: str
    exponent: float
    low: float
    high: float
    lengths: int


class Analysis(Record):
    """All of it. `done` of `asked` predictions were made: fewer in a run that was not finished."""

    schema_version: int = SCHEMA_VERSION
    done: int
    asked: int
    headline: tuple[HeadlineScore, ...]
    contrasts: tuple[ContrastResult, ...]
    cells: tuple[Cell, ...]
    length_scores: tuple[LengthScore, ...]
    effective_lengths: tuple[EffectiveLength, ...]
    gaps: tuple[Gap, ...]
    recalls: tuple[Recall, ...]
    positions: tuple[PositionScore, ...]
    losses: tuple[Loss, ...]
    costs: tuple[Cost, ...]
    cost_fits: tuple[CostFit, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """A prediction with its sample, scores and timing."""

    sample: SampleRecord
    system: str
    output: Any
    scores: Mapping[str, float]
    timing: Timing | None


def analyse(run: Run) -> Analysis:
    """The analysis of a run that was scored. Raises `UsageError` where scores are missing for some predictions."""
    suite = run.suite()
    samples, predictions = run.results()
    rows = _rows(run, samples, predictions)
    tasks = {task.name: task for task in suite.tasks}
    work = [(tasks[sample.task], sample) for sample in samples.values()]
    by_task: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_task[row.sample.task].append(row)
    scored = {name: found for name, found in by_task.items() if tasks[name].operation != "cost"}
    costs = [c for name, found in by_task.items() if name not in scored for c in _costs(found)]
    return Analysis(
        done=len(rows),
        asked=len(turns_of(work, [spec.open() for spec in suite.systems])),
        headline=tuple(_headline(suite, by_task)),
        contrasts=tuple(_contrasts(suite, by_task)),
        cells=tuple(cell for found in scored.values() for cell in _cells(found)),
        length_scores=tuple(_length_scores(scored)),
        effective_lengths=tuple(_effective_lengths(scored)),
        gaps=tuple(gap for name, found in scored.items() if tasks[name].kind == "rag" for gap in _gaps(found)),
        recalls=tuple(recall for found in scored.values() for recall in _recalls(found)),
        positions=tuple(position for found in scored.values() for position in _positions(found)),
        losses=tuple(loss for found in scored.values() for loss in _losses(found)),
        costs=tuple(costs),
        cost_fits=tuple(_fits(costs)),
    )


def _rows(run: Run, samples: Mapping[str, SampleRecord], predictions: Sequence[Prediction]) -> list[_Row]:
    scores = {(s.system, s.sample_id): s.scores for s in run.lines(run.scores, Score)}
    timings = {(t.system, t.key): t for t in run.lines(run.timings, Timing)}
    if scores.keys() != {(p.system, p.sample_id) for p in predictions}:
        raise UsageError(
            f"{run.scores} has scores of {len(scores)} predictions and the run has {len(predictions)}. "
            f"Score it: `stripedrag eval score {run.folder}`."
        )
    return [
        _Row(samples[p.sample_id], p.system, p.output, scores[p.system, p.sample_id], timings.get((p.system, p.key)))
        for p in predictions
    ]


def _groups(rows: Iterable[_Row], *axes: str) -> dict[tuple[Any, ...], list[_Row]]:
    """Rows by system and the values of some axes of their cells (all axes where none is named)."""
    found: dict[tuple[Any, ...], list[_Row]] = defaultdict(list)
    for row in rows:
        place = tuple(row.sample.cell.get(axis) for axis in axes) if axes else tuple(row.sample.cell.items())
        found[row.system, *place].append(row)
    return found


def _first_metric(rows: Iterable[_Row]) -> str | None:
    return next((next(iter(row.scores)) for row in rows if row.scores), None)


def _mean(rows: Sequence[_Row], metric: str) -> Estimate:
    known = [(row.scores[metric], row.sample.cluster) for row in rows if metric in row.scores]
    values = [value for value, _ in known]
    bounded = all(0 <= value <= 1 for value in values) and not metric.startswith("nats")
    return estimate(values, [cluster for _, cluster in known], bounded=bounded)


def _cells(rows: Sequence[_Row]) -> Iterable[Cell]:
    for found in _groups(rows).values():
        answers = [row.output for row in found if isinstance(row.output, Answered)]
        metrics = list(dict.fromkeys(name for row in found for name in row.scores)) or [_first_metric(rows) or ""]
        for metric in metrics:
            mean = _mean(found, metric)
            yield Cell(
                task=found[0].sample.task,
                system=found[0].system,
                cell=found[0].sample.cell,
                metric=metric,
                **_ends(mean),
                samples=len(found),
                answered=mean.samples,
                clusters=mean.clusters,
                failures=_failures(found),
                cut=sum(answer.cut_tokens > 0 for answer in answers),
                gold_lost=sum(answer.gold_survived is False for answer in answers),
                prompt_tokens=_median([answer.prompt_tokens for answer in answers if answer.prompt_tokens]),
                prefill_s=_median([row.timing.prefill_s for row in found if row.timing and row.timing.prefill_s]),
            )


def _failures(rows: Iterable[_Row]) -> dict[str, int]:
    return dict(Counter(row.output.reason for row in rows if isinstance(row.output, Failure)))


def _ends(mean: Estimate) -> dict[str, float]:
    """The fields of a record that are an estimate and its interval."""
    return {"mean": mean.mean, "low": mean.low, "high": mean.high}


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(plain.median(known)) if known else math.nan


def _headline(suite: Suite, by_task: Mapping[str, Sequence[_Row]]) -> Iterable[HeadlineScore]:
    for column in suite.headline:
        rows = [row for row in by_task.get(column.task, ()) if agrees(row.sample.cell, column.cell)]
        metric = column.metric or _first_metric(rows) or ""
        for system, found in _by_system(rows).items():
            mean = _mean(found, metric)
            yield HeadlineScore(
                label=column.label,
                system=system,
                metric=metric,
                **_ends(mean),
                answered=mean.samples,
                samples=len(found),
            )


def _by_system(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    found: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        found[row.system].append(row)
    return found


def _contrasts(suite: Suite, by_task: Mapping[str, Sequence[_Row]]) -> Iterable[ContrastResult]:
    for family in suite.families:
        results = [_contrast(family.name, contrast, by_task.get(contrast.task, ())) for contrast in family.contrasts]
        corrected = holm({result.label: result.p for result in results})
        yield from (result.model_copy(update={"p_holm": corrected[result.label]}) for result in results)


def _contrast(family: str, contrast: Contrast, rows: Sequence[_Row]) -> ContrastResult:
    """A contrast by itself: `p_holm` is not known yet."""
    metric = contrast.metric or _first_metric(r for r in rows if agrees(r.sample.cell, contrast.cell)) or ""
    first, second = contrast.system, contrast.against or contrast.system
    across = contrast.against_cell is not None
    second_cell = contrast.cell if contrast.against_cell is None else contrast.against_cell
    pairs = _pairs(rows, first, contrast.cell, across=across)
    ours = _paired_means(pairs, metric)
    theirs = _paired_means(_pairs(rows, second, second_cell, across=across), metric)
    shared = [key for key in ours if key in theirs]
    result = difference(
        [ours[key][0] for key in shared], [theirs[key][0] for key in shared], [ours[key][1] for key in shared]
    )
    return ContrastResult(
        family=family,
        label=contrast.label,
        metric=metric,
        first=f"{first} {words(contrast.cell)}" if across else first,
        second=f"{second} {words(second_cell)}" if across else second,
        mean=result.mean,
        low=result.low,
        high=result.high,
        p=result.p,
        p_holm=math.nan,
        pairs=result.samples,
        clusters=result.clusters,
        left_out=len(pairs) - len(shared),
    )


def words(cell: Mapping[str, Axis]) -> str:
    """A cell in words, "context fill, budget_tokens 2048"."""
    return ", ".join(f"{axis} {value}" for axis, value in cell.items())


def _pairs(rows: Iterable[_Row], system: str, cell: Mapping[str, Axis], *, across: bool) -> dict[str, list[_Row]]:
    """A system's rows in a cell by what pairs are made of: the sample, or `across` cells what these have in common."""
    found: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        if row.system == system and agrees(row.sample.cell, cell):
            found[row.sample.subject if across else row.sample.id].append(row)
    return found


def _paired_means(pairs: Mapping[str, Sequence[_Row]], metric: str) -> dict[str, tuple[float, str]]:
    """The mean score and the cluster of each, where there is a score."""
    scored = {key: [row for row in rows if metric in row.scores] for key, rows in pairs.items()}
    return {
        key: (plain.fmean(row.scores[metric] for row in rows), rows[0].sample.cluster)
        for key, rows in scored.items()
        if rows
    }


def _length_scores(by_task: Mapping[str, Sequence[_Row]]) -> Iterable[LengthScore]:
    for task, rows in _by_length(by_task):
        metric = _first_metric(rows) or ""
        for (system, length), found in _groups(rows, "length_tokens").items():
            mean = _mean(found, metric)
            yield LengthScore(
                task=task,
                system=system,
                metric=metric,
                length_tokens=length,
                **_ends(mean),
                answered=mean.samples,
                samples=len(found),
            )


def _by_length(by_task: Mapping[str, Sequence[_Row]]) -> Iterable[tuple[str, Sequence[_Row]]]:
    """Tasks whose texts are given and sized; where contexts are compared, length is a budget and another matter."""
    for task, rows in by_task.items():
        if all("length_tokens" in row.sample.cell and "context" not in row.sample.cell for row in rows):
            yield task, rows


def _effective_lengths(by_task: Mapping[str, Sequence[_Row]]) -> Iterable[EffectiveLength]:
    for task, rows in _by_length(by_task):
        metric = _first_metric(rows) or ""
        for system, found in _by_system(rows).items():
            at = {int(length): of_length for (_, length), of_length in _groups(found, "length_tokens").items()}
            scores = {length: _whole_mean(of_length, metric) for length, of_length in at.items()}
            base = _mean(at[min(at)], metric)
            yield EffectiveLength(
                task=task,
                system=system,
                absolute_tokens=effective_length(scores, RULER_THRESHOLD),
                own_base_tokens=effective_length(scores, NOLIMA_SHARE * base.mean) if base.mean > 0 else None,
                base=base.mean,
                base_low=base.low,
                base_high=base.high,
                longest_measured=max(scores),
            )


def _whole_mean(rows: Sequence[_Row], metric: str) -> float:
    """The mean where everything was answered, else NaN: a length is not held by what fails on part of it."""
    return _mean(rows, metric).mean if all(metric in row.scores for row in rows) else math.nan


def _gaps(rows: Sequence[_Row]) -> Iterable[Gap]:
    """For tasks that ask the same questions with and without a context."""
    without = {
        (row.system, row.sample.subject): _is_right(row) for row in rows if row.sample.cell.get("context") == "none"
    }
    if not without:
        return
    for found in _groups(r for r in rows if r.sample.cell.get("context") not in (None, "none", "random")).values():
        shares: Counter[str] = Counter()
        for row in found:
            knew, inside = without.get((row.system, row.sample.subject)), _was_inside(row)
            if knew is None or inside is None or not row.scores:
                continue
            if _is_right(row):
                shares["known" if knew else "used" if inside else "guessed"] += 1
            else:
                shares["unused" if inside else "missed"] += 1
        total = shares.total()
        if total:
            kinds = {kind: shares[kind] / total for kind in ("known", "used", "guessed", "unused", "missed")}
            sample = found[0].sample
            yield Gap(task=sample.task, system=found[0].system, cell=sample.cell, questions=total, **kinds)


def _was_inside(row: _Row) -> bool | None:
    """Whether the system was shown the evidence: in the context, and not cut off it."""
    cut_off = isinstance(row.output, Answered) and row.output.gold_survived is False
    return row.sample.evidence_in_context and not cut_off


def _is_right(row: _Row) -> bool:
    """By substring match where it is measured, else by the first metric."""
    scores = row.scores
    value = scores.get("substring_exact_match", next(iter(scores.values()), 0.0))
    return value >= _RIGHT


def _recalls(rows: Sequence[_Row]) -> Iterable[Recall]:
    """Of what was asked, not of who answered: each sample once."""
    cells: dict[tuple[Any, ...], dict[str, tuple[float, str]]] = defaultdict(dict)
    for sample in (row.sample for row in rows):
        if "context" in sample.cell and sample.evidence_share is not None:
            cells[tuple(sample.cell.items())][sample.id] = (sample.evidence_share, sample.cluster)
    for place, held in cells.items():
        shares, clusters = zip(*held.values(), strict=True)
        mean = estimate(shares, clusters)
        yield Recall(task=rows[0].sample.task, cell=dict(place), **_ends(mean), samples=mean.samples)


def _positions(rows: Sequence[_Row], bins: int = 5) -> Iterable[PositionScore]:
    """Of texts that were filled to a length: an oracle's paragraph is too short to have places."""
    metric = _first_metric(rows)
    filled = [row for row in rows if row.sample.cell.get("context", "fill") == "fill"]
    placed = [row for row in filled if row.sample.evidence_position is not None and _was_inside(row)]
    if metric is None or not placed:
        return
    for system, found in _by_system(placed).items():
        for place in range(bins):
            inside = [r for r in found if min(int((r.sample.evidence_position or 0.0) * bins), bins - 1) == place]
            if mean := _mean(inside, metric) if inside else None:
                yield PositionScore(
                    task=found[0].sample.task,
                    system=system,
                    metric=metric,
                    start=place / bins,
                    end=(place + 1) / bins,
                    **_ends(mean),
                    samples=mean.samples,
                )


def _losses(rows: Sequence[_Row]) -> Iterable[Loss]:
    for system, found in _by_system(rows).items():
        for metric in dict.fromkeys(name for row in found for name in row.scores if name.startswith("nats@")):
            mean = _mean(found, metric)
            yield Loss(
                task=found[0].sample.task,
                system=system,
                position=int(metric.removeprefix("nats@")),
                nats=mean.mean,
                low=mean.low,
                high=mean.high,
                samples=mean.samples,
            )


def _costs(rows: Sequence[_Row]) -> list[Cost]:
    costs = []
    for (system, length), found in _groups(rows, "length_tokens").items():
        counted = [row for row in found if row.sample.cell.get("round") != 0]
        done = [(row.output, row.timing) for row in counted if isinstance(row.output, Carried) and row.timing]
        first = [timing.prefill_s for _, timing in done if timing.prefill_s]
        rates = [output.prompt_tokens / timing.prefill_s for output, timing in done if timing.prefill_s]
        steps = [(output.decode_tokens - 1) / timing.decode_s for output, timing in done if timing.decode_s]
        first_round = [row for row in found if row.sample.cell.get("round") == 0 and isinstance(row.output, Carried)]
        peaks = [row.timing.peak_bytes for row in first_round if row.timing]
        costs.append(
            Cost(
                task=found[0].sample.task,
                system=system,
                length_tokens=length,
                rounds=len(done),
                first_token_s=_median(first),
                first_token_s_min=min(first, default=math.nan),
                first_token_s_max=max(first, default=math.nan),
                prefill_tokens_per_s=_median(rates),
                decode_tokens_per_s=_median(steps),
                decode_tokens_per_s_min=min(steps, default=math.nan),
                decode_tokens_per_s_max=max(steps, default=math.nan),
                peak_bytes=_median(peaks),
                cache_bytes=_median([output.cache_bytes for output, _ in done]),
                joules=_median([timing.joules for _, timing in done]),
                failures=_failures(found),
            )
        )
    return costs


def _fits(costs: Sequence[Cost]) -> Iterable[CostFit]:
    systems: dict[tuple[str, str], list[Cost]] = defaultdict(list)
    for cost in costs:
        systems[cost.task, cost.system].append(cost)
    for (task, system), found in systems.items():
        for quantity in ("first_token_s", "cache_bytes", "peak_bytes"):
            points = [(c.length_tokens, getattr(c, quantity)) for c in found if getattr(c, quantity) > 0]
            if len(points) >= 2:
                exponent, half = _slope(points)
                yield CostFit(
                    task=task,
                    system=system,
                    quantity=quantity,
                    exponent=exponent,
                    low=exponent - half,
                    high=exponent + half,
                    lengths=len(points),
                )


def _slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The exponent of y ~ x^a and the half width of its 95 % interval (NaN for two points)."""
    from scipy.stats import t

    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    freedom = len(points) - 2
    if freedom < 1:
        return slope, math.nan
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / freedom / float(centred @ centred))
    return slope, error * float(t.ppf(0.975, freedom))
