"""What the declared contrasts show, in sentences, and which model may be printed bold."""

import math
from collections.abc import Collection, Iterator

from stripedrag.eval.findings import ContrastResult
from stripedrag.eval.reporting.parts import (
    Verdict,
    cell_words,
    counted,
    interval,
    is_loss,
    mean_words,
    metric_words,
    number,
    p_words,
)
from stripedrag.eval.reporting.view import View
from stripedrag.eval.suite import Contrast, Headline

_ALPHA = 0.05


def verdicts(view: View) -> list[Verdict]:
    """A verdict for each family: what is shown, and where nothing is."""
    made = []
    for family in view.suite.families:
        results = [result for result in view.analysis.contrasts if result.family == family.name]
        declared = {contrast.label: contrast for contrast in family.contrasts}
        found = [result for result in results if result.p_holm < _ALPHA]
        number_of_tests = sum(not math.isnan(result.p) for result in results)
        tests = counted(number_of_tests, "test")
        shown = f"{len(found)} of {tests} {'shows' if len(found) == 1 else 'show'} a difference"
        made.append(
            Verdict(
                family=family.name,
                summary=f"{shown if found else 'No difference can be shown'} (p < .05 after Holm over {tests}).",
                found=[_found(result, declared[result.label]) for result in found],
                rest=[_open(result, number_of_tests) for result in results if not result.p_holm < _ALPHA],
            )
        )
    return made


def best(view: View, line: Headline) -> str | None:
    """The model that declared contrasts show ahead of each other one in a line of the headline."""
    scores = {s.system: s for s in view.analysis.headline if s.label == line.label and s.system in view.models}
    metrics = {score.metric for score in scores.values()}
    ahead = set()
    for result, sides in _in_line(view, line, metrics):
        if result.p_holm < _ALPHA:
            ahead.add(sides if _gain(result) > 0 else sides[::-1])
    return next((s for s in scores if len(scores) > 1 and all((s, r) in ahead for r in scores if r != s)), None)


def contrast_of(view: View, line: Headline, metric: str) -> ContrastResult | None:
    """The declared contrast of the first two models in just this line, the first less the second; None for none."""
    first, second = view.models[:2]
    for result, sides in _in_line(view, line, {metric}):
        if sides == (first, second):
            return result
        if sides == (second, first):
            turned = {"mean": -result.mean, "low": -result.high, "high": -result.low}
            return result.model_copy(update=turned)
    return None


def _in_line(view: View, line: Headline, metrics: Collection[str]) -> Iterator[tuple[ContrastResult, tuple[str, str]]]:
    """The contrasts of systems in just this line of the headline, with both sides."""
    declared = {(family.name, c.label): c for family in view.suite.families for c in family.contrasts}
    for result in view.analysis.contrasts:
        contrast = declared[result.family, result.label]
        is_same = contrast.task == line.task and contrast.cell == line.cell and result.metric in metrics
        if is_same and contrast.against_cell in (None, line.cell):
            yield result, (contrast.system, contrast.against or contrast.system)


def _gain(result: ContrastResult) -> float:
    """How far the first is ahead, below 0 where it is behind."""
    return -result.mean if is_loss(result.metric) else result.mean


def _found(result: ContrastResult, declared: Contrast) -> str:
    """Who is ahead of whom, by how much."""
    first, second = _sides(declared)
    ahead, behind = (first, second) if _gain(result) > 0 else (second, first)
    ends = (result.low, result.high) if result.mean > 0 else (-result.high, -result.low)
    metric, _, less = metric_words(result.metric).partition(", less")
    size = f"{number(abs(result.mean))} {interval(*ends)} {metric}{' less' if less else ''}"
    return f"{result.label}: {ahead} beats {behind} by {size}, {p_words(result.p_holm)}{_left_out(result)}."


def _open(result: ContrastResult, tests: int) -> str:
    """A contrast that shows nothing."""
    if math.isnan(result.p):
        return f"{result.label} (not tested: no sample has this score on both sides)"
    least = tests * 2.0 ** (1 - result.clusters)  # all clusters one way, and Holm's first factor
    few = f", the least p that {counted(result.clusters, 'cluster')} and {counted(tests, 'test')} allow is {least:.2g}"
    hopeless = few if least >= _ALPHA else ""
    return f"{result.label} ({mean_words(result)}, {p_words(result.p_holm)}{_left_out(result)}{hopeless})"


def _left_out(result: ContrastResult) -> str:
    return f", {result.left_out:,} of {result.pairs + result.left_out:,} pairs left out" if result.left_out else ""


def _sides(declared: Contrast) -> tuple[str, str]:
    """Both sides in the words that tell them apart: systems, or cells of one system."""
    theirs = declared.cell if declared.against_cell is None else declared.against_cell
    cells = []
    for cell, other in ((declared.cell, theirs), (theirs, declared.cell)):
        apart = {axis: value for axis, value in cell.items() if other.get(axis) != value}
        cells.append(cell_words(apart) if apart else "")
    systems = (declared.system, declared.against or declared.system)
    if systems[0] == systems[1] and all(cells):
        return cells[0], cells[1]
    first, second = (f"{system} {cell}".strip() for system, cell in zip(systems, cells, strict=True))
    return first, second
