"""Retrieves by a budget of tokens rather than by a number of chunks. No reranker: the index's order decides.

Knows nothing of prompts or models beyond a tokenizer's count; what fits is packed by `stripedrag.rag.packing`.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from stripedrag.errors import UsageError
from stripedrag.rag.beginning import beginning
from stripedrag.rag.packing import POLICIES, Context, Policy, Span, Tokenizer, fill

if TYPE_CHECKING:
    from stripedrag.indexes.documents import Scored
    from stripedrag.indexes.filters import Where
    from stripedrag.indexes.index import Index

OWN_TOKENS = 1536  # that a question keeps of a budget beside what it shares with others

_One = TypeVar("_One")


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


class Retriever:
    """Retrieves from an index by budget rather than by number.

    `policy` orders the spans: "rank" puts the best first, "best-last" puts it nearest to what follows, "edges" puts the
    best at both ends and the worst in the middle (Liu et al., "Lost in the Middle", 2307.03172), "document" keeps each
    document's spans in their order and the documents by their best span. `shared` is the share of a budget that begins
    with what other questions about the same document begin with, too, where a question is about one
    (`stripedrag.rag.beginning`); the best chunks, also those that are in it, fill the rest, which is no less than
    `own_tokens`, in the policy's order. A budget of less than twice `own_tokens` shares nothing. Raises `UsageError`
    for another policy or share, and for a share of what is no `Index`.
    """

    def __init__(
        self, index: Searchable, *, policy: Policy = "rank", shared: float = 0.0, own_tokens: int = OWN_TOKENS
    ) -> None:
        if policy not in POLICIES:
            raise UsageError(f"no order policy {policy!r}; choose one of {', '.join(POLICIES)}")
        if not 0 <= shared < 1:
            raise UsageError(f"shared is {shared}; it is a share of the budget from 0 to below 1")
        if shared and not hasattr(index, "chunks"):
            raise UsageError(f"a {type(index).__name__} gives no whole documents to share; open an index of stripedrag")
        self.index = index
        self.policy: Policy = policy
        self.shared, self.own_tokens = shared, own_tokens

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
        options: dict[str, Any] = {"tokenizer": tokenizer, "render": render}
        first: Context | None = None
        there: set[tuple[str, int]] = set()
        while True:
            found = [self.index.search(one, k=k, where=where, doc_ids=doc_ids) for one in questions]
            candidates = _of_all(found)
            if first is None and self.shared and len(questions) == 1:  # several share their context as it is
                first, there = self._beginning(candidates, budget_tokens, where, doc_ids, **options)
            # Also those that the beginning holds: a model answers best from what stands near the question.
            left = budget_tokens - (first.tokens if first else 0)
            context = self.fill(candidates, budget_tokens=left, **options)
            if (
                max_chunks
                or all(len(some) < k for some in found)
                or any(dropped.reason == "budget" for dropped in context.dropped)
            ):
                break
            k *= 2
        if first and first.spans:
            dropped = tuple(one for one in context.dropped if (one.doc_id, one.start) not in there)
            spans, tokens = first.spans + context.spans, first.tokens + context.tokens
            context = Context(spans, dropped, tokens, budget_tokens, self.policy, shared_tokens=first.tokens)
        return candidates, context

    def _beginning(
        self,
        candidates: "Sequence[Scored]",
        budget_tokens: int,
        where: "Where | None",
        doc_ids: Iterable[str] | None,
        **options: Any,
    ) -> tuple[Context, set[tuple[str, int]]]:
        """What is shared of a budget, and which chunks that is, by document and place."""
        most = min(int(self.shared * budget_tokens), budget_tokens - self.own_tokens)
        if most < self.own_tokens:  # less than what is read beside it, and most of it there again
            most = 0
        chunks, room = beginning(
            cast("Index", self.index), candidates, budget_tokens=most, where=where, doc_ids=doc_ids
        )
        first = Retriever(self.index).fill(chunks, budget_tokens=room, keep_repeats=True, **options)
        over = {dropped.rank for dropped in first.dropped}
        return first, {(scored.chunk.doc_id, scored.chunk.start) for scored in chunks if scored.rank not in over}

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
