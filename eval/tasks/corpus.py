"""A corpus with questions, as several tasks use it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from stripedrag.errors import CorpusError, UsageError
from stripedrag.eval.data_formats import DATA, CorpusQuestion, Place, file_sha256
from stripedrag.eval.places import holds
from stripedrag.eval.resources import Resources, read_corpus
from stripedrag.eval.schema import Passage, Record, Stretch
from stripedrag.indexes.documents import Document
from stripedrag.indexes.index import Index
from stripedrag.jsonl import read_lines
from stripedrag.rag.retriever import in_turn


class CorpusFields(Record):
    """Fields of tasks over a corpus: the files, the questions' split, how many, and how many documents distract.

    `distractors` None keeps every document; a number keeps so many of those that no question in the file is about.
    """

    corpus: Path = DATA / "rag_qa" / "corpus.jsonl.xz"
    questions: Path = DATA / "rag_qa" / "questions.jsonl.xz"
    split: str | None = "dev"
    samples_per_cell: int = Field(default=50, ge=1, alias="samples")
    distractors: int | None = Field(default=None, ge=0)

    def data(self) -> Mapping[str, str]:
        """The files, for the manifest."""
        return {"corpus": str(self.corpus), "questions": str(self.questions)}

    def index(self, resources: Resources) -> Index:
        """The corpus's index."""
        name, content = self.corpus.name.split(".")[0], self.index_content(resources)
        return resources.index(name, lambda: list(self._documents(resources)), content)

    def index_content(self, resources: Resources) -> object:
        """What decides what is in the index."""
        return [file_sha256(self.corpus), file_sha256(self.questions), self.distractors, resources.seed]

    def drawn(self, resources: Resources) -> list[CorpusQuestion]:
        """`samples` questions of the split, taken from the documents in turn, so that few documents are not most of it.

        Tasks over one file ask the same ones. Raises `UsageError` where there are fewer.
        """
        found = list(self.by_document(resources).values())
        if (count := sum(map(len, found))) < self.samples_per_cell:
            raise UsageError(
                f"{self.questions} has {count} questions of split {self.split!r} and the task wants "
                f"{self.samples_per_cell}. Lower its samples."
            )
        return in_turn(found)[: self.samples_per_cell]

    def by_document(self, resources: Resources) -> dict[str, list[CorpusQuestion]]:
        """The questions of the split by the document that answers them, both in an order drawn by the run's seed.

        Raises `CorpusError` for a question whose gold is not in its document.
        """
        found = [q for q in read_lines(self.questions, CorpusQuestion) if self.split in (None, q.split)]
        index = self.index(resources)
        by_document: dict[str, list[CorpusQuestion]] = {}
        for question in resources.rng("questions").sample(found, len(found)):
            refuse_places_outside(question, index)
            _refuse_gold_apart(question)
            by_document.setdefault(question.gold_spans[0].doc_id, []).append(question)
        return by_document

    def _documents(self, resources: Resources) -> Iterator[Document]:
        asked = {s.doc_id for q in read_lines(self.questions, CorpusQuestion) for s in q.gold_spans}
        documents = read_corpus(self.corpus)
        if strangers := sorted(asked - {d.id for d in documents}):
            raise CorpusError(
                f"{self.questions} has gold in document {strangers[0]!r}, which {self.corpus} has not. Mend either."
            )
        others = [d.id for d in documents if d.id not in asked]
        if self.distractors is not None and self.distractors < len(others):
            others = resources.rng("distractors").sample(others, self.distractors)
        kept = asked | set(others)
        return (d for d in documents if d.id in kept)


def refuse_places_outside(question: CorpusQuestion, index: Index) -> None:
    """Raises `CorpusError` where the question has gold in a document that the index has not, or past its end."""
    for place in (*question.gold_spans, *question.gold_passages):
        if not index.titles([place.doc_id]):
            raise CorpusError(
                f"{question.id!r} has gold in document {place.doc_id!r}, which the corpus has not. Mend either."
            )
        length = len(index.document(place.doc_id).text)
        if place.end > length:
            raise CorpusError(
                f"question {question.id!r} has gold at {place.start}:{place.end} of document {place.doc_id!r}, which "
                f"has {length} characters. Mend the question."
            )


def _refuse_gold_apart(question: CorpusQuestion) -> None:
    if question.gold_passages and not holds(question.gold_passages, question.gold_spans):
        raise CorpusError(f"question {question.id!r} has gold_spans outside its gold_passages. Mend the question.")


def stretches(places: Sequence[Place], doc_id: str = "") -> tuple[Stretch, ...]:
    """Places of a data file as evidence; `doc_id` where they name none."""
    return tuple(Stretch(doc_id=p.doc_id or doc_id, start=p.start, end=p.end) for p in places)


def passage(place: Place, document: Document) -> Passage:
    """A place of a document with its text."""
    text = document.text[place.start : place.end]
    return Passage(doc_id=document.id, title=document.title, start=place.start, end=place.end, text=text)
