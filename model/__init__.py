"""StripedHyena as a transformers model. Importing this room registers it with AutoConfig and AutoModelForCausalLM."""

from stripedrag.model.cache import new_cache
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.modeling import StripedHyenaForCausalLM

__all__ = ["StripedHyenaConfig", "StripedHyenaForCausalLM", "new_cache"]
