"""The folder of a run:

    suite.json         the suite, whole
    manifest.json      versions, hashes, machine, and the commit at which the run began
    samples.jsonl      what is asked, without the texts (they come again from task, data and seed)
    predictions.jsonl  what came back, one line a system and sample, in the order of the run
    timings.jsonl      what it cost, the same lines; the one file whose bytes differ from run to run
    scores.jsonl       what the predictions are worth, made from them again at any time
    indexes/           what was embedded for it; may be deleted
A line is whole or is not there: a torn one at the end is cut off when the run goes on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stripedrag.errors import UsageError
from stripedrag.eval.schema import OUTPUT_KINDS, Manifest, Prediction, SampleRecord
from stripedrag.eval.suite import Suite, parse_suite
from stripedrag.files import locked, written_whole

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
        return parse_suite(_json(file), name=str(file))

    def results(self) -> tuple[dict[str, SampleRecord], list[Prediction]]:
        """The samples by id, and the predictions. Raises `UsageError` where these are not of this suite and samples."""
        samples = {sample.id: sample for sample in self.lines(self.samples, SampleRecord)}
        predictions = self.lines(self.predictions, Prediction)
        _refuse_strangers(self.folder, self.suite(), samples, predictions)
        return samples, predictions

    def manifest(self) -> Manifest:
        """What the run was made with. Raises `UsageError` where the file is no manifest of ours."""
        file = self.folder / "manifest.json"
        try:
            return Manifest.model_validate(_json(file))
        except ValidationError as error:
            raise UsageError(
                f"{file} is no manifest of a run: {_first_fault(error)}. Delete the run and start again."
            ) from error

    def lines(self, file: Path, kind: type[Parsed]) -> list[Parsed]:
        """The whole lines of one of the files, none where it is missing. Raises `UsageError` for another kind."""
        if not file.exists():
            return []
        records = []
        for number, line in enumerate(_text(file).split("\n")[:-1], start=1):
            try:
                records.append(kind.model_validate_json(line))
            except ValidationError as error:
                raise UsageError(
                    f"{file}, line {number} is no {kind.__name__}: {_first_fault(error)}. Delete the run, start again."
                ) from error
        return records


def _refuse_strangers(
    folder: Path, suite: Suite, samples: Mapping[str, SampleRecord], predictions: Sequence[Prediction]
) -> None:
    known, tasks = {system.name for system in suite.systems}, {task.name for task in suite.tasks}
    for sample in samples.values():
        if sample.task not in tasks:
            raise UsageError(f"{folder} was changed by hand: no task {sample.task!r} ({sample.id}). Start again.")
    seen: set[tuple[str, str]] = set()
    for prediction in predictions:
        named = (prediction.system, prediction.sample_id)
        sample_of = samples.get(prediction.sample_id)
        fits = sample_of and prediction.output.kind in (OUTPUT_KINDS.get(sample_of.operation), "failure")
        if prediction.system not in known or not fits or named in seen:
            raise UsageError(
                f"{folder} was changed by hand: {' on '.join(named)} is not of this run, or there twice. "
                f"Delete the run and start again."
            )
        seen.add(named)


def _json(file: Path) -> Any:
    text = _text(file)
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{file} cannot be read ({error}). Delete the run and start again.") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}). Delete the run and start again.") from error


def _first_fault(error: ValidationError) -> str:
    """What pydantic says of the first place that is wrong."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `UsageError` where it cannot be written."""
    try:
        with written_whole(file) as scratch:
            scratch.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}. Make room there, or choose another.") from error


def keep(file: Path, text: str, what: str) -> None:
    """Write a file whole, or make sure that it says what it would; raises `UsageError` where it says something else."""
    if file.exists():
        if (found := _text(file)) != text:
            raise UsageError(
                f"{file.parent} {what} something else ({file.name} differs: {_first_difference(found, text)}). "
                f"Choose another folder, or delete this one."
            )
        return
    write_whole(file, text)


def _first_difference(old: str, new: str) -> str:
    for was, now in zip(old.splitlines(), new.splitlines(), strict=False):
        if was != now:
            return f"{was.strip()[:80]} there, {now.strip()[:80]} now"
    return "one is longer than the other"


def cut_torn_line(file: Path) -> None:
    """Cut off what stands after the last line break, if anything does. Raises `UsageError` for what is no file."""
    if not file.exists():
        return
    if not file.is_file():
        raise UsageError(f"{file} is no file. Delete the run and start again.")
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with file.open("r+b") as torn:
            torn.truncate(len(whole))


@contextmanager
def only_run_here(folder: Path) -> Iterator[None]:
    """Raises `UsageError` where another process runs in the folder, or none can."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_alone = stack.enter_context(locked(folder / ".lock", wait=False))
        except OSError as error:
            raise UsageError(f"{folder} cannot take a run: {error.strerror}. Choose another folder.") from error
        if not is_alone:
            raise UsageError(f"another process runs in {folder}. Wait for it, or choose another folder.")
        yield
