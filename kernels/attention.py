"""Attention without a mask where none is needed: of new tokens over those before them and over themselves.

By the native kernel where there is one for them; else by torch, on a CPU in two parts, merged by their log-sum-exp as
blocks of flash attention are (Dao et al. 2022, 2205.14135). B rows, Hkv key/value heads, G query heads for each, L new
tokens after P others, D the head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stripedrag.kernels import cpu

_SCORES = 2**26  # that live at once, where no kernel gives their log-sum-exp


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the last L of P + L tokens read, (B, G · Hkv, L, D): each up to itself, or where `mask` is True.

    q is (B, G · Hkv, L, D), k and v are (B, Hkv, P + L, D), `mask` is bool (B or 1, 1, L, P + L). Scores are over
    sqrt(D). Differentiable, where the native kernel serves once. Without a mask native kernels serve one token in
    float32 and bfloat16 without a gradient, and more, D a multiple of 16, in what `cpu.has_attention` says: of finite
    numbers they give the same bits for any number of threads, and wherever a prompt is split into parts of more than
    one token. The gradient of a whole sequence (P = 0) is native where this one is by products of bfloat16, the same
    bits for any number of threads; else it is torch's, taken from their output. k and v are kept as they are.

    Raises:
        ValueError: shapes that do not fit.
    """
    if (
        not q.ndim == k.ndim == v.ndim == 4
        or k.shape != v.shape
        or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3])
        or k.shape[1] == 0
        or q.shape[1] % k.shape[1]
        or k.shape[2] < q.shape[2]
    ):
        raise ValueError(
            f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; they are (B, G · Hkv, L, D) and "
            "twice (B, Hkv, P + L, D)"
        )
    if mask is None:
        attended = cpu.token_attention_at_once(q, k, v) if q.shape[2] == 1 else None
        attended = cpu.attention_at_once(q, k, v) if attended is None else attended
        if attended is not None:
            return attended
    batch, heads, length, width = q.shape
    kv_heads, past = k.shape[1], k.shape[2] - length
    takes_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if mask is None and not past and length > 1 and takes_gradient:
        q, k, v = _as_autocast(q, k, v)
        if cpu.takes_attention(q, k, v) and not cpu.lacks_products(q):
            whole: Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
            return whole
    if cpu.lacks_products(q):
        return cpu.in_float32(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    if length == 1:
        # The query heads of one key/value head as rows of one product: at 8,000 keys in bfloat16 on a CPU a
        # quarter of enable_gqa's time (5.2 to 1.2 ms).
        grouped = q.reshape(batch, kv_heads, -1, width)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
    if mask is None and past:
        if q.device.type == "cpu" and q.dtype == k.dtype == v.dtype and not torch.is_grad_enabled():
            return in_parts(q, k, v)  # not under autocast, which mixes dtypes; log-sum-exps have no gradient
        mask = torch.ones(length, past + length, dtype=torch.bool, device=q.device).tril(past)
    if heads != kv_heads and q.device.type == "cpu" and takes_gradient:
        return by_whole_heads(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads)


def by_whole_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `attend` with P = 0 or a mask, by torch, keys and values repeated for the heads that share them: the gradient
    with enable_gqa takes four times as long on a CPU (9.1 to 2.3 s at 8,192 tokens of 4 heads of 128).
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class _Attention(torch.autograd.Function):
    """Causal attention by the native kernel. Where there is no native gradient it is torch's of its own flash
    attention: all that this takes of the forward pass is the output and the log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        y = cpu.attention(q, k, v, lse)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # whatever a hook gives back, channels lie side by side
        q, k, v, y, lse = (t if t.stride(-1) == 1 else t.contiguous() for t in ctx.saved_tensors)
        if (gradients := cpu.attention_gradient_at_once(dy, q, k, v, y, lse)) is not None:
            return gradients
        kv_heads = k.shape[1]
        whole = (t.repeat_interleave(q.shape[1] // kv_heads, dim=1) for t in (k, v))
        dq, *of_whole = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, *whole, y, lse, 0.0, True
        )
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2) for t in of_whole)
        return dq, dk, dv


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Of the dtype that autocast gives to attention, where it is on for CPUs."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(t if t.dtype is torch.float64 else t.to(torch.get_autocast_dtype("cpu")) for t in tensors)


def attend_shared(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, seen: Tensor
) -> Tensor:
    """What L tokens of each of B rows read of what all rows share and of their own, merged (for shared prefixes
    Juravsky et al. 2024, 2402.05099): (B, G · Hkv, L, D) like q.

    `keys` and `values` are (1, Hkv, P, D), `own_keys` and `own_values` (B, Hkv, C, D), of which a token of a row reads
    those where `seen` (B, L, C) is True. Without a gradient.
    """
    rows, heads, length, width = q.shape
    kv_heads = keys.shape[1]
    # All queries of all rows as rows of one product with the shared keys.
    grouped = q.reshape(rows, kv_heads, -1, width)
    flat = grouped.transpose(0, 1).reshape(1, kv_heads, -1, width)
    at_once = _read_at_once(flat, keys, values)
    shared, shared_lse = read(flat, keys, values) if at_once is None else at_once
    shared = shared.view(kv_heads, rows, -1, width).transpose(0, 1)
    shared_lse = shared_lse.view(kv_heads, rows, -1).transpose(0, 1)
    if cpu.lacks_products(q):
        grouped, own_keys, own_values = grouped.float(), own_keys.float(), own_values.float()
    own, own_lse = read_where(grouped, own_keys, own_values, seen.repeat(1, heads // kv_heads, 1)[:, None])
    return merge(shared, shared_lse, own, own_lse).reshape(rows, heads, length, width).to(q.dtype)


def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attend` without a mask, by torch's flash attention on a CPU over what was before and over the new tokens: a
    mask would be of L · (P + L) elements, made and read in every layer.
    """
    past = k.shape[2] - q.shape[2]
    among, among_lse = read(q, k[:, :, past:], v[:, :, past:], is_causal=True)
    if not past:
        return among
    return merge(*read(q, k[:, :, :past], v[:, :, :past]), among, among_lse)


def read(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """By torch, attention of q (B, G · Hkv, L, D) over all of k and v (B, Hkv, P, D), or causally where P = L, and its
    log-sum-exp (B, G · Hkv, L) in float32. On other devices than a CPU with G = 1, and not causally.
    """
    if q.device.type == "cpu":
        if cpu.lacks_products(q):
            out, lse = read(q.float(), k.float(), v.float(), is_causal=is_causal)
            return out.to(q.dtype), lse
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=is_causal)
        return out, lse
    assert not is_causal and q.shape[1] == k.shape[1]
    some = max(1, _SCORES // (q.shape[1] * k.shape[2]))
    parts = [read_where(part, k, v, None) for part in q.split(some, dim=2)]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _read_at_once(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """As `read`, not causally, by the native kernel: the queries of a key/value head as so many heads of one token."""
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    tokens = q.reshape(batch, kv_heads * (heads // kv_heads) * length, 1, width)
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not cpu.takes_attention(tokens, k, v):
        return None
    lse = q.new_empty(tokens.shape[:3], dtype=torch.float32)
    return cpu.attention(tokens, k, v, lse).reshape(q.shape), lse.view(batch, heads, length)


def read_where(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `read`, G = 1, with the scores laid out: each query reads the keys where `seen` is True."""
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def merge(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over two sets of keys, from what was read of each (…, L, D) and its log-sum-exp (…, L)."""
    wide = torch.promote_types(one.dtype, torch.float32)
    share = torch.sigmoid(one_lse - other_lse).unsqueeze(-1)
    return torch.lerp(other.to(wide), one.to(wide), share.to(wide)).to(one.dtype)
