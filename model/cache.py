"""The generation cache: transformers' hybrid `DynamicCache`, with key/value layers that do not copy themselves.

A Hyena layer keeps `conv_states` (B, 3H, K-1) and `recurrent_states` (B, H, N, 2) float32, the same bytes at any length
(transformers' `LinearAttentionLayer`). An attention layer keeps keys and values.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from stripedrag.kernels.ops import HyenaState

LEAST_BLOCK_TOKENS = 256  # of a block, but for the last: a state is worth the keys and values of some 30 tokens


class GrowingLayer(DynamicLayer):
    """Keys and values (B, Hkv, L, head width) in buffers that grow by half: a token costs its own bytes, amortised.

    `DynamicLayer` concatenates, which copies all keys and values for every token. `keys` and `values` are views of
    what is filled.
    """

    keys: Tensor
    values: Tensor
    expected_tokens = 0  # that the first buffers have room for, and for half as many more

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first states."""
        super().lazy_initialization(key_states, value_states)
        self._buffers: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones (B, Hkv, L, head width) included."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled = self.get_seq_length()
        length = filled + key_states.shape[-2]
        if not self._fits(length, key_states):
            capacity = max(length, filled + filled // 2, self.expected_tokens + self.expected_tokens // 2)
            buffers = tuple(_room(states, capacity) for states in (key_states, value_states))
            if filled:
                buffers[0][:, :, :filled], buffers[1][:, :, :filled] = self.keys, self.values
            self._buffers = buffers
        assert self._buffers is not None
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, filled:length] = new
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values

    def _fits(self, length: int, key_states: Tensor) -> bool:
        """Whether the buffers can take `length` tokens and are still what `keys` shows (beam search replaces it)."""
        return (
            self._buffers is not None
            and length <= self._buffers[0].shape[-2]
            and self._buffers[0].shape[0] == key_states.shape[0]
            and self.keys.data_ptr() == self._buffers[0].data_ptr()
        )


def _room(states: Tensor, capacity: int) -> Tensor:
    return states.new_empty((*states.shape[:2], capacity, states.shape[-1]))


def new_cache(config: PreTrainedConfig, *, expected_tokens: int = 0) -> DynamicCache:
    """An empty cache for a model of this configuration, which does not have to grow for so many tokens."""
    cache = DynamicCache(config=config)
    adopt(cache)
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.expected_tokens = expected_tokens
    return cache


def adopt(cache: DynamicCache) -> None:
    """Give a cache that is still empty our key/value layers; `generate` makes its caches itself.

    Raises `ValueError` for a cache of fixed size, whose empty slots this model would attend to.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}; a StripedHyena takes a DynamicCache, as new_cache gives"
        )
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()


def hyena_state(cache: DynamicCache | None, layer_idx: int) -> HyenaState | None:
    """The state that a Hyena layer carries, as views into the cache; None before its first token."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None
    layer = cache.layers[layer_idx]
    return HyenaState(layer.conv_states[0], layer.recurrent_states[0])


def store_hyena_state(cache: DynamicCache, layer_idx: int, state: HyenaState) -> None:
    """Copy a state into the cache."""
    cache.update_conv_state(state.fir.detach(), layer_idx, conv_kernel_size=state.fir.shape[-1])
    cache.update_recurrent_state(state.iir.detach(), layer_idx)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of tokens and states that the cache holds (unfilled buffer space not counted)."""
    tensors: list[Tensor | None] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        elif layer.is_initialized:
            tensors += [layer.keys, layer.values]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def refuses_blocks(cache: DynamicCache) -> str | None:
    """Why what a cache holds cannot be taken in blocks and put together again; None where it can.

    A sliding window forgets keys and values, so that what it holds of a block depends on what came after.
    """
    for layer in cache.layers:
        if type(layer) not in (GrowingLayer, LinearAttentionLayer) or getattr(layer, "number_of_states", 1) != 1:
            return f"its cache has a {type(layer).__name__}, which does not keep every token"
    return None


def block(cache: DynamicCache, start: int) -> dict[str, Tensor]:
    """What a cache holds of its tokens from `start` on: copies of their keys and values (B, Hkv, L, head width), and of
    the states after the last of them. `extend` adds it to a cache again.
    """
    held: dict[str, Tensor | None] = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            held |= {f"{i}.conv": layer.conv_states[0], f"{i}.recurrent": layer.recurrent_states[0]}
        else:
            held |= {f"{i}.keys": layer.keys[:, :, start:], f"{i}.values": layer.values[:, :, start:]}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in held.items()
        if tensor is not None  # LFM2's convolutions have no recurrent state
    }


def extend(cache: DynamicCache, held: Mapping[str, Tensor]) -> None:
    """Copy a `block` into a cache that holds what came before it."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            conv, recurrent = held[f"{i}.conv"], held.get(f"{i}.recurrent")
            cache.update_conv_state(conv, i, conv_kernel_size=conv.shape[-1])
            if recurrent is not None:
                cache.update_recurrent_state(recurrent, i)
        else:
            layer.update(held[f"{i}.keys"], held[f"{i}.values"])
