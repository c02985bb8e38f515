"""Striping from files to a model folder with its card: what `stripedrag stripe` does."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from stripedrag.errors import SetupError, UsageError
from stripedrag.eval.model_card import write_card
from stripedrag.eval.run_files import only_run_here
from stripedrag.hardware import fast_dtype
from stripedrag.model.loading import load_model
from stripedrag.model.striping import Progress, Recipe, Run
from stripedrag.model.striping.processes import Processes
from stripedrag.rag.striping import framing, read_corpus

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
) -> Mapping[str, Path]:
    """Stripe `model` into the folder `to`, or go on where a killed run was; returns the files to look at.

    Of several processes the first writes and returns; the others return nothing.

    Raises `UsageError` for a folder that holds something else or where another process runs, for a recipe that the
    model or the data cannot meet, `CorpusError` for data that cannot be read, and what `load_model` raises.
    """
    if to.exists() and not (to.is_dir() and ((to / WORK / "recipe.json").is_file() or not _has_strangers(to))):
        raise UsageError(f"{to} holds something that is no striping run; give a new folder")
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
        )
        layers = run.hyena_layers(progress)
        evaluation = run.finish(run.train(layers, progress), to)
        if evaluation is None:
            return {}
        tokenizer.save_pretrained(to)
        name = to.resolve().name
        card = write_card(to, to / WORK, name=name, teacher=model, layers=layers, evaluation=evaluation, corpus=corpus)
    return {"model": to, "card": card, "changes": to / "changes.safetensors"}


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
