"""The cross-entropy of a large vocabulary, whose logits live a part at a time and are made once."""

from typing import Any, Literal

import torch
from torch import Tensor

from stripedrag.kernels import cpu

_LOGITS = 2**26  # of a part: 256 MiB in float32, and as much beside while they are summed


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The cross-entropy of the logits hidden @ weight.T, in nats: a float32 scalar.

    What torch's function of this name gives; how long either takes `stripedrag bench loss` tells. While a part's logits
    are there, their share of the gradient is taken (as in Liger Kernel, Hsu et al. 2024), so three products are enough
    for both passes. Until the backward pass a gradient is held like each operand that asks for one; there is no second.

    Args:
        hidden: (R, H), any floating dtype.
        weight: (V, H) of the same dtype, unless autocast gives both its own. Logits are rounded to that and then made
            float32, and so are the parts of the weight's gradient, which sum in float32. On a CPU without products of
            bfloat16 those are of float32.
        labels: (R,) int64 in [0, V), or `ignore_index` where there is none.
        ignore_index: what stands for no label.
        reduction: "mean" over the labels that there are, or "sum". Without any the mean is NaN and its gradient 0.

    Raises:
        ValueError: shapes that do not go together; a label that is no row of `weight`; another reduction.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)}; "
            "they are (R, H), (V, H) and (R,)"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it is 'mean' or 'sum'")
    is_label = labels != ignore_index
    if not torch.compiler.is_compiling():  # a graph branches on no number
        foreign = labels[is_label & ((labels < 0) | (labels >= weight.shape[0]))]
        if len(foreign):
            raise ValueError(
                f"labels holds {int(foreign[0])}; they are in [0, {weight.shape[0]}), or {ignore_index} where there is "
                "none"
            )
    if cpu.lacks_products(hidden):
        with torch.autocast("cpu", enabled=False):
            return linear_cross_entropy(
                hidden.float(), weight.float(), labels, ignore_index=ignore_index, reduction=reduction
            )
    divisor = is_label.sum() if reduction == "mean" else torch.ones_like(is_label.sum())
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, is_label, divisor, torch.is_grad_enabled()
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, is_label: Tensor, divisor: Tensor, wanted: bool
    ) -> Tensor:
        weight = weight.detach()  # of which autocast remembers no copy without history
        of_hidden, of_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        dhidden = torch.empty_like(hidden) if of_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, _LOGITS // weight.shape[0])
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            states, counts = hidden[part], is_label[part].unsqueeze(1)
            places = labels[part].unsqueeze(1).where(counts, 0)
            logits = (states @ weight.T).float()
            lse = logits.logsumexp(1, keepdim=True)
            total += (lse - logits.gather(1, places)).where(counts, 0).sum()
            if dhidden is None and dweight is None:
                continue
            # The gradient of the logits: probabilities less the one that was wanted.
            p = logits.sub_(lse).exp_().scatter_add_(1, places, torch.full_like(lse, -1)).mul_(counts)
            dlogits = p.to(hidden.dtype)
            if dhidden is not None:
                dhidden[part] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.T @ states
        some = divisor.clamp(min=1)
        dhidden = None if dhidden is None else dhidden.div_(some)
        dweight = None if dweight is None else dweight.div_(some).to(weight.dtype)
        ctx.save_for_backward(dhidden, dweight)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy can be differentiated once; for more take the loss of whole logits"
            )
        dhidden, dweight = (None if made is None else made * dloss for made in ctx.saved_tensors)
        return dhidden, dweight, None, None, None, None
