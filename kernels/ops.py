"""The public door of the kernels: the whole Hyena operator between the two Linear layers of a block, and what blocks
need beside it: linear layers, attention (`attention.py`), RMSNorm, SwiGLU, and the loss of a model
(`cross_entropy.py`).

B batch, L length, H channels, G filter groups, N modes, K taps. Inputs are checked here, once for every backend.
The operator's equations stand in `reference.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stripedrag.kernels import cpu
from stripedrag.kernels.attention import attend, attend_shared
from stripedrag.kernels.cross_entropy import linear_cross_entropy
from stripedrag.kernels.dispatch import select
from stripedrag.kernels.library import is_watched
from stripedrag.kernels.operands import FilterParameters, HyenaState, working_dtype, zero_state

__all__ = [
    "HyenaState",
    "attend",
    "attend_shared",
    "hyena_filter",
    "hyena_step",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "swiglu",
    "writes_out",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hyena_filter(
    z: Tensor,
    fir_weight: Tensor,
    fir_bias: Tensor,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor,
    *,
    heads: int | None = None,
    state: HyenaState | None = None,
    padding_mask: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, HyenaState]:
    """The operator over a sequence, and the state after its last token. Differentiable in every tensor, in reverse
    mode and once; the `torch` backend also in forward mode and again.

    Args:
        z: (B, L, 3H), L ≥ 1, float64, float32, bfloat16 or float16: the rows of the input projection.
        fir_weight: (3H, 1, K), any floating dtype.
        fir_bias: (3H,), any floating dtype.
        poles: (G, N, 1, 2) float32 or float64, last axis (re, im); G divides H.
        residues: like poles.
        skip: (H,), the D of the equations.
        heads: the column-split channel layout [head][x2|x1|v][head width]; None is [x2|x1|v].
        state: where an earlier part of the sequence stopped; None is the beginning. Not modified.
        padding_mask: (B, L) bool, True for a real token; a padded token counts as zeros.
        out: (B, L, H) in the dtype of z, channels contiguous: y is written there, for a caller that has the memory
            already. In the plain layout it may be `z[..., :H]` itself, which y then takes the place of. Without a
            gradient only.
        backend: a name from `dispatch.BACKENDS`; None chooses the fastest that runs.

    Returns:
        y (B, L, H) in the dtype of z, and a `HyenaState`. Arithmetic and modal state are float32 (float64 for a
        float64 z) whatever the dtype of z.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, each named.
        BackendError: the named backend cannot run here.
    """
    parameters = FilterParameters(fir_weight, fir_bias, poles, residues, skip, heads)
    if z.ndim != 3 or z.shape[1] == 0:
        raise ValueError(f"z has shape {tuple(z.shape)}; a sequence is (B, L, 3H) with L of at least 1")
    _check_parameters(z, parameters)
    if padding_mask is not None and (
        padding_mask.shape != z.shape[:2] or padding_mask.dtype != torch.bool or padding_mask.device != z.device
    ):
        raise ValueError(
            f"padding_mask is {padding_mask.dtype} of shape {tuple(padding_mask.shape)} on {padding_mask.device}; "
            f"for this z it is torch.bool of shape {tuple(z.shape[:2])}, True for a real token, on {z.device}"
        )
    if state is None:
        state = zero_state(z, parameters)
    else:
        _check_state(z, parameters, state)
    if out is not None:
        _check_out(z, parameters, state, out)
    chosen = select(backend, z.device, parameters.taps, parameters.modes)
    # Autocast would turn the float32 arithmetic into half precision.
    with torch.autocast(z.device.type, enabled=False):
        if out is not None and chosen.hyena_filter_out is not None:
            return out, chosen.hyena_filter_out(z, parameters, state, padding_mask, out)
        y, after = chosen.hyena_filter(z, parameters, state, padding_mask)
    return (y if out is None else out.copy_(y)), after


def hyena_step(
    z: Tensor,
    fir_weight: Tensor,
    fir_bias: Tensor,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor,
    *,
    state: HyenaState,
    heads: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, HyenaState]:
    """The operator for one token: y (B, H) for z (B, 3H), in O(H·N). Arguments as in `hyena_filter`.

    The tensors of `state` are overwritten in place and returned. Not differentiable: where a gradient would be
    recorded it raises ValueError (call it under `torch.no_grad()`, or use `hyena_filter` with L = 1).
    """
    parameters = FilterParameters(fir_weight, fir_bias, poles, residues, skip, heads)
    if backend is None or backend == "cpu":
        y = cpu.step_at_once(z, parameters, state)
        if y is not None:
            return y, state
    if z.ndim != 2:
        raise ValueError(f"z has shape {tuple(z.shape)}; one token is (B, 3H)")
    _check_parameters(z, parameters)
    _check_state(z, parameters, state)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (z, *parameters[:5], *state)):
        raise ValueError("hyena_step overwrites its state and is not differentiable; call it under torch.no_grad()")
    with torch.autocast(z.device.type, enabled=False):
        chosen = select(backend, z.device, parameters.taps, parameters.modes)
        return chosen.hyena_step(z, parameters, state), state


def writes_out(z: Tensor, taps: int, modes: int) -> bool:
    """Whether the backend that runs for z writes y into `out` itself; another computes it elsewhere and copies."""
    return select(None, z.device, taps, modes).hyena_filter_out is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`: (…, out) for x (…, in) and weight (out, in).

    Up to 8 rows on a CPU without a gradient, as of a decode step, go to the native kernels where these are there; and
    any number in bfloat16 where the processor has no products of it. Their sums are float32 whatever the dtype.
    """
    y = cpu.linear_at_once(x, weight, bias)
    if y is not None:
        return y
    is_plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.ndim == 2 and x.shape[-1:] == weight.shape[1:]
    if not (is_plain and cpu.lacks_products(x) and cpu.lacks_products(weight)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and not is_watched():
        recorded: Tensor = _WideLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return recorded
    return cpu.in_float32(F.linear, x, weight, bias)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · scale over the last axis (Zhang & Sennrich 2019), like x (…, H); `scale` is (H,).

    Arithmetic is float32 (float64 for a float64 x). Differentiable, on a CPU with the native kernels once.

    Raises:
        ValueError: a scale of another width.
    """
    if x.ndim == 0 or scale.shape != x.shape[-1:]:
        raise ValueError(f"x has shape {tuple(x.shape)} and scale {tuple(scale.shape)}; they are (…, H) and (H,)")
    if scale.dtype in (x.dtype, torch.float32) and cpu.takes_rows(x, scale):
        x, scale = x.contiguous(), scale.contiguous()
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            y: Tensor = _RMSNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
            return y
        return cpu.rms_norm(x, scale, eps)
    wide = x.to(working_dtype(x))
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * scale.to(wide.dtype)).to(x.dtype)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) · b, the gate of a gated MLP (Shazeer 2020), for tensors of one shape and dtype.

    Differentiable, on a CPU with the native kernels once; these round once.

    Raises:
        ValueError: tensors of other shapes or dtypes.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} of shape {tuple(a.shape)}, b {b.dtype} of {tuple(b.shape)}; they go in pairs")
    if cpu.takes_rows(a, b):
        a, b = a.contiguous(), b.contiguous()
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            y: Tensor = _SwiGLU.apply(a, b)  # type: ignore[no-untyped-call]
            return y
        return cpu.swiglu(a, b)
    return F.silu(a) * b


class _WideLinear(torch.autograd.Function):
    """In bfloat16 by products of float32; nothing wide is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return cpu.in_float32(F.linear, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide, made = dy.reshape(-1, len(weight)).float(), list[Tensor | None]([None, None, None])
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                made[0] = (wide @ weight.float()).to(x.dtype).view(x.shape)
            if ctx.needs_input_grad[1]:
                made[1] = (wide.T @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            made[2] = wide.sum(0).to(dy.dtype)
        return tuple(made)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return cpu.rms_norm(x, scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = (tensor.contiguous() for tensor in ctx.saved_tensors)  # whatever a hook gives back
        dx, dscale = cpu.rms_norm_gradient(x, scale, ctx.eps, dy.contiguous())
        return dx, dscale.to(scale.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return cpu.swiglu(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (tensor.contiguous() for tensor in ctx.saved_tensors)
        return cpu.swiglu_gradient(a, b, dy.contiguous())


def _check_parameters(z: Tensor, parameters: FilterParameters) -> None:
    fir_weight, fir_bias, poles, residues, skip, heads = parameters
    if not z.shape[-1] or z.shape[-1] % 3 or z.dtype not in _DTYPES:
        raise ValueError(
            f"z is {z.dtype} with {z.shape[-1]} channels; it takes float16, bfloat16, float32 or float64 and 3H of them"
        )
    channels = z.shape[-1] // 3
    if fir_weight.ndim != 3 or fir_weight.shape[:2] != (3 * channels, 1) or fir_weight.shape[2] < 1:
        raise ValueError(f"fir_weight has shape {tuple(fir_weight.shape)}; for this z it is ({3 * channels}, 1, K)")
    if fir_bias.shape != (3 * channels,):
        raise ValueError(f"fir_bias has shape {tuple(fir_bias.shape)}; for this z it is ({3 * channels},)")
    if skip.shape != (channels,):
        raise ValueError(f"skip has shape {tuple(skip.shape)}; for this z it is ({channels},)")
    for name, system in (("poles", poles), ("residues", residues)):
        if system.ndim != 4 or system.shape[2:] != (1, 2) or channels % max(system.shape[0], 1) or not system.numel():
            raise ValueError(
                f"{name} has shape {tuple(system.shape)}; for this z it is (G, N, 1, 2) with G a divisor of {channels}"
            )
        if system.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {system.dtype}, in which a pole of 0.9995 becomes 1; keep it in float32")
    if poles.shape != residues.shape or poles.dtype != residues.dtype:
        raise ValueError(
            f"poles are {poles.dtype} of shape {tuple(poles.shape)}, residues {residues.dtype} of shape "
            f"{tuple(residues.shape)}; they go in pairs"
        )
    if heads is not None and (not isinstance(heads, int) or heads < 1 or channels % heads):
        raise ValueError(f"heads is {heads!r}; it is an int that divides H, which is {channels} for this z")
    for name, tensor in zip(parameters._fields, parameters[:5], strict=False):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it takes a floating dtype")
        if tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device} and z on {z.device}; move them together")


def _check_state(z: Tensor, parameters: FilterParameters, state: HyenaState) -> None:
    batch, channels = z.shape[0], parameters.channels
    expected = (
        ("fir", state.fir, (batch, 3 * channels, parameters.taps - 1), z.dtype),
        ("iir", state.iir, (batch, channels, parameters.modes, 2), working_dtype(z)),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != z.device or tensor.stride(-1) > 1:
            raise ValueError(
                f"state.{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; "
                f"for this z it is {dtype} of shape {shape} on {z.device}, its last axis contiguous"
            )


def _check_out(z: Tensor, parameters: FilterParameters, state: HyenaState, out: Tensor) -> None:
    shape = (*z.shape[:2], parameters.channels)
    if out.shape != shape or out.dtype != z.dtype or out.device != z.device or out.stride(-1) != 1:
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}; for this z it is {z.dtype} of shape "
            f"{shape} on {z.device}, its last axis contiguous"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (z, *parameters[:5], *state, out)):
        raise ValueError(
            "no gradient flows through out, which is overwritten; call under torch.no_grad(), or without out"
        )
    extent = 0  # of the axes so far, the finest first
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= extent:
            raise ValueError(f"out has shape {shape} and strides {out.stride()}: several of its rows share memory")
        extent += stride * (size - 1)
    if torch.compiler.is_compiling() or not z.numel() or type(z) is not torch.Tensor:
        return
    storage = out.untyped_storage().data_ptr()
    for name, tensor in (*zip(parameters._fields, parameters[:5], strict=False), *state._asdict().items()):
        if tensor.untyped_storage().data_ptr() == storage and tensor.numel():
            raise ValueError(f"out lies in the storage of {name}, which is still read while y is written")
    shares = storage == z.untyped_storage().data_ptr()
    in_place = out.data_ptr() == z.data_ptr() and out.stride() == z.stride() and (parameters.heads or 1) == 1
    if shares and not in_place:
        raise ValueError(
            "out lies in the storage of z; of that it may only be z[..., :H], and in the plain layout (heads=None)"
        )
