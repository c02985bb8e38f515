"""A run: every sample through every system, kept line by line, so that a kill costs no sample but the one under way."""

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from stripedrag.errors import UsageError
from stripedrag.eval.data_formats import file_sha256
from stripedrag.eval.meter import Meter, OutOfTimeError, bounded_memory
from stripedrag.eval.reading import DoesNotFitError
from stripedrag.eval.resources import Resources
from stripedrag.eval.run_files import Run, cut_torn_line, keep, only_run_here
from stripedrag.eval.schema import (
    SCHEMA_VERSION,
    Failure,
    Load,
    Machine,
    Manifest,
    Prediction,
    Question,
    SampleRecord,
    Timing,
    agrees,
    content_sha256,
    digest,
    dumps,
)
from stripedrag.eval.suite import Suite
from stripedrag.eval.systems import System
from stripedrag.eval.tasks import ReadingTask

_VERSIONED = ("stripedrag", "torch", "transformers", "tokenizers", "faiss-cpu", "sentence-transformers", "lm_eval")


def run(
    suite: Suite,
    folder: Path,
    *,
    tell: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Run:
    """Run a suite in `folder`, or go on with what is there; the run when it is whole.

    `tell` hears what takes long, `progress` (task, done, of) after each prediction. Raises `UsageError` where the
    folder holds another run or something else, and what tasks and systems raise for what is missing.
    """
    made = Run(folder)
    systems = [spec.open() for spec in suite.systems]
    resources = Resources(seed=suite.seed, reference_tokenizer=suite.reference_tokenizer, folder=folder, tell=tell)
    with only_run_here(folder), closing(resources):
        _claim(made, suite)
        manifest = _manifest(suite, systems)  # first, so that a model that is missing costs no embedding
        if (folder / "manifest.json").exists():  # a commit more is no reason to lose a night's work; all else is
            manifest = manifest.model_copy(update={"commit": made.manifest().commit})
        keep(folder / "manifest.json", manifest.model_dump_json(indent=1) + "\n", "was made with")
        work = list(_samples(suite, resources, tell))
        keep(made.samples, "".join(dumps(SampleRecord.of(sample)) + "\n" for _, sample in work), "asks")
        turns = turns_of(work, systems)
        _refuse_idle(suite, work, turns)
        with bounded_memory():
            _perform(made, turns, manifest.systems, resources, suite.timeout_s, progress)
    return made


def turns_of(work: Sequence[tuple[Any, Any]], systems: Sequence[System]) -> list[tuple[Any, Any, System]]:
    """(task, sample, system) in the order of a run, for samples or their records: who can do what, and is asked to.

    In every other round of a cost task the systems take their turns the other way round, so that none is always first.
    """
    return [
        (task, sample, system)
        for task, sample in work
        for system in (systems[::-1] if int(sample.cell.get("round", 0)) % 2 else systems)
        if sample.operation in system.operations and (task.systems is None or system.name in task.systems)
    ]


def _refuse_idle(suite: Suite, work: Sequence[tuple[Any, Any]], turns: Sequence[tuple[Any, Any, System]]) -> None:
    """Raises `UsageError` for a task that no system does, and for a line or test over cells that there are not."""
    busy = {task.name for task, _, _ in turns}
    if idle := [task.name for task in suite.tasks if task.name not in busy]:
        raise UsageError(f"no system of the suite can do {', '.join(idle)}. Name one that can, or leave it out.")
    cells: dict[str, list[Any]] = {}
    for task, sample in work:
        cells.setdefault(task.name, []).append(sample)
    for task, cell in suite.named_cells():
        if not any(agrees(sample.cell, cell) for sample in cells[task]):
            some = sorted({json.dumps(sample.cell) for sample in cells[task]})[:3]
            raise UsageError(f"task {task!r} has no cell {json.dumps(cell)}; it has {', '.join(some)}, …")
    for contrast in suite.contrasts:
        if contrast.against_cell is not None and not all(sample.subject for sample in cells[contrast.task]):
            raise UsageError(
                f"the contrast {contrast.label!r} compares cells of {contrast.task!r}, whose samples share nothing "
                f"from cell to cell. Compare systems there."
            )


def _claim(made: Run, suite: Suite) -> None:
    strangers = sorted(entry.name for entry in made.folder.iterdir() if not entry.name.startswith("."))
    if strangers and "suite.json" not in strangers:
        raise UsageError(f"{made.folder} holds {strangers[0]!r} and no run. Choose an empty folder.")
    if not made.predictions.exists():  # what was refused before anything was done may be mended and tried again
        for file in (made.folder / "suite.json", made.folder / "manifest.json", made.samples):
            if file.is_file():
                file.unlink()
    keep(made.folder / "suite.json", suite.model_dump_json(indent=1, by_alias=True) + "\n", "is of")


def _samples(suite: Suite, resources: Resources, tell: Callable[[str], None]) -> Iterator[tuple[Any, Any]]:
    for task in suite.tasks:
        tell(f"making the samples of {task.name}")
        samples = list(task.samples(resources))
        if len({sample.id for sample in samples}) < len(samples):
            raise UsageError(f"task {task.name!r} asks the same thing twice: a length, depth or budget is repeated")
        if isinstance(task, ReadingTask):
            resources.answers[task.name] = [task.oracle(s) for s in samples if isinstance(s, Question)]
        yield from ((task, sample) for sample in samples)


def _manifest(suite: Suite, systems: Sequence[System]) -> Manifest:
    import torch

    from stripedrag.eval.bench.report import commit, processor

    files = {f"{task.name}.{name}": Path(file).resolve() for task in suite.tasks for name, file in task.data().items()}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        suite_sha256=digest(suite.model_dump(mode="json")),
        seed=suite.seed,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _VERSIONED}},
        commit=commit(),
        machine=Machine(
            processor=processor(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        ),
        data_sha256={name: file_sha256(file) for name, file in files.items()},
        systems={system.name: dict(system.identity()) for system in systems},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _perform(
    made: Run,
    turns: Sequence[tuple[Any, Any, System]],
    identities: dict[str, Any],
    resources: Resources,
    timeout_s: float,
    progress: Callable[[str, int, int], None],
) -> None:
    for file in (made.predictions, made.timings):
        cut_torn_line(file)
    done = made.lines(made.predictions, Prediction)
    known = {(p.system, p.sample_id): p.key for p in done}
    by_key = {(p.system, p.key): p.output for p in done}
    with (
        made.predictions.open("a", encoding="utf-8") as predictions,
        made.timings.open("a", encoding="utf-8") as timings,
    ):
        for number, (task, sample, system) in enumerate(turns, start=1):
            key = _key(identities[system.name], task, sample, resources)
            if known.get((system.name, sample.id)) != key:
                output = by_key.get((system.name, key))
                if output is None:
                    meter = Meter(trim=isinstance(sample, Load) and sample.measures == "bytes")
                    output = _attempt(system, task, sample, resources, meter, timeout_s)
                    timing = Timing(
                        key=key,
                        system=system.name,
                        sample_id=sample.id,
                        prefill_s=meter.prefill_s,
                        decode_s=meter.decode_s,
                        total_s=meter.total_s,
                        peak_bytes=meter.peak_bytes,
                        joules=meter.joules,
                    )
                    _append(timings, timing)  # first, so that no prediction is without its timing
                    by_key[system.name, key] = output
                made_of = Prediction(key=key, system=system.name, sample_id=sample.id, output=output)
                _append(predictions, made_of)
            progress(task.name, number, len(turns))


def _key(identity: dict[str, Any], task: Any, sample: Any, resources: Resources) -> str:
    """The hash of system, content and settings. Alike samples share it, and one result; a load is carried each time."""
    settings = {
        "kind": task.kind,
        "answer_tokens": getattr(task, "answer_tokens", None),
        "overflow": getattr(task, "overflow", None),
        "search": _search_settings(task, resources) if sample.operation == "search" else None,
        "load": sample.id if isinstance(sample, Load) else None,
    }
    return digest([identity, settings, content_sha256(sample)])


def _search_settings(task: Any, resources: Resources) -> list[object]:
    return [task.index_content(resources), getattr(task, "budgets", ()), getattr(task, "tops", ())]


def _attempt(system: System, task: Any, sample: Any, resources: Resources, meter: Meter, timeout_s: float) -> Any:
    import torch

    try:
        with meter.running(timeout_s):
            return system.perform(sample, task, resources, meter)
    except DoesNotFitError as error:
        return Failure(reason="overflow", message=str(error))
    except OutOfTimeError as error:
        return Failure(reason="timeout", message=str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Failure(reason="out-of-memory", message=str(error).partition("\n")[0])
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch says on the CPU
            raise
        return Failure(reason="out-of-memory", message=str(error).partition("\n")[0])


def _append(file: IO[str], record: BaseModel) -> None:
    try:
        file.write(dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"{file.name} cannot be written: {error.strerror}. Then the same command goes on.") from error
