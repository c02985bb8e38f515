"""What a run shows, as numbers. Reads the files of a run and nothing else."""

import math
import statistics as plain
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from stripedrag.errors import UsageError
from stripedrag.eval.cost_summary import cost_fits, costs_of
from stripedrag.eval.evidence import gaps, positions, recalls
from stripedrag.eval.findings import (
    Analysis,
    Cell,
    ContrastResult,
    EffectiveLength,
    HeadlineScore,
    LengthScore,
    Loss,
)
from stripedrag.eval.rows import (
    Row,
    by_system,
    failures_of,
    first_metric,
    groups,
    interval_fields,
    mean_score,
    median,
)
from stripedrag.eval.run_files import Run
from stripedrag.eval.runs import turns_of
from stripedrag.eval.schema import Answered, Axis, Prediction, SampleRecord, Score, Timing, agrees
from stripedrag.eval.statistics import NOLIMA_SHARE, RULER_THRESHOLD, difference, effective_length, holm
from stripedrag.eval.suite import Contrast, Suite


def analyse(run: Run) -> Analysis:
    """The analysis of a run that was scored. Raises `UsageError` where scores are missing for some predictions."""
    suite = run.suite()
    samples, predictions = run.results()
    rows = _rows(run, samples, predictions)
    tasks = {task.name: task for task in suite.tasks}
    work = [(tasks[sample.task], sample) for sample in samples.values()]
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row.sample.task].append(row)
    scored = {name: found for name, found in by_task.items() if tasks[name].operation != "cost"}
    costs = [c for name, found in by_task.items() if name not in scored for c in costs_of(found)]
    return Analysis(
        done=len(rows),
        asked=len(turns_of(work, [spec.open() for spec in suite.systems])),
        headline=tuple(_headline(suite, by_task)),
        contrasts=tuple(_contrasts(suite, by_task)),
        cells=tuple(cell for found in scored.values() for cell in _cells(found)),
        length_scores=tuple(_length_scores(scored)),
        effective_lengths=tuple(_effective_lengths(scored)),
        gaps=tuple(gap for name, found in scored.items() if tasks[name].kind == "rag" for gap in gaps(found)),
        recalls=tuple(recall for found in scored.values() for recall in recalls(found)),
        positions=tuple(position for found in scored.values() for position in positions(found)),
        losses=tuple(loss for found in scored.values() for loss in _losses(found)),
        costs=tuple(costs),
        cost_fits=tuple(cost_fits(costs)),
    )


def _rows(run: Run, samples: Mapping[str, SampleRecord], predictions: Sequence[Prediction]) -> list[Row]:
    scores = {(s.system, s.sample_id): s.scores for s in run.lines(run.scores, Score)}
    timings = {(t.system, t.key): t for t in run.lines(run.timings, Timing)}
    if scores.keys() != {(p.system, p.sample_id) for p in predictions}:
        raise UsageError(
            f"{run.scores} has scores of {len(scores)} predictions and the run has {len(predictions)}. "
            f"Score it: `stripedrag eval score {run.folder}`."
        )
    return [
        Row(samples[p.sample_id], p.system, p.output, scores[p.system, p.sample_id], timings.get((p.system, p.key)))
        for p in predictions
    ]


def _cells(rows: Sequence[Row]) -> Iterable[Cell]:
    for found in groups(rows).values():
        answers = [row.output for row in found if isinstance(row.output, Answered)]
        metrics = list(dict.fromkeys(name for row in found for name in row.scores)) or [first_metric(rows) or ""]
        for metric in metrics:
            mean = mean_score(found, metric)
            yield Cell(
                task=found[0].sample.task,
                system=found[0].system,
                cell=found[0].sample.cell,
                metric=metric,
                **interval_fields(mean),
                samples=len(found),
                answered=mean.samples,
                clusters=mean.clusters,
                failures=failures_of(found),
                cut=sum(answer.cut_tokens > 0 for answer in answers),
                gold_lost=sum(answer.gold_survived is False for answer in answers),
                prompt_tokens=median([answer.prompt_tokens for answer in answers if answer.prompt_tokens]),
                prefill_s=median([row.timing.prefill_s for row in found if row.timing and row.timing.prefill_s]),
            )


