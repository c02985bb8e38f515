"""The loop of a stage: rates, steps, a log, and checkpoints from which a killed run goes on with the same numbers."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stripedrag.errors import UsageError, said
from stripedrag.files import written_whole
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.recipe import Stage


class Progress(Protocol):
    """Hears of every step: its number, the number of steps, and what was measured."""

    def __call__(self, stage: str, step: int, steps: int, measured: Mapping[str, float]) -> None:
        """Called after every step."""


class Loop:
    """Steps of a stage over named parameters, in `folder`.

    A run that goes on from a checkpoint does what the whole run did: nothing is random but the order of windows, which
    is on disk.
    """

    def __init__(
        self,
        stage: Stage,
        groups: Iterable[tuple[dict[str, nn.Parameter], float]],
        folder: Path,
        *,
        clipped: Sequence[Sequence[nn.Parameter]],
        processes: Processes,
        checkpoint_seconds: float,
    ) -> None:
        """`groups` are named parameters and a rate; the gradients of each part of `clipped` get a norm of at most 1."""
        self.stage, self.folder, self._clipped, self._processes = stage, folder, clipped, processes
        self._checkpoint_seconds = checkpoint_seconds
        self.done = 0
        folder.mkdir(parents=True, exist_ok=True)
        named = [(parameters, rate) for parameters, rate in groups if parameters]
        self._parameters = {name: p for parameters, _ in named for name, p in parameters.items()}
        self.optimizer = torch.optim.AdamW(
            [{"params": list(parameters.values()), "lr": rate} for parameters, rate in named],
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )
        self._rates = [rate for _, rate in named]

    @property
    def checkpoint(self) -> Path:
        """The file of the last checkpoint."""
        return self.folder / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        """One JSON object a step."""
        return self.folder / "log.jsonl"

    def run(
        self,
        take: Callable[[int], dict[str, float]],
        *,
        check: Callable[[], dict[str, float]],
        check_every: int,
        progress: Progress,
    ) -> None:
        """Go to the end of the stage from where `resume` took it up.

        `take` computes the gradients of a step and returns what it measured; `check` measures on held-out windows,
        every `check_every` steps and at the end.
        """
        if self._processes.is_first:
            self._cut_log(self.done)
        saved = time.monotonic()
        for step in range(self.done, self.stage.steps):
            began = time.perf_counter()
            factor = self._factor(step)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad(set_to_none=True)
            measured = self._processes.average(take(step))
            self._processes.average_gradients(self._parameters.values())
            for parameters in self._clipped:
                norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
                if not norm.isfinite():  # before the step, so that the last checkpoint stays a good one
                    raise self._diverged("the gradient", step)
            self.optimizer.step()
            self._refuse_diverged(step)
            measured["seconds"] = time.perf_counter() - began
            is_last = step + 1 == self.stage.steps
            if is_last or (step + 1) % check_every == 0:
                measured |= check()
                if wrong := [name for name, value in measured.items() if not math.isfinite(value)]:
                    raise self._diverged(f"the held-out {wrong[0]}", step)
            if self._processes.is_first:
                with self.log.open("a") as log:
                    log.write(json.dumps({"step": step + 1} | measured) + "\n")
                if is_last or time.monotonic() - saved > self._checkpoint_seconds:
                    self._save(step + 1)
                    saved = time.monotonic()
            progress(self.stage.name, step + 1, self.stage.steps, measured)

    def _factor(self, step: int) -> float:
        rising = min(self.stage.warmup_steps, self.stage.steps // 2)
        if step < rising:
            return (step + 1) / rising
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / (self.stage.steps - rising)))

    def _save(self, step: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter:{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}:{name}"] = torch.as_tensor(value)
        with written_whole(self.checkpoint) as scratch:
            save_file({name: t.contiguous() for name, t in tensors.items()}, scratch, metadata={"step": str(step)})

    def _refuse_diverged(self, step: int) -> None:
        for name, parameter in self._parameters.items():
            if not parameter.isfinite().all():
                raise self._diverged(name, step)

    def _diverged(self, what: str, step: int) -> UsageError:
        return UsageError(
            f"{what} is no number at step {step + 1} of stage {self.stage.name!r}, at rates "
            f"{', '.join(f'{rate:g}' for rate in self._rates)}; lower them, and begin in another folder"
        )

    def resume(self) -> int:
        """Take up the last checkpoint, if there is one; the number of steps that were `done`.

        Raises `UsageError` for a checkpoint of another network, or one that cannot be read.
        """
        if not self.checkpoint.exists():
            return 0
        try:
            tensors, step = load_file(self.checkpoint), _step_of(self.checkpoint, self.stage.steps)
        except (SafetensorError, ValueError) as error:
            raise UsageError(
                f"{self.checkpoint} cannot be read ({said(error)}); remove it to take the stage {self.stage.name!r} "
                "anew"
            ) from error
        shapes = {key.removeprefix("parameter:"): t.shape for key, t in tensors.items() if key.startswith("parameter:")}
        if shapes != {name: parameter.shape for name, parameter in self._parameters.items()}:
            raise UsageError(f"{self.checkpoint} is of a network of other layers or sizes; choose another folder")
        state: dict[Tensor, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            parameter = self._parameters[name]
            if kind == "parameter":
                parameter.data.copy_(tensor)
            else:
                state.setdefault(parameter, {})[kind] = tensor.to(parameter.device)
        self.optimizer.state.update(state)
        self.done = step
        return step

    def _cut_log(self, step: int) -> None:
        """Leave in the log only what the checkpoint of a step knows of."""
        if self.log.exists():
            kept = [line for line in self.log.read_text().splitlines() if _is_before(line, step)]
            with written_whole(self.log) as scratch:
                scratch.write_text("".join(line + "\n" for line in kept))


def _is_before(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except ValueError:  # the last line of a process that was killed
        return False


def _step_of(path: Path, steps: int) -> int:
    with safe_open(path, "pt") as file:
        step = (file.metadata() or {}).get("step", "")
    if not step.isdecimal() or not 0 < int(step) <= steps:
        raise ValueError(f"its step is {step!r}, of {steps}")
    return int(step)
