"""What of an answer is search and what is reading: the gap taken apart, recall, and where the evidence stood."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from stripedrag.eval.findings import GAP_KINDS, Gap, GapKind, PositionScore, Recall
from stripedrag.eval.rows import Row, by_system, first_metric, groups, interval_fields, mean_score
from stripedrag.eval.schema import Answered
from stripedrag.eval.statistics import estimate

_RIGHT = 0.5  # an answer counts as right from this score on, where the gap is taken apart


def gaps(rows: Sequence[Row]) -> Iterable[Gap]:
    """Where answers come from, for tasks that ask the same questions with and without a context."""
    without = {
        (row.system, row.sample.subject): _is_right(row)
        for row in rows
        if row.scores and row.sample.cell.get("context") == "none"
    }
    read = [row for row in rows if row.scores and row.sample.cell.get("context") not in (None, "none", "random")]
    for found in groups(read).values():
        kinds = [
            (_kind(right=_is_right(row), knew=knew, inside=inside), row.sample.cluster)
            for row in found
            if (knew := without.get((row.system, row.sample.subject))) is not None
            and (inside := _was_inside(row)) is not None
        ]
        if not kinds:
            continue
        for kind in GAP_KINDS:
            share = estimate([float(k == kind) for k, _ in kinds], [cluster for _, cluster in kinds])
            sample = found[0].sample
            yield Gap(
                task=sample.task,
                system=found[0].system,
                cell=sample.cell,
                kind=kind,
                **interval_fields(share),
                questions=share.samples,
            )


def _kind(*, right: bool, knew: bool, inside: bool) -> GapKind:
    if right:
        return "known" if knew else "used" if inside else "guessed"
    return "unused" if inside else "missed"


def _was_inside(row: Row) -> bool | None:
    """Whether the system was shown the evidence: in the context, and not cut off it."""
    cut_off = isinstance(row.output, Answered) and row.output.gold_survived is False
    return row.sample.evidence_in_context and not cut_off


def _is_right(row: Row) -> bool:
    """By substring match where it is measured, else by the first metric."""
    scores = row.scores
    value = scores.get("substring_exact_match", next(iter(scores.values()), 0.0))
    return value >= _RIGHT


def recalls(rows: Sequence[Row]) -> Iterable[Recall]:
    """Of what was asked, not of who answered: each sample once."""
    cells: dict[tuple[Any, ...], dict[str, tuple[float, str]]] = defaultdict(dict)
    for sample in (row.sample for row in rows):
        if "context" in sample.cell and sample.evidence_share is not None:
            cells[tuple(sample.cell.items())][sample.id] = (sample.evidence_share, sample.cluster)
    for place, held in cells.items():
        shares, clusters = zip(*held.values(), strict=True)
        mean = estimate(shares, clusters)
        yield Recall(task=rows[0].sample.task, cell=dict(place), **interval_fields(mean), samples=mean.samples)


def positions(rows: Sequence[Row], bins: int = 5) -> Iterable[PositionScore]:
    """Of texts that were filled to a length: an oracle's paragraph is too short to have places."""
    metric = first_metric(rows)
    filled = [row for row in rows if row.sample.cell.get("context", "fill") == "fill"]
    placed = [row for row in filled if row.sample.evidence_position is not None and _was_inside(row)]
    if metric is None or not placed:
        return
    for system, found in by_system(placed).items():
        for place in range(bins):
            inside = [r for r in found if min(int((r.sample.evidence_position or 0.0) * bins), bins - 1) == place]
            if mean := mean_score(inside, metric) if inside else None:
                yield PositionScore(
                    task=found[0].sample.task,
                    system=system,
                    metric=metric,
                    start=place / bins,
                    end=(place + 1) / bins,
                    **interval_fields(mean),
                    samples=mean.samples,
                )
