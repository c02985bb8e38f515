"""The first table: what the suite puts first, system beside system, and what they cost at one length."""

from stripedrag.eval.findings import Cost
from stripedrag.eval.reporting.costs import cost_entries
from stripedrag.eval.reporting.parts import (
    NOTHING,
    Column,
    Entry,
    Table,
    counted,
    interval,
    mean_entry,
    metric_words,
    number,
    p_words,
)
from stripedrag.eval.reporting.verdicts import best, contrast_of
from stripedrag.eval.reporting.view import View
from stripedrag.eval.suite import Headline

_COSTS = ("first token", "decode", "cache", "peak memory")


def summary(view: View) -> str:
    """What was compared, in a sentence."""
    cells = {(c.task, c.system, *c.cell.items()): c for c in view.analysis.cells}.values()
    failed = [sum(cell.failures.values()) for cell in cells]
    carried_not = [sum(cost.failures.values()) for cost in view.analysis.costs]
    results = view.analysis.done
    failures = sum(failed) + sum(carried_not)
    names = f" ({', '.join(view.models)})" if view.models else ""
    others = counted(len(view.systems) - len(view.models), "other system")
    machine = view.manifest.machine
    return (
        f"{counted(len(view.models), 'model')}{names} and {others} in {counted(len(view.suite.tasks), 'task')}: "
        f"{counted(results, 'result')}, {failures:,} of them failures, on {machine.gpu or machine.processor}."
    )


def unfinished(view: View) -> str:
    """What is missing of the run; empty where nothing is."""
    done, asked = view.analysis.done, view.analysis.asked
    if done >= asked:
        return ""
    return f"{done:,} of {asked:,} results are there; all figures are of those alone. Run the suite again to go on."


def headline(view: View) -> Table:
    """What the suite puts first, a line each: the models beside each other and apart, then what proves the scale.

    Below them what the models cost at the longest length that all of them carried.
    """
    columns = [Column("what"), Column("measured in")]
    columns += [Column(system) for system in view.models]
    if paired := len(view.models) == 2:
        columns.append(Column("first less second", "p after Holm"))
    scores = {(score.label, score.system): score for score in view.analysis.headline}
    others = [system for system in view.systems if system not in view.models and any(system == s for _, s in scores)]
    columns += [Column(system, group="for scale, no rivals" if system in view.stubs else "") for system in others]
    rows = []
    bold = {line.label: best(view, line) for line in view.suite.headline}
    for line in view.suite.headline:
        found = {system: scores.get((line.label, system)) for system in view.systems}
        metric = next((score.metric for score in found.values() if score and score.metric), "")
        means = {
            system: mean_entry(score, score.answered, score.samples, strong=system == bold[line.label])
            for system, score in found.items()
            if score
        }
        row = [Entry(line.label), Entry(metric_words(metric)), *(means.get(s, Entry(NOTHING)) for s in view.models)]
        row += [_difference(view, line, metric)] if paired else []
        rows.append([*row, *(means.get(system, Entry(NOTHING)) for system in others)])
    blank = [Entry(NOTHING)] * (len(columns) - 2 - len(view.models))
    length, costs = _common_costs(view)
    for name in _COSTS:
        found_costs = {s: (c.unit, entry) for s, figures in costs.items() for c, entry in figures if c.name == name}
        entries = [found_costs.get(system, ("", Entry(NOTHING)))[1] for system in view.models]
        if any(entry.text != NOTHING for entry in entries):
            unit = next(iter(found_costs.values()))[0]
            rows.append([Entry(f"{name}, {length:,} tokens"), Entry(unit), *entries, *blank])
    verdict = ""
    if view.suite.families:
        bold_says = "Bold: the model that declared contrasts show ahead" if any(bold.values()) else "Nothing is bold"
        verdict = f"{bold_says} (p < .05 after Holm)."
    note = (
        "Means with 95 % intervals clustered by document, n answered; costs are medians with the range of the rounds, "
        f"peak memory is one measurement. {verdict}"
    )
    return Table(columns, rows, note=note, heads=2)


def _difference(view: View, line: Headline, metric: str) -> Entry:
    """The declared contrast of the two models in just this line, the first model less the second."""
    found = contrast_of(view, line, metric)
    if found is None:
        return Entry(NOTHING)
    return Entry(number(found.mean), interval(found.low, found.high), p_words(found.p_holm))


def _common_costs(view: View) -> tuple[int, dict[str, list[tuple[Column, Entry]]]]:
    """The longest length at which every model has a cost, and the costs there."""
    by_length: dict[int, dict[str, Cost]] = {}
    for cost in view.analysis.costs:
        if cost.rounds:
            by_length.setdefault(cost.length_tokens, {}).setdefault(cost.system, cost)
    common = max((length for length, found in by_length.items() if found.keys() >= set(view.models)), default=0)
    return common, {system: cost_entries(cost) for system, cost in by_length.get(common, {}).items()}
