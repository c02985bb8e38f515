"""Fills a budget of tokens with the best chunks, joined into spans. The one place that does, for whoever retrieves.

Contract: never over the budget, counted exactly and on the joined text; every chunk that was considered and left out
is listed. No reranker: the index's order decides. Knows nothing of prompts or models beyond a tokenizer's count.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from stripedrag.errors import UsageError

if TYPE_CHECKING:
    from stripedrag.indexes.documents import Scored
    from stripedrag.indexes.index import Index

Policy = Literal["rank", "best-last", "document"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


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
    """A chunk that was found and did not fit any more; `rank` counts from 1."""

    doc_id: str
    start: int
    end: int
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Context:
    """What fills a budget: spans in the policy's order, the chunks that were dropped, and the tokens of the spans."""

    spans: tuple[Span, ...]
    dropped: tuple[Dropped, ...]
    tokens: int
    budget_tokens: int
    policy: Policy


class Retriever:
    """Retrieves from an index by budget rather than by number.

    `policy` orders the spans: "rank" puts the best first, "best-last" puts it nearest to what follows, "document" keeps
    each document's spans in their order and the documents by their best span. Raises `UsageError` for another name.
    """

    def __init__(self, index: "Index", *, policy: Policy = "rank") -> None:
        if policy not in POLICIES:
            raise UsageError(f"no order policy {policy!r}; choose one of {', '.join(POLICIES)}")
        self.index = index
        self.policy: Policy = policy

    def retrieve(
        self,
        question: str,
        *,
        budget_tokens: int,
        max_chunks: int | None = None,
        tokenizer: Tokenizer | None = None,
        render: Callable[[Span], str] | None = None,
    ) -> Context:
        """The best chunks for `question` that fit into `budget_tokens`, as spans.

        Chunks are taken in rank order; one that does not fit is dropped and smaller ones after it are still tried. A
        chunk is joined to spans that it touches. `max_chunks` considers no more than so many (top-k). Tokens are those
        of `tokenizer` (None: the embedder's) over `render(span)` (None: the span's text). Raises `UsageError` for a
        budget or `max_chunks` below 1 and what `Index.search` raises.
        """
        if budget_tokens < 1:
            raise UsageError(f"budget_tokens is {budget_tokens}; it is at least 1")
        if max_chunks is not None:
            if max_chunks < 1:
                raise UsageError(f"max_chunks is {max_chunks}; it is at least 1, or None for as many as fit")
            found = self.index.search(question, k=max_chunks)
            return self.fill(found, budget_tokens=budget_tokens, tokenizer=tokenizer, render=render)
        # Twice what would fill the budget with full chunks, and again twice that while everything still fits.
        k = 8 + 2 * math.ceil(budget_tokens / self.index.manifest.chunk_tokens)
        while True:
            found = self.index.search(question, k=k)
            context = self.fill(found, budget_tokens=budget_tokens, tokenizer=tokenizer, render=render)
            if context.dropped or len(found) < k:
                return context
            k *= 2

    def fill(
        self,
        candidates: "Iterable[Scored]",
        *,
        budget_tokens: int,
        tokenizer: Tokenizer | None = None,
        render: Callable[[Span], str] | None = None,
    ) -> Context:
        """The `candidates`, taken in their order, that fit into `budget_tokens`, as spans; see `retrieve`."""
        filling = _Filling(self.index, budget_tokens, tokenizer or self.index.embedder.tokenizer, render)
        for scored in candidates:
            filling.offer(scored)
        spans = tuple(_ordered(filling.spans, self.policy))
        return Context(spans, tuple(filling.dropped), filling.tokens, budget_tokens, self.policy)


class _Filling:
    """A budget while it is being filled."""

    def __init__(
        self, index: "Index", budget_tokens: int, tokenizer: Tokenizer, render: Callable[[Span], str] | None
    ) -> None:
        self.spans: list[Span] = []  # in the rank order of their first chunk
        self.dropped: list[Dropped] = []
        self.tokens = 0
        self._index, self._budget, self._tokenizer, self._render = index, budget_tokens, tokenizer, render
        self._titles: dict[str, str] = {}
        self._counts: dict[tuple[str, int, int], int] = {}

    def offer(self, scored: "Scored") -> None:
        """Take the chunk in, or drop it if that would exceed the budget."""
        chunk = scored.chunk
        if chunk.doc_id not in self._titles:
            self._titles[chunk.doc_id] = self._index.document(chunk.doc_id).title
        touching = [
            s for s in self.spans if s.doc_id == chunk.doc_id and chunk.start in (s.end, s.start - len(chunk.text))
        ]
        pieces = sorted([(chunk.start, chunk.text), *((s.start, s.text) for s in touching)])
        text = "".join(piece for _, piece in pieces)
        joined = Span(
            doc_id=chunk.doc_id,
            title=self._titles[chunk.doc_id],
            start=pieces[0][0],
            end=pieces[0][0] + len(text),
            text=text,
            score=max([scored.score, *(s.score for s in touching)]),
        )
        tokens = self.tokens + self._count(joined) - sum(self._count(s) for s in touching)
        if tokens > self._budget:
            self.dropped.append(Dropped(chunk.doc_id, chunk.start, chunk.end, scored.score, scored.rank))
            return
        self.tokens = tokens
        if touching:
            self.spans[self.spans.index(touching[0])] = joined
            self.spans = [s for s in self.spans if s not in touching[1:]]
        else:
            self.spans.append(joined)

    def _count(self, span: Span) -> int:
        key = (span.doc_id, span.start, span.end)
        if key not in self._counts:
            text = self._render(span) if self._render else span.text
            self._counts[key] = len(self._tokenizer.encode(text, add_special_tokens=False))
        return self._counts[key]


def _ordered(spans: list[Span], policy: Policy) -> list[Span]:
    if policy == "best-last":
        return spans[::-1]
    if policy == "document":
        first = {span.doc_id: place for place, span in reversed(list(enumerate(spans)))}
        return sorted(spans, key=lambda span: (first[span.doc_id], span.start))
    return spans
