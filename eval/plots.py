"""The report's figures as SVG text: the same records give the same bytes. Text stays text, in the reader's own font.

Colours are Okabe and Ito's (2008), which eyes of every kind tell apart; a system keeps its own in every figure, and
markers and dashes say the same once more. Bands and whiskers are 95 % intervals.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from stripedrag.eval.findings import GAP_KINDS, Cell, Cost, Gap, GapKind, LengthScore, Loss, PositionScore, Recall

_RC = {
    "svg.hashsalt": "stripedrag",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_SYSTEMS = ("#0072B2", "#D55E00", "#56B4E9", "#000000", "#999933")
_MARKERS = "osD^vP"
_WIDTH = 11.4  # inches: the text's width on a laptop
# What a context is drawn in; filling the window is the thesis, and has its system's own colour.
_CONTEXTS = {  # colour, marker, line, and how far it stands aside so that whiskers do not cover each other
    "top-5": ("#009E73", "^", "-", 0.955),
    "top-20": ("#CC79A7", "v", "-", 0.98),
    "reranked-5": ("#E69F00", "D", "-", 1.02),
    "random": ("#777777", "x", ":", 1.045),
    "head": ("#56B4E9", "P", ":", 0.93),
}
_FLAT = {"oracle": ("evidence alone (oracle)", "-."), "none": ("no context", (0, (1, 2)))}
_KINDS: dict[GapKind, str] = {
    "known": "#56B4E9",
    "used": "#009E73",
    "guessed": "#F0E442",
    "unused": "#D55E00",
    "missed": "#BBBBBB",
}


@dataclass(frozen=True, slots=True)
class Style:
    """What a system is drawn in."""

    colour: str
    marker: str


def styles(systems: Sequence[str]) -> dict[str, Style]:
    """A style for each system, by its place."""
    return {
        name: Style(_SYSTEMS[place % len(_SYSTEMS)], _MARKERS[place % len(_MARKERS)])
        for place, name in enumerate(systems)
    }


def budget_curves(
    cells: Sequence[Cell], recalls: Sequence[Recall], metric: str, drawn: Mapping[str, Style], name: str
) -> str:
    """Quality against the budget for each context, and the recall of filling on the same axes; a panel a system."""
    with matplotlib.rc_context(_RC):
        figure, panels = _panels(list(drawn), height=4.1, share_y=True)
        budgets = sorted({int(cell.cell["budget_tokens"]) for cell in cells if "budget_tokens" in cell.cell})
        for (system, style), axes in zip(drawn.items(), panels, strict=True):
            found = [cell for cell in cells if cell.system == system]
            for cell in found:
                if cell.cell["context"] in _FLAT and not math.isnan(cell.mean):
                    label, dashes = _FLAT[str(cell.cell["context"])]
                    if "budget_tokens" in cell.cell:  # read at that budget and at no other
                        alone: dict[str, Any] = {"marker": "s", "linestyle": ""}
                        _curve(axes, [(1.07 * _axis(cell, "budget_tokens"), cell)], label, "#333333", **alone)
                        continue
                    axes.axhspan(cell.low, cell.high, color="#000000", alpha=0.045, linewidth=0)
                    axes.axhline(cell.mean, color="#333333", linestyle=dashes, linewidth=1.3, label=label)
            for context, (colour, marker, line, shift) in _CONTEXTS.items():
                points = [(shift * _axis(c, "budget_tokens"), c) for c in found if c.cell["context"] == context]
                thin: dict[str, Any] = {"marker": marker, "linestyle": line, "linewidth": 1.3, "markersize": 4.5}
                _curve(axes, points, context, colour, whiskers=True, **thin)
            filled = [(_axis(cell, "budget_tokens"), cell) for cell in found if cell.cell["context"] == "fill"]
            thick: dict[str, Any] = {"marker": style.marker, "linewidth": 2.8, "markersize": 7, "zorder": 4}
            _curve(axes, filled, "window filled", style.colour, **thick)
            aside = 1.0 if len(budgets) > 1 else 0.96  # a point alone has whiskers, which would cover the answers'
            held = [(aside * _axis(r, "budget_tokens"), r) for r in recalls if r.cell["context"] == "fill"]
            dashed: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.4, "marker": "_", "markersize": 7}
            _curve(axes, held, "evidence in the filled window", "#000000", band=0.0, **dashed)
            axes.set(title=system, xlabel="budget: tokens of prompt and answer", ylim=(-0.02, 1.02))
            _lengths(axes, budgets)
        panels[0].set_ylabel(f"{metric}; share of the evidence (dashed)")
        _legend(figure, panels, columns=4)
        return _svg(figure, name)


def gap_bars(rows: Mapping[str, Sequence[Gap]], systems: Sequence[str], name: str) -> str:
    """Where answers come from: a stacked bar a row, a panel a system. A row has the gaps of all systems and kinds."""
    with matplotlib.rc_context(_RC | {"axes.grid": False}):
        figure, panels = _panels(systems, height=1.3 + 0.27 * len(rows), share_y=True)
        for system, axes in zip(systems, panels, strict=True):
            for row, gaps in enumerate(rows.values()):
                _gap_bar(axes, row, {gap.kind: 100 * gap.mean for gap in gaps if gap.system == system})
            axes.set(title=system, xlabel="% of questions", xlim=(0, 100))
            axes.set_yticks(range(len(rows)), list(rows))
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        panels[0].invert_yaxis()
        _legend(figure, panels, columns=3)
        return _svg(figure, name)


def _gap_bar(axes: Any, row: int, percents: Mapping[GapKind, float]) -> None:
    left = 0.0
    for kind, meaning in GAP_KINDS.items():
        share, label = percents[kind], f"{kind}: {meaning}"
        axes.barh(row, share, left=left, color=_KINDS[kind], height=0.78, edgecolor="white", label=label)
        if share >= 7:
            ink = "white" if kind in ("used", "unused") else "#222222"
            middle = left + share / 2
            axes.text(middle, row, f"{share:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
        left += share


def heat_maps(cells: Sequence[Cell], systems: Sequence[str], name: str) -> str:
    """Scores over length and depth, a panel a system; each cell with its score, interval and number of answers."""
    lengths = sorted({int(cell.cell["length_tokens"]) for cell in cells})
    depths = sorted({float(cell.cell["depth"]) for cell in cells})
    with matplotlib.rc_context(_RC | {"axes.grid": False}):
        figure, panels = _panels(systems, height=1.1 + 0.5 * len(depths), share_y=True)
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="#eeeeee")
        for system, axes in zip(systems, panels, strict=True):
            at = {(c.cell["depth"], c.cell["length_tokens"]): c for c in cells if c.system == system}
            scores = [[at[d, n].mean if (d, n) in at else math.nan for n in lengths] for d in depths]
            axes.pcolormesh(scores, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1)
            for row, depth in enumerate(depths):
                for column, length in enumerate(lengths):
                    _heat_text(axes, column + 0.5, row + 0.5, at.get((depth, length)), small=len(lengths) > 5)
            axes.set(title=system, xlabel="length, tokens")
            axes.set_xticks([column + 0.5 for column in range(len(lengths))], _length_labels(lengths))
            axes.set_yticks([row + 0.5 for row in range(len(depths))], [f"{100 * depth:.0f} %" for depth in depths])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].invert_yaxis()
        panels[0].set_ylabel("depth of the needle")
        return _svg(figure, name)


def _heat_text(axes: Any, x: float, y: float, cell: Cell | None, *, small: bool) -> None:
    if cell is None:
        return
    known = not math.isnan(cell.mean)
    place = {"ha": "center", "va": "center", "color": "white" if known and cell.mean <= 0.5 else "#111111"}
    within = f"[{cell.low:.2f}, {cell.high:.2f}] " if known and not small else ""
    axes.text(x, y - 0.13, f"{cell.mean:.2f}" if known else "\N{EN DASH}", fontweight="bold", **place)
    axes.text(x, y + 0.24, f"{within}n {cell.answered}", fontsize=6.8, **place)


def length_curves(tasks: Mapping[str, Sequence[LengthScore]], drawn: Mapping[str, Style]) -> str:
    """Score against length over all depths, a panel a task."""
    with matplotlib.rc_context(_RC):
        figure, panels = _panels(list(tasks), height=3.1, share_y=True)
        for (task, scores), axes in zip(tasks.items(), panels, strict=True):
            _systems(axes, {s: [(c.length_tokens, c) for c in scores if c.system == s] for s in drawn}, drawn)
            axes.set(title=task, xlabel="length, tokens", ylim=(-0.02, 1.02))
            _lengths(axes, sorted({score.length_tokens for score in scores}))
        panels[0].set_ylabel("score")
        _legend(figure, panels, columns=4)
        return _svg(figure, "length")


def position_curves(tasks: Mapping[str, Sequence[PositionScore]], drawn: Mapping[str, Style]) -> str:
    """Score against the place where the evidence begins, a panel a task."""
    with matplotlib.rc_context(_RC):
        figure, panels = _panels(list(tasks), height=3.1, share_y=True)
        for (task, places), axes in zip(tasks.items(), panels, strict=True):
            points = {s: [(50 * (p.start + p.end), p) for p in places if p.system == s] for s in drawn}
            _systems(axes, points, drawn)
            axes.set(title=task, xlabel="where the evidence begins, % of context", xlim=(0, 100), ylim=(-0.02, 1.02))
        panels[0].set_ylabel("score")
        _legend(figure, panels, columns=4)
        return _svg(figure, "position")


def perplexity_curves(tasks: Mapping[str, Sequence[Loss]], drawn: Mapping[str, Style]) -> str:
    """Perplexity of the stretch that ends at a position, a panel a task."""
    with matplotlib.rc_context(_RC):
        figure, panels = _panels(list(tasks), height=3.1)
        for (task, losses), axes in zip(tasks.items(), panels, strict=True):
            _systems(axes, {s: [(p.position, _exp(p)) for p in losses if p.system == s] for s in drawn}, drawn)
            axes.set(title=task, xlabel="position, tokens", ylabel="perplexity per reference token")
            means = [math.exp(loss.nats) for loss in losses if loss.system in drawn]
            axes.set_ylim(min(means) / 2, 2 * max(means))  # a band of few texts can reach into the thousands
            _lengths(axes, sorted({loss.position for loss in losses}))
        _legend(figure, panels, columns=4)
        return _svg(figure, "perplexity")


def cost_curves(costs: Sequence[Cost], drawn: Mapping[str, Style], name: str) -> str:
    """Time to the first token with its range, decoding rate, peak memory and cache against length."""
    lengths = sorted({cost.length_tokens for cost in costs})
    quantities = {
        "time to the first token": ("first_token_s", 1.0, "s, log scale"),
        "decoding": ("decode_tokens_per_s", 1.0, "tokens/s"),
        "peak memory": ("peak_bytes", 1e-6, "MB above idle"),
        "cache": ("cache_bytes", 1e-6, "MB"),
    }
    known = {title: q for title, q in quantities.items() if any(not math.isnan(getattr(c, q[0])) for c in costs)}
    with matplotlib.rc_context(_RC):
        figure, panels = _panels(list(known), height=3.1)
        for (title, (field, scale, unit)), axes in zip(known.items(), panels, strict=True):
            for system, style in drawn.items():
                points = [(c.length_tokens, _ranged(c, field, scale)) for c in costs if c.system == system]
                _curve(axes, points, system, style.colour, marker=style.marker)
            axes.set(title=title, xlabel="length, tokens", ylabel=unit)
            _lengths(axes, lengths)
            if field == "first_token_s":
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            else:
                axes.set_ylim(bottom=0)
        _legend(figure, panels, columns=4)
        return _svg(figure, name)


@dataclass(frozen=True, slots=True)
class _Point:
    mean: float
    low: float
    high: float


def _exp(loss: Loss) -> _Point:
    return _Point(math.exp(loss.nats), math.exp(loss.low), math.exp(loss.high))


def _ranged(cost: Cost, field: str, scale: float) -> _Point:
    ends = [scale * getattr(cost, f"{field}_{end}", math.nan) for end in ("min", "max")]
    return _Point(scale * getattr(cost, field), *ends)


def _systems(axes: Any, points: Mapping[str, Sequence[tuple[Any, Any]]], drawn: Mapping[str, Style]) -> None:
    for system, style in drawn.items():
        _curve(axes, points[system], system, style.colour, marker=style.marker)


def _axis(record: Cell | Recall, name: str) -> float:
    return float(record.cell[name])


def _curve(
    axes: Any,
    points: Sequence[tuple[float, Any]],
    label: str,
    colour: str,
    *,
    band: float = 0.18,
    whiskers: bool = False,
    **line: Any,
) -> None:
    """A line through (x, estimate) with a band or whiskers; what is NaN is left out. A point alone has a whisker.

    A hollow mark is the mean of a cell in which something failed.
    """
    known = sorted(((x, e) for x, e in points if not math.isnan(e.mean)), key=lambda point: point[0])
    if not known:
        return
    x, means = [x for x, _ in known], [e.mean for _, e in known]
    lows, highs = [e.low for _, e in known], [e.high for _, e in known]
    axes.plot(x, means, **{"color": colour, "label": label, "linewidth": 1.8, "markersize": 5} | line)
    hollow = [(x, e.mean) for x, e in known if isinstance(e, Cell | LengthScore) and e.answered < e.samples]
    if hollow:  # drawn over the line's own mark
        inside = {"color": "white", "markeredgecolor": colour, "markersize": 6, "zorder": 5}
        axes.plot(*zip(*hollow, strict=True), linestyle="", marker=line["marker"], **inside)
    if whiskers or len(known) == 1:
        axes.vlines(x, lows, highs, color=colour, alpha=0.55, linewidth=1)
    else:
        axes.fill_between(x, lows, highs, color=colour, alpha=band, linewidth=0)


def _lengths(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis whose ticks are the lengths measured."""
    if not lengths:
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(_length_labels(lengths))
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)


