"""The first table: systems by what the suite puts first, and what they cost at one length."""

from stripedrag.eval.analysis import Cost
from stripedrag.eval.reporting.costs import cost_entries
from stripedrag.eval.reporting.parts import NOTHING, Column, Entry, Table, counted, mean_entry, metric_words
from stripedrag.eval.reporting.verdicts import best
from stripedrag.eval.reporting.view import View

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
    machine = view.manifest.get("machine", {})
    where = f", on {machine.get('gpu') or machine.get('processor')}" if machine else ""
    return (
        f"{counted(len(view.models), 'model')}{names} and {others} in {counted(len(view.suite.tasks), 'task')}: "
        f"{counted(results, 'result')}, {failures:,} of them failures{where}."
    )


def unfinished(view: View) -> str:
    """What is missing of the run; empty where nothing is."""
    done, asked = view.analysis.done, view.analysis.asked
    if done >= asked:
        return ""
    return f"{done:,} of {asked:,} results are there; all figures are of those alone. Run the suite again to go on."


def headline(view: View) -> Table:
    """Systems by the suite's columns, then the models' costs at the longest length that all of them carried."""
    scores = {(score.label, score.system): score for score in view.analysis.headline}
    metrics = {score.label: score.metric for score in view.analysis.headline if score.metric}
    bold = {column.label: best(view, column) for column in view.suite.headline}
    length, costs = _common_costs(view)
    columns = [Column("system")]
    columns += [Column(label, metric_words(metrics.get(label, "")), "quality") for label in bold]
    known = {c.name: c.unit for figures in costs.values() for c, entry in figures if entry.text != NOTHING}
    shown = [name for name in _COSTS if name in known]
    columns += [Column(name, known[name], f"cost at {length:,} tokens") for name in shown]
    rows = []
    for system in view.systems:
        row = [Entry(system)]
        for label, ahead in bold.items():
            score = scores.get((label, system))
            counts = (score.answered, score.samples) if score else (0, 0)
            row.append(mean_entry(score, *counts, strong=ahead == system))
        found = {column.name: entry for column, entry in costs.get(system, [])}
        row += [found.get(name, Entry(NOTHING)) for name in shown]
        if system in view.models or any(entry.text != NOTHING for entry in row[1:]):
            rows.append(row)
    verdict = (
        "Bold: the model that declared contrasts show ahead"
        if any(bold.values())
        else "Nothing is bold: no declared contrast shows a model ahead"
    )
    note = (
        "Means with 95 % intervals clustered by document, n answered; costs are medians with the range of the rounds. "
        f"{verdict} (p < .05 after Holm). Stubs are no rivals: they prove the scale."
    )
    return Table(columns, rows, note=note)


def _common_costs(view: View) -> tuple[int, dict[str, list[tuple[Column, Entry]]]]:
    """The longest length at which every model has a cost, and the costs there."""
    by_length: dict[int, dict[str, Cost]] = {}
    for cost in view.analysis.costs:
        if cost.rounds:
            by_length.setdefault(cost.length_tokens, {}).setdefault(cost.system, cost)
    common = max((length for length, found in by_length.items() if found.keys() >= set(view.models)), default=0)
    return common, {system: cost_entries(cost) for system, cost in by_length.get(common, {}).items()}
