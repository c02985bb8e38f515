"""Real text around planted sentences, sized exactly: novels cut at sentences, never inside one.

A window is where a sample's text begins; windows of one run do not overlap, so each is a cluster of its own. A longer
sample of the same window begins with the same sentences.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from stripedrag.errors import UsageError
from stripedrag.eval.data_formats import Chapter
from stripedrag.eval.schema import Passage, Stretch
from stripedrag.jsonl import read_lines

_SENTENCE = re.compile(r"\S.*?(?:[.!?][”\u2019\"')]*(?=\s)|\Z)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Book:
    """A book's sentences with the white space after them, and the tokens before each (as if each stood alone)."""

    name: str
    sentences: tuple[str, ...]
    tokens_before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A place in a book where a sample's text begins: the index of a sentence."""

    book: Book
    start: int

    @property
    def name(self) -> str:
        """The window's name, and its cluster's."""
        return f"{self.book.name}@{self.start}"

    def text(self, tokens: int) -> str:
        """Sentences from here on that alone have at least so many tokens, or all to the book's end."""
        end = _sentence_at(self.book, self.book.tokens_before[self.start] + tokens)
        return "".join(self.book.sentences[self.start : end])


class Haystack:
    """Books to hide things in. `count` gives the reference tokenizer's tokens of a text."""

    def __init__(self, books: Sequence[Book]) -> None:
        self.books = tuple(books)

    @classmethod
    def read(cls, file: Path, count: Callable[[str], int]) -> "Haystack":
        """The books of a file of chapters, in the file's order."""
        texts: dict[str, list[str]] = {}
        for chapter in read_lines(file, Chapter):
            texts.setdefault(chapter.book, []).append(chapter.text.strip())
        books = []
        for name, chapters in texts.items():
            sentences = tuple(_SENTENCE.findall("\n\n".join(chapters)))
            books.append(Book(name, sentences, tuple(accumulate(map(count, sentences), initial=0))))
        return cls(books)

    def windows(self, rng: random.Random, number: int, tokens: int) -> list[Window]:
        """`number` places with at least `tokens` of text each, no two of which overlap, drawn by `rng`.

        Tokens are counted sentence by sentence, which gives a few more than the text as a whole: see `with_margin`.

        Raises `UsageError` where the books are too short for so many.
        """
        windows = []
        for book in self.books:
            start = 0
            while (end := _sentence_at(book, book.tokens_before[start] + tokens)) is not None:
                windows.append(Window(book, start))
                start = end
        if len(windows) < number:
            raise UsageError(
                f"the haystack has {len(windows)} windows of {tokens} tokens and the task wants {number}. "
                f"Lower its samples or lengths, or give a longer haystack."
            )
        return rng.sample(windows, number)


def with_margin(tokens: int) -> int:
    """What sentences must have one by one for their whole to have `tokens`; measured, they have up to 3 % more."""
    return tokens + tokens // 16 + 64


def plant(
    window: Window,
    facts: Sequence[tuple[float, str]],
    *,
    fits: Callable[[Passage], bool],
    capacity_tokens: int,
) -> tuple[Passage, tuple[Stretch, ...]]:
    """As much of a window's text as fits with all `facts` in it, and where these stand, in the order given.

    A fact is (depth, sentence): 0 comes before the first sentence, 1 after the last. Facts of one depth keep their
    order. `capacity_tokens` is what could fit at most, by `fits`, which decides. Raises `UsageError` where the facts
    alone do not fit.
    """
    book, first = window.book, window.start
    most = _sentence_at(book, book.tokens_before[first] + with_margin(capacity_tokens))
    low, high = 0, (len(book.sentences) if most is None else most) - first
    if not fits(_planted(window, 0, facts)[0]):
        raise UsageError(f"{len(facts)} planted sentences do not fit the task's length. Raise it or plant fewer.")
    return _planted(window, largest(low, high, lambda sentences: fits(_planted(window, sentences, facts)[0])), facts)


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest size from `low`, which fits, to `high` that fits, where whatever is smaller than one fits too."""
    return bisect_left(range(low, high + 1), True, key=lambda size: not fits(size)) + low - 1


def _planted(window: Window, sentences: int, facts: Sequence[tuple[float, str]]) -> tuple[Passage, tuple[Stretch, ...]]:
    text = window.book.sentences[window.start : window.start + sentences]
    order = sorted(range(len(facts)), key=lambda i: round(facts[i][0] * sentences))
    pieces: list[str] = []
    at = done = 0
    places: dict[int, tuple[int, int]] = {}
    for i in order:
        before = round(facts[i][0] * sentences)
        pieces += text[done:before]
        at += sum(map(len, text[done:before]))
        done = before
        places[i] = (at, at + len(facts[i][1]))
        pieces.append(facts[i][1] + " ")
        at += len(pieces[-1])
    whole = "".join([*pieces, *text[done:]]).rstrip()
    passage = Passage(doc_id=window.name, title=_title(window.book.name), start=0, end=len(whole), text=whole)
    stretches = tuple(Stretch(doc_id=window.name, start=places[i][0], end=places[i][1]) for i in range(len(facts)))
    return passage, stretches


def _sentence_at(book: Book, tokens: int) -> int | None:
    """The first sentence that has at least so many tokens of the book before it; None past the end."""
    place = bisect_left(book.tokens_before, tokens)
    return place if place < len(book.tokens_before) else None


def _title(name: str) -> str:
    """A book's name as a person writes it: "herman-melville_moby-dick" is Moby Dick."""
    return name.split("_")[1 if "_" in name else 0].replace("-", " ").title()
