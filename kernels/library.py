"""The operator as torch's dispatcher, autograd and compilers know it: what is the same for every library of kernels.

A library has a filter that keeps what its gradient restarts from, that gradient, and a step. Here they become
`torch.library` operators.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Operators(NamedTuple):
    """The operators of one library of kernels.

    `filter(z, fir_weight, fir_bias, poles, residues, skip, fir_state, iir_state, padding_mask, heads, keep)` gives y,
    both states and what is kept for the gradient; `step(z, …, iir_state, heads)` gives y and overwrites the states.
    """

    filter: Any
    step: Any


def define(
    name: str,
    *,
    filter: Callable[[Tensor, Parameters, Tensor, Tensor, Tensor | None, int, bool], tuple[Tensor, ...]],
    gradient: Callable[[Tensor, Parameters, Tensor, Tensor | None, int, Tensor, Tensor, Tensor], Gradients],
    step: Callable[[Tensor, Parameters, Tensor, Tensor, int], Tensor],
    device_types: str | None,
) -> Operators:
    """Operators `NAME_filter`, `NAME_filter_backward` and `NAME_step` for devices of those types (None: any),
    differentiable in every tensor, once. The five parameters, in the operator's order, come to the functions as one.

    `filter(z, parameters, fir_state, iir_state, padding_mask, heads, keep)` gives y, both states after it, and with
    `keep` what the gradient restarts from (else none). `gradient(z, parameters, fir_state, padding_mask, heads, kept,
    dy, diir_out)` gives those of z, of the parameters (poles and residues (H, N, 2), a channel each) and of both given
    states, without what reaches them through the FIR state after the sequence. `step(z, parameters, fir_state,
    iir_state, heads)` gives y and overwrites the states, which are contiguous.
    """

    def filter_op(
        z: Tensor,
        fir_weight: Tensor,
        fir_bias: Tensor,
        poles: Tensor,
        residues: Tensor,
        skip: Tensor,
        fir_state: Tensor,
        iir_state: Tensor,
        padding_mask: Tensor | None,
        heads: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parameters = (fir_weight, fir_bias, poles, residues, skip)
        return filter(z, parameters, fir_state, iir_state, padding_mask, heads, keep)  # type: ignore[return-value]

    def gradient_op(
        z: Tensor,
        fir_weight: Tensor,
        fir_bias: Tensor,
        poles: Tensor,
        residues: Tensor,
        skip: Tensor,
        fir_state: Tensor,
        padding_mask: Tensor | None,
        heads: int,
        kept: Tensor,
        dy: Tensor,
        diir_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        parameters = (fir_weight, fir_bias, poles, residues, skip)
        return gradient(z, parameters, fir_state, padding_mask, heads, kept, dy, diir_out)

    def step_op(
        z: Tensor,
        fir_weight: Tensor,
        fir_bias: Tensor,
        poles: Tensor,
        residues: Tensor,
        skip: Tensor,
        fir_state: Tensor,
        iir_state: Tensor,
        heads: int,
    ) -> Tensor:
        fir, iir = fir_state.contiguous(), iir_state.contiguous()
        y = step(z, (fir_weight, fir_bias, poles, residues, skip), fir, iir, heads)
        for given, used in ((fir_state, fir), (iir_state, iir)):
            if used is not given:
                given.copy_(used)
        return y

    def custom(suffix: str, function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
        return torch.library.custom_op(f"{name}_{suffix}", function, mutates_args=mutates, device_types=device_types)

    filters = custom("filter", filter_op)
    gradients = custom("filter_backward", gradient_op)
    steps = custom("step", step_op, ("fir_state", "iir_state"))
    filters.register_fake(_filter_made)
    gradients.register_fake(_gradients_made)
    steps.register_fake(_step_made)

    def backward(ctx, dy, dfir_out, diir_out, _):  # type: ignore[no-untyped-def]
        return _backward(gradients, ctx, dy, dfir_out, diir_out)

    filters.register_autograd(backward, setup_context=_setup_context)
    return Operators(filters, steps)


def _filter_made(z, fir_weight, fir_bias, poles, residues, skip, fir_state, iir_state, padding_mask, heads, keep):  # type: ignore[no-untyped-def]
    numbers = torch.library.get_ctx().new_dynamic_size() if keep else 0
    return (
        z.new_empty(*z.shape[:2], skip.shape[0]),
        contiguous_like(fir_state),
        contiguous_like(iir_state),
        poles.new_empty(numbers),
    )


def _gradients_made(  # type: ignore[no-untyped-def]
    z, fir_weight, fir_bias, poles, residues, skip, fir_state, padding_mask, heads, kept, dy, diir_out
):
    parameters = (fir_weight, fir_bias, poles, residues, skip)
    return z.new_empty(z.shape), *other_gradients(parameters, fir_state, diir_out)


def _step_made(z, fir_weight, fir_bias, poles, residues, skip, fir_state, iir_state, heads):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape[0], skip.shape[0])


def other_gradients(
    parameters: Parameters, fir_state: Tensor, diir_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised: the gradients after that of z, in the operator's order."""
    fir_weight, fir_bias, poles, _, skip = parameters
    systems = (poles.new_empty(skip.shape[0], poles.shape[1], 2) for _ in range(2))
    firs, others = (fir_weight, fir_bias), (skip, fir_state, diir_out)
    return *map(contiguous_like, firs), *systems, *map(contiguous_like, others)  # type: ignore[return-value]


