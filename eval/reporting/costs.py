"""What answers cost, against length."""

from collections.abc import Sequence

from stripedrag.eval import plots
from stripedrag.eval.findings import Cost
from stripedrag.eval.reporting.parts import (
    Column,
    Drawing,
    Entry,
    Section,
    Table,
    counted,
    counts_words,
    interval,
    number,
    significant,
)
from stripedrag.eval.reporting.view import View

_QUANTITIES = {"first_token_s": "time to the first token", "cache_bytes": "cache", "peak_bytes": "peak memory"}


def cost_entries(cost: Cost) -> list[tuple[Column, Entry]]:
    """A cost's figures below their columns."""
    rounds = counted(cost.rounds, "round")
    return [
        (Column("first token", "s"), Entry(significant(cost.first_token_s), _range(cost, "first_token_s"), rounds)),
        (Column("prefill", "tokens/s"), Entry(significant(cost.prefill_tokens_per_s))),
        (
            Column("decode", "tokens/s"),
            Entry(significant(cost.decode_tokens_per_s), _range(cost, "decode_tokens_per_s")),
        ),
        (Column("cache", "MB"), Entry(significant(cost.cache_bytes / 1e6))),
        (Column("peak memory", "MB above idle"), Entry(significant(cost.peak_bytes / 1e6))),
        (Column("energy", "J"), Entry(significant(cost.joules))),
    ]


def cost_section(view: View) -> Section:
    """Curves, the figures they are drawn from, and how they grow."""
    section = Section("cost", "Cost against length", brief=True)
    for task, costs in view.by_task(view.analysis.costs, view.models).items():
        if any(cost.rounds for cost in costs):
            svg = plots.cost_curves(costs, view.styles, f"cost-{task}")
            words = f"{task}: medians of the rounds; the band is their range. {_caption(costs)}"
            section.drawings.append(Drawing.of(svg, words))
        rows = []
        for cost in sorted(costs, key=lambda cost: cost.length_tokens):
            figures = [entry for _, entry in cost_entries(cost)]
            failures = Entry(counts_words(cost.failures))
            rows.append([Entry(f"{cost.length_tokens:,}"), Entry(cost.system), *figures, failures])
        figure_columns = [column for column, _ in cost_entries(costs[0])]
        columns = [Column("length", "tokens"), Column("system"), *figure_columns, Column("failures")]
        note = "Medians of the rounds, all systems in turn in each; in brackets their range."
        section.tables.append(Table(columns, rows, task, note, heads=2).measured())
    rows = []
    for fit in view.analysis.cost_fits:
        if fit.system in view.models:
            exponent = Entry(number(fit.exponent), interval(fit.low, fit.high), counted(fit.lengths, "length"))
            rows.append([Entry(fit.system), Entry(_QUANTITIES.get(fit.quantity, fit.quantity)), exponent])
    if rows:
        columns = [Column("system"), Column("quantity"), Column("exponent of the length")]
        note = "1 grows with the length, 2 with its square, 0 not at all. Least squares on logarithms, 95 % interval."
        section.tables.append(Table(columns, rows, "How costs grow", note, heads=2))
    return section


def _range(cost: Cost, quantity: str) -> str:
    least, most = (getattr(cost, f"{quantity}_{end}") for end in ("min", "max"))
    return f"[{significant(least)}, {significant(most)}]" if cost.rounds > 1 else ""


def _caption(costs: Sequence[Cost]) -> str:
    longest = max(cost.length_tokens for cost in costs if cost.rounds)
    there = [cost for cost in costs if cost.rounds and cost.length_tokens == longest]
    said = [f"{cost.system} {significant(cost.first_token_s)} {_range(cost, 'first_token_s')} s" for cost in there]
    return f"To the first token after {longest:,} tokens: {', '.join(said)}."
