"""Question answering over a corpus: retrieve, fill, answer, beside what filling is compared with and the controls."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stripedrag.eval.data_formats import CorpusQuestion
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Axis, Question
from stripedrag.eval.schema import asked as as_read
from stripedrag.eval.tasks.base import ReadingTask
from stripedrag.eval.tasks.corpus import CorpusFields, passage, stretches
from stripedrag.eval.tasks.planted import Length
from stripedrag.eval.tasks.retrieved import UNBUDGETED, ContextName, Source
from stripedrag.rag.defaults import POLICY
from stripedrag.rag.packing import Policy


class RagTask(CorpusFields, ReadingTask):
    """Each question under each context, at each budget where the context has one (random: at the largest).

    A budget is what prompt and answer may have together, by the reference tokenizer, as `Pipeline.ask` counts it.
    `instruction` is read after the question; empty is the product's own prompt. Of several `policies` each is an order
    that the same passages are read in, and an axis of the cells; contexts without a budget have one order.
    """

    kind: Literal["rag"]
    contexts: tuple[ContextName, ...] = Field(default=("fill",), min_length=1)
    budgets: tuple[Length, ...] = Field(min_length=1)
    policies: tuple[Policy, ...] = Field(default=(POLICY,), min_length=1)
    instruction: str = ""
    answer_tokens: int = Field(default=32, ge=1)
    metrics: tuple[str, ...] = ("token_f1", "substring_exact_match", "exact_match")

    def samples(self, resources: Resources) -> Iterator[Question]:
        """See the class; question by question, so that a run that is cut has whole questions."""
        sources = [Source(resources, self.index(resources), policy) for policy in self.policies]
        for asked in self.drawn(resources):
            for name in self.contexts:
                for budget in self._budgets(name):
                    for source in sources[:1] if name in UNBUDGETED else sources:
                        yield self._question(resources, source, asked, name, budget)

    def _budgets(self, name: ContextName) -> tuple[int | None, ...]:
        """Where a context is read: a control at one budget, the largest, or at none."""
        if name in UNBUDGETED:
            return (None,)
        return (max(self.budgets),) if name == "random" else self.budgets

    def _question(
        self, resources: Resources, source: Source, asked: CorpusQuestion, name: ContextName, budget: int | None
    ) -> Question:
        evidence = stretches(asked.gold_spans)
        paragraphs = asked.gold_passages or asked.gold_spans
        gold = [passage(place, source.document(place.doc_id)) for place in paragraphs]
        words = as_read(asked.question, self.instruction)
        room = 0 if budget is None else source.passage_budget(words, budget, self.answer_tokens)
        rng = resources.rng(self.name, asked.id, name, budget)
        cell: dict[str, Axis] = {"context": str(name)} | ({} if budget is None else {"budget_tokens": budget})
        if len(self.policies) > 1 and name not in UNBUDGETED:
            cell["policy"] = source.policy
        return Question(
            id=self.sample_id(cell, asked.id),
            task=self.name,
            cell=cell,
            cluster=evidence[0].doc_id,
            subject=asked.id,
            question=asked.question,
            instruction=self.instruction,
            passages=source.context(name, asked.question, evidence, gold, room, rng),
            references=asked.answers,
            evidence=evidence,
        )
