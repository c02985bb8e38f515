"""Models whose linear layers have weights of 8 or 4 bits, by transformers' own way of quantizing while it loads.

A checkpoint's tensors are read one by one, and each becomes small before the next is read; so a model needs the memory
of what it becomes. What is no linear layer, as embeddings, norms and the filters' poles and residues, stays as it is.
"""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from stripedrag.errors import CheckpointError, UsageError
from stripedrag.kernels import quantized
from stripedrag.kernels.quantized import QuantizedWeight

METHOD = "stripedrag"
# The kinds of models that only call their linear layers: a Mamba computes with their weights, a Mixtral's experts are
# none, and both would give nonsense, or stay large.
KINDS = ("stripedhyena", "llama", "mistral", "qwen2", "qwen3", "lfm2")
Quantization = Literal["int8", "int4"]
QUANTIZATIONS: dict[str, int] = {"int8": 8, "int4": 4}


@register_quantization_config(METHOD)
class QuantizationConfig(QuantizationConfigMixin):
    """What config.json says of weights with `bits` 8 or 4, and the known model that they are of, where it is one.

    Raises `UsageError` for other bits.
    """

    def __init__(self, bits: int = 8, origin: str | None = None, quant_method: str = METHOD) -> None:
        if bits not in quantized.BITS:
            raise UsageError(f"bits is {bits!r}; weights are quantized to 8 or 4")
        self.quant_method, self.bits, self.origin = quant_method, bits, origin

    def to_dict(self) -> dict[str, Any]:
        """What is written of it."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


def quantization(model: PreTrainedModel) -> QuantizationConfig | None:
    """How a model's weights were made small; None where they were not, or not by this library."""
    found = getattr(model.config, "quantization_config", None)
    return found if isinstance(found, QuantizationConfig) else None


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is a `QuantizedWeight`; only its bias has the model's dtype."""

    weight: nn.Parameter
    scale: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.set_weight(quantized.empty(out_features, in_features, bits))

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Take the tensors of another weight of the same shape."""
        self.register_parameter("offset", None)
        for name, tensor in _tensors(weight).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def misfit(self) -> tuple[int, ...] | None:
        """The shape of what lies in the place of the weight, where that is not one of this layer."""
        weight = QuantizedWeight(self.weight, self.scale, self.offset, self.in_features)
        return None if weight.fits and len(self.weight) == self.out_features else tuple(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) for x (…, in)."""
        own: Any = self._parameters  # looked up at once: a decode step takes two hundred of these in some milliseconds
        weight = QuantizedWeight(own["weight"], own["scale"], own["offset"], self.in_features)
        return quantized.linear(x, weight, own["bias"])

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the parameters, but cast none except the bias."""
        kept = self.weight, self.scale, self.offset

        def keep(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            is_kept = any(tensor is one for one in kept) and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if is_kept else moved

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Puts `QuantizedLinear` for every `nn.Linear` of a model of the `KINDS`."""

    quantization_config: QuantizationConfig

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is the weight of such a layer, and not small yet."""
        del kwargs
        module, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(module), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        """What makes a weight small."""
        return _Quantize(self.quantization_config.bits)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtypes of a checkpoint that is quantized already are those of its modules."""
        del converter, param
        return dtype

    def is_serializable(self) -> bool:
        """It can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Its weights are not trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` takes it."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del kwargs
        if (kind := model.config.model_type) not in KINDS:
            raise UsageError(
                f"weights of {self.quantization_config.bits} bits are for models of the kinds {', '.join(KINDS)}; "
                f"this is a {kind}. Load it as it is."
            )
        tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not tied:
                model.set_submodule(name, self._empty(module))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """A tied output becomes a small copy: the embedding is read a row at a time, the output whole. Raises
        `CheckpointError` where a weight had another shape than its layer.
        """
        del kwargs
        small = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        if misfits := [
            f"{name}.weight {module.misfit} for {(module.out_features, module.in_features)}"
            for name, module in small.items()
            if module.misfit
        ]:
            raise CheckpointError(f"the checkpoint has misshapen tensors: {', '.join(sorted(misfits)[:8])}")
        for module in small.values():
            for tensor in (module.weight, module.scale, module.offset):
                if tensor is not None:
                    tensor.requires_grad_(False)
        output = model.get_output_embeddings()
        if isinstance(output, nn.Linear):
            copy = self._empty(output)
            copy.set_weight(quantized.quantize(output.weight, self.quantization_config.bits))
            model.set_output_embeddings(copy)
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}
        return model

    def _empty(self, module: nn.Linear) -> QuantizedLinear:
        with torch.device("meta"):
            bits, bias = self.quantization_config.bits, module.bias is not None
            return QuantizedLinear(module.in_features, module.out_features, bits, bias)


class _Quantize(ConversionOps):
    def __init__(self, bits: int) -> None:
        self.bits = bits

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        del kwargs
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        layer: Any = model.get_submodule(full_layer_name.removesuffix(".weight"))
        if weight.shape != (layer.out_features, layer.in_features):
            return {full_layer_name: weight}  # as it is; it is told when all are loaded
        module = full_layer_name.removesuffix("weight")
        return {module + name: tensor for name, tensor in _tensors(quantized.quantize(weight, self.bits)).items()}


def _tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    names = ("weight", "scale", "offset")
    return {name: tensor for name, tensor in zip(names, weight[:3], strict=True) if tensor is not None}
