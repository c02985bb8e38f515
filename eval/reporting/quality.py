"""How good answers are, and what of it is search and what reading: the figures of the report."""

import math
from collections.abc import Mapping, Sequence

from stripedrag.eval import plots
from stripedrag.eval.findings import GAP_KINDS, Cell, Gap, LengthScore, Loss, Recall
from stripedrag.eval.reporting.parts import (
    NOTHING,
    Column,
    Drawing,
    Entry,
    Section,
    Table,
    axis_words,
    cell_entry,
    cell_words,
    counted,
    interval,
    mean_entry,
    mean_words,
    metric_words,
    number,
    reading_entries,
)
from stripedrag.eval.reporting.view import View


def thesis(view: View) -> Section:
    """Quality against the budget of tokens with the evidence's recall on the same axes, and what each place costs."""
    section = Section("thesis", "Does filling the window pay?", brief=True)
    for task, cells in view.cells("rag", "long_documents").items():
        compared = {cell.cell["context"] for cell in cells} - {"fill", "head", "none"}
        if view.kind(task) == "long_documents" and not compared:
            continue  # told in a table of its own
        recalls = [recall for recall in view.analysis.recalls if recall.task == task]
        metric = metric_words(view.first_metric(task))
        svg = plots.budget_curves(cells, recalls, metric, view.drawn(cells), f"budget-{task}")
        section.drawings.append(Drawing.of(svg, _thesis_caption(task, cells)))
        section.tables.append(_thesis_table(view, task, cells, recalls))
    return section


def _thesis_table(view: View, task: str, cells: Sequence[Cell], recalls: Sequence[Recall]) -> Table:
    columns = [Column("context"), Column("budget", "tokens"), Column("evidence in it", "mean share")]
    for system in view.models:
        columns.append(Column("answers", metric_words(view.first_metric(task)), system))
        columns += [Column("prompt", "tokens", system), Column("prefill", "s", system)]
    at = {(cell.system, *cell.cell.items()): cell for cell in cells}
    held = {tuple(recall.cell.items()): recall for recall in recalls}
    rows = []
    for place in dict.fromkeys(tuple(cell.cell.items()) for cell in cells):
        where, recall = dict(place), held.get(place)
        budget = where.get("budget_tokens")
        row = [Entry(axis_words("context", where["context"])), Entry(NOTHING if budget is None else f"{budget:,}")]
        row.append(mean_entry(recall, recall.samples, recall.samples) if recall else Entry(NOTHING))
        for system in view.models:
            cell = at.get((system, *place))
            row += [cell_entry(cell), *reading_entries(cell)]
        rows.append(row)
    note = "Prompt and prefill are medians of what was answered."
    return Table(columns, rows, f"{task}: quality and its price", note, heads=2).measured()


def _thesis_caption(task: str, cells: Sequence[Cell]) -> str:
    """What filling is worth at the largest budget, beside the other contexts."""
    budget = max((b for cell in cells if isinstance(b := cell.cell.get("budget_tokens"), int)), default=None)
    said = []
    for system in dict.fromkeys(cell.system for cell in cells):
        at = {c.cell["context"]: c for c in cells if c.system == system and c.cell.get("budget_tokens") == budget}
        others = [f"{context} {mean_words(c)}" for context, c in at.items() if context not in ("fill", "random")]
        if "fill" in at and others:
            said.append(f"{system}, window filled {mean_words(at['fill'])}, {', '.join(others)}")
    lead = f"At {budget:,} tokens: {'; '.join(said)}. " if said else ""
    return (
        f"{task}. {lead}Filling pays where the thick curve lies above the thin ones. The dashed curve is the "
        "share of the evidence that is in the filled window. Bands and whiskers are 95 % intervals; a hollow mark is "
        "the mean of what did not fail."
    )


def gap(view: View) -> Section:
    """Each cell's answers by where they come from."""
    section = Section("gap", "Where right and wrong answers come from")
    by_task = view.by_task(view.analysis.gaps, view.models)
    for task, gaps in by_task.items():
        rows: dict[str, list[Gap]] = {}
        for found in gaps:
            rows.setdefault(cell_words(found.cell), []).append(found)
        least, most = min(found.questions for found in gaps), max(found.questions for found in gaps)
        each = counted(most, "question") if least == most else f"{least:,} to {counted(most, 'question')}"
        words = (
            f"{task}. Each bar is {each}. Grey is what a better search could win, vermillion what a better reader "
            "could; light blue is right without any context too: nothing was read for it. Right is a substring match "
            "where that is measured, else half of the first metric."
        )
        section.drawings.append(Drawing.of(plots.gap_bars(rows, list(view.drawn(gaps)), f"gap-{task}"), words))
        section.tables.append(_gap_table(task, rows, list(view.drawn(gaps))))
    return section


def _gap_table(task: str, rows: Mapping[str, Sequence[Gap]], systems: Sequence[str]) -> Table:
    columns = [Column("context"), Column("system"), *(Column(kind, meaning) for kind, meaning in GAP_KINDS.items())]
    lines = []
    for place, gaps in rows.items():
        for system in systems:
            shares = {gap.kind: mean_entry(gap) for gap in gaps if gap.system == system}
            lines.append([Entry(place), Entry(system), *(shares.get(kind, Entry(NOTHING)) for kind in GAP_KINDS)])
    note = "Shares of the questions with 95 % intervals, clustered by document."
    return Table(columns, lines, f"{task}: the bars in numbers", note, heads=2, folded=True)


