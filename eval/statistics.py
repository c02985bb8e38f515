"""How sure a mean is, and whether two systems differ: no figure without an interval, and none is 0 for want of data.

Samples of one document are alike, so the document (or whatever a task declares) is the unit of chance: intervals use
the variance between clusters, tests swap whole clusters.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
PERMUTATIONS = 10_000
EXACT_CLUSTERS = 12  # up to 2^12 sign patterns are all gone through
RULER_THRESHOLD = 0.856  # Llama-2-7B at 4k tokens, RULER's bar for an effective length (Hsieh et al. 2024)
NOLIMA_SHARE = 0.85  # of the own score at short length (Modarressi et al. 2025)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of scores in [0, 1] with its interval; NaN where the data do not say."""

    mean: float
    low: float
    high: float
    samples: int
    clusters: int

    @property
    def is_known(self) -> bool:
        """Whether there is a mean at all."""
        return not math.isnan(self.mean)


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference between two systems, with its interval and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    samples: int
    clusters: int


def estimate(scores: Sequence[float], clusters: Sequence[Hashable], *, bounded: bool = True) -> Estimate:
    """The mean of `scores` and its 95 % interval, samples being independent between clusters only.

    For scores in [0, 1] (`bounded`) the interval is Wilson's (1927) at the effective number of samples (Korn and
    Graubard 1998), that of independent 0-1 scores whose mean would vary as this one does: it stays in [0, 1], right
    near its ends. For scores that are 0 or 1 it is never more than there are.
    Otherwise it is Student's with clusters - 1 degrees of freedom, and NaN where all scores are equal, which says
    nothing of how they vary. One cluster has no interval that is not [0, 1].

    Raises ValueError where the lengths differ, or a bounded score is not in [0, 1].
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"there are {len(values)} scores and {len(clusters)} clusters; each score has one")
    if bounded and not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"scores reach from {values.min()} to {values.max()}; bounded ones lie in [0, 1]")
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    is_one_value = values.min() == values.max()  # and not a variance of 1e-33, which rounding leaves
    mean = float(values[0] if is_one_value else values.mean())
    sums = _cluster_sums(values - mean, clusters)
    count, groups = len(values), len(sums)
    if groups == 1:
        ends = (0.0, 1.0) if bounded else (math.nan, math.nan)
        return Estimate(mean, *ends, count, groups)
    variance = groups / (groups - 1) * float((sums**2).sum()) / count**2
    if not bounded:
        half = math.nan if is_one_value else _student(groups - 1) * math.sqrt(variance)
        return Estimate(mean, mean - half, mean + half, count, groups)
    # Of independent 0-1 samples with this mean and variance; where all scores are equal the clusters are what is
    # counted. Scores between 0 and 1 vary less than those at the ends, and may be worth more samples than there are.
    binomial = mean * (1 - mean)
    effective = groups if is_one_value or variance == 0 else binomial / variance
    if np.isin(values, (0, 1)).all():
        effective = min(effective, count)
    low, high = wilson(mean, effective, quantile=_student(groups - 1))
    return Estimate(mean, low, high, count, groups)


def wilson(share: float, samples: float, quantile: float | None = None) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share of `samples`, which need not be whole; 95 % unless told otherwise."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) if quantile is None else quantile
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    middle, scale = share + z * z / (2 * samples), 1 + z * z / samples
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def difference(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0
) -> Difference:
    """The mean of ours - theirs on the same samples, and the probability of one as large if the systems were alike.

    Under that hypothesis each cluster's difference is as likely to have the other sign: a permutation test over
    clusters, all sign patterns where these are few and 10,000 drawn ones elsewhere (p is then (1 + as large) /
    (1 + drawn)).
    """
    apart = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    found = estimate(apart.tolist(), clusters, bounded=False)
    if not found.samples:
        return Difference(math.nan, math.nan, math.nan, math.nan, 0, 0)
    sums = _cluster_sums(apart, clusters)
    groups = len(sums)
    if groups <= EXACT_CLUSTERS:
        patterns = (np.arange(2**groups)[:, None] >> np.arange(groups)) & 1
        p = _share_as_large(2.0 * patterns - 1, sums)
    else:
        signs = np.random.default_rng(seed).integers(0, 2, size=(PERMUTATIONS, groups)) * 2.0 - 1
        p = (1 + PERMUTATIONS * _share_as_large(signs, sums)) / (1 + PERMUTATIONS)
    return Difference(found.mean, found.low, found.high, p, found.samples, groups)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) adjusted p-values of a family of tests, by name; a NaN is no test and stays one."""
    tests = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted, largest = dict.fromkeys(p_values, math.nan), 0.0
    for rank, (p, name) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[name] = largest
    return adjusted


def effective_length(scores: Mapping[int, float], threshold: float) -> int | None:
    """The longest length up to which every measured length scores at least `threshold`; None where the first does not.

    The threshold is RULER_THRESHOLD, or NOLIMA_SHARE times the own score at the shortest length.
    A length whose score is NaN was not measured, and ends what can be claimed.
    """
    reached = None
    for length in sorted(scores):
        if not scores[length] >= threshold:
            break
        reached = length
    return reached


def _cluster_sums(values: np.ndarray, clusters: Iterable[Hashable]) -> np.ndarray:
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + float(value)
    return np.array(list(sums.values()))


def _share_as_large(signs: np.ndarray, sums: np.ndarray) -> float:
    """Of sign patterns, how many give a sum as far from zero as the one found (with room for rounding)."""
    return float((np.abs(signs @ sums) >= abs(sums.sum()) * (1 - 1e-12) - 1e-12).mean())


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's distribution."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
