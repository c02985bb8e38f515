"""Several continuations of one beginning, decoded as a batch: what they share is kept once and read once a step.

A row's attention is over the keys that all rows share and over its own (`ops.attend_shared`). A Hyena layer's state
has no length, so each row has a copy. B rows, Hkv key/value heads, G query heads for each.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from stripedrag.kernels import ops


class SharedLayer(DynamicLayer):
    """Keys and values of B rows: `keys` and `values` (1, Hkv, P, head width), which all rows begin with, and each row's
    own (B, Hkv, C, head width), of which row b has filled `lengths[b]`.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        own = keys.new_zeros(rows, keys.shape[1], 0, keys.shape[3])
        self.own_keys, self.own_values = own, own
        self.lengths = torch.zeros(rows, dtype=torch.long, device=keys.device)

    def get_seq_length(self) -> int:
        """The tokens of the longest row."""
        return self.keys.shape[-2] + int(self.lengths.max())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take in keys and values (B, Hkv, L, head width) of L new tokens in each row, and give what their queries q
        (B, G · Hkv, L, head width) read, causally: (B, G · Hkv, L, head width).
        """
        length = q.shape[2]
        places = self.lengths[:, None] + torch.arange(length, device=q.device)
        self.own_keys = _with(self.own_keys, k, places)
        self.own_values = _with(self.own_values, v, places)
        self.lengths = self.lengths + length

        seen = torch.arange(self.own_keys.shape[-2], device=q.device) <= places[:, :, None]
        return ops.attend_shared(q, self.keys, self.values, self.own_keys, self.own_values, seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self.own_keys, self.own_values = self.own_keys[beam_idx], self.own_values[beam_idx]
        self.lengths = self.lengths[beam_idx]


def _with(own: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """`own` (B, Hkv, C, D), longer where it must be, with `new` (B, Hkv, L, D) at `places` (B, L)."""
    needed = int(places.max()) + 1
    if needed > own.shape[2]:
        own = _padded(own, needed + needed // 2)
    own.transpose(1, 2)[torch.arange(len(own), device=own.device)[:, None], places] = new.transpose(1, 2)
    return own


def fork(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache of so many rows that all go on from what `cache` (one row) holds, whose keys and values they share.

    `cache` must not grow while the fork is used.
    """
    forked = DynamicCache()
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
            forked.layers.append(_states(conv.repeat(rows, 1, 1), recurrent.repeat(rows, 1, 1, 1)))
        else:
            forked.layers.append(SharedLayer(layer.keys, layer.values, rows))
    return forked


def join(forks: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of several forks of one cache as one."""
    joined = DynamicCache()
    for layers in zip(*(forked.layers for forked in forks), strict=True):
        if isinstance(layers[0], LinearAttentionLayer):
            conv = torch.cat([layer.conv_states[0] for layer in layers])
            joined.layers.append(_states(conv, torch.cat([layer.recurrent_states[0] for layer in layers])))
        else:
            layer = SharedLayer(layers[0].keys, layers[0].values, 0)
            layer.lengths = torch.cat([one.lengths for one in layers])
            columns = max(one.own_keys.shape[2] for one in layers)
            layer.own_keys = torch.cat([_padded(one.own_keys, columns) for one in layers])
            layer.own_values = torch.cat([_padded(one.own_values, columns) for one in layers])
            joined.layers.append(layer)
    return joined


def _padded(own: Tensor, columns: int) -> Tensor:
    return F.pad(own, (0, 0, 0, columns - own.shape[2]))


def _states(conv: Tensor, recurrent: Tensor) -> LinearAttentionLayer:
    layer = LinearAttentionLayer()
    layer.update_conv_state(conv, conv_kernel_size=conv.shape[-1])
    layer.update_recurrent_state(recurrent)
    return layer
