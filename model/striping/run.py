"""A striping run in a folder: windows, ranking, stages, each done once and found again after a kill."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stripedrag.errors import CheckpointError, UsageError, said
from stripedrag.files import written_whole
from stripedrag.hardware import keep_freed_memory
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping import distillation, layerwise
from stripedrag.model.striping.changes import TRANSFORMER, changes, striped_model, take_up
from stripedrag.model.striping.data import (
    ANSWER,
    Asked,
    Conversations,
    Corpus,
    Framing,
    Piece,
    Text,
    Windows,
    pack,
    text_windows,
)
from stripedrag.model.striping.evaluation import Evaluation, evaluate
from stripedrag.model.striping.families import striped_config, transformer_digest
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.ranking import LayerCost, choose, rank_layers
from stripedrag.model.striping.recipe import Recipe, Stage
from stripedrag.model.striping.student import blocks, make_trainable, stripe_layers
from stripedrag.model.striping.teacher import Teacher
from stripedrag.model.striping.training import Loop, Progress

HELD_OUT_WINDOWS = RANKING_WINDOWS = 16  # of up to 1,024 tokens; of longer ones as many tokens
LEAST_HELD_OUT = 8  # windows at the end, whatever their length
CHECKS_A_STAGE = 10
RANKING_LENGTH = 1024


_COSTS = TypeAdapter(list[LayerCost])


class Run:
    """A run in `folder`, which is made or gone on with."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        teacher: PreTrainedModel,
        framing: Framing,
        corpus: Corpus,
        *,
        processes: Processes | None = None,
        teacher_cache: Path | None = None,
        begins_from: Mapping[str, Tensor] | None = None,
    ) -> None:
        """What the teacher says is kept in `teacher_cache`, by default in `folder`. `begins_from` are the `changes` of
        which the recipe has the hash.

        A recipe may have stages more than the one that the folder's run was begun with: they are gone on with. Raises
        `CheckpointError` for a teacher that cannot be striped so, `UsageError` where the folder holds a run of another
        recipe, model or corpus.
        """
        self.folder, self.recipe, self.framing, self.corpus = folder, recipe, framing, corpus
        self.processes = processes or Processes()
        self._begins_from = begins_from
        _refuse_impossible(recipe, teacher, self.processes)
        _refuse_unknown_sources(recipe, corpus)
        self.teacher = teacher.to(self.processes.device).eval().requires_grad_(False)
        with self.processes.first_alone():
            if self.processes.is_first:
                folder.mkdir(parents=True, exist_ok=True)
            self.sayings = Teacher(teacher, teacher_cache or folder / "teacher")
            model = hashlib.sha256(self.sayings.key + framing.fingerprint()).hexdigest()
            self._claim("model.sha256", model, "of another model or tokenizer")
            self._claim("data.sha256", corpus.fingerprint(), "on other data")
            self._claim_recipe()  # the last: a refused run leaves a kept recipe as it was

    def _claim_recipe(self) -> None:
        """Keep the recipe, or one that goes on where the kept one ends; refuse another."""
        path = self.folder / "recipe.json"
        kept = _kept(path, Recipe.model_validate_json) if path.exists() else None
        if kept is not None and (other := self.recipe.unlike(kept)):
            raise self._another(f"of another recipe, with another {other}")
        if kept != self.recipe and self.processes.is_first:
            _write(path, f"{self.recipe.model_dump_json(indent=1)}\n")

    def _claim(self, name: str, digest: str, kind: str) -> None:
        """Keep what the run is of, or refuse another one."""
        path = self.folder / name
        if path.exists():
            if _kept(path, _digest) != digest:
                raise self._another(kind)
        elif self.processes.is_first:
            _write(path, f"{digest}\n")

    def _another(self, kind: str) -> UsageError:
        return UsageError(f"{self.folder} holds a run {kind}; choose another folder, or remove it")

    def hyena_layers(self, progress: Progress) -> list[int]:
        """The layers that the recipe names, or those that cost least of all; the costs are kept in `ranking.json`."""
        wanted = self.recipe.hyena_layers
        if isinstance(wanted, tuple):
            return sorted(wanted)
        if wanted == 0:
            return []
        path = self.folder / "ranking.json"
        with self.processes.first_alone():
            if not path.exists():
                windows = self._ranked_on()
                costs = rank_layers(self.teacher, windows, lambda i, n: progress("ranking", i, n, {}))
                _write(path, _COSTS.dump_json(costs, indent=1).decode())
        return choose(_kept(path, _COSTS.validate_json), wanted)

    def _ranked_on(self) -> Windows:
        """Windows of the training data, text and questions by turns."""
        length = min(RANKING_LENGTH, self.teacher.config.max_position_embeddings)
        stage = Stage(name="ranking", tokens=length, length=length, hyena_rate=1.0)
        talks = _talks(self.corpus.texts, self.corpus.asked, self.framing, stage)
        mixed = _mixed(talks, self.corpus.texts, stage, Random(f"{self.recipe.seed} ranking"))
        return _of_both(pack(mixed, length, RANKING_WINDOWS), "training")

    def make_windows(self) -> dict[str, Windows]:
        """The windows of every stage that is taken, by its name; those to measure on are made as well.

        Called before anything is trained, it raises `UsageError` for data that do not meet the last of the stages.
        """
        for _, stage in self.recipe.stages_taken:
            self.held_out(stage.length)
        return {stage.name: self.windows(stage, number) for number, stage in self.recipe.stages_taken}

    def train(self, layers: Sequence[int], progress: Progress) -> StripedHyenaForCausalLM:
        """A student with these Hyena layers, trained through all stages."""
        keep_freed_memory()
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)  # of the adapters
        student = stripe_layers(self.teacher, list(layers), modes=recipe.modes, taps=recipe.taps, generator=generator)
        make_trainable(student, rank=recipe.rank)
        if self._begins_from is not None:
            take_up(student, self._begins_from)
        student.train()
        for number, stage in self.recipe.stages_taken:
            groups = _groups(student, stage)
            together = [parameter for parameters, _ in groups for parameter in parameters.values()]
            each = [list(block.parameters()) for block in blocks(student) if not block.is_attention]
            loop = Loop(
                stage,
                groups,
                self.folder / "stages" / stage.name,
                clipped=each if stage.kind == "layers" else [together],
                processes=self.processes,
                checkpoint_seconds=recipe.checkpoint_seconds,
            )
            if loop.resume() < stage.steps:
                self._take_stage(student, stage, number, loop, progress)
        return student

    def _take_stage(
        self, student: StripedHyenaForCausalLM, stage: Stage, number: int, loop: Loop, progress: Progress
    ) -> None:
        windows = self.windows(stage, number)
        held_out = self.held_out(stage.length).at(slice(_checked(stage.length)))

        def batch(step: int) -> Windows:
            return windows.at(slice(step * stage.windows_a_step, (step + 1) * stage.windows_a_step))

        if stage.kind == "layers":
            if not loop.done:
                layerwise.fit_scales(student, self.teacher, batch(0))
            loop.run(
                lambda step: layerwise.take_step(student, self.teacher, batch(step), self.processes),
                check=lambda: layerwise.measure(student, self.teacher, held_out),
                check_every=max(1, stage.steps // CHECKS_A_STAGE),
                progress=progress,
            )
        else:
            of_text = distillation.said_of_text(self.teacher, held_out)
            loop.run(
                lambda step: distillation.take_step(student, self.sayings, stage, batch(step), self.processes),
                check=lambda: distillation.measure(student, held_out, of_text),
                check_every=max(1, stage.steps // CHECKS_A_STAGE),
                progress=progress,
            )

    def finish(self, student: StripedHyenaForCausalLM, to: Path) -> Evaluation | None:
        """Write the trained model into the folder `to`, as `save_pretrained` does, and `changes.safetensors` with what
        training changed, see `changes`; returns what the model that was written does on held-out windows.

        Every process calls it; the first writes and measures, the others wait and return None. A kill can leave some
        of the files.
        """
        lengths = {stage.length for _, stage in self.recipe.stages_taken}
        windows = {length: self.held_out(length) for length in sorted(lengths)}
        evaluation = self._write_model(student, to, windows) if self.processes.is_first else None
        self.processes.wait()
        return evaluation

    def _write_model(self, student: StripedHyenaForCausalLM, to: Path, windows: Mapping[int, Windows]) -> Evaluation:
        changed = changes(student)
        _save_whole(changed, to / "changes.safetensors", {TRANSFORMER: transformer_digest(self.teacher)})
        model = striped_model(self.teacher.state_dict(), student.config, changed)
        model.generation_config = self.teacher.generation_config
        model.save_pretrained(to)
        return evaluate({"teacher": self.teacher, "striped": model}, self.teacher, windows)

    def windows(self, stage: Stage, number: int) -> Windows:
        """The windows of a stage in their order, made once."""

        def made() -> Windows:
            rng = Random(f"{self.recipe.seed} {number}")  # a rival of the same recipe reads the same
            talks = _talks(self.corpus.texts, self.corpus.asked, self.framing, stage)
            packed = pack(_mixed(talks, self.corpus.texts, stage, rng), stage.length, count)
            if talks.too_long:
                warnings.warn(
                    f"{len(talks.too_long):,} passages, {min(talks.too_long)[:40]!r} among them, do not fit a "
                    f"window of {stage.length} tokens with a question: the stage {stage.name!r} asks nothing of them",
                    stacklevel=2,
                )
            return packed

        count = stage.steps * stage.windows_a_step
        windows = self._made_once(self.folder / "windows" / f"{stage.name}.safetensors", made, (count, stage.length))
        if len(windows.ids) < count:
            raise UsageError(
                f"the data give {len(windows.ids)} windows of {stage.length} tokens; the stage {stage.name!r} asks for "
                f"{count}. What does not fit a window is left out: give shorter passages, longer windows, or ask for "
                "fewer tokens."
            )
        return windows

    def held_out(self, length: int) -> Windows:
        """Windows to measure on, text and questions by turns, made once for a length.

        Raises `UsageError` where the held-out data do not give a window of each.
        """

        def made() -> Windows:
            stage = Stage(name="held-out", tokens=length, length=length, hyena_rate=1.0)
            talks = _talks(self.corpus.held_texts, self.corpus.held_asked, self.framing, stage)
            return _of_both(pack(_mixed(talks, self.corpus.held_texts, stage, Random(0)), length, count), "held-out")

        count = max(LEAST_HELD_OUT, _checked(length))
        return self._made_once(self.folder / "held-out" / f"{length}.safetensors", made, (count, length))

    def _made_once(self, path: Path, make: Callable[[], Windows], shape: tuple[int, int]) -> Windows:
        """The windows in a file, which the first process makes where it is not there or no windows of this shape."""
        with self.processes.first_alone():
            try:
                windows = Windows(**load_file(path))
            except (OSError, SafetensorError, TypeError):
                windows = None
            if windows is None or not windows.are_whole(shape, self.teacher.config.vocab_size):
                windows = make()
                _save_whole(windows._asdict(), path)
            return windows


def _of_both(windows: Windows, which: str) -> Windows:
    """The windows, if some are text and some have questions; else raises `UsageError`."""
    of_text = distillation.is_text(windows)
    if not of_text.any() or not (windows.kinds == ANSWER).any():
        raise UsageError(
            f"the {which} data do not give a window of {windows.ids.shape[1]} tokens of text and one of questions; "
            "give more texts and shorter passages, or take windows of another length"
        )
    return windows


Kept = TypeVar("Kept")


def _kept(path: Path, read: Callable[[str], Kept]) -> Kept:
    """What a small file of the run holds. Raises `UsageError` where it is damaged."""
    try:
        return read(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({said(error)}); remove it, and the same command makes it again"
        ) from error


def _digest(content: str) -> str:
    if not content.strip():
        raise ValueError("it is empty")
    return content.strip()


def _checked(length: int) -> int:
    """How many held-out windows of a length are measured on while training goes on."""
    return max(2, HELD_OUT_WINDOWS * 1024 // max(length, 1024))


def _refuse_impossible(recipe: Recipe, teacher: PreTrainedModel, processes: Processes) -> None:
    """Raises before any work where a teacher cannot be striped, not in these layers, or not in windows so long."""
    layers, names = recipe.hyena_layers, teacher.state_dict().keys()
    count = layers if isinstance(layers, int) else len(layers)
    there = striped_config(teacher.config, names, (), modes=recipe.modes, taps=recipe.taps).num_layers
    if isinstance(layers, tuple) and max(layers, default=0) >= there:
        striped_config(teacher.config, names, layers, modes=recipe.modes, taps=recipe.taps)  # which names it
    if count >= there:
        raise UsageError(f"{count} Hyena layers of {there}; a StripedHyena keeps one of attention at least")
    window = teacher.config.max_position_embeddings
    for _, stage in recipe.stages_taken:
        if stage.length > window:
            raise UsageError(
                f"the stage {stage.name!r} has windows of {stage.length} tokens and the model reads {window}; shorten "
                "its windows, or leave it out"
            )
        processes.refuse_uneven(stage.windows_a_step, stage.length)
    for name, parameter in teacher.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"the model's {name} holds values that are no numbers; give one that is whole")


def _refuse_unknown_sources(recipe: Recipe, corpus: Corpus) -> None:
    sources = sorted({one.source for one in corpus.asked})
    for stage in recipe.stages:
        if unknown := sorted(stage.source_shares.keys() - set(sources)):
            raise UsageError(
                f"the stage {stage.name!r} has a share of {unknown[0]!r}, and no question is of that source; those of "
                f"the data are {', '.join(map(repr, sources))}"
            )
        if stage.questions and not any(stage.source_shares.get(source, 1) for source in sources):
            raise UsageError(
                f"the stage {stage.name!r} has a share of 0 of every source, and {stage.questions:g} of its windows "
                "are to hold questions; give a source a share, or `questions` 0"
            )


def _talks(texts: Sequence[Text], asked: Sequence[Asked], framing: Framing, stage: Stage) -> Conversations:
    return Conversations(
        asked,
        texts,
        framing,
        unanswerable=stage.unanswerable,
        filler=stage.filler,
        answers_only=stage.answers_only,
        source_shares=stage.source_shares,
    )


def _mixed(talks: Conversations, texts: Sequence[Text], stage: Stage, rng: Random) -> Iterable[list[Piece]]:
    """Windows of text and of questions in the stage's proportion; texts come again when all have been read."""
    questions = talks.windows(stage.length, rng)

    def rounds() -> Iterable[Text]:
        order = list(texts)
        while order:
            rng.shuffle(order)
            yield from order

    reading = iter(text_windows(rounds(), talks.framing, stage.length))
    owed = 0.0
    while True:
        owed += stage.questions
        source = questions if owed >= 1 or not texts else reading
        owed -= source is questions
        window = next(iter(source), None)
        if window is None:
            return
        yield window


def _groups(student: StripedHyenaForCausalLM, stage: Stage) -> list[tuple[dict[str, nn.Parameter], float]]:
    hyena: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        is_hyena = any(part in name for part in (".projections.", ".filter.", ".out_filter_dense."))
        (hyena if is_hyena else others)[name] = parameter
    if stage.kind == "layers":
        return [(hyena, stage.hyena_rate)]
    return [(hyena, stage.hyena_rate), (others, stage.adapter_rate)]


def _save_whole(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as scratch:
        save_file(dict(tensors), scratch, metadata=metadata)


def _write(path: Path, content: str) -> None:
    with written_whole(path) as scratch:
        scratch.write_text(content, encoding="utf-8")
