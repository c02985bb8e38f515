"""How many tokens a model can read in the memory that is free, and what they take.

An estimate from above, for what grows with the tokens: keys and values in buffers that a long answer makes grow by
half, and what a context cache keeps of them. Activations do not grow: a prompt is read in segments.
"""

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from stripedrag.model.cache import LEAST_BLOCK_TOKENS, new_cache
from stripedrag.model.generation import SEGMENT_TOKENS
from stripedrag.model.modeling import StripedHyenaForCausalLM

_GROWTH = 1.5  # `GrowingLayer`; that the one which grows is there twice for a moment is not counted
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # limit, use, statistics and their name for pages of files, which are given up when needed
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in all attention layers."""
    config: Any = model.config
    attention = sum(not isinstance(layer, LinearAttentionLayer) for layer in new_cache(config).layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(attention * 2 * heads * width * model.dtype.itemsize)


def segment_bytes(model: PreTrainedModel) -> int:
    """Bytes of the activations that live while a segment is read: those of one layer, whose widest is its MLP."""
    config: Any = model.config
    inner = getattr(config, "intermediate_size", None) or getattr(config, "mlp_size", 4 * config.hidden_size)
    return int(SEGMENT_TOKENS * (3 * inner + 12 * config.hidden_size) * model.dtype.itemsize)


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of the states of all Hyena layers, after any number of tokens; 0 for a model of another kind."""
    if not isinstance(model, StripedHyenaForCausalLM):
        return 0
    config = model.config
    channel = config.state_size * 2 * 4 + 3 * (config.short_filter_length - 1) * model.dtype.itemsize
    return int((config.num_layers - len(config.attn_layer_idxs)) * config.hidden_size * channel)


def row_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of a reply of `tokens` among several that are decoded together: its own keys, values and states, which are
    there twice while the rows are joined.
    """
    return int(2 * state_bytes(model) + _GROWTH * tokens * token_bytes(model))


def kept_token_bytes(model: PreTrainedModel) -> float:
    """Bytes that a context cache keeps of a token, its share of a block's states among them."""
    return token_bytes(model) + state_bytes(model) / LEAST_BLOCK_TOKENS


def context_bytes(model: PreTrainedModel, tokens: int, *, kept_bytes: int = 0) -> int:
    """Bytes that reading and answering `tokens` takes, of which a context cache keeps up to `kept_bytes`."""
    read = segment_bytes(model) + _GROWTH * tokens * token_bytes(model)
    return int(read + min(tokens * kept_token_bytes(model), kept_bytes))


def fitting_tokens(model: PreTrainedModel, *, kept_bytes: int = 0, beside_bytes: int = 0, share: float = 1.0) -> int:
    """How many tokens fit beside `beside_bytes` into a `share` of the memory that is free on the model's device now."""
    free = share * free_bytes(model.device) - beside_bytes - segment_bytes(model)
    each = token_bytes(model)
    if each == 0:
        return 2**62  # no attention layer: a state is as large after any number of tokens
    kept = kept_token_bytes(model)
    both = free / (_GROWTH * each + kept)
    return max(0, int(both if both * kept <= kept_bytes else (free - kept_bytes) / (_GROWTH * each)))


def free_bytes(device: torch.device) -> int:
    """What a process may still take on a device: of a CPU's memory what is available, or the limit of its container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = int(psutil.virtual_memory().available)
    for limit, used, statistics, pages in _CGROUP_FILES:
        if (_CGROUP / limit).is_file() and (bytes_ := (_CGROUP / limit).read_text().strip()).isdigit():
            counts = dict(line.split() for line in (_CGROUP / statistics).read_text().splitlines())
            free = min(free, int(bytes_) - int((_CGROUP / used).read_text()) + int(counts.get(pages, 0)))
    return free