def _headline(suite: Suite, by_task: Mapping[str, Sequence[Row]]) -> Iterable[HeadlineScore]:
    for line in suite.headline:
        rows = [row for row in by_task.get(line.task, ()) if agrees(row.sample.cell, line.cell)]
        metric = line.metric or first_metric(rows) or ""
        for system, found in by_system(rows).items():
            mean = mean_score(found, metric)
            yield HeadlineScore(
                label=line.label,
                system=system,
                metric=metric,
                **interval_fields(mean),
                answered=mean.samples,
                samples=len(found),
            )


def _contrasts(suite: Suite, by_task: Mapping[str, Sequence[Row]]) -> Iterable[ContrastResult]:
    for family in suite.families:
        results = [_contrast(family.name, contrast, by_task.get(contrast.task, ())) for contrast in family.contrasts]
        corrected = holm({result.label: result.p for result in results})
        yield from (result.model_copy(update={"p_holm": corrected[result.label]}) for result in results)


def _contrast(family: str, contrast: Contrast, rows: Sequence[Row]) -> ContrastResult:
    """A contrast by itself: `p_holm` is not known yet."""
    metric = contrast.metric or first_metric(r for r in rows if agrees(r.sample.cell, contrast.cell)) or ""
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
        **interval_fields(result),
        p=result.p,
        p_holm=math.nan,
        pairs=result.samples,
        clusters=result.clusters,
        left_out=len(pairs) - len(shared),
    )


def words(cell: Mapping[str, Axis]) -> str:
    """A cell in words, "context fill, budget_tokens 2048"."""
    return ", ".join(f"{axis} {value}" for axis, value in cell.items())


def _pairs(rows: Iterable[Row], system: str, cell: Mapping[str, Axis], *, across: bool) -> dict[str, list[Row]]:
    """A system's rows in a cell by what pairs are made of: the sample, or `across` cells what these have in common."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.system == system and agrees(row.sample.cell, cell):
            found[row.sample.subject if across else row.sample.id].append(row)
    return found


def _paired_means(pairs: Mapping[str, Sequence[Row]], metric: str) -> dict[str, tuple[float, str]]:
    """The mean score and the cluster of each, where there is a score."""
    scored = {key: [row for row in rows if metric in row.scores] for key, rows in pairs.items()}
    return {
        key: (plain.fmean(row.scores[metric] for row in rows), rows[0].sample.cluster)
        for key, rows in scored.items()
        if rows
    }


def _length_scores(by_task: Mapping[str, Sequence[Row]]) -> Iterable[LengthScore]:
    for task, rows in _by_length(by_task):
        metric = first_metric(rows) or ""
        for (system, length), found in groups(rows, "length_tokens").items():
            mean = mean_score(found, metric)
            yield LengthScore(
                task=task,
                system=system,
                metric=metric,
                length_tokens=length,
                **interval_fields(mean),
                answered=mean.samples,
                samples=len(found),
            )


def _by_length(by_task: Mapping[str, Sequence[Row]]) -> Iterable[tuple[str, Sequence[Row]]]:
    """Tasks whose texts are given and sized; where contexts are compared, length is a budget and another matter."""
    for task, rows in by_task.items():
        if all("length_tokens" in row.sample.cell and "context" not in row.sample.cell for row in rows):
            yield task, rows


def _effective_lengths(by_task: Mapping[str, Sequence[Row]]) -> Iterable[EffectiveLength]:
    for task, rows in _by_length(by_task):
        metric = first_metric(rows) or ""
        for system, found in by_system(rows).items():
            at = {int(length): of_length for (_, length), of_length in groups(found, "length_tokens").items()}
            scores = {length: _whole_mean(of_length, metric) for length, of_length in at.items()}
            base = mean_score(at[min(at)], metric)
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


def _whole_mean(rows: Sequence[Row], metric: str) -> float:
    """The mean where everything was answered, else NaN: a length is not held by what fails on part of it."""
    return mean_score(rows, metric).mean if all(metric in row.scores for row in rows) else math.nan


def _losses(rows: Sequence[Row]) -> Iterable[Loss]:
    for system, found in by_system(rows).items():
        for metric in dict.fromkeys(name for row in found for name in row.scores if name.startswith("nats@")):
            mean = mean_score(found, metric)
            yield Loss(
                task=found[0].sample.task,
                system=system,
                position=int(metric.removeprefix("nats@")),
                nats=mean.mean,
                low=mean.low,
                high=mean.high,
                samples=mean.samples,
            )
