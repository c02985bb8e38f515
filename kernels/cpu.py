"""The `cpu` backend: the Hyena operator in C++ (`native/`), one pass over z, forward, backward and decode step.

The operator is a `torch.library` op, so that autograd, `torch.compile` and `opcheck` know it; the extension itself is
given addresses and was built without torch. Where nothing would miss it (no gradient, no compiler) a call goes to the
extension directly: at a decode step's few microseconds of work, the dispatcher would be most of its time.
"""

import importlib
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch  # before the extension: both use OpenMP, and the first to load decides which library serves the process
from torch import Tensor
from torch.nn import Parameter

from stripedrag.kernels import library
from stripedrag.kernels.library import (
    Gradients,
    Parameters,
    contiguous_like,
    is_ordinary,
    is_plain,
    is_watched,
    other_gradients,
)
from stripedrag.kernels.operands import FilterParameters, HyenaState, working_dtype

if TYPE_CHECKING:
    from stripedrag.kernels.blocks import BlockWeights, LinearWeights
    from stripedrag.kernels.quantized import QuantizedWeight

try:
    _native: Any = importlib.import_module("stripedrag.kernels._native")
except ModuleNotFoundError:
    _native = None
    _MISSING = (
        "its extension is not there: no C++17 compiler worked when stripedrag was installed. Get one (g++ 12 or newer) "
        "and install again with `pip install -v`, which shows what fails"
    )
except ImportError as error:
    _native, _MISSING = None, f"its extension does not load: {error}"

MAX_TAPS, MAX_MODES = 8, 16
_ROW_DTYPES = (torch.float32, torch.bfloat16)
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
# Products of it: torch's take a hundred times as long there as float32's.
_LACKS_BFLOAT16 = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_supported()


def refuses(device: torch.device, taps: int = 3, modes: int = 1) -> str | None:
    """Why this backend cannot run on `device` with filters of so many taps and modes, or None."""
    if device.type != "cpu":
        return "it runs on the CPU only"
    if _native is None:
        return _MISSING
    if taps > MAX_TAPS or modes > MAX_MODES:
        return f"it takes up to {MAX_TAPS} taps and {MAX_MODES} modes; this filter has {taps} and {modes}"
    return None


def instruction_set() -> str | None:
    """The x86-64 level that was chosen ("v2", "v3", "v4"; "native" elsewhere), or None where the extension is missing.

    The best that the processor runs; the environment variable STRIPEDRAG_ISA, read at import, asks for a lower one.
    """
    return None if _native is None else str(_native.isa)


