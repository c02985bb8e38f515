"""Contexts for a question over an index: the product's own filling, what it is compared with, and the controls."""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Literal

from stripedrag.errors import UsageError
from stripedrag.eval.places import touches
from stripedrag.eval.resources import Resources, passage_of
from stripedrag.eval.schema import Passage, Stretch
from stripedrag.indexes.documents import Document, Scored
from stripedrag.indexes.index import Index
from stripedrag.rag.packing import Context, Policy
from stripedrag.rag.retriever import Retriever

# fill: the best chunks, as many as fit, as `Pipeline.ask` does. top-k: the best k passages. reranked-5: the best 5 when
# a reranker that cannot err has put passages with evidence first among the best 100, a bound for every real one.
# oracle: the evidence's own paragraphs. random: chunks of documents without evidence, as many as fit. none: nothing.
ContextName = Literal["fill", "top-5", "top-20", "reranked-5", "oracle", "random", "none"]
UNBUDGETED: tuple[ContextName, ...] = ("oracle", "none")
_CANDIDATES = 100


class Source:
    """An index to take contexts from in the order of `policy`, counted by the run's reference tokenizer."""

    def __init__(self, resources: Resources, index: Index, policy: Policy) -> None:
        self._prompt = resources.prompt
        self._index = index
        self._retriever = Retriever(index, policy=policy)
        self.policy = policy

    def passage_budget(self, asked: str, budget_tokens: int, answer_tokens: int) -> int:
        """What prompt and answer of `budget_tokens` leave for passages. Raises `UsageError` where that is nothing."""
        left = budget_tokens - answer_tokens - self._prompt.overhead_tokens(asked)
        if left < 1:
            raise UsageError(
                f"a budget of {budget_tokens} tokens leaves nothing for passages: the answer's reserve takes "
                f"{answer_tokens}. Raise the budget or lower answer_tokens."
            )
        return left

    def context(
        self,
        name: ContextName,
        question: str,
        evidence: Sequence[Stretch],
        gold: Sequence[Passage],
        budget: int,
        rng: Random,
    ) -> tuple[Passage, ...]:
        """The passages of the context `name` within `budget` tokens (oracle's and none's need none)."""
        if name == "none":
            return ()
        if name == "oracle":
            return tuple(gold)
        if name == "random":
            return self.filled(self._random(evidence, budget, rng), budget)
        if name == "reranked-5":
            found = self._index.search(question, k=_CANDIDATES, unit="passage")
            return self.filled(_evidence_first(found, evidence)[:5], budget)
        if name != "fill":
            return self.filled(self._index.search(question, k=int(name.removeprefix("top-")), unit="passage"), budget)
        context = self._retriever.retrieve(
            question, budget_tokens=budget, tokenizer=self._prompt, render=self._prompt.render
        )
        return _passages(context)

    def filled_for(self, questions: Sequence[str], budget: int) -> tuple[Passage, ...]:
        """One context for several questions: the best chunk of each, then the second of each, as many as fit."""
        context = self._retriever.retrieve(
            questions, budget_tokens=budget, tokenizer=self._prompt, render=self._prompt.render
        )
        return _passages(context)

    def without(self, question: str, doc_ids: frozenset[str], budget: int) -> tuple[Passage, ...]:
        """The best chunks that fit, none of them from `doc_ids`."""
        found = self._index.search(question, k=len(self._index))
        return self.filled((scored for scored in found if scored.chunk.doc_id not in doc_ids), budget)

    def with_evidence(self, question: str, evidence: Sequence[Stretch], budget: int) -> tuple[Passage, ...]:
        """Chunks with evidence, then the best others that fit."""
        found = self._index.search(question, k=len(self._index))
        return self.filled(_evidence_first(found, evidence), budget)

    def only_evidence(self, question: str, evidence: Sequence[Stretch], budget: int) -> tuple[Passage, ...]:
        """The chunks with evidence, best first, that fit."""
        found = self._index.search(question, k=len(self._index))
        return self.filled((scored for scored in found if touches(scored.chunk, evidence)), budget)

    def beginning(self, doc_id: str, budget: int) -> tuple[Passage, ...]:
        """A document's first chunks, up to the first that does not fit."""
        chunks = [Scored(chunk, 0.0, rank) for rank, chunk in enumerate(self._index.chunks(doc_id), start=1)]
        return _passages(self._fill(chunks, budget, keep_repeats=True))

    def filled(self, candidates: Iterable[Scored], budget: int) -> tuple[Passage, ...]:
        """The candidates that fit, by the product's own filling."""
        return _passages(self._fill(candidates, budget))

    def document(self, doc_id: str) -> Document:
        """A document of the index."""
        return self._index.document(doc_id)

    def _fill(self, candidates: Iterable[Scored], budget: int, *, keep_repeats: bool = False) -> Context:
        return self._retriever.fill(
            candidates,
            budget_tokens=budget,
            tokenizer=self._prompt,
            render=self._prompt.render,
            keep_repeats=keep_repeats,
        )

    def _random(self, evidence: Sequence[Stretch], budget: int, rng: Random) -> list[Scored]:
        named = {stretch.doc_id for stretch in evidence}
        others = [doc_id for doc_id in self._index.document_ids() if doc_id not in named]
        if not others:
            raise UsageError("the corpus has no document without evidence, so no random context. Add distractors.")
        some = rng.sample(others, min(_CANDIDATES + budget // 32, len(others)))  # enough of short ones, too
        chunks = [chunk for doc_id in some for chunk in self._index.chunks(doc_id)]
        return [Scored(chunk, 0.0, rank) for rank, chunk in enumerate(chunks, start=1)]


def _evidence_first(found: Sequence[Scored], evidence: Sequence[Stretch]) -> list[Scored]:
    """What has a part of the evidence, then the rest, each in the order found."""
    return sorted(found, key=lambda scored: not touches(scored.chunk, evidence))


def _passages(context: Context) -> tuple[Passage, ...]:
    return tuple(passage_of(span) for span in context.spans)
