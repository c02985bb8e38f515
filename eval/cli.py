"""The console script: the command line of `rag/`, and beside it the commands of this room."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stripedrag.errors import UsageError
from stripedrag.eval.bench import BENCHES
from stripedrag.rag.cli import app, err, main, quiet_libraries

if TYPE_CHECKING:
    from stripedrag.eval.bench.report import Report

__all__ = ["main"]


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help=f"One of {', '.join(BENCHES)}; what each is: eval/README.md.", show_default=False)
    ],
    to: Annotated[
        Path | None, typer.Option("--to", help="Write the raw figures to this JSON file, and a plot beside it (.svg).")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions; the medians are shown.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure speed, each side interleaved with its rival, beside what the machine can do."""
    if name not in BENCHES:
        raise UsageError(f"no bench {name!r}; there is {', '.join(BENCHES)}")
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}; it is at least 1")
    if to is not None and to.suffix == ".svg":
        raise UsageError(f"{to} is where the plot would go; name the JSON file, {to.with_suffix('.json').name}")
    scratch = to.with_name(f".{to.name}.part") if to is not None else None
    if scratch is not None:  # before the work, so that a bad path costs none of it; `to` itself is only ever whole
        scratch.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch()
        if find_spec("matplotlib") is None:
            err.print("no plot will be drawn: matplotlib is missing (`pip install 'stripedrag[bench]'`)", markup=False)
    quiet_libraries()
    report: Report = import_module(BENCHES[name]).run(repeats)
    text = json.dumps(report.figures, indent=1)
    if to is not None and scratch is not None:
        scratch.write_text(text + "\n")
        scratch.replace(to)
        if report.plot is not None and find_spec("matplotlib") is not None:
            drawing = scratch.with_suffix(".svg")
            report.plot(drawing)
            drawing.replace(to.with_suffix(".svg"))
    typer.echo(text if as_json else report.table)
