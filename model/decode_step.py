"""One token through all blocks in one native call, where everything is as a decoding loop has it.

What the call would pass by (a hook, a layer of another kind, a weight that was moved) is looked for at every step: a
model that was quantized, adapted or watched in between runs as its modules say.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

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


def step_at_once(
    model: "StripedHyenaModel", x: Tensor, rotary: tuple[Tensor, Tensor], cache: DynamicCache
) -> Tensor | None:
    """The last block's output (B, 1, H) for x (B, 1, H), the states, keys and values in `cache` moved on; None where
    something is not as a decoding loop has it.
    """
    if not cpu.takes_token(x):
        return None
    step = model.decode_step
    if step is None or not step.holds(x):
        step = model.decode_step = DecodeStep(model, x)
    if step.native is None or step.is_watched():
        return None
    memories: list[HyenaState | native.KeysAndValues] = []
    for i, layer in enumerate(cache.layers):
        if type(layer) is GrowingLayer:
            memories.append(native.KeysAndValues(*layer.with_room()))
        elif isinstance(layer, LinearAttentionLayer) and (state := hyena_state(cache, i)) is not None:
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
        self._registered: list[tuple[dict[str, Any], str, Any]] = []  # modules and parameters, and where
        self._hooks: list[dict[int, Any]] = []
        self._dtype = x.dtype
        self.native: native.Blocks | None = None
        self._blocks = model.blocks._modules
        self._count = len(self._blocks)
        if self._note(model.blocks):
            with suppress(ValueError):
                self.native = native.Blocks(
                    [_weights(cast(StripedHyenaBlock, block)) for block in model.blocks], x.dtype
                )
        dictionaries, names, found = zip(*self._registered, strict=True)
        self._where = dictionaries, names, found

    def holds(self, x: Tensor) -> bool:
        """Whether the blocks are what they were, for an x of the same dtype."""
        return (
            self._dtype is x.dtype
            and self._count == len(self._blocks)
            and cpu.are_registered(*self._where)
            and (self.native is None or self.native.holds())
        )

    def is_watched(self) -> bool:
        """Whether somebody waits for what a module is given or gives."""
        return bool(torch_modules._has_any_global_hook()) or any(self._hooks)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def _note(self, parent: nn.Module) -> bool:
        """Note what is below a module; whether all of it is of our kinds and runs as these do."""
        is_ordinary = True
        for registered in (parent._parameters, parent._modules):
            self._registered += [(registered, name, one) for name, one in registered.items()]
        for module in parent.children():
            forward = module.__dict__.get("forward")  # one of its own, as hooks of other libraries put there
            self._registered.append((module.__dict__, "forward", forward))
            if type(module) not in _KINDS or forward is not None:
                is_ordinary = False
                continue
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            is_ordinary = self._note(module) and is_ordinary
        return is_ordinary


def _weights(block: StripedHyenaBlock) -> native.BlockWeights:
    """Raises `ValueError` for a norm or an activation that the kernels lack."""
    pre, post, mlp = block.pre_norm, block.post_norm, block.mlp
    if not (pre.eps_inside and post.eps_inside and pre.eps == post.eps) or mlp.activation != "silu":
        raise ValueError("the native step has RMSNorm with eps inside the root, and SwiGLU")
    mixer: FilterParameters | tuple[int, int]
    if block.is_attention:
        attention = block.inner_mha_cls
        linears, mixer = (attention.Wqkv, attention.out_proj), (attention.heads, attention.kv_heads)
    else:
        linears = block.projections, block.out_filter_dense
        mixer = FilterParameters(*block.filter._operands(), block.filter.heads)
    into, out, gate, up, down = map(_linear, (*linears, mlp.l1, mlp.l2, mlp.l3))
    return native.BlockWeights(pre.scale, post.scale, pre.eps, into, out, gate, up, down, mixer)


def _linear(module: Linear | QuantizedLinear) -> native.LinearWeights:
    weight: Tensor | QuantizedWeight = module.weight
    if isinstance(module, QuantizedLinear):
        weight = QuantizedWeight(module.weight, module.scale, module.offset, module.in_features)
    return native.LinearWeights(weight, cast(Tensor | None, module.bias))
