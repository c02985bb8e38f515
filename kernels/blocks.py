"""One token through whole blocks in one call of the native kernels (`native/blocks.h`): with a call for each
operator Python was a third of a decode step.

B batch, H width, D head width, P tokens in the cache.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from stripedrag.kernels import cpu
from stripedrag.kernels.library import is_ordinary
from stripedrag.kernels.operands import FilterParameters, HyenaState
from stripedrag.kernels.quantized import QuantizedWeight


class LinearWeights(NamedTuple):
    """A linear layer: its weight (out, in), plain or quantized, and its bias (out,)."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None

    @property
    def rows(self) -> int:
        """How many outputs it has."""
        return (self.weight if isinstance(self.weight, Tensor) else self.weight.weight).shape[:1].numel()


class BlockWeights(NamedTuple):
    """x + mixer(norm x), then x + SwiGLU MLP(norm x), by RMSNorms with `eps` inside the root."""

    pre_norm: Tensor
    post_norm: Tensor
    eps: float
    into: LinearWeights  # the mixer: z (B, 3H), or q, k and v
    out: LinearWeights  # of the mixer
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    mixer: FilterParameters | tuple[int, int]  # of the Hyena operator, or how many heads and key/value heads


class KeysAndValues(NamedTuple):
    """Where an attention layer's keys and values lie: `keys` and `values` (B, Hkv, room, D), which may be views of
    larger ones, and of which the next token's become the last of `tokens`.
    """

    keys: Tensor
    values: Tensor
    tokens: int


class Blocks:
    """The native step of blocks, made of their weights as they lie in memory."""

    def __init__(self, blocks: Sequence[BlockWeights], dtype: torch.dtype) -> None:
        """Raises `ValueError` where the kernels cannot be given the weights as they are, for an x of `dtype`."""
        self._native, self._tensors = cpu.native_blocks(blocks, dtype)
        self._lie = list(map(Tensor.data_ptr, self._tensors))
        self._are = list(map(_FORM, self._tensors))
        self._dtype, self._width = dtype, blocks[0].pre_norm.shape[0]
        self._mixers = [_Mixer(block) for block in blocks]

    def holds(self) -> bool:
        """Whether all weights lie where they lay, as they did."""
        some = self._tensors
        return (
            list(map(Tensor.data_ptr, some)) == self._lie
            and list(map(_FORM, some)) == self._are
            and all(map(Tensor.is_contiguous, some))
        )

    def step(
        self, x: Tensor, memories: Sequence[HyenaState | KeysAndValues], cos: Tensor, sin: Tensor
    ) -> Tensor | None:
        """The last block's output (B, 1, H) for x (B, 1, H), rounded as the same operations on tensors round it; the
        memories of the blocks, in their order, take the token in. None where the kernels cannot be given the
        arguments as they are; then nothing has changed.

        `cos` and `sin` (B or 1, 1, 1, D / 2) are of the token's position. x is one that `cpu.takes_token` takes.
        """
        batch, _, width = x.shape
        if not (
            x.dtype is cos.dtype is sin.dtype is self._dtype
            and width == self._width
            and cos.shape == sin.shape
            and cos.shape[:3] in ((1, 1, 1), (batch, 1, 1))
            and cpu.lie_plainly(cos, sin)
        ):
            return None
        places: list[int] = []
        for mixer, memory in zip(self._mixers, memories, strict=True):
            if not mixer.takes(memory, batch, self._dtype, cos.shape[3]):
                return None
            places += _places(memory)
        y = x.clone()
        angles = cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else cos.shape[3]
        self._native.run(batch, torch.get_num_threads(), y.data_ptr(), *angles, tuple(places))
        torch.autograd.graph.increment_version([tensor for memory in memories for tensor in memory[:2]])
        return y


class _Mixer:
    """The shapes of a block's memory."""

    def __init__(self, block: BlockWeights) -> None:
        width, mixer = block.pre_norm.shape[0], block.mixer
        self._is_hyena = isinstance(mixer, FilterParameters)
        if isinstance(mixer, FilterParameters):
            self._shapes = (3 * width, mixer.fir_weight.shape[2] - 1), (width, mixer.poles.shape[1], 2)
        else:
            heads, self._kv_heads = mixer
            self._head_width = width // heads

    def takes(self, memory: HyenaState | KeysAndValues, batch: int, dtype: torch.dtype, angles: int) -> bool:
        """Whether a memory is the block's, for so many rows, and lies as the kernels need it."""
        if self._is_hyena:
            fir, iir = memory[:2]
            return (
                type(memory) is HyenaState
                and fir.shape == (batch, *self._shapes[0])
                and iir.shape == (batch, *self._shapes[1])
                and fir.dtype is dtype
                and iir.dtype is torch.float32
                and cpu.lie_plainly(fir, iir)
            )
        if type(memory) is not KeysAndValues:
            return False
        keys, values, tokens = memory
        shape, strides = keys.shape, keys.stride()
        return (
            shape == values.shape
            and shape[0] == batch
            and shape[1] == self._kv_heads
            and shape[2] >= tokens > 0
            and shape[3] == self._head_width == 2 * angles
            and strides == values.stride()
            and strides[2:] == (shape[3], 1)
            and (batch == 1 or strides[0] > 0)  # of rows that are there once the token's places would be one
            and (shape[1] == 1 or strides[1] > 0)
            and keys.dtype is values.dtype is dtype
            and is_ordinary(keys)
            and is_ordinary(values)
            and keys.is_cpu
            and values.is_cpu
        )


def _places(memory: HyenaState | KeysAndValues) -> tuple[int, ...]:
    one, other = memory[0].data_ptr(), memory[1].data_ptr()
    return (one, other, *memory[0].stride()[:2], memory.tokens) if isinstance(memory, KeysAndValues) else (one, other)


_FORM = attrgetter("shape", "dtype")