def has_attention(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the native attention serves this processor. In bfloat16: one with AVX-512 BF16 (and "v4") that has no
    AMX, or one of `serves_bfloat16`, where numbers are made wide; in float32, where it was measured, "v3".
    """
    if dtype is torch.bfloat16:
        return _native is not None and (_native.has_bf16_attention or serves_bfloat16())
    return dtype is torch.float32 and instruction_set() == "v3"


def serves_bfloat16() -> bool:
    """Whether the native kernels give a processor without products of bfloat16 (x86-64 without AVX-512) linear layers
    and attention in it, which are as fast as float32's and read half as much: one of "v3".
    """
    return _LACKS_BFLOAT16 and instruction_set() in ("v3", "v4")


def lacks_products(x: Tensor) -> bool:
    """Whether what torch multiplies by x is better made float32: it is bfloat16 on a CPU without products of that."""
    return _LACKS_BFLOAT16 and x.dtype is torch.bfloat16 and x.is_cpu


def in_float32(run: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """What `run` gives of these in float32, rounded to the dtype of x; without autocast, which would narrow them."""
    with torch.autocast("cpu", enabled=False):
        return run(x.float(), *(None if other is None else other.float() for other in others)).to(x.dtype)


def hyena_filter(
    z: Tensor, parameters: FilterParameters, state: HyenaState, padding_mask: Tensor | None
) -> tuple[Tensor, HyenaState]:
    """y (B, L, H) and the state after the last token, for z (B, L, 3H); differentiable in every input."""
    if z.dtype == torch.float16:  # the kernels have no float16; their float32 takes it without loss
        y, after = hyena_filter(z.float(), parameters, HyenaState(state.fir.float(), state.iir), padding_mask)
        return y.half(), HyenaState(after.fir.half(), after.iir)
    tensors, heads = _tensors(z, parameters, state), parameters.heads or 1
    if is_plain(*tensors):
        y = _new(z, *z.shape[:2], parameters.channels)
        return y, HyenaState(*_Operands(z, tensors[1:6], *state, padding_mask, heads).filter(y, z.new_empty(0)))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, fir, iir, _ = _OPERATORS.filter(*tensors, padding_mask, heads, keep)
    return y, HyenaState(fir, iir)


def hyena_filter_out(
    z: Tensor, parameters: FilterParameters, state: HyenaState, padding_mask: Tensor | None, out: Tensor
) -> HyenaState:
    """The state after the last token; y is written into `out`, which may be the x2 channels of a plain z."""
    if z.dtype == torch.float16:
        y, after = hyena_filter(z, parameters, state, padding_mask)
        out.copy_(y)
        return after
    tensors, heads = _tensors(z, parameters, state), parameters.heads or 1
    if is_plain(*tensors, out):
        states = _Operands(z, tensors[1:6], *state, padding_mask, heads).filter(out, z.new_empty(0))
        torch.autograd.graph.increment_version(out)
        return HyenaState(*states)
    return HyenaState(*torch.ops.stripedrag.hyena_filter_out(*tensors, padding_mask, heads, out))


def hyena_step(z: Tensor, parameters: FilterParameters, state: HyenaState) -> Tensor:
    """y (B, H) for one token z (B, 3H); the state is overwritten."""
    if z.dtype == torch.float16:
        fir = state.fir.float()
        y = hyena_step(z.float(), parameters, HyenaState(fir, state.iir))
        state.fir.copy_(fir)
        return y.half()
    made: Tensor = _OPERATORS.step(*_tensors(z, parameters, state), parameters.heads or 1)
    return made


def _tensors(z: Tensor, parameters: FilterParameters, state: HyenaState) -> tuple[Tensor, ...]:
    """What the operators take, the parameters in the dtype of the arithmetic."""
    return (z, *(p.to(working_dtype(z)) for p in parameters[:5]), *state)


def step_at_once(z: Tensor, parameters: FilterParameters, state: HyenaState) -> Tensor | None:
    """y (B, H) for one token, or None where something is not as a decoding loop has it, however little.

    One expression takes the place of every check and conversion: with them, and with the dispatcher, Python costs
    several times the kernel. What it accepts is exactly what the extension can be given as it is: contiguous CPU
    tensors of shapes and dtypes that fit, no gradient, nobody who would miss the call.
    """
    fir_weight, fir_bias, poles, residues, skip, heads = parameters
    fir, iir = state
    dtype, z_shape, fir_shape, systems = z.dtype, z.shape, fir_weight.shape, poles.shape
    if (
        _native is None
        or type(z) is not Tensor
        or dtype not in _ELEMENTS
        or (len(z_shape), len(fir_shape), len(systems)) != (2, 3, 4)
        or torch.is_grad_enabled()
        or is_watched()
    ):
        return None
    batch, columns = z_shape
    channels, taps, heads = columns // 3, fir_shape[2], 1 if heads is None else heads
    groups, modes = systems[:2]
    work = torch.float64 if dtype is torch.float64 else torch.float32
    kept = fir_weight.dtype
    if not (
        columns == 3 * channels > 0
        and fir_shape == (columns, 1, taps)
        and systems == (groups, modes, 1, 2)
        and residues.shape == systems
        and fir_bias.shape == (columns,)
        and skip.shape == (channels,)
        and fir.shape == (batch, columns, taps - 1)
        and iir.shape == (batch, channels, modes, 2)
        and 1 <= taps <= MAX_TAPS
        and 1 <= modes <= MAX_MODES
        and groups > 0 == channels % groups
        and heads > 0 == channels % heads
        and kept is fir_bias.dtype
        and (kept is work or kept is dtype)
        and (skip.dtype is work or skip.dtype is dtype)
        and poles.dtype is work
        and residues.dtype is work
        and fir.dtype is dtype
        and iir.dtype is work
    ):
        return None
    tensors = (z, fir_weight, fir_bias, poles, residues, skip, fir, iir)
    for tensor in tensors:
        if not (tensor.is_cpu and tensor.is_contiguous() and is_ordinary(tensor)):
            return None
    return _run_step(tensors, heads)


def linear_at_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`F.linear` for up to 8 rows in float32 or bfloat16, and for more where torch has no quick products of bfloat16;
    or None where that is not what is asked for. A row's bits do not depend on the others, but for whether there are
    more than 8.

    torch's own takes three times as long on one row in bfloat16, which is most of a decode step.
    """
    if (
        _native is None
        or is_watched()
        or type(weight) is not Parameter
        or not (is_ordinary(x) and is_ordinary(weight))
        or torch.is_grad_enabled()
        or weight.ndim != 2
    ):
        return None
    dtype, numbers, (rows, columns) = x.dtype, x.numel(), weight.shape
    are_few, is_served = numbers <= _native.max_batch * columns, dtype is torch.bfloat16 and serves_bfloat16()
    if (
        not numbers
        or not (are_few or is_served)
        or (dtype is not torch.bfloat16 and dtype is not torch.float32)
        or weight.dtype is not dtype
        or torch.is_autocast_enabled("cpu")
        or not (x.is_cpu and weight.is_cpu and weight.is_contiguous() and (x.is_contiguous() or is_served))
        or x.shape[-1] != columns
        or not (
            bias is None
            or (
                is_ordinary(bias)
                and bias.dtype is dtype
                and bias.is_cpu
                and bias.shape == (rows,)
                and bias.is_contiguous()
            )
        )
    ):
        return None
    x = x.contiguous()
    return _run_linear(_native.linear, x, weight, bias) if are_few else gemm(x, weight, bias)


def _run_linear(run: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    y = x.new_empty(*x.shape[:-1], rows)
    threads, added = torch.get_num_threads(), 0 if bias is None else bias.data_ptr()
    sizes = x.numel() // columns, rows, columns, threads
    run(_ELEMENTS[x.dtype], *sizes, weight.data_ptr(), added, x.data_ptr(), y.data_ptr())
    return y


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for any number of rows in float32 or bfloat16, all contiguous, with products and sums of float32. A
    row's bits do not depend on the others, nor on the threads.
    """
    assert x.dtype is weight.dtype and x.dtype in _ROW_DTYPES and x.is_contiguous() and weight.is_contiguous()
    return _run_linear(_native.gemm, x, weight, bias)


def quantized_linear_at_once(x: Tensor, quantized: "QuantizedWeight", bias: Tensor | None) -> Tensor | None:
    """`quantized.linear` for a few rows in float32 or bfloat16, or None where that is not what is asked for. A row's
    bits do not depend on the others.
    """
    weight, scale, offset, columns = quantized
    dtype, numbers = x.dtype, x.numel()
    if (
        _native is None
        or is_watched()
        or not 0 < numbers <= _native.max_batch * columns
        or (dtype is not torch.bfloat16 and dtype is not torch.float32)
        or type(x) is not Tensor
        or torch.is_grad_enabled()
        or not x.is_cpu
        or x.shape[-1:] != (columns,)
        or torch.is_autocast_enabled("cpu")
        or not _reads(quantized)
        or x.is_neg()
    ):
        return None
    rows, added = len(weight), 0
    if bias is not None:
        if not (is_ordinary(bias) and bias.dtype is dtype and bias.is_cpu and bias.is_contiguous()):
            return None
        if bias.shape != (rows,):
            return None
        added = bias.data_ptr()
    x = x.contiguous()  # a prompt's last rows are not
    y = x.new_empty(*x.shape[:-1], rows)
    arguments = _quantized_arguments(dtype, weight, scale, offset, columns)
    _native.quantized_linear(*arguments, numbers // columns, added, x.data_ptr(), y.data_ptr())
    return y


def dequantize_at_once(quantized: "QuantizedWeight", dtype: torch.dtype) -> Tensor | None:
    """`quantized.dequantize` to float32 or bfloat16, or None where that is not what is asked for."""
    if dtype not in _ROW_DTYPES or is_watched() or not _reads(quantized):
        return None
    w = quantized.weight.new_empty(len(quantized.weight), quantized.columns, dtype=dtype)
    _native.dequantize(*_quantized_arguments(dtype, *quantized), w.data_ptr())
    return w


def quantize_at_once(weight: Tensor, to: "QuantizedWeight", refits: int) -> bool:
    """Whether `weight` (out, in), float32 or bfloat16, was written to a weight of 4 bits."""
    if weight.dtype not in _ROW_DTYPES or to.offset is None or is_watched() or not _reads(to):
        return False
    if not (is_ordinary(weight) and weight.is_cpu and weight.is_contiguous()):
        return False
    sizes = *weight.shape, torch.get_num_threads(), refits
    addresses = (tensor.data_ptr() for tensor in (weight, *to[:3]) if tensor is not None)
    _native.quantize(_ELEMENTS[weight.dtype], *sizes, *addresses)
    return True


def _reads(quantized: "QuantizedWeight") -> bool:
    """Whether there is an extension, and it can be given the tensors as they are."""
    if _native is None or not quantized.fits:
        return False
    weight, scale, offset, _ = quantized
    return (
        weight.is_cpu
        and scale.is_cpu
        and weight.is_contiguous()
        and scale.is_contiguous()
        and is_ordinary(weight)
        and is_ordinary(scale)
        and (offset is None or (offset.is_cpu and offset.is_contiguous() and is_ordinary(offset)))
    )


def _quantized_arguments(
    dtype: torch.dtype, weight: Tensor, scale: Tensor, offset: Tensor | None, columns: int
) -> tuple[int, ...]:
    bits, offsets = (8, 0) if offset is None else (4, offset.data_ptr())
    sizes = len(weight), columns, torch.get_num_threads()
    return (_ELEMENTS[dtype], bits, *sizes, weight.data_ptr(), scale.data_ptr(), offsets)


def attention_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Causal attention without a gradient, or None where another is asked for, or nothing here has it."""
    takes = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and takes_attention(q, k, v)
    return attention(q, k, v) if takes else None


def takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` takes these, of which none but it need know."""
    return (
        has_attention(q.dtype)
        and q.dtype is k.dtype is v.dtype
        and takes_rows(q, k, v)
        and q.shape[3] % 16 == 0
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )


def attention(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None) -> Tensor:
    """Causal attention as `ops.attend`, for what `takes_attention` takes; `lse` (B, G · Hkv, L) float32, contiguous,
    becomes the log-sum-exp of the scaled scores.
    """
    batch, heads, length, width = q.shape
    y = q.new_empty(batch, length, heads, width)
    sizes = (batch, heads, k.shape[1], length, k.shape[2], width, torch.get_num_threads())
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    addresses = (tensor.data_ptr() for tensor in (q, k, v, y))
    _native.attention(_ELEMENTS[q.dtype], sizes, strides, width**-0.5, *addresses, 0 if lse is None else lse.data_ptr())
    return y.transpose(1, 2)


def attention_gradient_at_once(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of q, k and v from that of y = `attention(q, k, v, lse)` of whole sequences, in bfloat16 where
    `attention` is by products of that; else None. The same bits for any number of threads.
    """
    if not (
        takes_attention(q, k, v)
        and q.dtype is dy.dtype is y.dtype is torch.bfloat16
        and _native.has_bf16_attention
        and takes_rows(dy, y, lse)
        and dy.shape == y.shape == q.shape
        and k.shape[2] == q.shape[2]
        and lse.dtype is torch.float32
    ):
        return None
    dy = dy if dy.stride(3) == 1 else dy.contiguous()  # whatever gave it
    y, lse = y.transpose(1, 2).contiguous(), lse.contiguous()
    batch, heads, length, width = q.shape
    sizes = (batch, heads, k.shape[1], length, length, width, torch.get_num_threads())
    strides = [stride for t in (q, k, v, dy) for stride in t.stride()[:3]]
    made = [t.new_empty(batch, length, t.shape[1], width) for t in (q, k, v)]
    addresses = (tensor.data_ptr() for tensor in (q, k, v, y, lse, dy, *made))
    _native.attention_gradient(sizes, tuple(strides), width**-0.5, *addresses)
    dq, dk, dv = (t.transpose(1, 2) for t in made)
    return dq, dk, dv


def token_attention_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Attention of one token, q (B, G · Hkv, 1, D), over all of k and v (B, Hkv, P, D) in float32 or bfloat16, or None
    where that is not what is asked for.
    """
    if not (_takes_attention(q, k, v) and k.stride() == v.stride() and k.stride()[2:] == (k.shape[3], 1)):
        return None
    q = q.contiguous()
    (batch, heads, _, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    y = torch.empty_like(q)
    sizes = batch, heads, kv_heads, keys, width, torch.get_num_threads(), heads * width, *k.stride()[:2]
    addresses = (tensor.data_ptr() for tensor in (q, k, v, y))
    _native.attend(_ELEMENTS[q.dtype], sizes, width**-0.5, *addresses)
    return y


def _takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these, of one dtype, can be read past the dispatcher."""
    return (
        q.dtype is k.dtype is v.dtype
        and takes_rows(q, k, v)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def takes_token(x: Tensor) -> bool:
    """Whether x (B, 1, H) can be taken through native blocks: ordinary, float32 or bfloat16, with nobody who would
    miss what goes past the dispatcher.
    """
    return (
        takes_rows(x)
        and x.shape[0] <= _native.max_batch
        and x.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def lie_plainly(*tensors: Tensor) -> bool:
    """Whether the numbers of these are those in memory, one after another, on a CPU."""
    return all(is_ordinary(t) and t.is_cpu and t.is_contiguous() for t in tensors)


def are_registered(dictionaries: tuple[dict[str, Any], ...], names: tuple[str, ...], found: tuple[Any, ...]) -> bool:
    """Whether each name stands in its dictionary for the very object that was found there, None if for none."""
    return bool(_native.are_registered(dictionaries, names, found))


def native_blocks(blocks: "Sequence[BlockWeights]", dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """The extension's own of blocks for an x of `dtype`, and the tensors whose addresses it holds.

    Raises `ValueError` where the extension cannot be given them as they are.
    """
    made, tensors = _native.Blocks(_ELEMENTS[dtype]), list[Tensor]()

    def address(tensor: Tensor, shape: tuple[int, ...], *allowed: torch.dtype) -> int:
        if not (lie_plainly(tensor) and tensor.shape == shape and tensor.dtype in allowed):
            raise ValueError(
                f"a {type(tensor).__name__} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; it is "
                f"one of {allowed} of shape {shape}, contiguous, on a CPU"
            )
        tensors.append(tensor)
        return tensor.data_ptr()

    def weights(linear: "LinearWeights", rows: int, columns: int) -> tuple[int, ...]:
        weight, added = linear.weight, 0 if linear.bias is None else address(linear.bias, (rows,), dtype)
        if isinstance(weight, Tensor):
            return 0, rows, columns, address(weight, (rows, columns), dtype), 0, 0, added
        if not weight.fits or (len(weight.weight), weight.columns) != (rows, columns):
            raise ValueError(f"a quantized weight is no one of shape {(rows, columns)}")
        stored = [0 if t is None else address(t, tuple(t.shape), t.dtype) for t in weight[:3]]
        return weight.bits, rows, columns, *stored, added

    narrow = dtype, torch.float32
    for block in blocks:
        width, inner, mixer = blocks[0].pre_norm.numel(), block.gate.rows, block.mixer
        wide = block.pre_norm.dtype
        scales = address(block.pre_norm, (width,), *narrow), address(block.post_norm, (width,), wide)
        rows = 3 * width if isinstance(mixer, FilterParameters) else (mixer[0] + 2 * mixer[1]) * (width // mixer[0])
        described = (
            width,
            inner,
            block.eps,
            *scales,
            wide is torch.float32,
            weights(block.into, rows, width),
            weights(block.out, width, width),
            weights(block.gate, inner, width),
            weights(block.up, inner, width),
            weights(block.down, width, inner),
        )
        if not isinstance(mixer, FilterParameters):
            heads, kv_heads = mixer
            if width % heads or heads % kv_heads or width // heads % 2:
                raise ValueError(f"a width of {width} is not that of {heads} heads on {kv_heads}, each of even width")
            made.add_attention(described, heads, kv_heads)
            continue
        fir_weight, fir_bias, poles, residues, skip, columns = mixer
        if fir_weight.ndim != 3 or poles.ndim != 4 or not poles.numel():
            raise ValueError(f"the FIR weight has shape {tuple(fir_weight.shape)} and the poles {tuple(poles.shape)}")
        taps, (groups, modes) = fir_weight.shape[2], poles.shape[:2]
        if taps > MAX_TAPS or modes > MAX_MODES or width % groups or width % (columns or 1):
            raise ValueError(
                f"{taps} taps, {modes} modes, {groups} groups and {columns} heads of {width} channels; it takes up to "
                f"{MAX_TAPS} and {MAX_MODES}, and divisors of the channels"
            )
        addresses = (
            address(fir_weight, (3 * width, 1, taps), *narrow),
            address(fir_bias, (3 * width,), fir_weight.dtype),
            address(poles, (groups, modes, 1, 2), torch.float32),
            address(residues, (groups, modes, 1, 2), torch.float32),
            address(skip, (width,), *narrow),
        )
        elements = _ELEMENTS[fir_weight.dtype], _ELEMENTS[skip.dtype]
        made.add_hyena(described, *elements, width // (columns or 1), groups, modes, taps, addresses)
    return made, tensors


def takes_rows(*tensors: Tensor) -> bool:
    """Whether `rms_norm` or `swiglu` can be given these: float32 or bfloat16 on the CPU, nobody who would miss it."""
    return (
        _native is not None
        and not is_watched()
        and all(t.is_cpu and t.dtype in _ROW_DTYPES and t.numel() and is_ordinary(t) for t in tensors)
    )


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Like x (…, H), without a gradient of its own; `scale` (H,) is float32 or of the dtype of x."""
    y = torch.empty_like(x)
    _native.norm(*_norm_arguments(x, scale, eps), y.data_ptr())
    return y


def rms_norm_gradient(x: Tensor, scale: Tensor, eps: float, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and, in float32, of the scale."""
    dx, dscale = torch.empty_like(x), torch.empty_like(scale, dtype=torch.float32)
    _native.norm_gradient(*_norm_arguments(x, scale, eps), dy.data_ptr(), dx.data_ptr(), dscale.data_ptr())
    return dx, dscale


def _norm_arguments(x: Tensor, scale: Tensor, eps: float) -> tuple[Any, ...]:
    columns, threads, is_wide = scale.shape[0], torch.get_num_threads(), scale.dtype is torch.float32
    return (_ELEMENTS[x.dtype], x.numel() // columns, columns, threads, eps, is_wide, x.data_ptr(), scale.data_ptr())


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) · b, without a gradient of its own."""
    y = torch.empty_like(a)
    threads = torch.get_num_threads()
    _native.gate(_ELEMENTS[a.dtype], a.numel(), threads, a.data_ptr(), b.data_ptr(), y.data_ptr())
    return y


def swiglu_gradient(a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a and b."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    addresses = (tensor.data_ptr() for tensor in (a, b, dy, da, db))
    _native.gate_gradient(_ELEMENTS[a.dtype], a.numel(), torch.get_num_threads(), *addresses)
    return da, db


def _filter(
    z: Tensor,
    parameters: Parameters,
    fir_state: Tensor,
    iir_state: Tensor,
    padding_mask: Tensor | None,
    heads: int,
    keep: bool,
) -> tuple[Tensor, ...]:
    """What is kept are the modal states that the gradient restarts from."""
    operands = _Operands(z, parameters, fir_state, iir_state, padding_mask, heads)
    y = _new(z, *z.shape[:2], parameters[4].shape[0])
    checkpoints = _new(parameters[2], operands.checkpoint_numbers() if keep else 0)
    return y, *operands.filter(y, checkpoints), checkpoints


@torch.library.custom_op("stripedrag::hyena_filter_out", mutates_args=("out",), device_types="cpu")
def _filter_out(
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
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """The states after z, whose y is written into `out`."""
    parameters = (fir_weight, fir_bias, poles, residues, skip)
    operands = _Operands(z, parameters, fir_state, iir_state, padding_mask, heads)
    return operands.filter(out, poles.new_empty(0))


@_filter_out.register_fake
def _(z, fir_weight, fir_bias, poles, residues, skip, fir_state, iir_state, padding_mask, heads, out):  # type: ignore[no-untyped-def]
    return contiguous_like(fir_state), contiguous_like(iir_state)


def _gradient(
    z: Tensor,
    parameters: Parameters,
    fir_state: Tensor,
    padding_mask: Tensor | None,
    heads: int,
    checkpoints: Tensor,
    dy: Tensor,
    diir_out: Tensor,
) -> Gradients:
    # The gradient reads no modal state but the kept ones; the operands want one, and any will do.
    operands = _Operands(z, parameters, fir_state, diir_out, padding_mask, heads)
    if checkpoints.numel() != operands.checkpoint_numbers():
        raise RuntimeError(
            f"the filter kept {checkpoints.numel()} numbers for its gradient, which needs "
            f"{operands.checkpoint_numbers()}: it was called, or traced, where no gradient was wanted"
        )
    if checkpoints.data_ptr() % 64:
        checkpoints = checkpoints.clone()  # torch's own memory is aligned; what a saved-tensor hook gives need not be
    gradients = _new(z, *z.shape), *other_gradients(parameters, fir_state, diir_out)
    operands.gradient(checkpoints, dy.contiguous(), diir_out.contiguous(), *gradients)
    return gradients


def _step(z: Tensor, parameters: Parameters, fir_state: Tensor, iir_state: Tensor, heads: int) -> Tensor:
    return _run_step((z.contiguous(), *(p.contiguous() for p in parameters), fir_state, iir_state), heads)


_OPERATORS = library.define("stripedrag::hyena", filter=_filter, gradient=_gradient, step=_step, device_types="cpu")


def _run_step(operands: tuple[Tensor, ...], heads: int) -> Tensor:
    z, fir_weight, fir_bias, poles, residues, skip, fir_state, iir_state = operands
    batch, channels = z.shape[0], skip.shape[0]
    y = z.new_empty(batch, channels)
    _native.step(
        _ELEMENTS[z.dtype],
        _ELEMENTS[fir_weight.dtype],
        _ELEMENTS[skip.dtype],
        batch,
        channels,
        channels // heads,
        *poles.shape[:2],
        fir_weight.shape[2],
        torch.get_num_threads(),
        fir_weight.data_ptr(),
        fir_bias.data_ptr(),
        poles.data_ptr(),
        residues.data_ptr(),
        skip.data_ptr(),
        z.data_ptr(),
        y.data_ptr(),
        fir_state.data_ptr(),
        iir_state.data_ptr(),
    )
    torch.autograd.graph.increment_version((fir_state, iir_state))
    return y


class _Operands:
    """The arguments of a call as the extension takes them: addresses of contiguous tensors, kept alive meanwhile."""

    def __init__(
        self,
        z: Tensor,
        parameters: tuple[Tensor, ...],
        fir_state: Tensor,
        iir_state: Tensor,
        padding_mask: Tensor | None,
        heads: int,
    ) -> None:
        fir_weight, _, poles, _, skip = parameters
        channels = skip.shape[0]
        self.element = _ELEMENTS[z.dtype]
        self.sizes = (
            *z.shape[:2],
            channels,
            channels // heads,
            poles.shape[0],
            poles.shape[1],
            fir_weight.shape[2],
            torch.get_num_threads(),
        )
        self.z = z if z.stride(2) == 1 else z.contiguous()
        mask = None if padding_mask is None else padding_mask.contiguous()
        states = fir_state.contiguous(), iir_state.contiguous()
        self.tensors: tuple[Any, ...] = (*(t.contiguous() for t in parameters), self.z, mask, *states)

    def checkpoint_numbers(self) -> int:
        """How many numbers of the working dtype the filter keeps for its gradient."""
        return int(_native.checkpoint_numbers(self.element, self.sizes))

    def filter(self, y: Tensor, checkpoints: Tensor) -> tuple[Tensor, Tensor]:
        """The states after the sequence; y is written, and the checkpoints where there is room for them."""
        *_, fir_state, iir_state = self.tensors
        after = torch.empty_like(fir_state), torch.empty_like(iir_state)
        _native.filter(
            self.element, self.sizes, *self.z.stride()[:2], *y.stride()[:2], self._addresses(y, *after, checkpoints)
        )
        return after

    def gradient(self, *read_and_written: Tensor) -> None:
        """Write the gradients, from the checkpoints and the gradients of y and of the final modal state."""
        _native.gradient(self.element, self.sizes, *self.z.stride()[:2], self._addresses(*read_and_written))

    def _addresses(self, *more: Tensor) -> tuple[int, ...]:
        return tuple(0 if t is None else t.data_ptr() for t in (*self.tensors, *more))


def _new(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor, in huge pages where it is large."""
    tensor = like.new_empty(shape)
    _native.use_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
