"""stripedrag in LlamaIndex: the LLM, a synthesizer that fills its window, and our index as retriever and vector store.

Contract: LlamaIndex's own engines, pipelines and events work with each of them alone. Only this folder imports it.
Public names are loaded when they are first used: to search costs no torch model.
"""

from typing import TYPE_CHECKING

from stripedrag.exports import lazy

if TYPE_CHECKING:
    from stripedrag.rag.llama_index.embedding import IndexEmbedding
    from stripedrag.rag.llama_index.fill import FillContext
    from stripedrag.rag.llama_index.llm import StripedHyena
    from stripedrag.rag.llama_index.retriever import BudgetRetriever
    from stripedrag.rag.llama_index.search import LlamaIndexSearch
    from stripedrag.rag.llama_index.store import IndexVectorStore

_HOMES = {
    "BudgetRetriever": "stripedrag.rag.llama_index.retriever",
    "FillContext": "stripedrag.rag.llama_index.fill",
    "IndexEmbedding": "stripedrag.rag.llama_index.embedding",
    "IndexVectorStore": "stripedrag.rag.llama_index.store",
    "LlamaIndexSearch": "stripedrag.rag.llama_index.search",
    "StripedHyena": "stripedrag.rag.llama_index.llm",
}

__all__ = [
    "BudgetRetriever",
    "FillContext",
    "IndexEmbedding",
    "IndexVectorStore",
    "LlamaIndexSearch",
    "StripedHyena",
]

__getattr__ = lazy(__name__, _HOMES)
