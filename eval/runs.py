"""A run: every sample through every system, kept line by line, so that a kill costs the sample under way and no other.

The folder of a run:
    suite.json         the suite, whole
    manifest.json      versions, hashes, machine, and the commit at which the run began
    samples.jsonl      what is asked, without the texts (they come again from task, data and seed)
    predictions.jsonl  what came back, one line a system and sample, in the order of the run
    timings.jsonl      what it cost, the same lines; the one file whose bytes differ from run to run
    indexes/           what was embedded for it; may be deleted
A line is whole or is not there: a torn one at the end is cut off when the run goes on.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from stripedrag.errors import UsageError
from stripedrag.eval.meter import Meter, OutOfTimeError, bounded_memory
from stripedrag.eval.reading import DoesNotFitError
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import (
    Failure,
    Load,
    Prediction,
    Question,
    SampleRecord,
    Timing,
    content_sha256,
    digest,
    dumps,
)
from stripedrag.eval.suite import Suite, parse_suite
from stripedrag.eval.systems import System
from stripedrag.eval.tasks import ReadingTask
from stripedrag.weights import sha256

_VERSIONED = ("stripedrag", "torch", "transformers", "tokenizers", "faiss-cpu", "sentence-transformers", "lm_eval")
Parsed = TypeVar("Parsed", bound=BaseModel)


class Run:
    """The files of a run, for those who make it and those who read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples, self.predictions, self.timings, self.scores = (
            folder / f"{name}.jsonl" for name in ("samples", "predictions", "timings", "scores")
        )

    def suite(self) -> Suite:
        """The suite that was run. Raises `UsageError` where the folder is no run."""
        file = self.folder / "suite.json"
        if not file.is_file():
            raise UsageError(f"{self.folder} is no run: it has no suite.json. Make one with `stripedrag eval run`.")
        return parse_suite(json.loads(file.read_text()), name=str(file))

    def manifest(self) -> dict[str, Any]:
        """What the run was made with."""
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    def lines(self, file: Path, kind: type[Parsed]) -> list[Parsed]:
        """The whole lines of one of the files, none where it is missing. Raises `UsageError` for another kind."""
        if not file.exists():
            return []
        records = []
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                records.append(kind.model_validate_json(line))
            except ValidationError as error:
                raise UsageError(
                    f"{file}, line {number} is no {kind.__name__}. Delete the run, start again."
                ) from error
        return records


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
    _claim(made, suite)
    systems = [spec.open() for spec in suite.systems]
    resources = Resources(seed=suite.seed, reference_tokenizer=suite.reference_tokenizer, folder=folder, tell=tell)
    try:
        work = list(_samples(suite, resources, tell))
        manifest = _manifest(suite, systems)
        if (folder / "manifest.json").exists():  # a commit more is no reason to lose a night's work; all else is
            manifest["commit"] = made.manifest().get("commit")
        _keep(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "was made with")
        _keep(made.samples, "".join(dumps(SampleRecord.of(sample)) + "\n" for _, sample in work), "asks")
        with bounded_memory():
            _perform(made, work, systems, manifest["systems"], resources, suite.timeout_s, progress)
    finally:
        resources.close()
    return made


def _claim(made: Run, suite: Suite) -> None:
    made.folder.mkdir(parents=True, exist_ok=True)
    strangers = sorted(entry.name for entry in made.folder.iterdir())
    if strangers and "suite.json" not in strangers:
        raise UsageError(f"{made.folder} holds {strangers[0]!r} and no run. Choose an empty folder.")
    _keep(made.folder / "suite.json", suite.model_dump_json(indent=1, by_alias=True) + "\n", "is of")


def _keep(file: Path, text: str, what: str) -> None:
    """Write a file whole, or make sure that it says what it would; raises `UsageError` where it says something else."""
    if file.exists():
        if (found := file.read_text(encoding="utf-8")) != text:
            raise UsageError(
                f"{file.parent} {what} something else ({file.name} differs: {_first_difference(found, text)}). "
                f"Choose another folder, or delete this one."
            )
        return
    scratch = file.with_name(f".{file.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)


def _first_difference(old: str, new: str) -> str:
    for was, now in zip(old.splitlines(), new.splitlines(), strict=False):
        if was != now:
            return f"{was.strip()[:80]} there, {now.strip()[:80]} now"
    return "one is longer than the other"


def _samples(suite: Suite, resources: Resources, tell: Callable[[str], None]) -> Iterator[tuple[Any, Any]]:
    for task in suite.tasks:
        tell(f"making the samples of {task.name}")
        samples = list(task.samples(resources))
        if len({sample.id for sample in samples}) < len(samples):
            raise UsageError(f"task {task.name!r} asks the same thing twice: a length, depth or budget is repeated")
        if isinstance(task, ReadingTask):
            resources.answers[task.name] = [task.oracle(s) for s in samples if isinstance(s, Question)]
        yield from ((task, sample) for sample in samples)


def _manifest(suite: Suite, systems: Sequence[System]) -> dict[str, Any]:
    import torch

    from stripedrag.eval.bench.report import commit, processor

    files = {f"{task.name}.{name}": Path(file).resolve() for task in suite.tasks for name, file in task.data().items()}
    return {
        "suite_sha256": digest(suite.model_dump(mode="json")),
        "seed": suite.seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONED}},
        "commit": commit(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "data_sha256": {name: sha256(file) for name, file in files.items()},
        "systems": {system.name: dict(system.identity()) for system in systems},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _perform(
    made: Run,
    work: Sequence[tuple[Any, Any]],
    systems: Sequence[System],
    identities: dict[str, Any],
    resources: Resources,
    timeout_s: float,
    progress: Callable[[str, int, int], None],
) -> None:
    for file in (made.predictions, made.timings):
        _cut_torn_line(file)
    done = made.lines(made.predictions, Prediction)
    known = {(p.system, p.sample_id): p.key for p in done}
    by_key = {(p.system, p.key): p.output for p in done}
    turns = [
        (task, sample, system)
        for task, sample in work
        for system in systems
        if sample.operation in system.operations and (task.systems is None or system.name in task.systems)
    ]
    with (
        made.predictions.open("a", encoding="utf-8") as predictions,
        made.timings.open("a", encoding="utf-8") as timings,
    ):
        for number, (task, sample, system) in enumerate(turns, start=1):
            key = _key(identities[system.name], task, sample)
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


def _key(identity: dict[str, Any], task: Any, sample: Any) -> str:
    """The hash of system, content and settings. Alike samples share it, and one result; a load is carried each time."""
    settings = {
        "kind": task.kind,
        "answer_tokens": getattr(task, "answer_tokens", None),
        "overflow": getattr(task, "overflow", None),
        "budgets": getattr(task, "budgets", None) if sample.operation == "search" else None,
        "load": sample.id if isinstance(sample, Load) else None,
    }
    return digest([identity, settings, content_sha256(sample)])


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
    file.write(dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _cut_torn_line(file: Path) -> None:
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with file.open("r+b") as torn:
            torn.truncate(len(whole))