def lengths(view: View) -> Section:
    """Heat maps over length and depth, curves over length, and the lengths that are held."""
    section = Section("length", "Needles and other tasks against length", brief=True)
    tasks = view.length_cells()
    for task, cells in tasks.items():
        if len({cell.cell.get("depth") for cell in cells}) > 1:
            svg = plots.heat_maps(cells, list(view.drawn(cells)), f"heat-{task}")
            words = f"{task}: {metric_words(view.first_metric(task))} from dark (0) to yellow (1); {_lowest(cells)}"
            section.drawings.append(Drawing.of(svg, words))
    by_task = view.by_task(view.analysis.length_scores, view.models)
    curves = {task: scores for task, scores in by_task.items() if len({s.length_tokens for s in scores}) > 1}
    if curves:
        words = (
            "Score against length, over all depths, with 95 % bands. A hollow mark is the mean of what did not fail."
        )
        section.drawings.append(Drawing.of(plots.length_curves(curves, view.styles), words))
    rows = []
    for found in view.analysis.effective_lengths:
        if found.system in view.models and found.task in curves:
            ends = [_reached(n, found.longest_measured) for n in (found.absolute_tokens, found.own_base_tokens)]
            base = Entry(number(found.base), interval(found.base_low, found.base_high))
            rest = [Entry(text) for text in (f"{found.longest_measured:,}", *ends)]
            rows.append([Entry(found.task), Entry(found.system), base, *rest])
    if rows:
        group = "effective length, tokens"
        columns = [Column("task"), Column("system"), Column("base", "score at the shortest")]
        columns += [Column("longest", "tokens measured"), Column("85.6 % or more", "RULER", group)]
        columns += [Column("85 % of base", "NoLiMa", group)]
        note = (
            "The longest length up to which the mean holds at every length measured: ≥ where it held at the longest, "
            '"none" where not even at the shortest. Means alone decide, so with few samples this is rough.'
        )
        section.tables.append(Table(columns, rows, "Effective length", note, heads=2))
    if single := {task: scores for task, scores in by_task.items() if task not in curves}:
        section.tables.append(_single_lengths(view, single))
    return section


def _single_lengths(view: View, tasks: Mapping[str, Sequence[LengthScore]]) -> Table:
    columns = [Column("task"), Column("length", "tokens"), Column("score by"), *(Column(s) for s in view.models)]
    rows = []
    for task, scores in tasks.items():
        at = {score.system: score for score in scores}
        means = [
            mean_entry(s, s.answered, s.samples) if (s := at.get(system)) else Entry(NOTHING) for system in view.models
        ]
        first = scores[0]
        rows.append([Entry(task), Entry(f"{first.length_tokens:,}"), Entry(metric_words(first.metric)), *means])
    return Table(columns, rows, "Tasks at one length", heads=3)


def _lowest(cells: Sequence[Cell]) -> str:
    known = [cell for cell in cells if not math.isnan(cell.mean)]
    if not known:
        return "nothing was answered."
    worst = min(known, key=lambda cell: cell.mean)
    alike = sum(cell.mean == worst.mean for cell in known) - 1
    more = f" (and {counted(alike, 'cell')} more)" if alike else ""
    return f"lowest {mean_words(worst)}, {worst.system} at {cell_words(worst.cell)}{more}."


def _reached(tokens: int | None, longest: int) -> str:
    if tokens is None:
        return "none"
    return f"≥ {tokens:,}" if tokens == longest else f"{tokens:,}"


def positions(view: View) -> Section:
    """Quality against where the evidence begins."""
    section = Section("position", "Quality against the place of the evidence")
    placed = {task for task, cells in view.length_cells().items() if any("depth" in cell.cell for cell in cells)}
    tasks = {  # depths have heat maps, and one place is no curve
        task: places
        for task, places in view.by_task(view.analysis.positions, view.models).items()
        if task not in placed and len({place.start for place in places}) > 1
    }
    if tasks:
        words = (
            "Questions whose evidence was in the filled context, by the fifth of it in which it begins; all budgets "
            "and lengths of a task together. A dip in the middle is text that was lost there."
        )
        section.drawings.append(Drawing.of(plots.position_curves(tasks, view.styles), words))
    return section


def perplexity(view: View) -> Section:
    """Perplexity of stretches against where they end."""
    section = Section("perplexity", "Perplexity against position")
    tasks = view.by_task(view.analysis.losses, view.models)
    if tasks:
        said = [
            f"{task}, {system}: {_perplexity(own[0])} up to token {own[0].position:,}, {_perplexity(own[-1])} up to "
            f"{own[-1].position:,}."
            for task, losses in tasks.items()
            for system in view.models
            if (own := sorted((loss for loss in losses if loss.system == system), key=lambda loss: loss.position))
        ]
        words = f"A model that uses what it has read falls, one that is past its length rises. {' '.join(said)}"
        section.drawings.append(Drawing.of(plots.perplexity_curves(tasks, view.styles), words))
    return section


def _perplexity(loss: Loss) -> str:
    return f"{number(math.exp(loss.nats), 1)} {interval(math.exp(loss.low), math.exp(loss.high), 1)}".strip()
