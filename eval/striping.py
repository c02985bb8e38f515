"""Striping from files to a model folder with its card: what `stripedrag stripe` does."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stripedrag.errors import UsageError
from stripedrag.eval.model_card import write_card
from stripedrag.model.loading import load_model
from stripedrag.model.striping import Progress, Recipe, Run
from stripedrag.rag.striping import framing, read_corpus

HELD_OUT = "held-out-"
WORK = "run"  # the folder in the model's with all that a killed run goes on from


def stripe(
    model: str, data: Sequence[Path], held_out: Sequence[Path], to: Path, recipe: Recipe, progress: Progress
) -> Mapping[str, Path]:
    """Stripe `model` into the folder `to`, or go on where a killed run was; returns the files to look at.

    Of several processes the first writes and returns; the others return nothing.

    Raises `UsageError` for a folder that holds something else, a recipe that the model or the data cannot meet,
    `CorpusError` for data that cannot be read, and what `load_model` raises.
    """
    if to.exists() and not (to / WORK).is_dir() and any(to.iterdir()):
        raise UsageError(f"{to} holds something that is no striping run; give a new folder")
    files, apart = corpus_files(data, held_out)
    corpus = read_corpus(files, apart)
    teacher, tokenizer = load_model(model)
    run = Run(to / WORK, recipe, teacher, framing(tokenizer, model), corpus)
    layers = run.hyena_layers(progress)
    student = run.train(layers, progress)
    if not run.processes.is_first:
        return {}
    evaluation = run.finish(student, to)
    tokenizer.save_pretrained(to)
    card = write_card(
        to, to / WORK, name=to.resolve().name, teacher=model, layers=layers, evaluation=evaluation, corpus=corpus
    )
    return {"model": to, "card": card, "changes": to / "changes.safetensors"}


def corpus_files(data: Sequence[Path], held_out: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files to train on and to measure on; a folder stands for its `*.jsonl`, of which those called `held-out-…`
    are to measure on. Raises `UsageError` for a folder without any."""
    files, apart = [], list(held_out)
    for path in data:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(path.glob("*.jsonl"))
        if not found:
            raise UsageError(f"{path} holds no .jsonl file")
        files += [file for file in found if not file.name.startswith(HELD_OUT)]
        apart += [file for file in found if file.name.startswith(HELD_OUT)]
    return files, apart