def is_watched() -> bool:
    """Whether a compiler, tracer, dispatch mode, function transform (vmap) or forward-mode gradient is about, which
    would miss a call."""
    return (
        torch.compiler.is_compiling()
        or bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing would miss a call that goes past the dispatcher: no gradient, watcher or subclass.

    The dispatcher takes 0.1 ms for an operator written in Python, which a call on a few hundred tokens would notice.
    """
    return not (torch.is_grad_enabled() or is_watched()) and all(is_ordinary(t) for t in tensors)


def is_ordinary(tensor: Tensor) -> bool:
    """Whether the numbers are those in memory: no subclass, and no negation that torch has yet to carry out."""
    return type(tensor) in (Tensor, Parameter) and not tensor.is_neg()


def contiguous_like(tensor: Tensor) -> Tensor:
    """Uninitialised."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    z, fir_weight, fir_bias, poles, residues, skip, fir_state, _, padding_mask, heads, _ = inputs
    ctx.heads = heads
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(z, fir_weight, fir_bias, poles, residues, skip, fir_state, padding_mask, output[3])


def _backward(gradient_op: Any, ctx: Any, dy: Tensor, dfir_out: Tensor, diir_out: Tensor) -> tuple[Any, ...]:
    z, *parameters, fir_state, padding_mask, kept = ctx.saved_tensors
    dz, dfir_weight, dfir_bias, dpoles, dresidues, dskip, dfir, diir = gradient_op(
        z, *parameters, fir_state, padding_mask, ctx.heads, kept, dy, diir_out
    )
    # The FIR state after the sequence is its last K-1 rows, or where it is shorter also rows of the given state.
    length, before = z.shape[1], fir_state.shape[-1]
    rows = min(length, before)
    if rows:
        last = dfir_out[..., before - rows :].transpose(1, 2)
        if padding_mask is not None:
            last = last.masked_fill(~padding_mask[:, length - rows :, None], 0)
        dz[:, length - rows :] += last
    if rows < before:
        dfir[..., length:] += dfir_out[..., : before - rows]
    systems = parameters[2].shape

    def per_group(gradient: Tensor) -> Tensor:
        return gradient.view(systems[0], -1, systems[1], 2).sum(1).unsqueeze(2)

    return dz, dfir_weight, dfir_bias, per_group(dpoles), per_group(dresidues), dskip, dfir, diir, None, None, None
