"""Striping from files to a model folder with its card: what `stripedrag stripe` does."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from stripedrag.errors import CheckpointError, SetupError, UsageError, faults
from stripedrag.eval.model_card import write_card
from stripedrag.eval.run_files import only_run_here
from stripedrag.files import written_whole
from stripedrag.hardware import fast_dtype
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import STRIPED, WEIGHTS
from stripedrag.model.striping import Progress, Recipe, Run
from stripedrag.model.striping.changes import TRANSFORMER, striped_model
from stripedrag.model.striping.families import striped_config, transformer_digest
from stripedrag.model.striping.processes import Processes
from stripedrag.rag.striping import framing, read_corpus
from stripedrag.weights import sha256

HELD_OUT = "held-out-"
WORK = "run"  # the folder in the model's with all that a killed run goes on from
BEGUN = "begun-from"  # the folder in that with what the run went on from
_CONFIG, _CHANGES = "config.json", "changes.safetensors"


def stripe(
    model: str,
    data: Sequence[Path],
    held_out: Sequence[Path],
    to: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    teacher_cache: Path | None = None,
    begin: str | None = None,
) -> Mapping[str, Path]:
    """Stripe `model` into the folder `to`, or go on where a killed run was; returns the files to look at.

    With `begin`, a folder that this wrote or the default model's name, training goes on from what was changed there.

    Of several processes the first writes and returns; the others return nothing.

    Raises `UsageError` for a folder that holds something else or where another process runs, for a recipe that the
    model or the data cannot meet, `CorpusError` for data that cannot be read, and what `load_model` raises.
    """
    name = to.resolve().name
    for given in (name, model):
        if not given.isprintable():
            raise UsageError(f"{given!r} cannot be written on the model's card; give a name of printable characters")
    with _writing(to):
        if to.exists() and (not to.is_dir() or _has_strangers(to)):
            raise UsageError(f"{to} holds something that is no striping run; give a new folder")
        if teacher_cache is not None and teacher_cache.exists() and not teacher_cache.is_dir():
            raise UsageError(f"{teacher_cache} is no folder; what the teacher says is kept in one")
    begun = None
    if begin is not None:
        begun = _begun(recipe, begin, to / WORK / BEGUN)
        recipe = begun.recipe
    elif recipe.begins_from:
        raise UsageError(f"the recipe begins from changes of sha256 {recipe.begins_from}; give their folder by --from")
    files, apart = corpus_files(data, held_out)
    corpus = read_corpus(files, apart)
    processes = Processes()
    teacher, tokenizer = load_model(model, dtype=fast_dtype(processes.device), device=processes.device)
    if len(tokenizer) > teacher.config.vocab_size:
        raise UsageError(
            f"the tokenizer of {model} has {len(tokenizer)} ids and the model {teacher.config.vocab_size}; they do not "
            "belong together"
        )
    if begun is not None:
        begun.refuse_unlike(teacher)
    with only_run_here(to / WORK) if processes.is_first else nullcontext(), _writing(to):
        run = Run(
            to / WORK,
            recipe,
            teacher,
            framing(tokenizer, model),
            corpus,
            processes=processes,
            teacher_cache=teacher_cache,
            begins_from=begun.changed if begun else None,
        )
        if begun is not None and processes.is_first:
            begun.keep(to / WORK / BEGUN)
        windows = run.make_windows()  # every process
        layers = run.hyena_layers(progress)
        written = to / WORK / "written"
        evaluation = run.finish(run.train(layers, progress), written)
        if evaluation is None:
            return {}
        tokenizer.save_pretrained(written)
        write_card(
            written,
            to / WORK,
            name=name,
            teacher=model,
            layers=layers,
            windows=windows,
            evaluation=evaluation,
            corpus=corpus,
        )
        _put(written, to)
    return {"model": to, "card": to / "README.md", "changes": to / _CHANGES}


def _put(written: Path, to: Path) -> None:
    """Move a model's files to their place. None of it can be loaded until the last, its config, is there."""
    (to / _CONFIG).unlink(missing_ok=True)
    for file in sorted(written.iterdir(), key=lambda file: file.name == _CONFIG):
        with written_whole(to / file.name) as scratch:
            shutil.copyfile(file, scratch)
        file.unlink()
    written.rmdir()


