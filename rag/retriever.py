"""Fills a budget of tokens with the best chunks, joined into spans. The one place that does, for whoever retrieves.

Contract: never over the budget, counted exactly and on the joined text, and under it by less than the next chunk; every
chunk that was considered and left out is listed with the reason. No reranker: the index's order decides. Knows nothing
of prompts or models beyond a tokenizer's count.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, get_args

from stripedrag.errors import UsageError
from stripedrag.rag.beginning import beginning

if TYPE_CHECKING:
    from stripedrag.indexes.documents import Chunk, Scored
    from stripedrag.indexes.filters import Where
    from stripedrag.indexes.index import Index

_One = TypeVar("_One")
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


class Searchable(Protocol):
    """What is asked of an index: of `stripedrag.indexes.Index`, or of what stands in for it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Counts where a caller gives none."""

    @property
    def chunk_tokens(self) -> int:
        """About how many tokens a chunk has."""

    def search(
        self, query: str, *, k: int, where: "Where | None" = None, doc_ids: Iterable[str] | None = None
    ) -> "list[Scored]":
        """The `k` best chunks for a query, best first; fewer where there are no more."""

    def titles(self, doc_ids: Collection[str]) -> dict[str, str]:
        """The titles of documents that a search has found."""


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


class Retriever:
    """Retrieves from an index by budget rather than by number.

    `policy` orders the spans: "rank" puts the best first, "best-last" puts it nearest to what follows, "edges" puts the
    best at both ends and the worst in the middle (Liu et al., "Lost in the Middle", 2307.03172), "document" keeps each
    document's spans in their order and the documents by their best span. `shared` is the share of a budget that begins
    with what other questions about the same document begin with, too (`stripedrag.rag.beginning`); the best chunks that
    are not in it fill the rest, in the policy's order. Raises `UsageError` for another policy or share, and for a share
    of what is no `Index`.
    """

    def __init__(self, index: Searchable, *, policy: Policy = "rank", shared: float = 0.0) -> None:
        if policy not in POLICIES:
            raise UsageError(f"no order policy {policy!r}; choose one of {', '.join(POLICIES)}")
        if not 0 <= shared < 1:
            raise UsageError(f"shared is {shared}; it is a share of the budget from 0 to below 1")
        if shared and not hasattr(index, "chunks"):
            raise UsageError(f"a {type(index).__name__} gives no whole documents to share; open an index of stripedrag")
        self.index = index
        self.policy: Policy = policy
        self.shared = shared

    def retrieve(
        self,
        question: str | Sequence[str],
        *,
        budget_tokens: int,
        max_chunks: int | None = None,
        tokenizer: Tokenizer | None = None,
        render: Callable[[Span], str] | None = None,
        where: "Where | None" = None,
        doc_ids: Iterable[str] | None = None,
    ) -> Context:
        """The best chunks for `question` that fit into `budget_tokens`, as spans; of several questions the best chunk
        of each, then the second of each.

        Chunks are taken in rank order up to the first that does not fit, and joined where they touch; a chunk that
        repeats better ones is passed over. `max_chunks` considers no more than so many (top-k); `where` and `doc_ids`
        narrow the search as in `Index.search`. Tokens are those of `tokenizer` (None: the embedder's) over
        `render(span)` (None: the span's text). Raises `UsageError` for a budget or `max_chunks` below 1, no question,
        and what `Index.search` raises.
        """
        return self._retrieve(question, budget_tokens, max_chunks, tokenizer, render, where, doc_ids)[1]

    def retrieve_chunks(
        self,
        question: str | Sequence[str],
        *,
        budget_tokens: int,
        tokenizer: Tokenizer | None = None,
        render: Callable[[Span], str] | None = None,
        where: "Where | None" = None,
        doc_ids: Iterable[str] | None = None,
    ) -> "list[Scored]":
        """The chunks that `retrieve` joins into spans, in rank order; of those that are shared, what was found."""
        found, context = self._retrieve(question, budget_tokens, None, tokenizer, render, where, doc_ids)
        dropped = {one.rank for one in context.dropped}
        return [scored for scored in found if scored.rank not in dropped]

    def _retrieve(
        self,
        question: str | Sequence[str],
        budget_tokens: int,
        max_chunks: int | None,
        tokenizer: Tokenizer | None,
        render: Callable[[Span], str] | None,
        where: "Where | None",
        doc_ids: Iterable[str] | None,
    ) -> "tuple[list[Scored], Context]":
        """What was considered, and what of it fits."""
        if budget_tokens < 1:
            raise UsageError(f"budget_tokens is {budget_tokens}; it is at least 1")
        if max_chunks is not None and max_chunks < 1:
            raise UsageError(f"max_chunks is {max_chunks}; it is at least 1, or None for as many as fit")
        doc_ids = None if doc_ids is None else list(doc_ids)
        questions = [question] if isinstance(question, str) else list(question)
        if not questions:
            raise UsageError("there is no question to retrieve for; give at least one")
        # Twice what would fill the budget with full chunks, and again twice that while everything still fits.
        k = max_chunks or 8 - 2 * (-budget_tokens // self.index.chunk_tokens)
        while True:
            found = [self.index.search(one, k=k, where=where, doc_ids=doc_ids) for one in questions]
            candidates = _of_all(found)
            context = self.fill(candidates, budget_tokens=budget_tokens, tokenizer=tokenizer, render=render)
            if (
                max_chunks
                or all(len(some) < k for some in found)
                or any(dropped.reason == "budget" for dropped in context.dropped)
            ):
                break
            k *= 2
        if self.shared:
            context = self._with_beginning(candidates, context, tokenizer, render, where, doc_ids)
        return candidates, context

    def _with_beginning(
        self,
        candidates: "Sequence[Scored]",
        alone: Context,
        tokenizer: Tokenizer | None,
        render: Callable[[Span], str] | None,
        where: "Where | None",
        doc_ids: Iterable[str] | None,
    ) -> Context:
        """What is shared, and the best candidates that it lacks in the rest of the budget of `alone`."""
        budget = alone.budget_tokens
        chunks, room = beginning(
            cast("Index", self.index), candidates, budget_tokens=int(self.shared * budget), where=where, doc_ids=doc_ids
        )
        options: dict[str, Any] = {"tokenizer": tokenizer or self.index.tokenizer, "render": render}
        titles = self.index.titles({scored.chunk.doc_id for scored in (*chunks, *candidates)})
        first = fill(chunks, titles, budget_tokens=room, policy="rank", keep_repeats=True, **options)
        over = {dropped.rank for dropped in first.dropped}
        taken = [scored for scored in chunks if scored.rank not in over]
        there = {scored.chunk.id for scored in taken}
        own = [scored for scored in candidates if scored.chunk.id not in there]
        rest = fill(own, titles, budget_tokens=budget - first.tokens, policy=self.policy, before=taken, **options)
        tokens = first.tokens + rest.tokens
        return Context(first.spans + rest.spans, rest.dropped, tokens, budget, self.policy, shared_tokens=first.tokens)

    def fill(
        self,
        candidates: "Iterable[Scored]",
        *,
        budget_tokens: int,
        tokenizer: Tokenizer | None = None,
        render: Callable[[Span], str] | None = None,
        keep_repeats: bool = False,
    ) -> Context:
        """The `candidates`, taken in their order, that fit into `budget_tokens`, as spans; see `retrieve`.

        `keep_repeats` takes those too that repeat better ones, as a document has to be read from its beginning.
        """
        candidates = list(candidates)
        return fill(
            candidates,
            self.index.titles({scored.chunk.doc_id for scored in candidates}),
            budget_tokens=budget_tokens,
            tokenizer=tokenizer or self.index.tokenizer,
            render=render,
            policy=self.policy,
            keep_repeats=keep_repeats,
        )


def fill(
    candidates: "Sequence[Scored]",
    titles: Mapping[str, str],
    *,
    budget_tokens: int,
    tokenizer: Tokenizer,
    render: Callable[[Span], str] | None = None,
    policy: Policy,
    keep_repeats: bool = False,
    before: "Sequence[Scored]" = (),
) -> Context:
    """As `Retriever.fill`, for candidates that come from no index; `titles` are those of their documents. What `before`
    says already is a repeat, too.
    """
    new, repeats = (candidates, []) if keep_repeats else _without_repeats(candidates, before)
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


def in_turn(groups: Iterable[Sequence[_One]]) -> list[_One]:
    """The first of each group, then the second of each that has one, and so on."""
    turns = [(turn, one) for group in groups for turn, one in enumerate(group)]
    return [one for _, one in sorted(turns, key=lambda pair: pair[0])]  # stable: groups keep their order in a turn


def _of_all(found: "Sequence[Sequence[Scored]]") -> "list[Scored]":
    """What was found for several questions, in turn, each chunk once."""
    if len(found) == 1:
        return list(found[0])
    first: dict[str, Scored] = {}
    for scored in in_turn(found):
        first.setdefault(scored.chunk.id, scored)
    return [replace(scored, rank=rank) for rank, scored in enumerate(first.values(), start=1)]


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


def _without_repeats(candidates: "Iterable[Scored]", before: "Sequence[Scored]") -> "tuple[list[Scored], list[Scored]]":
    """Those that say something new in the order given, and those whose runs of words were all seen before."""
    seen = {run for scored in before for run in runs_of_words(scored.chunk.text)}
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
