"""The `triton` backend: the Hyena operator on GPUs, forward, backward and decode step. `triton_forward.py` and
`triton_backward.py` say how the kernels work; here is when they run, how time is cut, and what is launched.

With TRITON_INTERPRET=1 it runs on the CPU, kernel by kernel and block by block in numpy, for tests.
"""

import importlib.util
import os
import shutil
import sysconfig
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stripedrag.kernels import library
from stripedrag.kernels.library import Gradients, Parameters, contiguous_like, is_plain, other_gradients
from stripedrag.kernels.operands import FilterParameters, HyenaState, working_dtype

MAX_TAPS, MAX_MODES = 8, 16
LEAST_TRITON = (3, 7)
LEAST_CAPABILITY = (8, 0)  # the first with bfloat16, and the oldest that the kernels were compiled for
CHUNK_TOKENS = (64, 512)  # least and most: states of chunks are 32 N bytes a channel, beside 12 a token in bfloat16
PROGRAMS_A_MULTIPROCESSOR = 16  # of two warps each: as many as fit where registers are few, two or three rounds else
INTERPRETED_MULTIPROCESSORS = 132
BLOCK = 64  # channels a program, one a thread
KERNELS = ("chunk_states", "carry", "outputs", "step", "chunk_adjoints", "gate_gradients", "input_gradients")
_BACKWARD = ("chunk_adjoints", "gate_gradients", "input_gradients")
_LAUNCHING = threading.Lock()
_ROWS, _GRADIENT_ROWS, _FEW_MODES = (4, 8), (2,), 8
_ROWS_OF_MANY = {"outputs": (2,), "gate_gradients": (1,), "input_gradients": (1,)}


def refuses(device: torch.device, taps: int = 3, modes: int = 1) -> str | None:
    """Why this backend cannot run on `device` with filters of so many taps and modes, or None."""
    reason: str | None = _refuses_device(device)
    if reason is not None:
        return reason
    if taps > MAX_TAPS or modes > MAX_MODES:
        return f"it takes up to {MAX_TAPS} taps and {MAX_MODES} modes; this filter has {taps} and {modes}"
    return None


