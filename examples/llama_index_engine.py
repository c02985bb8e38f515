"""A stock LlamaIndex query engine whose one call fills a StripedHyena's window with retrieved nodes.

python examples/llama_index_engine.py
"""

from pathlib import Path
from typing import Any

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.node_parser import SentenceSplitter
from llama_index.llms.stripedhyena import StripedHyena

from stripedrag.indexes import MiniLMEmbedder

ARTICLES = Path(__file__).parents[1] / "eval" / "data" / "xquad"


class LocalEmbedding(BaseEmbedding):
    """MiniLM, which `stripedrag setup` has put on this machine; any other embedding of LlamaIndex will do."""

    _embedder: MiniLMEmbedder = PrivateAttr(default_factory=MiniLMEmbedder)

    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(x) for x in self._embedder.embed([text])[0]]

    def _get_query_embedding(self, query: str) -> list[float]:
        return [float(x) for x in self._embedder.embed_query(query)]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def main() -> None:
    """Index two articles and ask."""
    documents = [
        Document(text=(ARTICLES / f"{name}.txt").read_text(), metadata={"title": name}) for name in ("Warsaw", "Oxygen")
    ]
    llm: Any = StripedHyena(max_tokens=32)
    index = VectorStoreIndex.from_documents(
        documents,
        embed_model=LocalEmbedding(),
        transformations=[SentenceSplitter(chunk_size=160, chunk_overlap=0)],  # MiniLM reads 254 wordpieces
    )
    response = index.as_query_engine(llm=llm, similarity_top_k=4).query("When was the Warsaw Uprising?")
    print(response)
    for node in response.source_nodes:
        print(f"  {node.score:.3f}  {node.metadata['title']}  {node.text[:60]!r}")


if __name__ == "__main__":
    main()
