"""The report of a run: one self-contained HTML (no network, no script), Markdown, JSON and CSV.

Nothing is measured here: the numbers are those of `stripedrag.eval.analysis`, arranged by the modules beside the
templates so that a person sees in two minutes what was found and what was not.
"""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from pydantic import BaseModel

from stripedrag.errors import UsageError
from stripedrag.eval.findings import Cell, Cost
from stripedrag.eval.reporting.checks import controls, everything, lost
from stripedrag.eval.reporting.costs import cost_section
from stripedrag.eval.reporting.headline import headline, summary, unfinished
from stripedrag.eval.reporting.others import other_tasks, unanswerable
from stripedrag.eval.reporting.parts import markdown
from stripedrag.eval.reporting.quality import gap, lengths, perplexity, positions, thesis
from stripedrag.eval.reporting.verdicts import verdicts
from stripedrag.eval.reporting.view import View
from stripedrag.eval.run_files import Run, write_whole

_SECTIONS = (
    thesis,
    gap,
    lengths,
    positions,
    perplexity,
    unanswerable,
    other_tasks,
    cost_section,
    controls,
    lost,
    everything,
)


def write_report(run: Run, to: Path | None = None) -> dict[str, Path]:
    """Write report.html, report.md, report.json, cells.csv and costs.csv into `to` (the run's folder); paths by name.

    The same files of a run give the same bytes. Raises `UsageError` for a run that was not scored.
    """
    run.suite()  # says so where the folder is no run
    if not run.scores.is_file():
        raise UsageError(
            f"{run.folder} has no {run.scores.name}. Score it first: `stripedrag eval score {run.folder}`."
        )
    view, folder = View(run), run.folder if to is None else to
    texts = {
        **_rendered(view),
        "report.json": _json(view),
        "cells.csv": _csv(Cell, view.analysis.cells),
        "costs.csv": _csv(Cost, view.analysis.costs),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text)
    return {name: folder / name for name in texts}


def _rendered(view: View) -> dict[str, str]:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markdown
    made = [section(view) for section in _SECTIONS]
    shown = {
        "suite": view.suite,
        "versions": view.manifest.versions,
        "summary": summary(view),
        "unfinished": unfinished(view),
        "headline": headline(view),
        "verdicts": verdicts(view),
        "sections": [section for section in made if section.words or section.drawings or section.tables],
    }
    return {name: environment.get_template(f"{name}.jinja").render(shown) for name in ("report.html", "report.md")}


def _json(view: View) -> str:
    """Title, limits, manifest and analysis; NaN is null."""
    about = {"name": view.suite.name, "title": view.suite.title, "limits": view.suite.limits}
    analysis = json.loads(view.analysis.model_dump_json())
    whole = {"suite": about, "manifest": view.manifest.model_dump(mode="json"), "analysis": analysis}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(kind: type[BaseModel], records: Iterable[BaseModel]) -> str:
    """A line a record, the fields in their order; mappings as JSON, NaN as nothing."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(kind.model_fields)
    for record in records:
        values = record.model_dump().values()
        writer.writerow([json.dumps(value) if isinstance(value, dict) else _blank(value) for value in values])
    return file.getvalue()


def _blank(value: object) -> object:
    return "" if isinstance(value, float) and value != value else value
