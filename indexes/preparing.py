"""From documents to what an index stores of them: passages with their chunks and vectors.

A document is cut into *passages*, as long as the embedder reads, which are embedded under the document's title; a
passage into *chunks*, which are found by their words and are what a search returns. Knows nothing of stores.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stripedrag.indexes import checks
from stripedrag.indexes.chunking import MIN_CHUNK_TOKENS, TileChunker
from stripedrag.indexes.documents import Chunk, Document

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from stripedrag.indexes.embedding import Embedder

# Passages embedded together: enough to sort by length, few enough (under 2 MB of text and vectors) to hold.
PASSAGES_AT_ONCE = 512
HEADING_TOKENS = 40

Progress = Callable[[int], None]


class Passage(NamedTuple):
    """A stretch of a document: its text, as it is embedded under its heading, and the chunks that tile it."""

    heading: str
    text: str
    chunks: list[Chunk]


class Prepared(NamedTuple):
    """The chunks of a passage with its vector, None for white space; `is_new` where it was embedded for this."""

    chunks: list[Chunk]
    vector: "NDArray[np.float32] | None"
    is_new: bool


class Changed(NamedTuple):
    """A document that is to come in, and the vectors of passages that an older one has, by their texts."""

    document: Document
    known: "dict[str, NDArray[np.float32]]"


class Prepare(Protocol):
    """How documents become what is stored: here, or on other machines (`stripedrag.indexes.ray_workers`)."""

    def __call__(
        self, changed: Iterable[Changed], cutter: "Cutter", embedder: "Embedder", progress: Progress | None
    ) -> Iterator[Prepared]:
        """The passages of the documents in their order, each document's in its own.

        `progress` is called with the number of passages embedded since its last call.
        """


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts documents as a manifest says: into passages and chunks of at most so many wordpieces of `tokenizer`."""

    tokenizer: "Tokenizer"
    passage_tokens: int
    chunk_tokens: int

    def cut(self, document: Document) -> Iterator[Passage]:
        """The passages of a document, in order."""
        heading = self.heading(document.title)
        # One more than it has: where the two meet, a tokenizer may see something else than in each.
        taken = len(self.tokenizer.encode(heading, add_special_tokens=False)) + 1 if heading else 0
        chunks = TileChunker(self.tokenizer, self.chunk_tokens)
        for passage in TileChunker(self.tokenizer, self.passage_tokens - taken).cut(document):
            yield Passage(heading, passage.text, list(chunks.tiles(document.id, passage.text, passage.start)))

    def heading(self, title: str) -> str:
        """What stands before each passage of a document when it is embedded: its title, as far as there is room."""
        room = min(HEADING_TOKENS, self.passage_tokens // 4, self.passage_tokens - MIN_CHUNK_TOKENS) - 1
        encoding = self.tokenizer.encode(title, add_special_tokens=False)
        if len(encoding) > room:
            title = title[: encoding.offsets[room][0]] if room > 0 else ""
        return f"{title.strip()}\n" if title.strip() else ""


def prepare(
    changed: Iterable[Changed], cutter: Cutter, embedder: "Embedder", progress: Progress | None = None
) -> Iterator[Prepared]:
    """See `Prepare`: here and now, some hundred passages at a time, whichever documents they are of."""
    cut = ((passage, known.get(passage.text)) for document, known in changed for passage in cutter.cut(document))
    while batch := list(islice(cut, PASSAGES_AT_ONCE)):
        texts = [p.heading + p.text for p, vector in batch if _is_new(p.text, vector)]
        new: Iterator[NDArray[np.float32]] = iter(())
        if texts:
            new = iter(checks.unit_vectors(embedder, embedder.embed(texts, progress=progress), len(texts)))
        for passage, vector in batch:
            yield completed(passage.chunks, passage.text, vector, new)


def completed(
    chunks: list[Chunk], text: str, known: "NDArray[np.float32] | None", new: "Iterator[NDArray[np.float32]]"
) -> Prepared:
    """A passage of `text` with the vector that is `known`, or the next of those of the `new` ones where it is new."""
    is_new = _is_new(text, known)
    return Prepared(chunks, next(new) if is_new else known, is_new)


def _is_new(text: str, known: "NDArray[np.float32] | None") -> bool:
    return known is None and not text.isspace()