def _length_labels(lengths: Sequence[int]) -> list[str]:
    """Whole numbers of tokens; where there are many, multiples of 1,024 as 2k, 4k."""
    short = len(lengths) > 5
    return [f"{n // 1024}k" if short and n % 1024 == 0 else f"{n:,}" for n in lengths]


def _panels(names: Sequence[str], *, height: float, share_y: bool = False) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each name: as wide as the text for two and more, half as wide for one."""
    across = min(len(names), 4)
    down = math.ceil(len(names) / across)
    width = _WIDTH if across > 1 else 0.62 * _WIDTH
    figure = Figure(figsize=(width, height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=share_y)
    panels = list(grid.flat)
    for spare in panels[len(names) :]:
        spare.remove()
    return figure, panels[: len(names)]


def _legend(figure: Figure, panels: Sequence[Any], *, columns: int) -> None:
    """One legend below all panels: each label once, with a stroke of every colour that it has in them."""
    handles: dict[str, dict[Any, Any]] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            colour = handle.get_color() if hasattr(handle, "get_color") else None
            handles.setdefault(label, {}).setdefault(colour, handle)
    strokes: list[Any] = [
        found[0] if len(found) == 1 else found for found in (tuple(h.values()) for h in handles.values())
    ]
    side_by_side = {tuple: HandlerTuple(ndivide=None, pad=0.6)}
    place = {"loc": "outside lower center", "ncols": columns, "handlelength": 2.8}
    figure.legend(strokes, list(handles), handler_map=side_by_side, **place)


def _svg(figure: Figure, name: str) -> str:
    """The drawing alone, fit to stand in HTML beside others: ids carry `name`, and no date or namespace of metadata."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
