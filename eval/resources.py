"""What the tasks of a run share: the reference tokenizer that sizes texts, the haystack, and indexes of corpora.

Everything is made once a run, from data and seed alone.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

from stripedrag.eval.data_formats import CorpusDocument
from stripedrag.eval.haystack import Haystack
from stripedrag.eval.schema import Passage, digest
from stripedrag.indexes.documents import Document
from stripedrag.indexes.embedding import MiniLMEmbedder
from stripedrag.indexes.index import Index
from stripedrag.jsonl import read_lines
from stripedrag.rag.packing import Span
from stripedrag.rag.prompt import PromptFormat


class Resources:
    """Shared by the tasks of a run; `folder` takes the indexes, `tell` hears what takes long."""

    def __init__(
        self, *, seed: int, reference_tokenizer: str, folder: Path, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.seed, self.folder, self.tell = seed, folder, tell
        self.answers: dict[str, list[str]] = {}  # right answers of all samples, by task: what chance draws from
        self._reference_tokenizer = reference_tokenizer
        self._indexes: dict[str, Index] = {}
        self.haystack = cache(self._haystack)

    def rng(self, *key: object) -> random.Random:
        """A generator of its own for a key, so that one task's draws never move another's."""
        return random.Random("/".join(map(str, (self.seed, *key))))

    @cached_property
    def prompt(self) -> PromptFormat:
        """The prompt as the reference tokenizer counts it."""
        from stripedrag.model.baselines import template_options
        from stripedrag.model.loading import load_tokenizer

        name = self._reference_tokenizer
        return PromptFormat(load_tokenizer(name), template_options(name))

    @cached_property
    def _embedder(self) -> MiniLMEmbedder:
        return MiniLMEmbedder()  # one for all indexes: each would load its own

    def count(self, text: str) -> int:
        """The tokens of a text alone."""
        return len(self.prompt.encode(text))

    def offsets(self, text: str) -> list[int]:
        """Where each token of a text begins, in characters, and the text's length after them."""
        return [*(start for start, _ in self.prompt.offsets(text)), len(text)]

    def prompt_tokens(self, question: str, passages: Sequence[Passage]) -> int:
        """The tokens of a whole prompt, template included."""
        return len(self.prompt.ids(question, [span_of(passage) for passage in passages]))

    def _haystack(self, file: Path) -> Haystack:
        return Haystack.read(file, self.count)

    def index(self, name: str, documents: Callable[[], Sequence[Document]], content: object) -> Index:
        """The index of these documents, made where the run has none yet; `content` identifies them."""
        place = self.folder / "indexes" / f"{name}-{digest(content)[:12]}"
        if place.name not in self._indexes:
            make = Index.open if Index.is_at(place) else Index.create
            index = make(place, embedder=self._embedder)
            if not index.document_count:  # new, or left by a run that was killed while it embedded
                found = documents()
                self.tell(f"indexing {len(found)} documents of {name}")
                index.add(found)
            self._indexes[place.name] = index
        return self._indexes[place.name]

    def close(self) -> None:
        """Close the indexes."""
        for index in self._indexes.values():
            index.close()
        self._indexes.clear()


def read_corpus(file: Path) -> list[Document]:
    """A corpus file as documents."""
    return [Document(id=d.id, title=d.title, text=d.text) for d in read_lines(file, CorpusDocument)]


def span_of(passage: Passage) -> Span:
    """A passage as the prompt takes it."""
    return Span(passage.doc_id, passage.title, passage.start, passage.end, passage.text, score=0.0)


def passage_of(span: Span) -> Passage:
    """A retrieved span as a sample keeps it."""
    return Passage(doc_id=span.doc_id, title=span.title, start=span.start, end=span.end, text=span.text)
