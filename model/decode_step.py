"""One token through all blocks in one native call, where everything is as a decoding loop has it.

What the call would pass by (a hook, a layer of another kind, a weight that was moved, a number that was changed) is
looked for at every step: a model that was quantized, adapted or watched in between runs as its modules say.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import output_capturing

from stripedrag.kernels import blocks as native
from stripedrag.kernels import cpu
from stripedrag.kernels.operands import FilterParameters, HyenaState
from stripedrag.kernels.quantized import QuantizedWeight
from stripedrag.model.cache import GrowingLayer, hyena_state
from stripedrag.model.layers import Attention, GatedMLP, HyenaFilter, Linear, RMSNorm, StripedHyenaBlock
from stripedrag.model.quantization import QuantizedLinear

if TYPE_CHECKING:
    from stripedrag.model.modeling import StripedHyenaModel

_KINDS = (StripedHyenaBlock, RMSNorm, Linear, QuantizedLinear, GatedMLP, HyenaFilter, Attention)
_FORWARDS = [kind.forward for kind in _KINDS]
# Of a module's own what the step is made of; and a `forward`, which other libraries put there.
_READ = "activation eps eps_inside forward head_dim heads in_features is_attention kv_heads layer_idx".split()


def step_at_once(
    model: "StripedHyenaModel", x: Tensor, rotary: tuple[Tensor, Tensor], cache: DynamicCache
) -> Tensor | None:
    """The last block's output (B, 1, H) for x (B, 1, H), the states, keys and values in `cache` moved on; None where
    something is not as a decoding loop has it. After a `MemoryError` the cache is good for nothing.
    """
    if not cpu.takes_token(x) or type(cache) is not DynamicCache:  # another may do more when it is given a token
        return None
    step = model.decode_step
    if step is None or not step.holds(x):
        step = model.decode_step = DecodeStep(model, x)
    if step.native is None or step.is_watched() or len(cache.layers) != len(model.blocks):
        return None
    memories: list[HyenaState | native.KeysAndValues] = []
    for i, layer in enumerate(cache.layers):
        if type(layer) is GrowingLayer and layer.is_initialized:
            memories.append(native.KeysAndValues(*layer.with_room()))
        elif type(layer) is LinearAttentionLayer and (state := hyena_state(cache, i)) is not None:
            memories.append(state)
        else:
            return None
    y = step.native.step(x, memories, *rotary)
    if y is not None:
        for layer, memory in zip(cache.layers, memories, strict=True):
            if isinstance(memory, native.KeysAndValues):
                layer.fill(memory.tokens)
    return y


class DecodeStep:
    """The native step of a model's blocks, None where they have none, and what they were when it was made. A copied or
    unpickled model begins without.
    """

    def __init__(self, model: "StripedHyenaModel", x: Tensor) -> None:
        self._modules: list[nn.Module] = []
        self._dtype = x.dtype
        self._blocks = model.blocks._modules
        self._count = len(self._blocks)
        found: list[tuple[dict[str, Any], str, Any]] = [(model._modules, "blocks", model.blocks)]
        self._note(model.blocks, found)
        self._types = list(map(type, self._modules))
        self._hooks = [hooks for one in self._modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        dictionaries, names, ones = zip(*found, strict=True)
        self._where = dictionaries, names, ones
        self.native: native.Blocks | None = None
        is_ours = set(self._types) <= set(_KINDS) and not any("forward" in one.__dict__ for one in self._modules)
        if is_ours and [kind.forward for kind in _KINDS] == _FORWARDS:
            blocks = enumerate(cast(list[StripedHyenaBlock], list(model.blocks)))
            with suppress(ValueError):
                self.native = native.Blocks([_weights(block, i) for i, block in blocks], x.dtype)

    def holds(self, x: Tensor) -> bool:
        """Whether the blocks are what they were, for an x of the same dtype."""
        return (
            self._dtype is x.dtype
            and self._count == len(self._blocks)
            and cpu.are_registered(*self._where)
            and list(map(type, self._modules)) == self._types
            and [kind.forward for kind in _KINDS] == _FORWARDS
            and (self.native is None or self.native.holds())
        )

    def is_watched(self) -> bool:
        """Whether somebody waits for what a module is given or gives."""
        if torch_modules._has_any_global_hook():
            return True
        if not any(self._hooks):
            return False
        # transformers leaves its own for hidden states where they are, and says when they are waited for.
        foreign = any(
            getattr(hook, "__module__", None) != output_capturing.__name__
            for hooks in self._hooks
            for hook in hooks.values()
        )
        collector = getattr(output_capturing, "_active_collector", None)
        return foreign or collector is None or bool(collector.get())

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def _note(self, parent: nn.Module, found: list[tuple[dict[str, Any], str, Any]]) -> None:
        """Note what is below a module, and where it is registered."""
        for registered in (parent._parameters, parent._modules):
            found += [(registered, name, one) for name, one in registered.items()]
        for module in parent.children():
            self._modules.append(module)
            own = module.__dict__
            found += [(own, name, own.get(name)) for name in _READ if name in own or name == "forward"]
            self._note(module, found)


def _weights(block: StripedHyenaBlock, place: int) -> native.BlockWeights:
    """Raises `ValueError` for what the native step lacks."""
    pre, post, mlp = block.pre_norm, block.post_norm, block.mlp
    if not (pre.eps_inside and post.eps_inside and pre.eps == post.eps) or mlp.activation != "silu":
        raise ValueError("the native step has RMSNorm with eps inside the root, and SwiGLU")
    mixer: FilterParameters | tuple[int, int]
    if place != (block.inner_mha_cls if block.is_attention else block).layer_idx:
        raise ValueError("the native step takes a cache's layers in their order")
    if block.is_attention:
        attention = block.inner_mha_cls
        linears, mixer = (attention.Wqkv, attention.out_proj), (attention.heads, attention.kv_heads)
    else:
        linears = block.projections, block.out_filter_dense
        names = "short_filter_weight", "short_filter_bias", "poles", "residues", "D"
        fir_weight, fir_bias, poles, residues, skip = (_own(block.filter, name) for name in names)
        mixer = FilterParameters(fir_weight, fir_bias, poles, residues, skip, block.filter.heads)
    into, out, gate, up, down = map(_linear, (*linears, mlp.l1, mlp.l2, mlp.l3))
    return native.BlockWeights(_own(pre, "scale"), _own(post, "scale"), pre.eps, into, out, gate, up, down, mixer)


def _linear(module: Linear | QuantizedLinear) -> native.LinearWeights:
    stored = _own(module, "weight")
    weight: Tensor | QuantizedWeight = stored
    if isinstance(module, QuantizedLinear):
        weight = QuantizedWeight(stored, _own(module, "scale"), module._parameters.get("offset"), module.in_features)
    if "bias" not in module._parameters:
        raise ValueError("a bias that is no parameter may change unseen")
    return native.LinearWeights(weight, module._parameters["bias"])


def _own(module: nn.Module, name: str) -> Tensor:
    """A parameter that is registered as one: another attribute could be changed unseen."""
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ValueError(f"{name} is no parameter")
    return parameter
