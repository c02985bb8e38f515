"""The processes that share a run, as Accelerate has started them: one, unless it was asked for more."""

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from stripedrag.errors import UsageError
from stripedrag.model.striping.data import Windows


class Processes:
    """`rank` of `count` processes, each on its `device` with the same weights and a share of every step's windows.

    `accelerate launch -m stripedrag.eval.cli stripe …` starts one for each GPU, and with ACCELERATE_USE_CPU=true
    `torchrun --nproc_per_node N -m stripedrag.eval.cli stripe …` N on a CPU. Gradients are averaged, so that every
    process takes the same step, and the first one writes.

    Raises `UsageError` where several were started that would not know of one another.
    """

    def __init__(self) -> None:
        from accelerate import Accelerator  # a second that loading a model need not take

        self._accelerator = Accelerator()
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        started = os.environ.get("WORLD_SIZE", "1")
        if started != str(self.count):
            raise UsageError(
                f"{started} processes were started and Accelerate sees {self.count}; on a CPU set "
                "ACCELERATE_USE_CPU=true"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def first_alone(self) -> AbstractContextManager[None]:
        """What is done in here the first process does before the others, which then find its files."""
        context: AbstractContextManager[None] = self._accelerator.main_process_first()
        return context

    def wait(self) -> None:
        """Until every process has come here."""
        self._accelerator.wait_for_everyone()

    def share(self, windows: Windows) -> Windows:
        """This process's windows of a step's, see `refuse_uneven`."""
        return windows.at(slice(self.rank, None, self.count))

    def refuse_uneven(self, windows: int, length: int) -> None:
        """Raises `UsageError` where so many windows, of `length` tokens, cannot be shared evenly."""
        if windows % self.count:
            raise UsageError(
                f"a step of {windows} windows cannot be shared by {self.count} processes; set the stage's batch_tokens "
                f"to a multiple of {self.count} windows of {length} tokens"
            )

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the mean over the processes in place of each gradient."""
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.mean(parameter.grad)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor of each."""
        if self.count == 1:
            return value
        mean: Tensor = self._accelerator.reduce(value, "mean")
        return mean

    def average(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The means over the processes of what each measured."""
        if self.count == 1 or not measured:
            return dict(measured)
        values = torch.tensor(list(measured.values()), dtype=torch.float32, device=self.device)
        return dict(zip(measured, self.mean(values).tolist(), strict=True))
