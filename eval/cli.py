"""The console script: the command line of `rag/`, and beside it the commands of this room."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stripedrag.errors import UsageError, faults
from stripedrag.eval.bench import BENCHES, LONG_BENCHES, SHORTEST_PROMPT
from stripedrag.files import written_whole
from stripedrag.rag import cli_index as cli_index  # its commands
from stripedrag.rag.cli import app, main
from stripedrag.rag.terminal import err, quiet_libraries, spinner

if TYPE_CHECKING:
    from stripedrag.eval.bench.report import Report
    from stripedrag.model.striping import Progress

__all__ = ["main"]

evaluation = typer.Typer(no_args_is_help=True, help="Run, score and report an evaluation: systems against tasks.")
app.add_typer(evaluation, name="eval")
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@evaluation.command("run")
def eval_run(
    suite: Annotated[
        str,
        typer.Argument(
            help="A suite that ships (quick, compare, look, order, striping, window, full, openllm), or a file.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", help="The run's folder; by default build/eval/ and the suite's name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a suite, then score and report it. A run that was killed goes on where it was, given the same folder."""
    _need_extra()
    quiet_libraries()
    from stripedrag.eval.runs import run
    from stripedrag.eval.suite import load_suite

    declared = load_suite(suite)
    folder = to or Path("build", "eval", declared.name)
    try:
        with _progress() as (tell, progress):
            made = run(declared, folder, tell=tell, progress=progress)
    except KeyboardInterrupt:
        err.print(f"stopped; the same command goes on where it was (in {folder})", markup=False, soft_wrap=True)
        raise
    eval_score(made.folder)
    eval_report(made.folder, as_json=as_json)


@evaluation.command("score")
def eval_score(folder: RunFolder) -> None:
    """Score the predictions of a run anew. Needs no model."""
    _need_extra()
    from stripedrag.eval.run_files import Run
    from stripedrag.eval.scoring import score

    scores = score(Run(folder))
    err.print(f"{len(scores)} predictions scored in {folder / 'scores.jsonl'}", markup=False, soft_wrap=True)


@evaluation.command("report")
def eval_report(folder: RunFolder, as_json: AsJson = False) -> None:
    """Write a scored run's report as HTML, Markdown, JSON and CSV. Needs neither model nor texts."""
    _need_extra()
    from stripedrag.eval.report import write_report
    from stripedrag.eval.run_files import Run

    files = write_report(Run(folder))
    if as_json:
        typer.echo(json.dumps({name: str(path) for name, path in files.items()}, indent=2))
    else:
        for path in files.values():
            typer.echo(path)


def _need_extra() -> None:
    """Raises `UsageError` before any work, where a package of the `eval` extra is missing."""
    if missing := [
        name for name in ("lm_eval", "matplotlib", "rouge_score", "scipy", "yaml") if find_spec(name) is None
    ]:
        raise UsageError(f"an evaluation needs {', '.join(missing)}: `pip install 'stripedrag[eval]'`")


