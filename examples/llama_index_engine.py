"""A LlamaIndex query engine whose one call fills a StripedHyena's window with retrieved nodes.

python examples/llama_index_engine.py
"""

from pathlib import Path

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.llms.stripedhyena import FillContext, StripedHyena

from stripedrag.rag.llama_index import IndexEmbedding

ARTICLES = Path(__file__).parents[1] / "eval" / "data" / "xquad"


def main() -> None:
    """Index two articles and ask."""
    documents = [
        Document(text=(ARTICLES / f"{name}.txt").read_text(), metadata={"title": name}) for name in ("Warsaw", "Oxygen")
    ]
    index = VectorStoreIndex.from_documents(
        documents,
        embed_model=IndexEmbedding(),  # MiniLM, which `stripedrag setup` has put here; any of LlamaIndex's will do
        transformations=[SentenceSplitter(chunk_size=160, chunk_overlap=0)],  # MiniLM reads 254 wordpieces
    )
    llm = StripedHyena(max_tokens=32)
    engine = RetrieverQueryEngine(index.as_retriever(similarity_top_k=1000), FillContext(llm))
    response = engine.query("When was the Warsaw Uprising?")
    filled = response.metadata["fill_context"]
    print(response)
    print(f"{filled['prompt_tokens']} tokens of prompt, {len(filled['dropped'])} nodes left out")
    for node in response.source_nodes[:3]:
        print(f"  {node.score:.3f}  {node.metadata['title']}  {node.text[:60]!r}")


if __name__ == "__main__":
    main()
