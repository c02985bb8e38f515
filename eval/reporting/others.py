"""Tasks that are told in tables: unanswerable questions, long documents, retrieval, and what lm-eval brings."""

from stripedrag.eval.reporting.parts import Column, Entry, Section, Table, cell_entry, cell_words, metric_words
from stripedrag.eval.reporting.view import View

_SIDES = {"present": "the evidence is there", "absent": "it was taken away"}
_DECISIONS = {"present": "does answer", "absent": "abstains"}


def unanswerable(view: View) -> Section:
    """Both sides beside each other: answers to what can be answered, abstention from what cannot."""
    section = Section("unanswerable", "Knowing what was not told")
    for task, cells in view.by_task(view.analysis.cells, view.models).items():
        if view.kind(task) != "unanswerable":
            continue
        at = {(cell.system, str(cell.cell["evidence"]), cell.metric): cell for cell in cells if cell.metric}
        sides = list(dict.fromkeys((side, metric) for _, side, metric in at))
        columns = [Column("system")]
        for side, metric in sides:
            name = _DECISIONS[side] if metric == "decision" else metric_words(metric)
            columns.append(Column(name, group=_SIDES[side]))
        rows = [[Entry(s), *(cell_entry(at.get((s, *side))) for side in sides)] for s in view.models]
        note = "Who always answers wins the left and loses the right; both sides count."
        section.tables.append(Table(columns, rows, task, note))
    return section


def other_tasks(view: View) -> Section:
    """A table for each task that has no figure: systems and cells by metrics."""
    section = Section("tasks", "Long documents, retrieval and other tasks")
    told = {*view.length_cells()}
    for task, cells in view.by_task(view.analysis.cells, view.readers).items():
        if task in told or view.kind(task) in ("rag", "unanswerable", "perplexity"):
            continue
        metrics = list(dict.fromkeys(cell.metric for cell in cells if cell.metric))
        at = {(*cell.cell.items(), cell.system, cell.metric): cell for cell in cells}
        places = dict.fromkeys((tuple(cell.cell.items()), cell.system) for cell in cells)
        rows = [
            [Entry(system), Entry(cell_words(dict(place))), *(cell_entry(at.get((*place, system, m))) for m in metrics)]
            for place, system in places
        ]
        columns = [Column("system"), Column("cell"), *(Column(metric_words(metric)) for metric in metrics)]
        section.tables.append(Table(columns, rows, task, heads=2).measured())
    return section
