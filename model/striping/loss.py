"""The next-token loss against any target distribution, taken with the unembedding in pieces.

Logits of a whole batch never exist at once: 4,096 positions of a vocabulary of 49,152 would be 800 MB in float32.
Pieces of 128 positions take a third of the time of larger ones, whose memory glibc gives back after every use.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = 128  # logits of so many positions live at once


class Targets(NamedTuple):
    """What is known of the next token's distribution at R positions: K tokens each, the rest of the mass unresolved.

    `ids` (R, K) int64, `probabilities` (R, K) float32 with rows that sum to at most 1, `weights` (R,) float32. A label
    is a row [1, 0, …]; a teacher's distribution is cut to its K likeliest tokens.
    """

    ids: Tensor
    probabilities: Tensor
    weights: Tensor


def divergence(hidden: Tensor, unembedding: Tensor, targets: Targets, *, rows: int = ROWS) -> Tensor:
    """Σ w_r KL(q_r ‖ p_r) over positions, p the model's next-token distribution, q the target's; a scalar, float32.

    Both are taken over the target's K tokens and one class for all others, so that unresolved mass asks only for as
    much mass elsewhere. For a label it is the cross-entropy; for a teacher's likeliest tokens a lower bound of the KL
    divergence over the whole vocabulary (data processing inequality).

    `hidden` (R, H) after the final norm, differentiable; `unembedding` (V, H), of which no gradient is taken. Products
    are in the dtype of `unembedding`, sums in float32.
    """
    total: Tensor = _Divergence.apply(hidden, unembedding, *targets, rows)  # type: ignore[no-untyped-call]
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, ids: Tensor, probabilities: Tensor, weights: Tensor, rows: int
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            q, w = probabilities[part], weights[part].unsqueeze(-1)
            p = (hidden[part].to(unembedding.dtype) @ unembedding.T).float().softmax(-1)
            is_known = q > 0  # a token without target mass is one of the others
            p_known = torch.where(is_known, p.gather(1, ids[part]), 0.0)
            p_rest = (1 - p_known.sum(-1, keepdim=True)).clamp(min=1e-6)
            q_rest = (1 - q.sum(-1, keepdim=True)).clamp(min=0)
            log_p = torch.where(is_known, p_known, 1.0).clamp(min=1e-37).log()
            entropies = torch.xlogy(q, q) - q * log_p
            rest = torch.xlogy(q_rest, q_rest) - q_rest * p_rest.log()
            total += (w * (entropies.sum(-1, keepdim=True) + rest)).sum()
            if not ctx.needs_input_grad[0]:
                continue
            # d/dlogit is p - q on the known tokens, and p (1 - q_rest / p_rest) on the others.
            ratio = q_rest / p_rest
            p.mul_((1 - ratio) * w).scatter_add_(1, ids[part], (p_known * ratio - q) * w)
            gradient[part] = (p.to(unembedding.dtype) @ unembedding).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, None
