"""Retrieval alone: recall of the evidence, at budgets and in the best k, and nDCG of the documents. Needs no model."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stripedrag.errors import CorpusError, UsageError
from stripedrag.eval.data_formats import DATA, Claim, file_sha256
from stripedrag.eval.metrics import ndcg
from stripedrag.eval.resources import Resources, read_corpus
from stripedrag.eval.schema import Ranking, SampleRecord, Search
from stripedrag.eval.tasks.base import Task
from stripedrag.eval.tasks.corpus import CorpusFields, stretches
from stripedrag.eval.tasks.planted import Length
from stripedrag.indexes.index import Index
from stripedrag.jsonl import read_lines

DEPTH = 10  # nDCG@10, BEIR's headline (Thakur et al. 2021)


class RetrievalTask(Task):
    """What a search brings."""

    operation: ClassVar[str] = "search"

    def score(self, sample: SampleRecord, output: Ranking) -> dict[str, float]:
        """nDCG@10 of the documents, and where evidence is named whether all of it was found."""
        scores = {f"ndcg@{DEPTH}": ndcg(output.doc_ids, sample.relevant, DEPTH)}
        scores |= {f"recall_top_{k}": float(found) for k, found in output.evidence_in_top.items()}
        return scores | {f"recall@{budget}": float(found) for budget, found in output.evidence_in_budget.items()}

    @abstractmethod
    def index(self, resources: Resources) -> Index:
        """The index that is searched."""

    @abstractmethod
    def index_content(self, resources: Resources) -> object:
        """What decides what is in the index."""


class CorpusRetrievalTask(CorpusFields, RetrievalTask):
    """Retrieval for questions whose answers have places in a corpus.

    `recall@B` is 1 where all evidence lies in the best chunks that fit B tokens, for each B of `budgets`: tokens of the
    passages alone. `recall_top_k` is 1 where it lies in the best k chunks, for each k of `tops`.
    """

    kind: Literal["retrieval"]
    budgets: tuple[Length, ...] = (2048, 4096, 8192)
    tops: tuple[Annotated[int, Field(ge=1)], ...] = ()

    def known_metrics(self) -> tuple[str, ...]:
        """nDCG, and recall in each of `tops` and at each of `budgets`."""
        recalls = [*(f"recall_top_{k}" for k in self.tops), *(f"recall@{budget}" for budget in self.budgets)]
        return (f"ndcg@{DEPTH}", *recalls)

    def samples(self, resources: Resources) -> Iterator[Search]:
        """A search for each question."""
        for asked in self.drawn(resources):
            evidence = stretches(asked.gold_spans)
            yield Search(
                id=f"{self.name}/{asked.id}",
                task=self.name,
                cell={},
                cluster=evidence[0].doc_id,
                query=asked.question,
                relevant=tuple(dict.fromkeys(stretch.doc_id for stretch in evidence)),
                evidence=evidence,
            )


class JudgedRetrievalTask(RetrievalTask):
    """Retrieval of documents that were judged relevant to a claim (SciFact, Wadden et al. 2020, and its like)."""

    kind: Literal["judged_retrieval"]
    corpus: Path = DATA / "scifact" / "corpus.jsonl.xz"
    queries: Path = DATA / "scifact" / "queries.jsonl.xz"
    split: str | None = "test"
    samples_per_cell: int | None = Field(default=None, ge=1, alias="samples")

    def samples(self, resources: Resources) -> Iterator[Search]:
        """A search for each claim of the split, or for `samples` of them."""
        found = [c for c in read_lines(self.queries, Claim) if self.split in (None, c.split)]
        if not found:
            raise UsageError(f"{self.queries} has no query of split {self.split!r}. Name another.")
        if self.samples_per_cell is not None:
            found = resources.rng(self.name).sample(found, min(self.samples_per_cell, len(found)))
        self.index(resources)  # now, not under the time limit of the first search
        for claim in found:
            relevant = tuple(doc_id for doc_id, grade in claim.qrels.items() if grade > 0)
            if not relevant:
                raise CorpusError(f"{self.queries}: query {claim.id!r} has no relevant document. Leave it out.")
            yield Search(
                id=f"{self.name}/{claim.id}",
                task=self.name,
                cell={},
                cluster=claim.id,
                query=claim.query,
                relevant=relevant,
            )

    def index(self, resources: Resources) -> Index:
        """The index of the whole corpus."""
        name = f"judged-{self.corpus.name.split('.')[0]}"
        return resources.index(name, lambda: read_corpus(self.corpus), self.index_content(resources))

    def index_content(self, resources: Resources) -> object:
        """What decides what is in the index."""
        return [file_sha256(self.corpus)]

    def data(self) -> Mapping[str, str]:
        """Corpus and queries."""
        return {"corpus": str(self.corpus), "queries": str(self.queries)}
