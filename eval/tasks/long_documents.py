"""Long documents: query-based summaries of stories (SQuALITY) and meetings (QMSum), from what a budget holds."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from stripedrag.errors import CorpusError, UsageError
from stripedrag.eval.data_formats import DATA, LongDocument, LongTask
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Axis, Passage, Question, Stretch, asked
from stripedrag.eval.tasks.base import ReadingTask
from stripedrag.eval.tasks.corpus import stretches
from stripedrag.eval.tasks.planted import Length
from stripedrag.eval.tasks.retrieved import Source
from stripedrag.indexes.documents import Document
from stripedrag.jsonl import read_lines
from stripedrag.rag.retriever import in_turn

_Context = Literal["fill", "top-5", "top-20", "reranked-5", "oracle", "head", "none"]
_OF_EVIDENCE: tuple[_Context, ...] = ("reranked-5", "oracle")


class LongDocumentsTask(ReadingTask):
    """A query over one document, whose own chunks are what is searched, in the document's order.

    head: its beginning, as much as fits. oracle: at the largest budget, the chunks with evidence that fit. none: the
    query alone. The others are those of `ContextName`. With oracle or reranked-5 among `contexts` the task asks only
    queries that have evidence, in every context. What a context leaves out is the task's choice, not a system's
    truncation. Clusters are documents.
    """

    kind: Literal["long_documents"]
    documents: Path = DATA / "long_documents" / "documents.jsonl.xz"
    source: Literal["squality-v1.3", "qmsum"] | str | None = None
    contexts: tuple[_Context, ...] = Field(default=("fill",), min_length=1)
    budgets: tuple[Length, ...] = Field(min_length=1)
    samples_per_cell: int = Field(default=20, ge=1, alias="samples")
    instruction: str = "Answer in a short paragraph."
    answer_tokens: int = Field(default=128, ge=1)
    metrics: tuple[str, ...] = ("rouge_l", "rouge_1", "coverage")

    def samples(self, resources: Resources) -> Iterator[Question]:
        """See the class."""
        for document, task in self._drawn(resources):
            evidence = stretches(task.evidence, document.id)
            whole = Document(id=document.id, title=document.title, text=document.document)
            for name in self.contexts:
                for budget in self._budgets(name):
                    cell: dict[str, Axis] = {"context": str(name)} | (
                        {} if budget is None else {"budget_tokens": budget}
                    )
                    yield Question(
                        id=self.sample_id(cell, task.id),
                        task=self.name,
                        cell=cell,
                        cluster=document.id,
                        subject=task.id,
                        question=task.query,
                        instruction=self.instruction,
                        passages=()
                        if budget is None
                        else self._passages(resources, whole, task.query, evidence, name, budget),
                        references=task.references,
                        evidence=evidence,
                    )

    def _drawn(self, resources: Resources) -> list[tuple[LongDocument, LongTask]]:
        """A task of each document in turn, until there are enough."""
        found = [d for d in read_lines(self.documents, LongDocument) if self.source in (None, d.source)]
        for document in found:
            _refuse_places_outside(document)
        ids = Counter(task.id for document in found for task in document.tasks)
        if again := [name for name, count in ids.items() if count > 1]:
            raise CorpusError(f"{self.documents} has two tasks {again[0]!r}. Make the ids of tasks unique in the file.")
        groups = []
        needs_evidence = any(name in _OF_EVIDENCE for name in self.contexts)
        for document in resources.rng(self.name).sample(found, len(found)):
            tasks = [task for task in document.tasks if task.evidence or not needs_evidence]
            tasks = resources.rng(self.name, document.id).sample(tasks, len(tasks))
            groups.append([(document, task) for task in tasks])
        drawn = in_turn(groups)
        if len(drawn) < self.samples_per_cell:
            kind = "tasks with evidence (oracle and reranked-5 need it)" if needs_evidence else "tasks"
            raise UsageError(
                f"{self.documents} has {len(drawn)} {kind} of source {self.source!r} and {self.name!r} wants "
                f"{self.samples_per_cell}. Lower its samples."
            )
        return drawn[: self.samples_per_cell]

    def _budgets(self, name: _Context) -> tuple[int | None, ...]:
        if name == "none":
            return (None,)
        return (max(self.budgets),) if name == "oracle" else self.budgets

    def _passages(
        self,
        resources: Resources,
        document: Document,
        query: str,
        evidence: tuple[Stretch, ...],
        name: _Context,
        budget: int,
    ) -> tuple[Passage, ...]:
        index = resources.index("document", lambda: [document], [document.title, document.text])
        source = Source(resources, index, "document")
        room = source.passage_budget(asked(query, self.instruction), budget, self.answer_tokens)
        if name == "head":
            return source.beginning(document.id, room)
        if name == "oracle":
            return source.only_evidence(query, evidence, room)
        return source.context(name, query, evidence, (), room, resources.rng(self.name))

    def data(self) -> Mapping[str, str]:
        """The documents."""
        return {"documents": str(self.documents)}


def _refuse_places_outside(document: LongDocument) -> None:
    for task in document.tasks:
        for place in task.evidence:
            if place.doc_id not in ("", document.id) or place.end > len(document.document):
                raise CorpusError(
                    f"task {task.id!r} of document {document.id!r}, {len(document.document)} characters long, has "
                    f"evidence at {place.start}:{place.end} of {place.doc_id or document.id!r}. Mend the task."
                )
