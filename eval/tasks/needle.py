"""Needles: numbers planted in a novel (after NIAH, Kamradt 2023, and RULER, Hsieh et al. 2024; wording our own)."""

from random import Random
from typing import Literal

from pydantic import Field

from stripedrag.eval.schema import Axis
from stripedrag.eval.tasks.planted import Depth, PlantedTask, Riddle
from stripedrag.eval.tasks.vocabulary import ADJECTIVES, NOUNS


class NeedleTask(PlantedTask):
    """A number is asked for by its name.

    single: one needle. multi-key: `others` needles of other names beside it. multi-value: one name with `others` more
    numbers, all asked for. multi-query: `others` more names, all asked for. The first two have a depth axis; the
    needles of the others, and those beside, are spread by chance.
    """

    kind: Literal["needle"]
    variant: Literal["single", "multi-key", "multi-value", "multi-query"] = "single"
    depths: tuple[Depth, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    others: int = Field(default=3, ge=1, le=100)
    answer_tokens: int = Field(default=48, ge=1)

    def riddles(self, rng: Random) -> list[tuple[dict[str, Axis], Riddle]]:
        """See the class."""
        names = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
        drawn = rng.sample(names, 1 + self.others)
        numbers = [str(n) for n in rng.sample(range(1_000_000, 10_000_000), 1 + self.others)]
        scattered = [rng.random() for _ in numbers]
        if self.variant in ("single", "multi-key"):
            beside = list(zip(scattered[1:], map(_sentence, drawn[1:], numbers[1:]), strict=True))
            facts = beside if self.variant == "multi-key" else []
            sentence, question = needle(drawn[0], numbers[0])
            return [
                (
                    {"depth": depth},
                    Riddle(
                        facts=((depth, sentence), *facts),
                        question=question,
                        instruction="Answer with the number only.",
                        references=(numbers[0],),
                        needed=(0,),
                    ),
                )
                for depth in self.depths
            ]
        if self.variant == "multi-value":
            sentences = [_sentence(drawn[0], number) for number in numbers]
            question = f"What are all the registry numbers of the {drawn[0]}?"
        else:
            sentences = list(map(_sentence, drawn, numbers))
            *first, last = (f"the {name}" for name in drawn)
            question = f"What are the registry numbers of {', '.join(first)} and {last}?"
        riddle = Riddle(
            facts=tuple(zip(scattered, sentences, strict=True)),
            question=question,
            instruction="Answer with the numbers only.",
            references=tuple(numbers),
            needed=tuple(range(len(numbers))),
        )
        return [({}, riddle)]


def needle(name: str, number: str) -> tuple[str, str]:
    """A sentence that gives a number by its name, and the question for it."""
    return _sentence(name, number), f"What is the registry number of the {name}?"


def _sentence(name: str, number: str) -> str:
    return f"The registry number of the {name} is {number}."
