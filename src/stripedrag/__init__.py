"""stripedrag: question answering that fills a StripedHyena's long context with retrieved chunks.

Public names are loaded when they are first used, so that `import stripedrag` costs milliseconds and imports no torch.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from stripedrag.exports import lazy

if TYPE_CHECKING:
    from stripedrag.indexes.documents import Chunk, Document, Scored
    from stripedrag.indexes.index import Index
    from stripedrag.model.config import StripedHyenaConfig
    from stripedrag.model.loading import load_model
    from stripedrag.model.modeling import StripedHyenaForCausalLM
    from stripedrag.rag.answer import Answer
    from stripedrag.rag.packing import Context
    from stripedrag.rag.pipeline import Pipeline
    from stripedrag.rag.retriever import Retriever

__version__ = version("stripedrag")

_HOMES = {
    "Answer": "stripedrag.rag.answer",
    "Chunk": "stripedrag.indexes.documents",
    "Context": "stripedrag.rag.packing",
    "Document": "stripedrag.indexes.documents",
    "Index": "stripedrag.indexes.index",
    "Pipeline": "stripedrag.rag.pipeline",
    "Retriever": "stripedrag.rag.retriever",
    "Scored": "stripedrag.indexes.documents",
    "StripedHyenaConfig": "stripedrag.model.config",
    "StripedHyenaForCausalLM": "stripedrag.model.modeling",
    "load_model": "stripedrag.model.loading",
}

__all__ = [
    "Answer",
    "Chunk",
    "Context",
    "Document",
    "Index",
    "Pipeline",
    "Retriever",
    "Scored",
    "StripedHyenaConfig",
    "StripedHyenaForCausalLM",
    "__version__",
    "load_model",
]

__getattr__ = lazy(__name__, _HOMES)
