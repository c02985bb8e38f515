"""Reciprocal rank fusion: Cormack, Clarke & Büttcher, SIGIR 2009."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

K = 60


def reciprocal_ranks(rankings: "Sequence[NDArray[np.int64]]", n: int) -> "NDArray[np.float32]":
    """Scores (n,) of the items 0…n-1 from rankings, each of distinct items, best first.

    An item's score is Σ (K + 1) / (K + rank) over the rankings that hold it, divided by their number: 1 for what is
    first in all, 0 for what is in none.
    """
    scores = np.zeros(n, dtype=np.float32)
    for ranking in rankings:
        scores[ranking] += (K + 1) / (K + np.arange(1, len(ranking) + 1, dtype=np.float32)) / len(rankings)
    return scores
