"""Runs of thirteen words that texts have in common, by hash: proof that one part of the data is not in another."""

import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

WORDS = 13
SAMPLED = 16  # one run in so many is kept of texts that do not ship
APART = Path(__file__).with_name("evaluated-apart.npy")


def runs(text: str) -> list[int]:
    """The hash (64 bits) of every run of thirteen words, whatever their case and what stands between them."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    spans = (" ".join(words[i : i + WORDS]).encode() for i in range(len(words) - WORDS + 1))
    return [int.from_bytes(blake2b(span, digest_size=8).digest(), "little") for span in spans]


class Overlap:
    """Some runs, and what texts have of them."""

    def __init__(self, known: Iterable[int]) -> None:
        self._known = frozenset(known)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Overlap":
        """All runs of some texts."""
        return cls(run for text in texts for run in runs(text))

    @classmethod
    def between(cls, texts: Iterable[str], others: Iterable[str]) -> "Overlap":
        """The runs of `texts` that `others`, of which there may be many more, have as well."""
        wanted = {run for text in texts for run in runs(text)}
        return cls(run for other in others for run in runs(other) if run in wanted)

    def shares(self, text: str) -> bool:
        """Whether a text has such a run."""
        return not self._known.isdisjoint(runs(text))

    def share(self, text: str) -> float:
        """The share of a text's runs that are known; 0 for one of fewer than thirteen words."""
        found = runs(text)
        return sum(run in self._known for run in found) / max(1, len(found))


def sample(texts: Iterable[str]) -> np.ndarray:
    """(R,) uint64, sorted: the runs of some texts whose hash is a multiple of 16, from which no text can be read."""
    return np.array(sorted({run for text in texts for run in runs(text) if run % SAMPLED == 0}), dtype=np.uint64)


def evaluated_apart() -> list[int]:
    """Such a sample of `rag_qa`'s 83 documents of COVID-QA and Chroma in the parts `dev` and `evaluation_only`, which
    do not ship. A text that holds fifty words of one of them in a row is found in nine cases of ten."""
    apart: list[int] = np.load(APART).tolist()
    return apart
