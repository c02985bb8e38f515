"""What tasks over planted sentences share. A length is the whole of prompt and answer by the reference tokenizer."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import Field

from stripedrag.eval.data_formats import DATA
from stripedrag.eval.haystack import Window, plant, with_margin
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Axis, Passage, Question, Record, asked
from stripedrag.eval.tasks.base import ReadingTask

HAYSTACK = DATA / "haystack" / "novels.jsonl.xz"
Length = Annotated[int, Field(ge=64)]
Depth = Annotated[float, Field(ge=0, le=1)]


class Riddle(Record):
    """What is planted (depth, sentence), what is asked about it, and the sentences that an answer needs (by place)."""

    facts: tuple[tuple[float, str], ...]
    question: str
    instruction: str
    references: tuple[str, ...]
    needed: tuple[int, ...]


class HaystackFields(Record):
    """The field of tasks over a haystack."""

    haystack: Path = HAYSTACK

    def data(self) -> Mapping[str, str]:
        """The haystack, for the manifest."""
        return {"haystack": str(self.haystack)}


class PlantedTask(HaystackFields, ReadingTask):
    """`samples` windows of the haystack, each with a riddle of its own, which it keeps over all lengths and depths."""

    lengths: tuple[Length, ...] = Field(min_length=1)
    samples_per_cell: int = Field(default=5, ge=1, alias="samples")
    metrics: tuple[str, ...] = ("string_match_all",)

    @abstractmethod
    def riddles(self, rng: Random) -> list[tuple[dict[str, Axis], Riddle]]:
        """The riddle of one window at each place of the task's axes other than length."""

    def samples(self, resources: Resources) -> Iterator[Question]:
        """One question for every window, length and place on the other axes."""
        haystack = resources.haystack(self.haystack)
        rng = resources.rng(self.name)
        windows = haystack.windows(rng, self.samples_per_cell, with_margin(max(self.lengths)))
        riddles = [self.riddles(resources.rng(self.name, number)) for number in range(len(windows))]
        for length in self.lengths:
            for number, window in enumerate(windows):
                for axes, riddle in riddles[number]:
                    cell: dict[str, Axis] = {"length_tokens": length, **axes}
                    yield self._question(resources, self.sample_id(cell, number), cell, window, riddle, length)

    def _question(
        self, resources: Resources, name: str, cell: dict[str, Axis], window: Window, riddle: Riddle, length: int
    ) -> Question:
        words = asked(riddle.question, riddle.instruction)

        def fits(passage: Passage) -> bool:
            return resources.prompt_tokens(words, [passage]) + self.answer_tokens <= length

        passage, stretches = plant(window, riddle.facts, fits=fits, capacity_tokens=length)
        return Question(
            id=name,
            task=self.name,
            cell=cell,
            cluster=window.name,
            subject=window.name,
            question=riddle.question,
            instruction=riddle.instruction,
            passages=(passage,),
            references=riddle.references,
            evidence=tuple(stretches[i] for i in riddle.needed),
        )
