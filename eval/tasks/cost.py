"""What a prompt costs: time to first token, rates, memory and cache bytes against its length, all systems in turn."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stripedrag.eval.haystack import with_margin
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Axis, Carried, Load, SampleRecord
from stripedrag.eval.tasks.base import Task
from stripedrag.eval.tasks.planted import HaystackFields, Length


class CostTask(HaystackFields, Task):
    """`repeats` times every length, all systems taken in turn within each.

    A round before them warms up and measures memory: memory that was freed is given back to the system before each of
    its loads, which costs time, so that what a load takes is counted anew.

    Its figures are in the run's timings. Nothing is scored.
    """

    kind: Literal["cost"]
    lengths: tuple[Length, ...] = Field(min_length=1)
    repeats: int = Field(default=3, ge=1)
    decode_tokens: int = Field(default=16, ge=2)

    operation: ClassVar[str] = "cost"

    @model_validator(mode="after")
    def _has_a_prompt(self) -> Self:
        if self.decode_tokens >= min(self.lengths):
            raise ValueError(
                f"decode_tokens is {self.decode_tokens}; of {min(self.lengths)} tokens that leaves none for a prompt"
            )
        return self

    def samples(self, resources: Resources) -> Iterator[Load]:
        """Round after round, so that a slow minute of the machine meets every length and system."""
        (window,) = resources.haystack(self.haystack).windows(
            resources.rng(self.name), 1, with_margin(max(self.lengths))
        )
        text = window.text(with_margin(max(self.lengths)))
        for turn in range(self.repeats + 1):
            for length in self.lengths:
                prompt_tokens = length - self.decode_tokens
                cell: dict[str, Axis] = {"length_tokens": length, "round": turn}
                yield Load(
                    id=f"{self.name}/length_tokens={length}/{turn}",
                    task=self.name,
                    cell=cell,
                    cluster=window.name,
                    text=text,
                    prompt_tokens=prompt_tokens,
                    decode_tokens=self.decode_tokens,
                    measures="seconds" if turn else "bytes",
                )

    def known_metrics(self) -> tuple[str, ...]:
        """None: what is measured here is no score."""
        return ()

    def score(self, sample: SampleRecord, output: Carried) -> dict[str, float]:
        """Nothing."""
        del sample, output
        return {}
