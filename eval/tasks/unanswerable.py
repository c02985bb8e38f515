"""Questions whose evidence was taken away, beside the same with it: does a system know what it was not told?"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stripedrag.eval.metrics import METRICS, abstains
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import Answered, Axis, Question, SampleRecord
from stripedrag.eval.schema import asked as as_read
from stripedrag.eval.tasks.base import ReadingTask
from stripedrag.eval.tasks.corpus import CorpusFields, stretches
from stripedrag.eval.tasks.planted import Length
from stripedrag.eval.tasks.retrieved import Source
from stripedrag.rag.defaults import POLICY
from stripedrag.rag.packing import Policy

REFUSAL = "not in the documents"


class UnanswerableTask(CorpusFields, ReadingTask):
    """Each question twice: in a filled context that has its evidence first, and in one without its documents.

    Evidence that a search would have missed is put in, so that an abstention is never right where an answer is asked.

    Scores: `decision` is 1 where a system abstains if and only if there is nothing to be found, and beside it the
    metrics of the answer, for questions that have one. A false refusal costs as much as a made-up answer.
    """

    kind: Literal["unanswerable"]
    budget_tokens: Length
    policy: Policy = POLICY
    answer_tokens: int = Field(default=32, ge=1)
    instruction: str = f"If the passages do not say, answer: {REFUSAL}."
    metrics: tuple[str, ...] = ("token_f1",)

    def samples(self, resources: Resources) -> Iterator[Question]:
        """See the class."""
        source = Source(resources, self.index(resources), self.policy)
        for asked in self.drawn(resources):
            evidence = stretches(asked.gold_spans)
            words = as_read(asked.question, self.instruction)
            room = source.passage_budget(words, self.budget_tokens, self.answer_tokens)
            documents = frozenset(stretch.doc_id for stretch in evidence)
            for answerable in (True, False):
                cell: dict[str, Axis] = {"evidence": "present" if answerable else "absent"}
                passages = (
                    source.with_evidence(asked.question, evidence, room)
                    if answerable
                    else source.without(asked.question, documents, room)
                )
                yield Question(
                    id=self.sample_id(cell, asked.id),
                    task=self.name,
                    cell=cell,
                    cluster=evidence[0].doc_id,
                    subject=asked.id,
                    question=asked.question,
                    instruction=self.instruction,
                    passages=passages,
                    references=asked.answers if answerable else (REFUSAL,),
                    evidence=evidence if answerable else (),
                    answerable=answerable,
                )

    def known_metrics(self) -> tuple[str, ...] | None:
        """The decision, and the declared ones."""
        return ("decision", *self.metrics)

    def score(self, sample: SampleRecord, output: Answered) -> dict[str, float]:
        """See the class."""
        scores = {"decision": float(abstains(output.text) != sample.answerable)}
        if sample.answerable:
            scores |= {name: METRICS[name](output.text, sample.references) for name in self.metrics}
        return scores