@app.command()
def corpus(
    to: Annotated[Path, typer.Option("--to", help="The folder for the files.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write the corpus that the default model is trained on: texts and questions, and what is held out of both."""
    quiet_libraries()
    from stripedrag.eval.corpus.build import build

    with spinner("building the corpus") as tell:
        written = build(to, tell)
    if as_json:
        typer.echo(json.dumps({str(to / f"{name}.jsonl"): lines for name, lines in written.items()}, indent=2))
    else:
        for name, lines in written.items():
            typer.echo(f"{to / name}.jsonl: {lines:,} lines")


@app.command()
def stripe(
    model: Annotated[
        str, typer.Argument(help="A Llama, Mistral or Qwen2 model: a name, a folder or a hub id.", show_default=False)
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            help="JSON lines of texts {id, title, text} or of questions {id, passage, question, answers}; a folder is "
            "all of its .jsonl files, of which held-out-*.jsonl are not trained on. May come again.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path, typer.Option("--to", help="The folder of the model. A run that was killed goes on.", show_default=False)
    ],
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="A file of either kind to measure on. May come again.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="JSON with layers, stages and rates; the default's stages made the default model's first weights.",
        ),
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder for what the teacher says, which a run of other layers can use again; else in --to.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="How many layers become Hyena layers, or which: 15, or 3,4,9, or 3, for one; 0 only fine-tunes.",
            show_default=False,
        ),
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Go on from what another run changed: its folder, or the default model's name. The layers are its; "
            "--recipe says what comes now.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a StripedHyena of a transformer: rank its layers, distil Hyena layers from some, and write card and curves.

    Hours for a small model on a laptop. Several devices: `accelerate launch -m stripedrag.eval.cli stripe …`.
    """
    quiet_libraries()
    from pydantic import ValidationError

    from stripedrag.eval.striping import stripe as run_stripe
    from stripedrag.model.striping import Recipe

    if begin is not None and (recipe is None or layers is not None):
        raise UsageError("--from goes with --recipe, whose stages are what comes now, and without --layers")
    try:
        declared = Recipe() if recipe is None else Recipe.model_validate_json(recipe.read_bytes())
        if layers is not None:
            named = tuple(int(part) for part in layers.removesuffix(",").split(","))
            if min(named) < 0:
                raise ValueError(layers)
            wanted = named if "," in layers else named[0]
            declared = Recipe.model_validate(declared.model_dump() | {"hyena_layers": wanted})
    except OSError as error:
        raise UsageError(f"{recipe} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        given = " with --layers ".join(str(part) for part in (recipe, layers) if part)
        raise UsageError(f"{given} is no recipe: {faults(error)}") from error
    except ValueError as error:
        raise UsageError(f"--layers is {layers!r}; it is a number, or layers with commas between, as 3,4,9") from error
    if find_spec("matplotlib") is None:
        err.print("no curves will be drawn: matplotlib is missing (`pip install 'stripedrag[bench]'`)", markup=False)
    try:
        with _progress() as (tell, progress):
            tell("reading the data")
            hear = _stages(tell, progress)
            files = run_stripe(
                model, data, held_out or [], to, declared, hear, teacher_cache=teacher_cache, begin=begin
            )
    except KeyboardInterrupt:
        err.print(f"stopped; the same command goes on from the last checkpoint (in {to})", markup=False, soft_wrap=True)
        raise
    if as_json and files:
        typer.echo(json.dumps({name: str(path) for name, path in files.items()}, indent=2))
    for name, path in files.items() if not as_json else ():
        typer.echo(f"{name}: {path}")


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help=f"One of {', '.join(BENCHES)}; what each is: eval/README.md.", show_default=False)
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="Write the raw figures to this JSON file, and a plot beside it (.svg). `generate` and `train` go on "
            "where a run was cut.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions; the medians are shown.")] = 5,
    corpus: Annotated[Path | None, typer.Option(help="`recall` and `stream`: another corpus, JSON lines.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="`recall` and `stream`: the questions on it, JSON lines.")
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            help=f"`generate` and `prefill`: leave out prompts longer than so many tokens, at least {SHORTEST_PROMPT}; "
            "the longest take an hour.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="`filter`: 'cuda' measures the Triton kernels on a GPU; `train`: whole 7B shapes there.",
            metavar="cpu|cuda",
        ),
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure each side in turn with its rival, beside what the machine can do; `recall`: what a budget holds."""
    if name not in BENCHES:
        raise UsageError(f"no bench {name!r}; there is {', '.join(BENCHES)}")
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}; it is at least 1")
    if (corpus is None) != (questions is None) or (corpus is not None and name not in ("recall", "stream")):
        raise UsageError("--corpus and --questions go together, and with `recall` or `stream`")
    if device != "cpu" and (name not in ("filter", "train") or device.partition(":")[0] != "cuda"):
        raise UsageError(f"--device is {device!r}; it is cpu, or with `filter` and `train` cuda")
    data: dict[str, Any] = {} if corpus is None else {"corpus": corpus, "questions": questions}
    data |= {} if device == "cpu" else {"device": device}
    if longest is not None:
        if name not in ("generate", "prefill") or longest < SHORTEST_PROMPT:
            raise UsageError(
                f"--longest is {longest}; it goes with `generate` and `prefill`, from {SHORTEST_PROMPT} on"
            )
        data["longest"] = longest
    if to is not None and to.suffix == ".svg":
        raise UsageError(f"{to} is where the plot would go; name the JSON file, {to.with_suffix('.json').name}")
    if to is not None and to.is_dir():
        raise UsageError(f"{to} is a folder; name a file in it, {to / f'{name}.json'}")
    scratch = to.with_name(f".{to.name}.part") if to is not None else None
    so_far = to.with_name(f".{to.name}.{name}") if to is not None and name in LONG_BENCHES else None
    if scratch is not None:  # before the work, so that a bad path costs none of it; `to` itself is only ever whole
        scratch.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch()
        scratch.unlink()
        if find_spec("matplotlib") is None:
            err.print("no plot will be drawn: matplotlib is missing (`pip install 'stripedrag[bench]'`)", markup=False)
    if so_far is not None:
        data["so_far"] = so_far
        if so_far.exists():
            err.print(f"going on from {so_far}", markup=False, soft_wrap=True)
    quiet_libraries()
    try:
        report: Report = import_module(BENCHES[name]).run(repeats, **data)
    except KeyboardInterrupt:
        if so_far is not None and so_far.exists():
            err.print(f"stopped; the same command goes on from {so_far}", markup=False, soft_wrap=True)
        raise
    text = json.dumps(report.figures, indent=1)
    if to is not None and scratch is not None:
        with written_whole(to) as whole:
            whole.write_text(text + "\n")
        if so_far is not None:
            so_far.unlink(missing_ok=True)
        if report.plot is not None and find_spec("matplotlib") is not None:
            drawing = scratch.with_suffix(".svg")
            report.plot(drawing)
            drawing.replace(to.with_suffix(".svg"))
    typer.echo(text if as_json else report.table)


def _stages(tell: Callable[[str], None], progress: Callable[[str, int, int], None]) -> "Progress":
    """How far a stage of training is, and what was measured on held-out data; off a terminal a line a minute."""
    began: dict[str, tuple[float, int]] = {}
    told = time.monotonic()

    def hear(stage: str, step: int, steps: int, measured: Mapping[str, float]) -> None:
        nonlocal told
        now = time.monotonic()
        start, first = began.setdefault(stage, (now, step))
        progress(stage, step, steps)
        figures = [
            f"{name} {measured[name]:.3f}"
            for name in ("error", "kl", "nats", "answer_nats", "exact")
            if name in measured
        ]
        if figures:
            tell(f"{stage}, step {step} of {steps}: {', '.join(figures)}")
        elif not err.is_terminal and now - told > 60 and step > first:
            left = (now - start) * (steps - step) / (step - first)
            tell(f"{stage}, step {step} of {steps}: {timedelta(seconds=round(left))} left")
            told = now

    return hear


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """What a run tells and how far it is, on stderr: a bar on a terminal, a line a task elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        shown = bar.add_task("preparing", total=None)
        current = ""

        def progress(task: str, done: int, total: int) -> None:
            nonlocal current
            if task != current and not err.is_terminal:
                err.print(f"{task}: {done} of {total}", markup=False)
            current = task
            bar.update(shown, description=task, completed=done, total=total)

        yield (lambda text: err.print(text, markup=False, soft_wrap=True)), progress


if __name__ == "__main__":  # `accelerate launch -m stripedrag.eval.cli`
    main()
