"""Questions that share a context: what one prefill is worth, and many questions at the price of few contexts."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stripedrag.errors import UsageError
from stripedrag.eval.data_formats import CorpusQuestion
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Axis, Question
from stripedrag.eval.tasks.base import ReadingTask
from stripedrag.eval.tasks.corpus import CorpusFields, stretches
from stripedrag.eval.tasks.planted import Length
from stripedrag.eval.tasks.retrieved import Source
from stripedrag.rag.defaults import POLICY
from stripedrag.rag.packing import Policy
from stripedrag.rag.retriever import in_turn


class SharedContextTask(CorpusFields, ReadingTask):
    """`samples` contexts, each filled for `together` questions on one document by taking the best chunks of each in
    turn, and each of its questions asked of it alone. A context is a cluster, so that intervals are by context.

    The reserve of a budget is the longest question's.
    """

    kind: Literal["shared_context"]
    together: int = Field(default=5, ge=1)
    budgets: tuple[Length, ...] = Field(min_length=1)
    policy: Policy = POLICY
    answer_tokens: int = Field(default=32, ge=1)
    metrics: tuple[str, ...] = ("token_f1", "substring_exact_match", "exact_match")

    def samples(self, resources: Resources) -> Iterator[Question]:
        """See the class; budget by budget, context by context."""
        source = Source(resources, self.index(resources), self.policy)
        groups = self._groups(resources)
        for budget in self.budgets:
            cell: dict[str, Axis] = {"context": "fill", "budget_tokens": budget}
            for number, group in enumerate(groups):
                asked = [one.question for one in group]
                room = min(source.passage_budget(question, budget, self.answer_tokens) for question in asked)
                passages = source.filled_for(asked, room)
                for one in group:
                    yield Question(
                        id=self.sample_id(cell, one.id),
                        task=self.name,
                        cell=cell,
                        cluster=f"context {number}",
                        subject=one.id,
                        question=one.question,
                        passages=passages,
                        references=one.answers,
                        evidence=stretches(one.gold_spans),
                        shared=True,
                    )

    def _groups(self, resources: Resources) -> list[list[CorpusQuestion]]:
        """Groups of questions on one document, from the documents in turn. Raises `UsageError` for too few."""
        groups = in_turn(
            [some[i : i + self.together] for i in range(0, len(some) - self.together + 1, self.together)]
            for some in self.by_document(resources).values()
        )
        if len(groups) < self.samples_per_cell:
            raise UsageError(
                f"{self.questions} has {len(groups)} groups of {self.together} questions on one document in split "
                f"{self.split!r}, and the task wants {self.samples_per_cell}. Lower its samples or together."
            )
        return groups[: self.samples_per_cell]
