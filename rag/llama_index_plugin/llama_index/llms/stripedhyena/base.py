"""What this integration offers; the code is part of stripedrag, which measures and tests it."""

from stripedrag.rag.llama_index import FillContext, StripedHyena

__all__ = ["FillContext", "StripedHyena"]
