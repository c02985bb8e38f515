"""What a reader needs to trust the report: controls, what was lost, and all of the numbers."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from stripedrag.eval.findings import Cell, ContrastResult
from stripedrag.eval.reporting.parts import (
    NOTHING,
    Column,
    Entry,
    Section,
    Table,
    axis_words,
    cell_entry,
    cell_words,
    counts_words,
    mean_entry,
    metric_words,
    number,
    reading_entries,
)
from stripedrag.eval.reporting.view import View
from stripedrag.eval.schema import Axis

_STUBS = {
    "oracle": "1 everywhere: it knows the answers",
    "empty": "0, but where not to abstain is right",
    "echo": "what a question's own words are worth",
    "chance": "what another question's answer is worth",
}
_CONTROLS = {
    "none": "what the weights know already",
    "random": "what any text does: no more than none",
    "oracle": "what reading is worth where search does not err",
}


def controls(view: View) -> Section:
    """Stubs with what they should score, and the contexts that are controls."""
    section = Section("controls", "Stubs and controls")
    means: dict[tuple[str, str], list[float]] = {}
    for cell in view.analysis.cells:
        if cell.system in view.stubs and cell.metric == view.first_metric(cell.task) and not math.isnan(cell.mean):
            means.setdefault((cell.system, cell.task), []).append(cell.mean)
    tasks = list(dict.fromkeys(task for _, task in means))
    if tasks:
        faults = [task for task in tasks if min(means.get(("oracle", task), [1.0])) < 1]
        if faults:
            section.words.append(f"The oracle does not score 1 in {', '.join(faults)}: do not trust the figures there.")
        columns = [Column("task"), *(Column(stub, _STUBS[stub]) for stub in view.stubs)]
        rows = [[Entry(task), *(_range(means.get((stub, task), [])) for stub in view.stubs)] for task in tasks]
        note = "Means of a task's cells, from the least to the most."
        section.tables.append(Table(columns, rows, "Stubs prove the harness", note))
    for task, cells in view.cells("rag").items():
        shown = [cell for cell in cells if cell.cell["context"] in _CONTROLS]
        at = {(cell.system, *cell.cell.items()): cell for cell in shown}
        columns = [Column("context"), Column("shows")]
        columns += [Column(system, metric_words(view.first_metric(task))) for system in view.models]
        rows = []
        for place in dict.fromkeys(tuple(cell.cell.items()) for cell in shown):
            where: dict[str, Axis] = dict(place)
            name = axis_words("context", where["context"])
            budget = where.get("budget_tokens")
            row = [
                Entry(name if budget is None else f"{name}, {budget:,} tokens"),
                Entry(_CONTROLS[str(where["context"])]),
            ]
            rows.append([*row, *(cell_entry(at.get((system, *place))) for system in view.models)])
        if rows:
            section.tables.append(Table(columns, rows, f"Controls of {task}", heads=2))
    return section


def _range(means: list[float]) -> Entry:
    if not means:
        return Entry(NOTHING)
    least, most = number(min(means)), number(max(means))
    return Entry(least if least == most else f"{least} to {most}")


def lost(view: View) -> Section:
    """Every cell in which something failed or was cut; said plainly where nothing was."""
    section = Section("lost", "Truncation and failures", brief=True)
    rows = []
    for cell in {(c.task, c.system, *c.cell.items()): c for c in view.analysis.cells}.values():
        if cell.cut or cell.gold_lost or cell.failures:
            counts = (f"{cell.samples:,}", counts_words(cell.failures), f"{cell.cut:,}", f"{cell.gold_lost:,}")
            rows.append([Entry(text) for text in (cell.task, cell.system, cell_words(cell.cell), *counts)])
    for cost in view.analysis.costs:
        if cost.failures:
            place, asked = f"{cost.length_tokens:,} tokens", cost.rounds + sum(cost.failures.values())
            texts = (cost.task, cost.system, place, f"{asked:,}", counts_words(cost.failures), NOTHING, NOTHING)
            rows.append([Entry(text) for text in texts])
    if not rows:
        section.words.append("None: every prompt that was run fitted whole, and every one came back.")
        return section
    names = ("task", "system", "cell", "asked", "failures", "prompts cut", "evidence cut off")
    note = "A failure is left out of means and stands in n. No other cell lost anything."
    section.tables.append(Table([Column(name) for name in names], rows, note=note, heads=3))
    return section


def everything(view: View) -> Section:
    """Contrasts, cells and manifest, whole."""
    section = Section("everything", "Everything")
    if view.analysis.contrasts:
        names = ("family", "contrast", "first", "second", "metric", "first less second", "p", "p, Holm")
        columns = [Column(name) for name in (*names, "pairs", "clusters", "left out")]
        rows = [_contrast(result) for result in view.analysis.contrasts]
        note = "Paired by sample or question, whole clusters permuted. Left out are pairs in which a side has no score."
        section.tables.append(Table(columns, rows, "Contrasts", note, heads=5, folded=True))
    columns = [Column(name) for name in ("task", "system", "cell", "metric", "mean", "clusters", "failures")]
    columns += [Column("prompts", "cut"), Column("evidence", "cut off"), Column("prompt", "tokens")]
    columns.append(Column("prefill", "s"))
    rows = [_cell(cell) for cell in view.analysis.cells]
    section.tables.append(Table(columns, rows, f"All {len(rows):,} cells", heads=4, folded=True))
    facts = [[Entry(name), Entry(value)] for name, value in _leaves(view.manifest.model_dump(mode="json"))]
    section.tables.append(Table([Column("what"), Column("value")], facts, "Manifest", heads=2, folded=True))
    return section


def _contrast(result: ContrastResult) -> list[Entry]:
    texts = (result.family, result.label, result.first, result.second, metric_words(result.metric))
    counts = (f"{result.pairs:,}", f"{result.clusters:,}", f"{result.left_out:,}")
    values = (number(result.p, 4), number(result.p_holm, 4), *counts)
    return [*map(Entry, texts), mean_entry(result), *map(Entry, values)]


def _cell(cell: Cell) -> list[Entry]:
    texts = (cell.task, cell.system, cell_words(cell.cell), cell.metric or NOTHING)
    counts = (f"{cell.clusters:,}", counts_words(cell.failures), f"{cell.cut:,}", f"{cell.gold_lost:,}")
    return [*map(Entry, texts), cell_entry(cell), *map(Entry, counts), *reading_entries(cell)]


def _leaves(value: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """What a nested mapping says, by path."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{before}{key}.")
        else:
            yield f"{before}{key}", NOTHING if inner is None else str(inner)
