"""Perplexity against position: does a model predict better, or fall apart, the more it has read?"""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stripedrag.eval.haystack import with_margin
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Losses, SampleRecord, Text
from stripedrag.eval.tasks.base import Task
from stripedrag.eval.tasks.planted import HaystackFields, Length


class PerplexityTask(HaystackFields, Task):
    """`samples` windows of the haystack, cut at `positions` of the reference tokenizer; nats per reference token.

    Dividing by the reference's tokens makes systems with other tokenizers comparable; exp of it is the perplexity.
    """

    kind: Literal["perplexity"]
    positions: tuple[Length, ...] = Field(default=(512, 1024, 2048, 4096), min_length=1)
    samples_per_cell: int = Field(default=8, ge=1, alias="samples")

    operation: ClassVar[str] = "perplexity"

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.positions) != sorted(set(self.positions)):
            raise ValueError(f"positions {list(self.positions)} do not ascend")
        return self

    def samples(self, resources: Resources) -> Iterator[Text]:
        """A text for each window, ending at the last position (to the nearest character boundary of a token)."""
        windows = resources.haystack(self.haystack).windows(
            resources.rng(self.name), self.samples_per_cell, with_margin(self.positions[-1])
        )
        for number, window in enumerate(windows):
            text = window.text(with_margin(self.positions[-1]))
            offsets = resources.offsets(text)
            boundaries = tuple(offsets[position] for position in self.positions)
            text = text[: boundaries[-1]]
            tokens = tuple(b - a for a, b in zip((0, *self.positions), self.positions, strict=False))
            yield Text(
                id=f"{self.name}/{number}",
                task=self.name,
                cell={},
                cluster=window.name,
                text=text,
                boundaries=boundaries,
                tokens=tokens,
            )

    def score(self, sample: SampleRecord, output: Losses) -> dict[str, float]:
        """`nats` over the whole text, and `nats@P` of the stretch that ends at position P."""
        scores = {"nats": sum(output.nats) / sum(sample.tokens)}
        per_stretch = zip(self.positions, output.nats, sample.tokens, strict=True)
        return scores | {f"nats@{position}": nats / tokens for position, nats, tokens in per_stretch}
