"""Natural questions on passages, with answers, for training: `qa_train.jsonl.xz`, whose sources stand in SOURCES.md."""

import re
from collections.abc import Iterator
from pathlib import Path

from stripedrag.jsonl import read_lines
from stripedrag.model.striping.data import Asked

FILE = Path(__file__).with_name("qa_train.jsonl.xz")
# Chat in lower case, and questions that are a dialogue on one of 68 rules.
_LEFT_OUT = frozenset(("molweni_test", "sharc_dev"))


def natural() -> Iterator[Asked]:
    """The questions in their file's order, in which those of one article stand together; each passage gets a title."""
    for asked in read_lines(FILE, Asked):
        if asked.source not in _LEFT_OUT:
            yield asked.model_copy(update={"title": title_of(asked.passage)})


def title_of(passage: str) -> str:
    """What a passage seems to be about: the name that it says most often, longer ones first; "" where it has none.

    A name is told by its capital within a sentence. A word that comes in lower case, too, is none.
    """
    within = " | ".join(_BEGINNING.sub("", sentence) for sentence in _ENDS.split(passage))
    words = set(re.findall(r"[^\W\d_]+", within))
    names = (name for name in dict.fromkeys(_NAME.findall(within)) if name.lower() not in words)
    counts = {name: passage.count(name) for name in names}
    return max(counts, key=lambda name: counts[name] * len(name.split()) ** 0.5, default="")


_LETTER = r"[^\W\d_]"
_ENDS = re.compile(r"(?<=[.!?:])[\"'”)]*\s+|\n")
_BEGINNING = re.compile(rf"^\W*{_LETTER}+")
_NAME = re.compile(rf"\b(?=[A-ZÀ-ÖØ-Þ]){_LETTER}{{2,}}(?: (?=[A-ZÀ-ÖØ-Þ]){_LETTER}{{2,}})*")
