"""One score of two: by meaning and by words (a convex combination: Bruch, Gai & Ingber, ACM TOIS 42, 2023)."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEANING = 0.4  # the weight of meaning; words have the rest
FLOOR = 2048  # the place in the ranking by meaning whose cosine is the least that an item with words counts
LEAST_RANGE = 0.05  # of cosines: those of one text in two batches differ by up to .001 in bfloat16


def combined(
    near: "NDArray[np.int64]", cosines: "NDArray[np.float32]", lexical: "NDArray[np.float32]"
) -> "NDArray[np.float32]":
    """Scores (n,) of the items 0…n-1, 1 for what is best by both; -inf for what is not near and has none of the words.

        score(i) = MEANING · m(i) + (1 - MEANING) · l(i) / l_1
        m(i) = 1 - (c_1 - c(i)) / max(c_1 - c_f, LEAST_RANGE)

    `near` are the m items by falling `cosines` c_1 … c_m, and f is the smaller of FLOOR and m: with the usual range
    m(f) is 0. `lexical` (n,) are the scores by words, 0 without any, and l_1 the highest. An item with words counts c_f
    where its cosine is unknown or lower, so that it is not told apart by how far the ranking by meaning was asked for;
    one without words has less than that below c_f.
    """
    scores = np.full(len(lexical), -np.inf, dtype=np.float32)
    worded = np.flatnonzero(lexical)
    scores[worded] = 0
    if len(near):
        floor = cosines[min(FLOOR, len(near)) - 1]
        scale = max(cosines[0] - floor, LEAST_RANGE)
        scores[worded] = MEANING * (1 - (cosines[0] - floor) / scale)
        counted = np.where(lexical[near] > 0, np.maximum(cosines, floor), cosines)
        scores[near] = MEANING * (1 - (cosines[0] - counted) / scale)
    if len(worded):
        scores[worded] += (1 - MEANING) * lexical[worded] / lexical.max()
    return scores
