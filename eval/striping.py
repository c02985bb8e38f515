"""Striping from files to a model folder with its card: what `stripedrag stripe` does."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stripedrag.errors import SetupError, UsageError, faults
from stripedrag.eval.model_card import write_card
from stripedrag.eval.run_files import only_run_here
from stripedrag.hardware import fast_dtype
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import STRIPED, WEIGHTS
from stripedrag.model.striping import Progress, Recipe, Run
from stripedrag.model.striping.processes import Processes
from stripedrag.rag.striping import framing, read_corpus
from stripedrag.weights import sha256

HELD_OUT = "held-out-"
WORK = "run"  # the folder in the model's with all that a killed run goes on from


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
    if to.exists() and not (to.is_dir() and ((to / WORK / "recipe.json").is_file() or not _has_strangers(to))):
        raise UsageError(f"{to} holds something that is no striping run; give a new folder")
    begins_from = None
    if begin is not None:
        recipe, begins_from = _begun(recipe, begin)
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
    with only_run_here(to / WORK) if processes.is_first else nullcontext(), _writing(to):
        run = Run(
            to / WORK,
            recipe,
            teacher,
            framing(tokenizer, model),
            corpus,
            processes=processes,
            teacher_cache=teacher_cache,
            begins_from=begins_from,
        )
        layers = run.hyena_layers(progress)
        evaluation = run.finish(run.train(layers, progress), to)
        if evaluation is None:
            return {}
        tokenizer.save_pretrained(to)
        name = to.resolve().name
        card = write_card(to, to / WORK, name=name, teacher=model, layers=layers, evaluation=evaluation, corpus=corpus)
    return {"model": to, "card": card, "changes": to / "changes.safetensors"}


def _begun(recipe: Recipe, begin: str) -> tuple[Recipe, dict[str, Tensor]]:
    """The recipe with the layers of the run to begin from and the hash of its changes, and these."""
    folder = Path(begin)
    config_file, file = folder / "config.json", folder / "changes.safetensors"
    if begin == STRIPED:
        config_file, file = WEIGHTS / f"{STRIPED}.json", WEIGHTS / f"{STRIPED}.safetensors"
    try:
        config = StripedHyenaConfig(**json.loads(config_file.read_text(encoding="utf-8")))
        changed = load_file(file)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UsageError(
            f"--from is {begin}: {error}; give a folder that `stripedrag stripe` wrote, or {STRIPED}"
        ) from error
    own = {
        "hyena_layers": tuple(i for i in range(config.num_layers) if i not in config.attn_layer_idxs),
        "modes": config.state_size,
        "taps": config.short_filter_length,
        "rank": next((len(tensor) for name, tensor in changed.items() if name.endswith(".down")), 0),
        "begins_from": sha256(file),
    }
    for name in own.keys() & recipe.model_fields_set:
        if getattr(recipe, name) not in (None, own[name]):
            raise UsageError(
                f"the recipe's {name} is {getattr(recipe, name)} and that of {file} is {own[name]}; leave it out"
            )
    try:
        return Recipe.model_validate(recipe.model_dump() | own), changed
    except ValidationError as error:
        raise UsageError(f"with --from {begin} the recipe cannot be: {faults(error)}") from error


def _has_strangers(to: Path) -> bool:
    """Whether a folder holds anything that was not left there by a run that was refused before it began."""
    return any(path not in (to / WORK, to / WORK / ".lock") for path in to.rglob("*"))


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
    files = [file for path in data for file in _files(path)]
    apart = [file for file in files if file.name.startswith(HELD_OUT)]
    named = [file for path in held_out for file in _files(path)]
    return [file for file in files if file not in apart], list(dict.fromkeys([*named, *apart]))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.iterdir() if one.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")))
    if not found:
        raise UsageError(f"{path} holds no .jsonl file")
    return found