@dataclass(frozen=True)
class _Begun:
    """What another run changed, its Hyena `layers`, and `recipe`, with these and its hash."""

    config_file: Path
    file: Path
    layers: tuple[int, ...]
    recipe: Recipe
    changed: Mapping[str, Tensor]

    def refuse_unlike(self, teacher: PreTrainedModel) -> None:
        """Raises `UsageError` where the changes are of another transformer."""
        with safe_open(self.file, "pt") as file:
            of = (file.metadata() or {}).get(TRANSFORMER)
        if of not in (None, transformer_digest(teacher)):
            raise UsageError(
                f"{self.file} is of a transformer with tensors of sha256 {of}, not of "
                f"{teacher.config.name_or_path}; give the model that it was made from"
            )
        recipe, tensors = self.recipe, teacher.state_dict()
        try:
            config = striped_config(teacher.config, tensors, self.layers, modes=recipe.modes, taps=recipe.taps)
            striped_model(tensors, config, self.changed)
        except CheckpointError as error:
            raise UsageError(f"{self.file} does not go with {teacher.config.name_or_path}: {error}") from error

    def keep(self, folder: Path) -> None:
        """Leave a copy in `folder`, from which the run can go on when its source is gone or has changed."""
        folder.mkdir(exist_ok=True)
        for source, name in ((self.config_file, _CONFIG), (self.file, _CHANGES)):
            if not (folder / name).exists():
                with written_whole(folder / name) as scratch:
                    shutil.copyfile(source, scratch)


def _begun(recipe: Recipe, begin: str, kept: Path) -> _Begun:
    """What to begin from; `kept` is where the run, if it was begun before, keeps its copy."""
    config_file, file = Path(begin, _CONFIG), Path(begin, _CHANGES)
    if begin == STRIPED:
        config_file, file = WEIGHTS / f"{STRIPED}.json", WEIGHTS / f"{STRIPED}.safetensors"
    instead = f"; this run's own copy of what it began from is {kept}, give that" if (kept / _CHANGES).exists() else ""
    try:
        config = StripedHyenaConfig(**json.loads(config_file.read_text(encoding="utf-8")))
        changed = load_file(file)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UsageError(
            f"--from is {begin}: {error}{instead or f'; give a folder that `stripedrag stripe` wrote, or {STRIPED}'}"
        ) from error
    digest = sha256(file)
    if instead and sha256(kept / _CHANGES) != digest:
        raise UsageError(
            f"--from is {begin}, and this run began from other changes{instead}, or another folder by --to"
        )
    layers = tuple(i for i in range(config.num_layers) if i not in config.attn_layer_idxs)
    own = {
        "hyena_layers": layers,
        "modes": config.state_size,
        "taps": config.short_filter_length,
        "rank": next((len(tensor) for name, tensor in changed.items() if name.endswith(".down")), 0),
        "begins_from": digest,
    }
    for name in own.keys() & recipe.model_fields_set:
        if getattr(recipe, name) not in (None, own[name]):
            raise UsageError(
                f"the recipe's {name} is {getattr(recipe, name)} and that of {file} is {own[name]}; leave it out"
            )
    try:
        return _Begun(config_file, file, layers, Recipe.model_validate(recipe.model_dump() | own), changed)
    except ValidationError as error:
        raise UsageError(f"with --from {begin} the recipe cannot be: {faults(error)}") from error


def _has_strangers(to: Path) -> bool:
    """Whether a folder holds anything that was not left there by a run that was killed or refused before it began."""
    work = to / WORK
    if (work / "model.sha256").is_file():  # a run that began, whatever became of its other files
        return False
    begun = {".lock", "teacher", ".model.sha256.part"}
    strangers = [path for path in to.iterdir() if path != work]
    return bool(strangers) or (work.is_dir() and any(path.name not in begun for path in work.iterdir()))


@contextmanager
def _writing(to: Path) -> Iterator[None]:
    """Raises `SetupError` where files cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SetupError(
            f"a file of the run in {to} could not be written or read: {error}. Mend that (is the disk full?), and "
            "the same command goes on from the last checkpoint."
        ) from error


def corpus_files(data: Sequence[Path], held_out: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files to train on and to measure on; a folder stands for its JSON lines, plain or compressed. What is called
    `held-out-…` is only measured on. Raises `UsageError` for a folder without any."""
    files = _each_once(file for path in data for file in _files(path))
    apart = [file for file in files if file.name.startswith(HELD_OUT)]
    named = [file for path in held_out for file in _files(path)]
    return [file for file in files if file not in apart], _each_once([*named, *apart])


def _each_once(files: Iterable[Path]) -> list[Path]:
    return list({os.path.realpath(file): file for file in files}.values())


def _files(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    found = sorted(one for one in path.iterdir() if one.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")))
    if not found:
        raise UsageError(f"{path} holds no .jsonl file")
    return found
