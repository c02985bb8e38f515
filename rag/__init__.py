"""Questions in, answers with citations out: retriever, packing, pipeline, command line, LlamaIndex.

Contract: the prompt never exceeds the tokens that were asked for, what did not fit is listed, and the model is called
once for a question. Knows nothing of evaluation. Public names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from stripedrag.exports import lazy

if TYPE_CHECKING:
    from stripedrag.rag.answer import Answer, Citation, Timings, Usage
    from stripedrag.rag.packing import Context, Dropped, Span
    from stripedrag.rag.pipeline import Pipeline
    from stripedrag.rag.retriever import Retriever

_HOMES = {
    "Answer": "stripedrag.rag.answer",
    "Citation": "stripedrag.rag.answer",
    "Context": "stripedrag.rag.packing",
    "Dropped": "stripedrag.rag.packing",
    "Pipeline": "stripedrag.rag.pipeline",
    "Retriever": "stripedrag.rag.retriever",
    "Span": "stripedrag.rag.packing",
    "Timings": "stripedrag.rag.answer",
    "Usage": "stripedrag.rag.answer",
}

__all__ = ["Answer", "Citation", "Context", "Dropped", "Pipeline", "Retriever", "Span", "Timings", "Usage"]

__getattr__ = lazy(__name__, _HOMES)
