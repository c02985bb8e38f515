"""Packs the best chunks into a budget of tokens, joined into spans. The one place that does, for whoever retrieves.

Contract: never over the budget, counted exactly and on the joined text, and under it by less than the next chunk; every
chunk that was considered and left out is listed with the reason. No reranker: the order given decides. Knows nothing
of indexes, prompts or models beyond a tokenizer's count.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from stripedrag.indexes.documents import Chunk, Scored

Policy = Literal["rank", "best-last", "document", "edges"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

# A chunk repeats those before it where all its runs of so many words were in them. All, as reports differ in numbers.
RUN_WORDS = 5
_FEW_CHARS = 4  # a token has rarely fewer: where the search for the longest filling starts


class Tokenizer(Protocol):
    """What is needed of a tokenizer: that of transformers and that of tokenizers both have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> "Sized":
        """The tokens of `text`, something that has a length."""


class Sized(Protocol):
    """Something that has a length."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Span:
    """A contiguous stretch of one document: joined chunks, `text == document.text[start:end]`.

    `score` is that of its best chunk.
    """

    doc_id: str
    title: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """A chunk that was found and left out: over the budget, or a repeat of better ones; `rank` counts from 1."""

    doc_id: str
    start: int
    end: int
    score: float
    rank: int
    reason: Literal["budget", "repeat"]


@dataclass(frozen=True, slots=True)
class Context:
    """What fills a budget: spans in the policy's order, the chunks that were dropped, and the tokens of the spans.

    The first `shared_tokens` of them are of spans that other questions about the same document begin with, too.
    """

    spans: tuple[Span, ...]
    dropped: tuple[Dropped, ...]
    tokens: int
    budget_tokens: int
    policy: Policy
    shared_tokens: int = 0


def fill(
    candidates: "Sequence[Scored]",
    titles: Mapping[str, str],
    *,
    budget_tokens: int,
    tokenizer: Tokenizer,
    render: Callable[[Span], str] | None = None,
    policy: Policy,
    keep_repeats: bool = False,
) -> Context:
    """As `Retriever.fill`, for candidates that come from no index; `titles` are those of their documents."""
    new, repeats = (candidates, []) if keep_repeats else _without_repeats(candidates)
    count = _Count(tokenizer, render)
    fitting = _longest(new, titles, count, min(budget_tokens, sys.maxsize))
    spans = _joined(new[:fitting], titles)
    dropped = [_dropped(scored, "budget") for scored in new[fitting:]]
    dropped += [_dropped(scored, "repeat") for scored in repeats]
    return Context(
        tuple(_ordered(spans, policy)),
        tuple(sorted(dropped, key=lambda one: one.rank)),
        count.of(spans),
        budget_tokens,
        policy,
    )


def _dropped(scored: "Scored", reason: Literal["budget", "repeat"]) -> Dropped:
    chunk = scored.chunk
    return Dropped(chunk.doc_id, chunk.start, chunk.end, scored.score, scored.rank, reason)


class _Count:
    """Exact tokens of spans; each span is counted once, however often it is asked for."""

    def __init__(self, tokenizer: Tokenizer, render: Callable[[Span], str] | None) -> None:
        self._tokenizer, self._render = tokenizer, render
        self._known: dict[Span, int] = {}

    def of(self, spans: Iterable[Span]) -> int:
        """The tokens of all of them."""
        return sum(self._one(span) for span in spans)

    def _one(self, span: Span) -> int:
        if span not in self._known:
            text = self._render(span) if self._render else span.text
            self._known[span] = len(self._tokenizer.encode(text, add_special_tokens=False))
        return self._known[span]


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """All `RUN_WORDS` words in a row of a text, in lower case; a shorter text is one run, white space none."""
    words = text.lower().split()
    runs = range(max(1, len(words) - RUN_WORDS + 1)) if words else ()
    return {tuple(words[at : at + RUN_WORDS]) for at in runs}


def _without_repeats(candidates: "Iterable[Scored]") -> "tuple[list[Scored], list[Scored]]":
    """Those that say something new in the order given, and those whose runs of words were all seen before."""
    seen: set[tuple[str, ...]] = set()
    new, repeats = [], []
    for scored in candidates:
        runs = runs_of_words(scored.chunk.text)
        if runs and runs <= seen:
            repeats.append(scored)
        else:
            new.append(scored)
            seen |= runs
    return new, repeats


def _longest(candidates: "Sequence[Scored]", titles: Mapping[str, str], count: _Count, budget_tokens: int) -> int:
    """How many of the first candidates fit together.

    Counting is what costs, and a span is counted again when it grows. So the length is found by interpolation over the
    characters, which the tokens nearly follow: a few counts, of which the later ones concern few spans.
    """
    chars = [0, *accumulate(len(scored.chunk.text) for scored in candidates)]
    fits, fitting, over, exceeding = 0, 0, len(candidates) + 1, 0
    target: float = _FEW_CHARS * budget_tokens
    for attempt in range(len(candidates) + 1):
        if over - fits == 1:
            break
        nearest = bisect_right(chars, target) - 1 if attempt % 4 < 3 else (fits + over) // 2
        n = min(max(nearest, fits + 1), over - 1)
        tokens = count.of(_joined(candidates[:n], titles))
        if tokens <= budget_tokens:
            fits, fitting = n, tokens
        else:
            over, exceeding = n, tokens
        if over <= len(candidates):
            share = (budget_tokens - fitting) / (exceeding - fitting)
            target = chars[fits] + share * (chars[over] - chars[fits])
        else:
            target = chars[fits] * budget_tokens / max(fitting, 1)
    return fits


def _joined(taken: "Sequence[Scored]", titles: Mapping[str, str]) -> list[Span]:
    """The chunks as spans, those that touch or overlap joined, in the order of each span's first chunk in `taken`."""
    spans: list[tuple[int, Span]] = []
    pieces: list[tuple[int, Scored, str]] = []

    def close() -> None:
        first = pieces[0][1].chunk
        text = "".join(piece for _, _, piece in pieces)
        score = max(scored.score for _, scored, _ in pieces)
        span = Span(first.doc_id, titles.get(first.doc_id, ""), first.start, first.start + len(text), text, score)
        spans.append((min(place for place, _, _ in pieces), span))
        pieces.clear()

    last: Chunk | None = None  # the one that ends last of those in `pieces`
    for place, scored in sorted(enumerate(taken), key=lambda one: (one[1].chunk.doc_id, one[1].chunk.start)):
        chunk, shared = scored.chunk, ""
        if last is not None:
            shared = last.text[chunk.start - last.start :]
            touches = last.doc_id == chunk.doc_id and chunk.start <= last.end
            if not touches or not (chunk.text.startswith(shared) or shared.startswith(chunk.text)):
                close()
                last, shared = None, ""
        pieces.append((place, scored, chunk.text[len(shared) :]))
        if last is None or chunk.end > last.end:
            last = chunk
    if pieces:
        close()
    return [span for _, span in sorted(spans, key=lambda one: one[0])]


def _ordered(spans: list[Span], policy: Policy) -> list[Span]:
    if policy == "best-last":
        return spans[::-1]
    if policy == "edges":
        return spans[::2] + spans[1::2][::-1]
    if policy == "document":
        first = {span.doc_id: place for place, span in reversed(list(enumerate(spans)))}
        return sorted(spans, key=lambda span: (first[span.doc_id], span.start))
    return spans
