"""A real but tiny embedder, and the sentences that several tests search in."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from stripedrag.errors import UsageError
from stripedrag.indexes import Document, Index, MiniLMEmbedder


class HashingEmbedder:
    """A bag of hashed words: texts that share words have a high cosine. Counts what it embeds."""

    name = "hashing"
    max_tokens = 64

    def __init__(self, *, name: str = "hashing", sha256: str = "a" * 64, dimension: int = 256) -> None:
        self.name, self.sha256, self.dimension = name, sha256, dimension
        self.tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.embedded: list[str] = []

    def embed(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            assert len(self.tokenizer.encode(text)) <= self.max_tokens
            row[0] = 0.01  # so that a text without words has a direction too
            for word in re.findall(r"\w+", text.lower()):
                row[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % self.dimension] += 1
        self.embedded += texts
        if progress is not None:
            progress(len(texts))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_query(self, query: str) -> np.ndarray:
        if len(self.tokenizer.encode(query)) > self.max_tokens:
            raise UsageError("the query is too long for hashing")
        vector = self.embed([query])[0]
        self.embedded.pop()
        return vector


@pytest.fixture
def make_embedder() -> type[HashingEmbedder]:
    return HashingEmbedder


@pytest.fixture
def embedder() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture
def index(tmp_path: Path, embedder: HashingEmbedder) -> Iterator[Index]:
    with Index.create(tmp_path / "wiki", embedder=embedder) as index:
        yield index


@pytest.fixture
def contents() -> Callable[[Index], object]:
    """Everything that a user can see of an index, to compare before and after."""

    def see(index: Index) -> object:
        documents = [index.document(doc_id) for doc_id in index.document_ids()]
        found = index.search("the cat", k=10_000) if documents else []
        return documents, [index.chunks(d.id) for d in documents], found, len(index), index.manifest

    return see


@pytest.fixture
def pets() -> list[Document]:
    return [
        Document("cats", "Cats", "The cat sat on the mat.", {"year": 2020, "good": True, "by": None}),
        Document("dogs", "Dogs", "The dog ate the homework.\n\nIt was a long essay about cheese."),
        Document("long", "Long", "".join(f"Sentence number {n} has exactly seven words. " for n in range(60))),
    ]


@pytest.fixture(scope="session")
def minilm() -> MiniLMEmbedder:
    return MiniLMEmbedder()
