"""What the report's templates are filled with, and how its numbers are written: NaN is a dash and never 0."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol

from markupsafe import Markup

from stripedrag.eval.findings import Cell
from stripedrag.eval.schema import Axis

NOTHING = "\N{EN DASH}"
_MINUS, _HARD_SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
_METRICS = {
    "token_f1": "token F1",
    "exact_match": "exact match",
    "substring_exact_match": "substring match",
    "words_match": "words match",
    "string_match_all": "all strings found",
    "string_match_part": "some string found",
    "rouge_l": "ROUGE-L",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "nats": "nats per token, less is better",
    "ndcg@10": "nDCG@10",
    "decision": "right to answer or to abstain",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A place in a table: what it says, its interval, and what it is a figure of."""

    text: str
    interval: str = ""
    note: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its name, the unit below it, and the group that it shares with its neighbours."""

    name: str
    unit: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns with entries below them; the first `heads` of a row say what the row is about.

    `folded`: opened by the reader, in HTML.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Entry]]
    title: str = ""
    note: str = ""
    heads: int = 1
    folded: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of neighbouring columns, with the number of these; empty where no column has one."""
        runs = [(group, len(list(columns))) for group, columns in groupby(self.columns, key=lambda c: c.group)]
        return runs if any(group for group, _ in runs) else []

    def measured(self) -> "Table":
        """The table without the columns in which nothing was measured."""
        kept = [
            place
            for place in range(len(self.columns))
            if place < self.heads or any(row[place].text != NOTHING for row in self.rows)
        ]
        columns, rows = [self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=columns, rows=rows)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure and what to see in it."""

    svg: Markup
    caption: str

    @classmethod
    def of(cls, svg: str, caption: str) -> "Drawing":
        """The figure of SVG text from `stripedrag.eval.plots`, in which names are escaped already."""
        return cls(Markup(svg), caption)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a family of tests shows: a summary, what was found, and where nothing was."""

    family: str
    summary: str
    found: Sequence[str]
    rest: Sequence[str]


@dataclass(slots=True)
class Section:
    """Words, then what is drawn, then tables. `brief`: in the Markdown too."""

    id: str
    title: str
    words: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    brief: bool = False


class Mean(Protocol):
    """A mean with its 95 % interval."""

    @property
    def mean(self) -> float:
        """The mean, NaN for nothing."""

    @property
    def low(self) -> float:
        """The interval's lower end."""

    @property
    def high(self) -> float:
        """Its upper end."""


def number(value: float, digits: int = 2) -> str:
    """Fixed digits and a true minus; a dash for NaN."""
    if math.isnan(value):
        return NOTHING
    text = f"{value:,.{digits}f}"
    return text.replace("-", _MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def significant(value: float) -> str:
    """Three significant digits, thousands parted: 0.0123, 1.23, 12.3, 12,345."""
    if math.isnan(value):
        return NOTHING
    return number(value, max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0)


def interval(low: float, high: float, digits: int = 2) -> str:
    """[low, high]; nothing where there is none."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{number(low, digits)}, {number(high, digits)}]"


def mean_words(mean: Mean) -> str:
    """A mean and its interval in a sentence."""
    return f"{number(mean.mean)} {interval(mean.low, mean.high)}".strip()


def mean_entry(mean: Mean | None, answered: int = 0, samples: int = 0, *, strong: bool = False) -> Entry:
    """A mean of `answered` scores, of `samples` that were asked for."""
    if mean is None:
        return Entry(NOTHING)
    note = "" if not samples else f"n {answered:,}" if answered == samples else f"n {answered:,} of {samples:,}"
    return Entry(number(mean.mean), interval(mean.low, mean.high), note, strong)


def cell_entry(cell: Cell | None) -> Entry:
    """A cell's mean."""
    return mean_entry(cell, cell.answered, cell.samples) if cell else Entry(NOTHING)


def reading_entries(cell: Cell | None) -> list[Entry]:
    """What a cell's answers cost to read: median tokens and seconds."""
    if cell is None:
        return [Entry(NOTHING)] * 2
    return [Entry(number(cell.prompt_tokens, 0)), Entry(significant(cell.prefill_s))]


def p_words(p: float) -> str:
    """A p-value as it is printed: "p = .031", "p = .16", "p < .001"; three digits where they decide."""
    if math.isnan(p):
        return "not tested"
    text = "p < .001" if p < 0.001 else f"p = {p:.{3 if p < 0.1 else 2}f}".replace("= 0.", "= .")
    return text.replace(" ", _HARD_SPACE)


def metric_words(metric: str) -> str:
    """A metric's name for people."""
    name, _, budget = metric.partition("@")
    if name == "recall" and budget.isdigit():
        return f"recall at {int(budget):,} tokens"
    if metric.startswith("recall_top_"):
        return f"recall in the best {metric.removeprefix('recall_top_')} chunks"
    return _METRICS.get(metric, metric.replace("_", " "))


def is_loss(metric: str) -> bool:
    """Whether less of it is better."""
    return metric.startswith("nats")


def axis_words(axis: str, value: Axis) -> str:
    """A coordinate of a cell for people: "fill", "2,048 tokens", "depth 50 %"."""
    match axis, value:
        case (("budget_tokens" | "length_tokens"), int()):
            return f"{value:,} tokens"
        case "depth", int() | float():
            return f"depth {100 * value:.0f} %"
        case "context", str():
            return "no context" if value == "none" else value
        case "evidence", str():
            return f"evidence {value}"
    return f"{axis.replace('_', ' ')} {value}"


def cell_words(cell: Mapping[str, Axis]) -> str:
    """A cell for people; "all" where a task has one."""
    return ", ".join(axis_words(axis, value) for axis, value in cell.items()) or "all"


def counted(count: int, noun: str) -> str:
    """The count with its noun: 1 task, 2 tasks."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def counts_words(counts: Mapping[str, int]) -> str:
    """Reasons with their counts: timeout 2, overflow 1; a dash for none."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or NOTHING


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_|\[\]<>#~])", r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")
