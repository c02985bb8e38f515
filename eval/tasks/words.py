"""Words counted over a whole context: common and frequent words (after RULER, Hsieh et al. 2024; words of our own)."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import Field

from stripedrag.errors import UsageError
from stripedrag.eval.haystack import largest
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Axis, Passage, Question, asked
from stripedrag.eval.tasks.base import ReadingTask
from stripedrag.eval.tasks.planted import HaystackFields, Length

_WORD = re.compile(r"\b[a-z]{4,9}\b")
_ZIPF = 2.0  # RULER's exponent of the frequent words


class WordsTask(HaystackFields, ReadingTask):
    """A list of words fills the length; which are the most frequent?

    common: `asked` words stand ten times as often as any other does, and others fill the length.
    frequent: one list whose frequencies fall like rank^-2, and the `asked` most frequent are wanted.
    Words are lower-case words of the haystack. The first evidence is nowhere in particular: there is no depth.
    """

    kind: Literal["words"]
    variant: Literal["common", "frequent"] = "common"
    lengths: tuple[Length, ...] = Field(min_length=1)
    samples_per_cell: int = Field(default=5, ge=1, alias="samples")
    asked: int = Field(default=3, ge=1, le=20)
    answer_tokens: int = Field(default=48, ge=1)
    metrics: tuple[str, ...] = ("string_match_all",)

    def samples(self, resources: Resources) -> Iterator[Question]:
        """`samples` lists for each length."""
        vocabulary = _vocabulary(resources, self.haystack)
        for length in self.lengths:
            for number in range(self.samples_per_cell):
                rng = resources.rng(self.name, length, number)
                yield self._question(resources, rng, vocabulary, length, number)

    def _question(self, resources: Resources, rng: Random, vocabulary: list[str], length: int, number: int) -> Question:
        drawn = rng.sample(vocabulary, len(vocabulary))
        wanted = tuple(drawn[: self.asked])
        question = f"Which {self.asked} words stand in the list above most often?"
        instruction = "Name only these words."
        order = rng.random()
        cell: dict[str, Axis] = {"length_tokens": length}

        def passage(size: int) -> Passage:
            words = self._words(drawn, size)
            Random(order).shuffle(words)
            text = "Words: " + " ".join(words)
            return Passage(doc_id=f"words-{number}", title="A list of words", start=0, end=len(text), text=text)

        def fits(size: int) -> bool:
            tokens = resources.prompt_tokens(asked(question, instruction), [passage(size)])
            return tokens + self.answer_tokens <= length

        # The last rank asked for and the next differ by a word at least from this size on.
        low = 1 if self.variant == "common" else self.asked**2 * (self.asked + 1) ** 2 // (2 * self.asked + 1) + 1
        high = max(low, length)
        if not fits(low):
            raise UsageError(f"task {self.name!r}: a length of {length} tokens holds no list of words. Raise it.")
        return Question(
            id=self.sample_id(cell, number),
            task=self.name,
            cell=cell,
            cluster=f"{self.name}/{length}/{number}",
            question=question,
            instruction=instruction,
            passages=(passage(largest(low, high, fits)),),
            references=wanted,
        )

    def _words(self, drawn: list[str], size: int) -> list[str]:
        """A list that grows with `size`, whose most frequent words are the first `asked` of `drawn`."""
        if self.variant == "common":
            rest = drawn[self.asked :]
            most = -(-size // len(rest))  # how often a word of the rest stands there, at most
            return drawn[: self.asked] * (10 * most) + [rest[i % len(rest)] for i in range(size)]
        return [word for rank, word in enumerate(drawn, start=1) for _ in range(int(size * rank**-_ZIPF))]


def _vocabulary(resources: Resources, haystack: Path) -> list[str]:
    """Lower-case words of 4 to 9 letters that occur at least 20 times, in alphabetical order."""
    counts: Counter[str] = Counter()
    for book in resources.haystack(haystack).books:
        for sentence in book.sentences:
            counts.update(_WORD.findall(sentence))
    return sorted(word for word, times in counts.items() if times >= 20)