@torch.compiler.assume_constant_result  # a graph looks at no file
def _refuses_device(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install 'stripedrag[gpu]'` on Linux"
    if is_interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET is set, which is for the CPU and for tests; unset it"
    if device.type != "cuda":
        return "it runs on CUDA devices"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"it needs a device of compute capability {least}; this one has {found}"
    if not any(map(shutil.which, [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"])):
        return "Triton needs a C compiler to launch what it compiles, gcc, clang or what CC names; install gcc"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton takes Debian's
    if not (Path(sysconfig.get_path("include", scheme)) / "Python.h").exists():
        return "Triton needs Python's headers to launch what it compiles; install python3-dev"
    import triton  # whose distribution has several names

    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return f"it needs triton {'.'.join(map(str, LEAST_TRITON))}; {triton.__version__} is installed"
    return None


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels, which is said before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def hyena_filter(
    z: Tensor, parameters: FilterParameters, state: HyenaState, padding_mask: Tensor | None
) -> tuple[Tensor, HyenaState]:
    """y (B, L, H) and the state after the last token, for z (B, L, 3H); differentiable in every input."""
    given: Parameters = tuple(p.to(working_dtype(z)) for p in parameters[:5])  # type: ignore[assignment]
    heads = parameters.heads or 1
    if is_plain(z, *given, *state):  # past the dispatcher, which for an operator in Python takes longer than a step
        y, fir, iir, _ = _filter(z, given, *state, padding_mask, heads, False)
    else:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (z, *given, *state))
        y, fir, iir, _ = _OPERATORS.filter(z, *given, *state, padding_mask, heads, keep)
    return y, HyenaState(fir, iir)


def hyena_step(z: Tensor, parameters: FilterParameters, state: HyenaState) -> Tensor:
    """y (B, H) for one token z (B, 3H); the state is overwritten."""
    given, heads = parameters[:5], parameters.heads or 1  # which its kernel casts
    if is_plain(z, *given, *state) and all(one.is_contiguous() for one in state):
        y = _step(z, given, *state, heads)
        torch.autograd.graph.increment_version(state)
        return y
    made: Tensor = _OPERATORS.step(z, *given, *state, heads)
    return made


def chunk_tokens(batch: int, length: int, channels: int, multiprocessors: int) -> int:
    """T: as many tokens as leave every multiprocessor its programs, a power of two."""
    tokens, most = CHUNK_TOKENS
    blocks = batch * -(-channels // BLOCK)
    while tokens < most and blocks * -(-length // (2 * tokens)) >= PROGRAMS_A_MULTIPROCESSOR * multiprocessors:
        tokens *= 2
    return tokens


@cache
def _multiprocessors(device: torch.device) -> int:
    if is_interpreted():
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Launches:
    """One call's operands by the kernels' names for them, and its launches."""

    def __init__(
        self, z: Tensor, parameters: Parameters, fir_state: Tensor, padding_mask: Tensor | None, heads: int
    ) -> None:
        fir_weight, fir_bias, poles, residues, skip = (p.contiguous() for p in parameters)
        self.batch, self.length, _ = z.shape
        self.channels, self.modes, self.taps = skip.shape[0], poles.shape[1], fir_weight.shape[2]
        tokens = chunk_tokens(self.batch, self.length, self.channels, _multiprocessors(z.device))
        self.chunks = -(-self.length // tokens)
        z = z if z.stride(2) == 1 else z.contiguous()
        self.operands = {
            "z": z,
            "before": fir_state.contiguous(),
            "real": z if padding_mask is None else padding_mask.contiguous().view(torch.uint8),  # unread without one
            "fir_weight": fir_weight,
            "fir_bias": fir_bias,
            "poles": poles,
            "residues": residues,
            "skips": skip,
            "L": self.length,
            "H": self.channels,
            "W": self.channels // heads,
            "G": poles.shape[0],
            "C": self.chunks,
            "batch_stride": z.stride(0),
            "row_stride": z.stride(1),
            "T": tokens,
            "SQUARINGS": tokens.bit_length() - 1,
            "N": self.modes,
            "K": self.taps,
            "MASKED": padding_mask is not None,
            "WORK": _work(z),
        }

    def run(self, name: str, rows: int, /, **more: Tensor | int) -> None:
        """Launch a kernel over so many chunks, or modes, of each batch row; of its operands `more` come first."""
        _launch(name, self.batch * rows, self.channels, self.operands | more)

    def states(self, like: Tensor) -> Tensor:
        """Room for the state of each chunk (B, C, N, 2, H)."""
        return like.new_empty(self.batch, self.chunks, self.modes, 2, self.channels)

    def carry(self, states: Tensor, *, backward: bool) -> None:
        """From what chunks add to states to the states."""
        first, step = (self.chunks - 1, -1) if backward else (0, 1)
        rows = self.chunks - 1
        if rows:
            self.run("carry", self.modes, states=states, rows=rows, first=first, step=step, CONJUGATE=backward)


def configurations(name: str, modes: int) -> tuple[dict[str, int], ...]:
    """What autotuning chooses from for a kernel: channels a program, rows that are asked for at once, warps.

    A channel a thread: with two the compiler passes them through shared memory. More rows than these take all
    registers, and with many modes minutes to compile.
    """
    if name == "step":
        return ({"BLOCK": 128, "num_warps": 4},)
    if name == "carry":  # which reads what it overwrites, and so cannot be tried
        return ({"BLOCK": BLOCK, "ROWS": 8, "num_warps": 2},)
    rows: tuple[int, ...]
    if modes > _FEW_MODES:
        rows = _ROWS_OF_MANY.get(name, _ROWS[:1])
    else:
        rows = _GRADIENT_ROWS if name.endswith("_gradients") else _ROWS
    return tuple({"BLOCK": BLOCK, "ROWS": r, "num_warps": 2} for r in rows)


def input_parts(modes: int) -> tuple[tuple[int, dict[str, int]], ...]:
    """The launches of `input_gradients`, which with many modes are several for want of registers: the first mode of
    each, and what it makes.
    """
    if modes <= _FEW_MODES:
        return ((0, {"INPUTS": True, "POLES": True, "COUNT": modes}),)
    inputs = (0, {"INPUTS": True, "POLES": False, "COUNT": modes})
    poles = (
        (first, {"INPUTS": False, "POLES": True, "COUNT": min(_FEW_MODES, modes - first)})
        for first in range(0, modes, _FEW_MODES)
    )
    return inputs, *poles


def function(name: str) -> Any:
    """The kernel of that name, as it is written."""
    from stripedrag.kernels import triton_backward, triton_forward

    return getattr(triton_backward if name in _BACKWARD else triton_forward, name)


@cache
def _kernel(name: str, modes: int, device: torch.device) -> Any:
    """A kernel that is tuned for each device, dtype and kind of filter, and for each length of chunks."""
    del device
    import triton

    choices = configurations(name, modes)[: 1 if is_interpreted() else None]
    configs = [
        triton.Config(
            {key: value for key, value in one.items() if key != "num_warps"}, num_warps=one["num_warps"], num_stages=1
        )
        for one in choices
    ]
    tune = triton.autotune(configs, key=["K", "MASKED", "T"] if len(configs) > 1 else [])
    return tune(function(name))


def _launch(name: str, rows: int, channels: int, operands: dict[str, Any]) -> None:
    """Run a kernel by name over so many rows of blocks of channels, with those of the operands that it takes."""
    if not rows or not channels:
        return
    poles: Tensor = operands["poles"]
    kernel = _kernel(name, operands["N"], poles.device)
    taken = {argument: operands[argument] for argument in function(name).arg_names if argument in operands}
    with torch.cuda.device_of(poles), _LAUNCHING:  # what tunes a kernel is not made for several threads
        kernel[lambda chosen: (rows * -(-channels // chosen["BLOCK"]),)](**taken, enable_fp_fusion=True)


def _work(z: Tensor) -> Any:
    import triton.language as tl

    return tl.float64 if z.dtype == torch.float64 else tl.float32


def _filter(
    z: Tensor,
    parameters: Parameters,
    fir_state: Tensor,
    iir_state: Tensor,
    padding_mask: Tensor | None,
    heads: int,
    keep: bool,
) -> tuple[Tensor, ...]:
    """What is kept are the states that enter chunks."""
    it = _Launches(z, parameters, fir_state, padding_mask, heads)
    y, last, states = z.new_empty(it.batch, it.length, it.channels), contiguous_like(iir_state), it.states(iir_state)
    states[:, 0] = iir_state.permute(0, 2, 3, 1)
    it.run("chunk_states", it.chunks - 1, states=states)
    it.carry(states, backward=False)
    it.run("outputs", it.chunks, states=states, y=y, last=last)
    return y, _fir_after(z, fir_state, padding_mask), last, states.flatten() if keep else states.new_empty(0)


def _fir_after(z: Tensor, fir_state: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The last K-1 rows of the given state and z (B, 3H, K-1)."""
    before, length = fir_state.shape[-1], z.shape[1]
    new = z[:, max(0, length - before) :]
    if padding_mask is not None:
        new = new.masked_fill(~padding_mask[:, max(0, length - before) :, None], 0)
    return torch.cat([fir_state[..., min(length, before) :], new.transpose(1, 2)], dim=-1)


def _gradient(
    z: Tensor,
    parameters: Parameters,
    fir_state: Tensor,
    padding_mask: Tensor | None,
    heads: int,
    kept: Tensor,
    dy: Tensor,
    diir_out: Tensor,
) -> Gradients:
    it = _Launches(z, parameters, fir_state, padding_mask, heads)
    dz = z.new_empty(z.shape)
    dfir_weight, dfir_bias, dpoles, dresidues, dskip, dbefore, dstate = other_gradients(parameters, fir_state, diir_out)
    n, k, h = 2 * it.modes, it.taps, it.channels
    adjoints, states = it.states(diir_out), kept.view(it.batch, it.chunks, it.modes, 2, h)
    gate_sums = diir_out.new_empty(it.batch, it.chunks, n + k + 2, h)
    input_sums = diir_out.new_empty(it.batch, it.chunks, n + 2 * k + 2, h)
    it.operands |= {"dy": dy.contiguous(), "dz": dz, "dbefore": dbefore, "dstate": dstate}
    dlast = diir_out.contiguous()
    adjoints[:, -1] = 0
    it.run("chunk_adjoints", it.chunks - 1, dlast=dlast, adjoints=adjoints)
    it.carry(adjoints, backward=True)
    it.run("gate_gradients", it.chunks, states=states, sums=gate_sums)
    for first, part in input_parts(it.modes):
        it.run(
            "input_gradients",
            it.chunks,
            **part,
            poles=it.operands["poles"][:, first:],
            residues=it.operands["residues"][:, first:],
            states=states[:, :, first:],
            adjoints=adjoints[:, :, first:],
            dlast=dlast[:, :, first:],
            sums=input_sums[:, :, 2 * first :],
        )
    gate, inputs = gate_sums.sum((0, 1)), input_sums.sum((0, 1))
    dresidues.copy_(gate[:n].t().view(h, it.modes, 2))
    dpoles.copy_(inputs[:n].t().view(h, it.modes, 2))
    dskip.copy_(gate[n])
    firs = torch.stack([gate[n + 1 :], inputs[n : n + k + 1], inputs[n + k + 1 :]])  # (3, K + 1, H)
    firs = firs.view(3, k + 1, heads, h // heads).permute(2, 0, 3, 1).reshape(3 * h, k + 1)
    dfir_weight.copy_(firs[:, None, :k])
    dfir_bias.copy_(firs[:, k])
    return dz, dfir_weight, dfir_bias, dpoles, dresidues, dskip, dbefore, dstate


def _step(z: Tensor, parameters: Parameters, fir_state: Tensor, iir_state: Tensor, heads: int) -> Tensor:
    fir_weight, fir_bias, poles, residues, skip = (p.contiguous() for p in parameters)
    batch, channels = z.shape[0], skip.shape[0]
    y = z.new_empty(batch, channels)
    operands = {
        "z": z.contiguous(),
        "fir_weight": fir_weight,
        "fir_bias": fir_bias,
        "poles": poles,
        "residues": residues,
        "skips": skip,
        "fir_state": fir_state,
        "iir_state": iir_state,
        "y": y,
        "H": channels,
        "W": channels // heads,
        "G": poles.shape[0],
        "N": poles.shape[1],
        "K": fir_weight.shape[2],
        "WORK": _work(z),
    }
    _launch("step", batch, channels, operands)
    return y


_OPERATORS = library.define(
    "stripedrag::triton_hyena", filter=_filter, gradient=_gradient, step=_step, device_types=None
)
