"""Facts of several kinds planted in a novel, all of one window asked for one by one; wording and names our own."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Literal, NamedTuple

from pydantic import Field

from stripedrag.eval.haystack import plant, with_margin
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Axis, Passage, Question
from stripedrag.eval.tasks.base import ReadingTask
from stripedrag.eval.tasks.planted import HaystackFields, Length
from stripedrag.eval.tasks.vocabulary import ADJECTIVES, NAMES, NOUNS, TOWNS

MATERIALS = (
    "alabaster bamboo basalt brass bronze cedar copper cork ebony granite ivory leather oak pine slate tin wax".split()
)
# What is stated of a thing, what is asked about it, and the answers. {0} is the thing, {1} the answer.
KINDS: tuple[tuple[str, str, Callable[[Random], str]], ...] = (
    ("The {0} was carved out of {1}.", "What was the {0} carved out of?", lambda rng: rng.choice(MATERIALS)),
    (
        "The {0} now stands on the green of {1}.",
        "On whose green does the {0} now stand?",
        lambda rng: rng.choice(TOWNS),
    ),
    ("It was {1} who mended the {0}.", "Who mended the {0}?", lambda rng: rng.choice(NAMES)),
    ("The {0} weighs {1} ounces.", "How many ounces does the {0} weigh?", lambda rng: str(rng.randrange(13, 990))),
    (
        "The {0} has been lost since {1}.",
        "Since when has the {0} been lost?",
        lambda rng: str(rng.randrange(1502, 1799)),
    ),
    (
        "A thief paid {1} florins for the {0}.",
        "How many florins did a thief pay for the {0}?",
        lambda rng: str(rng.randrange(1001, 9990)),
    ),
)


class Fact(NamedTuple):
    """A planted sentence and what is asked about it; no question on one that stands beside."""

    depth: float
    sentence: str
    question: str
    answer: str


class RecallTask(HaystackFields, ReadingTask):
    """`samples` windows with `facts` facts each, at depths spread evenly, and a question on every one.

    Of each fact there is a second of the same kind about another thing, so that its form does not give it away. A
    window is a cluster; its facts are the same at every length.
    """

    kind: Literal["recall"]
    lengths: tuple[Length, ...] = Field(min_length=1)
    samples_per_cell: int = Field(default=5, ge=1, alias="samples")
    facts: int = Field(default=5, ge=1, le=len(KINDS))
    answer_tokens: int = Field(default=24, ge=1)
    metrics: tuple[str, ...] = ("words_match", "exact_match")

    def samples(self, resources: Resources) -> Iterator[Question]:
        """See the class; length by length, window by window."""
        haystack = resources.haystack(self.haystack)
        longest = with_margin(max(self.lengths))
        windows = haystack.windows(resources.rng(self.name), self.samples_per_cell, longest)
        for length in self.lengths:
            cell: dict[str, Axis] = {"length_tokens": length}
            for number, window in enumerate(windows):
                asked = self._facts(resources.rng(self.name, number))
                sentences = [(fact.depth, fact.sentence) for fact in asked]

                def fits(passage: Passage, asked: Sequence[Fact] = asked, most: int = length) -> bool:
                    prompts = (resources.prompt_tokens(fact.question, [passage]) for fact in asked if fact.question)
                    return max(prompts) + self.answer_tokens <= most

                passage, places = plant(window, sentences, fits=fits, capacity_tokens=length)
                for place, fact in enumerate(asked):
                    if fact.question:
                        yield Question(
                            id=self.sample_id(cell, f"{number}.{place}"),
                            task=self.name,
                            cell=cell,
                            cluster=window.name,
                            subject=f"{window.name}.{place}",
                            question=fact.question,
                            passages=(passage,),
                            references=(fact.answer,),
                            evidence=(places[place],),
                            shared=True,
                        )

    def _facts(self, rng: Random) -> list[Fact]:
        things = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], 2 * self.facts)
        made = []
        for place, (said, asks, value) in enumerate(rng.sample(KINDS, self.facts)):
            answer = value(rng)
            while (other := value(rng)) == answer:
                pass
            thing, beside = things[2 * place : 2 * place + 2]
            depth = (place + 0.5) / self.facts
            made.append(Fact(depth, said.format(thing, answer), asks.format(thing), answer))
            made.append(Fact(rng.random(), said.format(beside, other), "", other))
        return made
