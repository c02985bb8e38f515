"""Linear layers whose weights have 8 or 4 bits: rounded once after training, without calibration, and read as they are.

A decode step does little but read weights, so it is sooner by what they have lost. Products are of x as it is with what
the stored numbers stand for, not of a rounded x.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stripedrag.kernels import cpu, library

BITS = (8, 4)
GROUP_COLUMNS, BLOCK_COLUMNS = 32, 128
_BLOCK_GROUPS = BLOCK_COLUMNS // GROUP_COLUMNS
_LEVELS = 15  # above the least, of 4 bits
_REFITS = 3  # of the line on which a group's levels lie
_TILE_BYTES = 1 << 20  # of weights that are made wide at a time: they stay in the second-level cache
_QUANTIZED_AT_ONCE = 1 << 17  # numbers, for the same reason


class QuantizedWeight(NamedTuple):
    """A weight (out, in) as stored, on three axes: none passes for a weight of plain numbers.

    8 bits: `weight` (out, 1, in) int8 and `scale` (out,) float32, whose product it is; no offset. 4 bits: `weight`
    (out, blocks, 32) int16, and `scale` and `offset` (out, 4 blocks) bfloat16, for every 32 columns; a number q from 0
    to 15 stands for scale · q + offset. A block is 128 columns: bits 4j to 4j + 3 of word i are column 32j + i. The
    last is filled up; what is there counts for nothing, but its scales and offsets are finite.
    """

    weight: Tensor
    scale: Tensor
    offset: Tensor | None
    columns: int

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.offset is None else 4

    @property
    def fits(self) -> bool:
        """Whether the tensors have the dtypes and shapes of one weight."""
        weight, scale, offset, columns = self
        rows = weight.shape[0]
        if offset is None:
            is_typed = weight.dtype is torch.int8 and scale.dtype is torch.float32
            return is_typed and weight.shape == (rows, 1, columns) and scale.shape == (rows,)
        blocks = -(-columns // BLOCK_COLUMNS)
        is_typed = weight.dtype is torch.int16 and scale.dtype is offset.dtype is torch.bfloat16
        is_shaped = weight.shape == (rows, blocks, GROUP_COLUMNS)
        return is_typed and is_shaped and scale.shape == offset.shape == (rows, _BLOCK_GROUPS * blocks)


def empty(rows: int, columns: int, bits: int) -> QuantizedWeight:
    """A weight of that shape whose numbers are not set, on torch's default device."""
    if bits == 8:
        return QuantizedWeight(
            torch.empty(rows, 1, columns, dtype=torch.int8), torch.empty(rows, dtype=torch.float32), None, columns
        )
    blocks = -(-columns // BLOCK_COLUMNS)
    groups = (rows, _BLOCK_GROUPS * blocks)
    scale, offset = (torch.empty(groups, dtype=torch.bfloat16) for _ in range(2))
    return QuantizedWeight(torch.empty(rows, blocks, GROUP_COLUMNS, dtype=torch.int16), scale, offset, columns)


@torch.no_grad()
def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """`weight` (out, in), rounded: to the nearest of 255 multiples of a row's largest / 127; or of 16 levels, which lie
    from end to end of 32 columns first, and then, by turns, on the line that fits what was rounded to them best.

    Raises:
        ValueError: other bits, or a weight that is no matrix of floating numbers.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; weights are quantized to 8 or 4")
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"the weight is {weight.dtype} of shape {tuple(weight.shape)}; it is (out, in), floating")
    with weight.device:
        made = empty(weight.shape[0], weight.shape[1], bits)
    if cpu.quantize_at_once(weight, made, _REFITS):
        return made
    rows = max(1, _QUANTIZED_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part, wide = _rows(made, start, start + rows), weight[start : start + rows].float().contiguous()
        if not cpu.quantize_at_once(wide, part, _REFITS):
            for whole, some in zip(part[:3], _to_int8(wide) if bits == 8 else _to_int4(wide), strict=False):
                assert whole is not None
                whole.copy_(some)
    return made


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that stored numbers stand for."""
    w = cpu.dequantize_at_once(quantized, dtype)
    if w is not None:
        return w
    weight, scale, offset, columns = quantized
    if offset is None:
        return (weight.flatten(1).float() * scale[:, None]).to(dtype)
    shifts = 4 * torch.arange(_BLOCK_GROUPS, device=weight.device, dtype=torch.int32)
    q = (weight[:, :, None, :].int() >> shifts[:, None]) & _LEVELS
    wide = q * scale.float().view(*q.shape[:3], 1) + offset.float().view(*q.shape[:3], 1)
    return wide.flatten(1)[:, :columns].to(dtype)


def linear(x: Tensor, quantized: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (…, out) for x (…, in), of any floating dtype.

    Up to 8 rows of float32 or bfloat16 on a CPU with the native kernels read the stored numbers; more rows multiply by
    weights that are made wide again, some at a time. Differentiable in x and the bias, once.

    Raises:
        ValueError: x of another width.
    """
    y = cpu.quantized_linear_at_once(x, quantized, bias)
    if y is not None:
        return y
    if x.ndim == 0 or x.shape[-1] != quantized.columns:
        raise ValueError(f"x has shape {tuple(x.shape)}; for this weight it is (…, {quantized.columns})")
    if cpu.lacks_products(x):
        return cpu.in_float32(lambda x, bias: linear(x, quantized, bias), x, bias)
    if library.is_watched() or not x.is_cpu:
        return F.linear(x, dequantize(quantized, x.dtype), bias)
    if not torch.is_grad_enabled():
        return _by_tiles(x, quantized, bias)
    recorded: Tensor = _Linear.apply(x, quantized, bias)  # type: ignore[no-untyped-call]
    return recorded


class _Linear(torch.autograd.Function):
    """Keeps no wide weight for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.quantized = quantized
        return _by_tiles(x, quantized, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor | None]:
        bias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dy @ dequantize(ctx.quantized, dy.dtype), None, bias


def _by_tiles(x: Tensor, quantized: QuantizedWeight, bias: Tensor | None) -> Tensor:
    rows = quantized.weight.shape[0]
    some = max(1, _TILE_BYTES // (x.element_size() * quantized.columns))
    if some >= rows:
        return F.linear(x, dequantize(quantized, x.dtype), bias)
    y: Tensor | None = None
    for start in range(0, rows, some):
        wide = dequantize(_rows(quantized, start, start + some), x.dtype)
        made = F.linear(x, wide, None if bias is None else bias[start : start + some])
        if y is None:
            y = made.new_empty(*made.shape[:-1], rows)
        y[..., start : start + some] = made
    assert y is not None
    return y


def _rows(quantized: QuantizedWeight, start: int, end: int) -> QuantizedWeight:
    weight, scale, offset, columns = quantized
    return QuantizedWeight(weight[start:end], scale[start:end], None if offset is None else offset[start:end], columns)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1) / 127
    rounded = (weight / _divisor(scale)[:, None]).round_().clamp_(-127, 127)  # which denormals' would pass
    return rounded.to(torch.int8).unsqueeze(1), scale


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padding = weight[:, -1:].expand(-1, -weight.shape[1] % BLOCK_COLUMNS)  # which widens no group's range
    groups = torch.cat([weight, padding], dim=1).unflatten(1, (-1, GROUP_COLUMNS))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    offset, scale = low, (high - low) / _LEVELS
    least = torch.full_like(low, torch.inf)
    best: tuple[Tensor, ...] = torch.zeros_like(groups), scale, offset
    for fit in range(_REFITS + 1):
        offset, scale = offset.bfloat16().float(), scale.bfloat16().float()
        q = ((groups - offset) / _divisor(scale)).round_().clamp_(0, _LEVELS)
        error = (q * scale + offset - groups).square_().sum(-1, keepdim=True)
        is_better = error < least if fit else torch.ones_like(error, dtype=torch.bool)
        best = tuple(torch.where(is_better, new, old) for new, old in zip((q, scale, offset), best, strict=True))
        least = torch.minimum(error, least)
        middle, q_middle = groups.mean(-1, keepdim=True), q.mean(-1, keepdim=True)
        q -= q_middle
        scale = (q * groups).sum(-1, keepdim=True) / _divisor(q.square().sum(-1, keepdim=True))
        offset = middle - scale * q_middle
    q, scale, offset = best
    nibbles = q.nan_to_num().int().unflatten(1, (-1, _BLOCK_GROUPS)).unbind(2)
    words = sum(nibble << (4 * j) for j, nibble in enumerate(nibbles))
    assert isinstance(words, Tensor)
    words = words - ((words >> 15) << 16)  # as a signed number of 16 bits
    return words.to(torch.int16), scale.squeeze(-1).bfloat16(), offset.squeeze(-1).bfloat16()


def _divisor(scale: Tensor) -> Tensor:
    """Of a row or group of equal numbers the scale is 0, and so are its multiples."""
    return torch.where(scale == 0, 1, scale)
