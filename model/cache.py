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
from stripedrag.model.config import StripedHyenaConfig

_ANSWER_TOKENS = 256  # that there is room for after a prompt, before its buffers have to grow
LEAST_BLOCK_TOKENS = 256  # of a block, but for the last: a state is worth the keys and values of some 30 tokens


class GrowingLayer(DynamicLayer):
    """Keys and values (B, Hkv, L, head width) in buffers that are first made for what is expected, and then grow by
    half: a token costs its own bytes, amortised.

    `DynamicLayer` concatenates, which copies all keys and values for every token. `keys` and `values` are views of
    what is filled; tensors that are put in their place (beam search does) become the buffers.
    """

    is_initialized: bool
    _keys: Tensor | None
    _values: Tensor | None
    _filled: int  # of the keys, and in turn of the values: whoever replaces them does it one by one
    _filled_values: int
    expected_tokens = 0  # that the next buffers have room for, and for a short answer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from the first states."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones (B, Hkv, L, head width) included."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None
        if self._keys.shape[0] != key_states.shape[0]:
            raise ValueError(f"the cache holds {self._keys.shape[0]} rows, and {key_states.shape[0]} are to be added")
        filled = self._filled
        keys, values, length = self.with_room(key_states.shape[-2])
        keys[:, :, filled:length] = key_states
        values[:, :, filled:length] = value_states
        self.fill(length)
        return keys[:, :, :length], values[:, :, :length]

    def with_room(self, tokens: int = 1) -> tuple[Tensor, Tensor, int]:
        """The buffers, with room for so many tokens more, and how many are then filled: `fill` says that they are."""
        assert self._keys is not None and self._values is not None
        filled, length = self._filled, self._filled + tokens
        if length > self._keys.shape[-2]:
            is_expected = length <= self.expected_tokens
            room = max(self.expected_tokens + _ANSWER_TOKENS if is_expected else length, filled + filled // 2)
            self._keys = _grown(self._keys[:, :, :filled], room)
            self._values = _grown(self._values[:, :, :filled], room)
        return self._keys, self._values, length

    def fill(self, length: int) -> None:
        """So many tokens are filled."""
        self._filled = self._filled_values = length

    @property
    def keys(self) -> Tensor | None:
        """The keys (B, Hkv, L, head width); None before the first."""
        return None if self._keys is None else self._keys[:, :, : self._filled]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys, self._filled = keys, 0 if keys is None else keys.shape[-2]

    @property
    def values(self) -> Tensor | None:
        """The values (B, Hkv, L, head width); None before the first."""
        return None if self._values is None else self._values[:, :, : self._filled_values]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values, self._filled_values = values, 0 if values is None else values.shape[-2]

    def get_seq_length(self) -> int:
        """How many tokens are filled, L."""
        return self._filled

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; a crop of n tokens is -n")
        self._filled = self._filled_values = max(0, self._filled + tokens_to_remove)


def _grown(filled: Tensor, room: int) -> Tensor:
    """A buffer for so many tokens, which begins with those that are `filled` (B, Hkv, L, head width)."""
    buffer = filled.new_empty((*filled.shape[:2], room, filled.shape[-1]))
    buffer[:, :, : filled.shape[-2]] = filled
    return buffer


def new_cache(config: PreTrainedConfig, *, expected_tokens: int = 0) -> DynamicCache:
    """An empty cache for a model of this configuration, which does not have to grow for so many tokens."""
    cache = DynamicCache(config=config)
    adopt(cache)
    expect(cache, expected_tokens)
    return cache


def expect(cache: DynamicCache, tokens: int) -> None:
    """Tell a cache how many tokens it will hold: buffers without room for them are next made just so large."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.expected_tokens = max(layer.expected_tokens, tokens)


def fit(cache: DynamicCache, config: StripedHyenaConfig) -> None:
    """Make a cache that a caller or `generate` made one of a StripedHyena; one without layers gets them.

    Raises `ValueError` for a cache of fixed size, whose empty slots this model would attend to, and for one whose
    layers are of other kinds than this model's.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}; a StripedHyena takes a DynamicCache, as new_cache gives"
        )
    if not cache.layers:
        made = DynamicCache(config=config)
        cache.layers, cache.layer_class_to_replicate = made.layers, made.layer_class_to_replicate
    kinds = [
        "linear_attention" if isinstance(layer, LinearAttentionCacheLayerMixin) else "full_attention"
        for layer in cache.layers
    ]
    if kinds != config.layer_types:
        raise ValueError(
            f"the cache has {kinds.count('linear_attention')} layers of states among its {len(kinds)}, which are not "
            "this StripedHyena's; make it by new_cache(model.config)"
        )
    adopt(cache)


def adopt(cache: DynamicCache) -> None:
    """Give a cache that is still empty our key/value layers."""
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
