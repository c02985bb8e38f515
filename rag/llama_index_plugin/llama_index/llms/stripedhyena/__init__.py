"""StripedHyena for LlamaIndex: `from llama_index.llms.stripedhyena import StripedHyena`."""

from llama_index.llms.stripedhyena.base import FillContext, StripedHyena

__all__ = ["FillContext", "StripedHyena"]
