"""StripedHyena for LlamaIndex: `from llama_index.llms.stripedhyena import StripedHyena`."""

from stripedrag.rag.llama_index import StripedHyena

__all__ = ["StripedHyena"]
