"""What a run shows, as records: means with intervals, paired differences, the gap taken apart, cost against length.

What was not measured is NaN (null in JSON), never 0. Made by `stripedrag.eval.analysis`.
"""

from typing import Literal

from stripedrag.eval.schema import SCHEMA_VERSION, Axis, Record

GapKind = Literal["known", "used", "guessed", "unused", "missed"]
GAP_KINDS: dict[GapKind, str] = {  # what is right first
    "known": "right, and right without a context",
    "used": "right, the evidence in the context",
    "guessed": "right, not all of the evidence in it",
    "unused": "wrong, the evidence in it",
    "missed": "wrong, not all of the evidence in it",
}


class Cell(Record):
    """One system in one cell of a task by one metric: the mean with its 95 % interval over what was answered.

    `answered` of `samples` have a score; failures are counted by reason, answers whose passages were cut in `cut`, and
    those of them whose evidence went with it in `gold_lost`. `prompt_tokens` and `prefill_s` are medians.
    """

    task: str
    system: str
    cell: dict[str, Axis]
    metric: str
    mean: float
    low: float
    high: float
    samples: int
    answered: int
    clusters: int
    failures: dict[str, int]
    cut: int
    gold_lost: int
    prompt_tokens: float
    prefill_s: float


class HeadlineScore(Record):
    """One system in one line of the first table."""

    label: str
    system: str
    metric: str
    mean: float
    low: float
    high: float
    answered: int
    samples: int


class ContrastResult(Record):
    """A paired difference with its interval; `p_holm` is corrected over the family. `left_out` pairs lacked a score."""

    family: str
    label: str
    metric: str
    first: str
    second: str
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    pairs: int
    clusters: int
    left_out: int


class LengthScore(Record):
    """A task's first metric at one length, over all depths."""

    task: str
    system: str
    metric: str
    length_tokens: int
    mean: float
    low: float
    high: float
    answered: int
    samples: int


class EffectiveLength(Record):
    """The longest length up to which a system holds a task: absolutely (RULER) and against its own base (NoLiMa).

    The base is the score at the shortest length.
    """

    task: str
    system: str
    absolute_tokens: int | None
    own_base_tokens: int | None
    base: float
    base_low: float
    base_high: float
    longest_measured: int


class Gap(Record):
    """Where the answers of a system come from: the share of a kind (`GAP_KINDS`) in the questions of a cell."""

    task: str
    system: str
    cell: dict[str, Axis]
    kind: GapKind
    mean: float
    low: float
    high: float
    questions: int


class Recall(Record):
    """How much of the evidence the context held, in characters, whatever was made of it; `samples` have evidence."""

    task: str
    cell: dict[str, Axis]
    mean: float
    low: float
    high: float
    samples: int


class PositionScore(Record):
    """The task's first metric where the evidence begins between two places of the context (0 its start, 1 its end)."""

    task: str
    system: str
    metric: str
    start: float
    end: float
    mean: float
    low: float
    high: float
    samples: int


class Loss(Record):
    """Nats for each reference token of the stretch that ends at `position`; exp of it is the perplexity."""

    task: str
    system: str
    position: int
    nats: float
    low: float
    high: float
    samples: int


class Cost(Record):
    """Medians over the rounds, with their ranges: seconds to the first token, tokens a second; bytes and joules.

    `peak_bytes` is from the round for memory, above what the process held with the models loaded.
    """

    task: str
    system: str
    length_tokens: int
    rounds: int
    first_token_s: float
    first_token_s_min: float
    first_token_s_max: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_tokens_per_s_min: float
    decode_tokens_per_s_max: float
    peak_bytes: float
    cache_bytes: float
    joules: float
    failures: dict[str, int]


class CostFit(Record):
    """The exponent of a quantity against length, least squares on logarithms, with its 95 % interval."""

    task: str
    system: str
    quantity: str
    exponent: float
    low: float
    high: float
    lengths: int


class Analysis(Record):
    """All of it. `done` of `asked` predictions were made: fewer in a run that was not finished."""

    schema_version: int = SCHEMA_VERSION
    done: int
    asked: int
    headline: tuple[HeadlineScore, ...]
    contrasts: tuple[ContrastResult, ...]
    cells: tuple[Cell, ...]
    length_scores: tuple[LengthScore, ...]
    effective_lengths: tuple[EffectiveLength, ...]
    gaps: tuple[Gap, ...]
    recalls: tuple[Recall, ...]
    positions: tuple[PositionScore, ...]
    losses: tuple[Loss, ...]
    costs: tuple[Cost, ...]
    cost_fits: tuple[CostFit, ...]
