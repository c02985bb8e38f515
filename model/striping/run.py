"""A striping run in a folder: windows, ranking, stages, each done once and found again after a kill."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stripedrag.errors import UsageError
from stripedrag.hardware import keep_freed_memory
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping import distillation, layerwise
from stripedrag.model.striping.changes import changes, striped_model
from stripedrag.model.striping.data import (
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
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.ranking import LayerCost, choose, rank_layers
from stripedrag.model.striping.recipe import Recipe, Stage
from stripedrag.model.striping.student import blocks, make_trainable, stripe_layers
from stripedrag.model.striping.teacher import Teacher
from stripedrag.model.striping.training import Loop, Progress

HELD_OUT_WINDOWS = 16
CHECKS_A_STAGE = 10
RANKING_LENGTH = 1024


_COSTS = TypeAdapter(list[LayerCost])


class Run:
    """A run in `folder`, which is made or gone on with."""

    def __init__(
        self, folder: Path, recipe: Recipe, teacher: PreTrainedModel, framing: Framing, corpus: Corpus
    ) -> None:
        self.folder, self.recipe, self.framing, self.corpus = folder, recipe, framing, corpus
        self.processes = Processes()
        with self.processes.first_alone():
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / "recipe.json"
            if kept.exists() and Recipe.model_validate_json(kept.read_bytes()) != recipe:
                raise UsageError(f"{folder} holds a run of another recipe; choose another folder, or remove it")
            _write(kept, (recipe.model_dump_json(indent=1) + "\n").encode())
            kept = folder / "data.sha256"
            if kept.exists() and kept.read_text().strip() != corpus.fingerprint():
                raise UsageError(f"{folder} holds a run on other data; choose another folder, or remove it")
            _write(kept, (corpus.fingerprint() + "\n").encode())
        self.teacher = teacher.to(self.processes.device).eval().requires_grad_(False)
        self.sayings = Teacher(teacher, folder / "teacher")

    def hyena_layers(self, progress: Progress) -> list[int]:
        """The layers that the recipe names, or those that cost least of all; the costs are kept in `ranking.json`."""
        wanted = self.recipe.hyena_layers
        if isinstance(wanted, tuple):
            return sorted(wanted)
        if wanted == 0:
            return []
        path = self.folder / "ranking.json"
        if not path.exists():
            windows = self.held_out(RANKING_LENGTH)
            costs = rank_layers(self.teacher, self.sayings, windows, lambda i, n: progress("ranking", i, n, {}))
            with self.processes.first_alone():
                _write(path, _COSTS.dump_json(costs, indent=1))
        return choose(_COSTS.validate_json(path.read_bytes()), wanted)

    def train(self, layers: Sequence[int], progress: Progress) -> StripedHyenaForCausalLM:
        """A student with these Hyena layers, trained through all stages."""
        keep_freed_memory()
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)  # of the adapters
        student = stripe_layers(self.teacher, list(layers), modes=recipe.modes, taps=recipe.taps, generator=generator)
        make_trainable(student, rank=recipe.rank)
        student.train()
        for number, stage in enumerate(recipe.stages):
            if stage.kind == "layers" and not layers:
                continue
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
            if loop.finished():
                loop.load()
                continue
            self._take_stage(student, stage, number, loop, progress)
        return student

    def _take_stage(
        self, student: StripedHyenaForCausalLM, stage: Stage, number: int, loop: Loop, progress: Progress
    ) -> None:
        windows = self.windows(stage, number)
        held_out = self.held_out(stage.length)

        def batch(step: int) -> Windows:
            part = slice(step * stage.windows_a_step, (step + 1) * stage.windows_a_step)
            return Windows(windows.ids[part], windows.kinds[part])

        if stage.kind == "layers":
            if not loop.checkpoint.exists():
                layerwise.fit_scales(student, self.teacher, batch(0))
            loop.run(
                lambda step: layerwise.take_step(student, self.teacher, self.processes.share(batch(step))),
                check=lambda: layerwise.measure(student, self.teacher, held_out),
                check_every=max(1, stage.steps // CHECKS_A_STAGE),
                progress=progress,
            )
        else:
            loop.run(
                lambda step: distillation.take_step(student, self.sayings, stage, batch(step), self.processes),
                check=lambda: distillation.measure(student, self.sayings, held_out),
                check_every=max(1, stage.steps // CHECKS_A_STAGE),
                progress=progress,
            )

    def finish(self, student: StripedHyenaForCausalLM, to: Path) -> Evaluation:
        """Write the trained model into the folder `to`, as `save_pretrained` does, and `changes.safetensors` with what
        training changed, see `changes`; returns what the model that was written does on held-out windows.
        """
        changed = changes(student)
        _save_whole(changed, to / "changes.safetensors")
        model = striped_model(self.teacher.state_dict(), student.config, changed)
        model.generation_config = self.teacher.generation_config
        model.save_pretrained(to)
        lengths = sorted({stage.length for stage in self.recipe.stages if stage.kind != "layers"})
        windows = {length: self.held_out(length) for length in lengths or [RANKING_LENGTH]}
        return evaluate({"teacher": self.teacher, "striped": model}, self.sayings, windows)

    def windows(self, stage: Stage, number: int) -> Windows:
        """The windows of a stage in their order, made once."""
        path = self.folder / "windows" / f"{stage.name}.safetensors"
        with self.processes.first_alone():
            if not path.exists():
                wanted = stage.steps * stage.windows_a_step
                rng = Random(f"{self.recipe.seed} {number}")
                made = _mixed(self.corpus.texts, self.corpus.asked, self.framing, stage, rng)
                _save_whole(pack(made, stage.length, wanted)._asdict(), path)
        windows = Windows(**load_file(path))
        if len(windows.ids) < stage.steps * stage.windows_a_step:
            raise UsageError(
                f"the data give {len(windows.ids)} windows of {stage.length} tokens; the stage {stage.name!r} asks for "
                f"{stage.steps * stage.windows_a_step}. Give more documents, longer windows, or fewer tokens."
            )
        return windows

    def held_out(self, length: int) -> Windows:
        """Windows to measure on, half of them text and half questions, made once for a length."""
        path = self.folder / "windows" / f"held-out-{length}.safetensors"
        with self.processes.first_alone():
            if not path.exists():
                stage = Stage(name="held-out", tokens=length, length=length, hyena_rate=1.0)
                made = _mixed(self.corpus.held_texts, self.corpus.held_asked, self.framing, stage, Random(0))
                count = max(2, HELD_OUT_WINDOWS * 1024 // max(length, 1024))
                _save_whole(pack(made, length, count)._asdict(), path)
        return Windows(**load_file(path))


def _mixed(
    texts: Sequence[Text], asked: Sequence[Asked], framing: Framing, stage: Stage, rng: Random
) -> Iterable[list[Piece]]:
    """Windows of text and of questions in the stage's proportion; texts come again when all have been read."""
    talks = Conversations(asked, texts, framing, unanswerable=stage.unanswerable, filler=stage.filler)
    questions = talks.windows(stage.length, rng)

    def rounds() -> Iterable[Text]:
        order = list(texts)
        while order:
            rng.shuffle(order)
            yield from order

    reading = iter(text_windows(rounds(), framing, stage.length))
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


def _save_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial)
    partial.replace(path)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
