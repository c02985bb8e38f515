"""The blocks of a StripedHyena and the layers that they are made of, under the names of the published tensors.

B batch, L length, H width, K taps, N modes.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from stripedrag.kernels import ops
from stripedrag.model.cache import hyena_state, store_hyena_state
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.shared import SharedLayer

_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "gelu": lambda a, b: F.gelu(a) * b,  # the erf form
}


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) computed in float32, with either placement of eps."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.eps
        self.eps_inside = config.use_flash_rmsnorm

    def forward(self, x: Tensor) -> Tensor:
        """Like x (…, H): x / sqrt(mean(x²) + eps) · scale, or with eps beside the root."""
        if self.eps_inside:
            return ops.rms_norm(x, self.scale, self.eps)
        wide = x.float()
        root = (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.eps).reciprocal()
        return (wide * root * self.scale.float()).to(x.dtype)


class Linear(nn.Linear):
    """torch's linear layer, as `ops.linear` runs it."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, out) for input (…, in)."""
        return ops.linear(input, self.weight, self.bias)


class GatedMLP(nn.Module):
    """l3(act(l1 x) · l2 x), without biases (Shazeer 2020)."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__()
        self.l1 = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.l2 = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.l3 = Linear(config.mlp_size, config.hidden_size, bias=False)
        self.activation = config.mlp_activation

    def forward(self, x: Tensor) -> Tensor:
        """Like x (…, H)."""
        gated = _GATES[self.activation](self.l1(x), self.l2(x))
        out: Tensor = self.l3(gated)
        return out


class HyenaFilter(nn.Module):
    """The parameters of the Hyena operator, under their published names. Poles and residues stay float32."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__()
        width, systems, modes = config.hidden_size, config.filter_systems, config.state_size
        self.short_filter_weight = nn.Parameter(torch.empty(3 * width, 1, config.short_filter_length))
        self.short_filter_bias = nn.Parameter(torch.empty(3 * width))
        self.poles = nn.Parameter(torch.empty(systems, modes, 1, 2, dtype=torch.float32))
        self.residues = nn.Parameter(torch.empty(systems, modes, 1, 2, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(width))
        self.heads = config.num_attention_heads if config.column_split_hyena else None

    def forward(
        self, z: Tensor, state: ops.HyenaState | None, padding_mask: Tensor | None, *, may_overwrite: bool = False
    ) -> tuple[Tensor, ops.HyenaState]:
        """y (B, L, H) and the state after it, for z (B, L, 3H); see `ops.hyena_filter`."""
        # Where the layout allows it y takes the place of the gate in z: mapping new memory takes longer than the work.
        in_place = (
            may_overwrite
            and self.heads is None
            and z.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and ops.writes_out(z, self.short_filter_weight.shape[-1], self.poles.shape[1])
        )
        out = z[..., : self.D.shape[0]] if in_place else None
        return ops.hyena_filter(z, *self._operands(), heads=self.heads, state=state, padding_mask=padding_mask, out=out)

    def step(self, z: Tensor, state: ops.HyenaState) -> Tensor:
        """y (B, H) for one token z (B, 3H); the state is overwritten."""
        return ops.hyena_step(z, *self._operands(), heads=self.heads, state=state)[0]

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.short_filter_weight, self.short_filter_bias, self.poles, self.residues, self.D

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the parameters, but never cast poles and residues: in bfloat16 a pole of 0.9995 becomes 1."""
        systems = (self.poles, self.residues)

        def keep_wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            is_system = any(tensor is system or tensor is system.grad for system in systems)
            return tensor.to(moved.device) if is_system and moved.dtype != tensor.dtype else moved

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return self


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with half-split rotary positions (Su et al. 2021)."""

    def __init__(self, config: StripedHyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.Wqkv = Linear(config.hidden_size, rows, bias=config.qkv_proj_bias)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, bias=config.mha_out_proj_bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """Like x (B, L, H). `mask` (B, 1, L, keys) bool, True where a query may look; None is causal."""
        batch, length, _ = x.shape
        q, k, v = (
            self.Wqkv(x)
            .view(batch, length, -1, self.head_dim)
            .transpose(1, 2)
            .split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        layer = None if cache is None else cache.layers[self.layer_idx]
        if isinstance(layer, SharedLayer):
            if mask is not None and not torch.compiler.is_compiling():
                raise ValueError("a forked cache takes no attention_mask with padding; its beginning has none")
            shared: Tensor = self.out_proj(layer.attend(q, k, v).transpose(1, 2).reshape(batch, length, -1))
            return shared
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attended = self.attend(q, k, v, mask).transpose(1, 2).reshape(batch, length, -1)
        projected: Tensor = self.out_proj(attended)
        return projected

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What the new tokens read, as `ops.attend`."""
        return ops.attend(q, k, v, mask)


class StripedHyenaBlock(GradientCheckpointingLayer):
    """x + mixer(pre_norm(x)), then x + mlp(post_norm(x)). The mixer is the Hyena operator or attention."""

    def __init__(self, config: StripedHyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_attention = layer_idx in config.attn_layer_idxs
        self.pre_norm = RMSNorm(config)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config)
        if self.is_attention:
            self.inner_mha_cls = Attention(config, layer_idx)
        else:
            self.projections = Linear(config.hidden_size, 3 * config.hidden_size)
            self.filter = HyenaFilter(config)
            self.out_filter_dense = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        """Like x (B, L, H)."""
        normed = self.pre_norm(x)
        if self.is_attention:
            x = x + self.inner_mha_cls(normed, rotary, attention_mask, past_key_values)
        else:
            x = x + self._hyena(normed, padding_mask, past_key_values)
        out: Tensor = x + self.mlp(self.post_norm(x))
        return out

    def _hyena(self, x: Tensor, padding_mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        z = self.projections(x)
        state = hyena_state(cache, self.layer_idx)
        if state is not None and z.shape[1] == 1 and padding_mask is None and not torch.is_grad_enabled():
            y = self.filter.step(z[:, 0], state).unsqueeze(1)
        else:
            # Nobody else holds z, unless a hook has seen it.
            y, after = self.filter(z, state, padding_mask, may_overwrite=not self.projections._forward_hooks)
            if cache is not None:
                store_hyena_state(cache, self.layer_idx, after)
        mixed: Tensor = self.out_filter_dense(y)
        return mixed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Like x (B, heads, L, head width), each half-split pair turned by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
