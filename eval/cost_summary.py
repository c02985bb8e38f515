"""What answers cost, against length: medians over the rounds of a cost task, and how they grow."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from stripedrag.eval.findings import Cost, CostFit
from stripedrag.eval.rows import Row, failures_of, groups, median
from stripedrag.eval.schema import Carried


def costs_of(rows: Sequence[Row]) -> list[Cost]:
    """A cost for each system and length: rounds for seconds in medians, the round for memory by itself."""
    costs = []
    for (system, length), found in groups(rows, "length_tokens").items():
        counted = [row for row in found if row.sample.cell.get("round") != 0]
        done = [(row.output, row.timing) for row in counted if isinstance(row.output, Carried) and row.timing]
        first = [timing.prefill_s for _, timing in done if timing.prefill_s]
        rates = [output.prompt_tokens / timing.prefill_s for output, timing in done if timing.prefill_s]
        steps = [(output.decode_tokens - 1) / timing.decode_s for output, timing in done if timing.decode_s]
        first_round = [row for row in found if row.sample.cell.get("round") == 0 and isinstance(row.output, Carried)]
        peaks = [row.timing.peak_bytes for row in first_round if row.timing]
        costs.append(
            Cost(
                task=found[0].sample.task,
                system=system,
                length_tokens=length,
                rounds=len(done),
                first_token_s=median(first),
                first_token_s_min=min(first, default=math.nan),
                first_token_s_max=max(first, default=math.nan),
                prefill_tokens_per_s=median(rates),
                decode_tokens_per_s=median(steps),
                decode_tokens_per_s_min=min(steps, default=math.nan),
                decode_tokens_per_s_max=max(steps, default=math.nan),
                peak_bytes=median(peaks),
                cache_bytes=median([output.cache_bytes for output, _ in done]),
                joules=median([timing.joules for _, timing in done]),
                failures=failures_of(found),
            )
        )
    return costs


def cost_fits(costs: Sequence[Cost]) -> Iterable[CostFit]:
    """The exponents of what grows with the length, for each system with two lengths and more."""
    systems: dict[tuple[str, str], list[Cost]] = defaultdict(list)
    for cost in costs:
        systems[cost.task, cost.system].append(cost)
    for (task, system), found in systems.items():
        for quantity in ("first_token_s", "cache_bytes", "peak_bytes"):
            points = [(c.length_tokens, getattr(c, quantity)) for c in found if getattr(c, quantity) > 0]
            if len(points) >= 2:
                exponent, half = _slope(points)
                yield CostFit(
                    task=task,
                    system=system,
                    quantity=quantity,
                    exponent=exponent,
                    low=exponent - half,
                    high=exponent + half,
                    lengths=len(points),
                )


def _slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The exponent of y ~ x^a and the half width of its 95 % interval (NaN for two points)."""
    from scipy.stats import t

    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    freedom = len(points) - 2
    if freedom < 1:
        return slope, math.nan
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / freedom / float(centred @ centred))
    return slope, error * float(t.ppf(0.975, freedom))
