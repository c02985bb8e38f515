"""A LlamaIndex retriever in the place of an index: its nodes fill our window.

store = VectorStoreIndex.from_vector_store(any_vector_store)
pipeline = Pipeline.open(LlamaIndexSearch(store.as_retriever()))
"""

import copy
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from stripedrag.errors import UsageError
from stripedrag.indexes.documents import Chunk, Scored
from stripedrag.indexes.embedding import MiniLMEmbedder

if TYPE_CHECKING:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.schema import BaseNode

    from stripedrag.indexes.filters import Where
    from stripedrag.rag.packing import Tokenizer

TITLES = ("title", "file_name")


class LlamaIndexSearch:
    """What `Retriever` and `Pipeline` ask of an index, by any LlamaIndex retriever; `k` sets its `similarity_top_k`.

    A node is a chunk of its source document where it says at which characters it begins, else a document of its own;
    its title is the metadata's "title" or "file_name". A retriever without `similarity_top_k` gives as many nodes as it
    does, which may leave a window nearly empty. `tokenizer` counts where no other is given (None: MiniLM's);
    `chunk_tokens` is about how many tokens a node has. Filters belong into the retriever: `search` refuses its own.
    """

    def __init__(
        self, retriever: "BaseRetriever", *, tokenizer: "Tokenizer | None" = None, chunk_tokens: int = 256
    ) -> None:
        self._retriever = retriever
        self._titles: dict[str, str] = {}
        self.tokenizer = MiniLMEmbedder().tokenizer if tokenizer is None else tokenizer
        self.chunk_tokens = chunk_tokens

    def search(
        self, query: str, *, k: int, where: "Where | None" = None, doc_ids: Iterable[str] | None = None
    ) -> list[Scored]:
        """The retriever's nodes for a query, in its order; `k` at most. Raises `UsageError` for a blank query."""
        if where is not None or doc_ids is not None:
            raise UsageError("a LlamaIndex retriever takes no where and no doc_ids. Give it MetadataFilters instead.")
        if not query.strip():
            raise UsageError(f"the query {query!r} is blank. Ask something.")
        retriever = copy.copy(self._retriever)  # the caller's keeps its own k, and threads do not share one
        if hasattr(retriever, "similarity_top_k"):
            corpus = getattr(retriever, "corpus", None)  # of LlamaIndex's BM25Retriever, which fails for more
            retriever.similarity_top_k = k if corpus is None else min(k, len(corpus))
        found = []
        for rank, scored in enumerate(retriever.retrieve(query)[:k], start=1):
            doc_id, start = place(scored.node)
            self._titles[doc_id] = title(scored.node)
            found.append(Scored(Chunk.at(doc_id, start, scored.node.get_content()), scored.score or 0.0, rank))
        return found

    def titles(self, doc_ids: Collection[str]) -> dict[str, str]:
        """The titles of documents that a search has found."""
        return {doc_id: self._titles[doc_id] for doc_id in doc_ids}


def place(node: "BaseNode") -> tuple[str, int]:
    """The document of a node, and at which character it begins: itself where it does not say."""
    start = getattr(node, "start_char_idx", None)
    return (node.node_id, 0) if start is None or node.ref_doc_id is None else (node.ref_doc_id, start)


def title(node: "BaseNode", names: Collection[str] = TITLES) -> str:
    """A node's title by those of its metadata, or none."""
    return next((str(node.metadata[name]) for name in TITLES if name in names and node.metadata.get(name)), "")
