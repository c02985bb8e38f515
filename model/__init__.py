"""StripedHyena as a transformers model. Importing this room registers it with AutoConfig and AutoModelForCausalLM."""

from stripedrag.model.cache import new_cache
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.quantization import QuantizationConfig

__all__ = ["QuantizationConfig", "StripedHyenaConfig", "StripedHyenaForCausalLM", "new_cache"]
