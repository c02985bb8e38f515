"""The Triton backend beyond the contract: chunks, offsets, what it refuses, and that it compiles for GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig

import pytest
import torch

from hyena_inputs import CPU, PARAMETERS, assert_close, gradients, make, random_state, widen
from stripedrag.kernels import gpu, ops
from stripedrag.kernels.ahead import Compiled, main, table
from stripedrag.kernels.dispatch import BACKENDS, select

triton = pytest.importorskip("triton", reason="Triton is not installed; pip install 'stripedrag[gpu]', on Linux")


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_any_number_of_chunks_gives_the_definition(monkeypatch, tokens, padded):
    monkeypatch.setattr(gpu, "CHUNK_TOKENS", (tokens, tokens))
    inputs = make(34, dtype=torch.float64, groups=4, heads=3)
    state = random_state(inputs)
    mask = torch.rand(2, 34, generator=torch.Generator().manual_seed(3)) > 0.3 if padded else None
    y, after = ops.hyena_filter(**inputs, state=state, padding_mask=mask, backend="triton")
    exact, exact_after = ops.hyena_filter(**inputs, state=state, padding_mask=mask, backend="reference")
    assert_close(y, exact, 1e-12, "y")
    assert_close(after.iir, exact_after.iir, 1e-12, "state")
    assert torch.equal(after.fir, exact_after.fir)
    found, expected = (gradients(inputs, state, backend, mask) for backend in ("triton", "reference"))
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-12, name)


@pytest.mark.parametrize("rows,gradient_rows", [((8,), (1,)), ((4,), (4,))])
def test_every_number_of_rows_that_tuning_may_choose_gives_the_definition(monkeypatch, rows, gradient_rows):
    """Over several blocks of channels, with a last chunk that no number of rows fills."""
    monkeypatch.setattr(gpu, "CHUNK_TOKENS", (8, 8))
    monkeypatch.setattr(gpu, "_ROWS", rows)
    monkeypatch.setattr(gpu, "_GRADIENT_ROWS", gradient_rows)
    gpu._kernel.cache_clear()
    inputs = make(21, batch=1, channels=130, modes=2, heads=2, dtype=torch.float64)
    state = random_state(inputs)
    found, expected = (gradients(inputs, state, backend) for backend in ("triton", "reference"))
    gpu._kernel.cache_clear()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-12, name)
    y, _ = ops.hyena_filter(**inputs, state=state, backend="triton")
    assert_close(y, ops.hyena_filter(**inputs, state=state, backend="reference")[0], 1e-12)
    z = inputs.pop("z")[:, 0]
    kept = [ops.HyenaState(*(t.clone() for t in state)) for _ in range(2)]
    one, other = (
        ops.hyena_step(z, **inputs, state=s, backend=b) for s, b in zip(kept, ("triton", "reference"), strict=True)
    )
    assert_close(one[0], other[0], 1e-12)
    assert torch.equal(kept[0].fir, kept[1].fir)
    assert_close(kept[0].iir, kept[1].iir, 1e-12)


@pytest.mark.parametrize("length", [15, 16, 17, 18, 19, 20])
@pytest.mark.parametrize("taps,modes", [(1, 1), (4, 2)])
def test_a_last_chunk_may_be_shorter_than_the_fir(monkeypatch, length, taps, modes):
    """The adjoint's chunks lie K-1 tokens later, so that the last of them can be empty."""
    monkeypatch.setattr(gpu, "CHUNK_TOKENS", (8, 8))
    inputs = make(length, batch=1, channels=4, taps=taps, modes=modes, dtype=torch.float64)
    state = random_state(inputs)
    found, expected = (gradients(inputs, state, backend) for backend in ("triton", "reference"))
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-12, name)


@pytest.mark.parametrize("modes,taps", [(9, 3), (16, 8)])
def test_many_modes_take_several_launches_for_their_gradients(monkeypatch, modes, taps):
    monkeypatch.setattr(gpu, "CHUNK_TOKENS", (8, 8))
    inputs = make(17, batch=1, channels=4, modes=modes, taps=taps, groups=2, dtype=torch.float64)
    state = random_state(inputs)
    found, expected = (gradients(inputs, state, backend) for backend in ("triton", "reference"))
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-12, name)


def test_channels_that_fill_no_block_and_several(tolerances):
    for channels, heads in ((1, None), (65, 5), (130, None)):
        inputs = make(5, batch=1, channels=channels, heads=heads)
        y, after = ops.hyena_filter(**inputs, backend="triton")
        exact, exact_after = ops.hyena_filter(**widen(inputs), backend="reference")
        assert_close(y, exact, tolerances["backend", torch.float32])
        assert_close(after.iir, exact_after.iir, tolerances["backend", torch.float32])


def test_rows_lie_beyond_offsets_of_32_bits(tmp_path, monkeypatch):
    """As those of an ordinary prompt: 3H = 12,288 and 175,000 tokens are 2^31 numbers."""
    monkeypatch.setattr(gpu, "CHUNK_TOKENS", (4, 4))
    stride, length = 2**28, 10
    inputs = make(length, batch=1, channels=4)
    file = torch.from_file(str(tmp_path / "z"), shared=True, size=stride * length, dtype=torch.float32)  # holes
    far = file.as_strided(inputs["z"].shape, (stride * length, stride, 1))
    far.copy_(inputs["z"])
    state = random_state(inputs)
    expected, near = gradients(inputs, state, "triton"), ops.hyena_filter(**inputs, state=state, backend="triton")
    assert_close(near[0], ops.hyena_filter(**inputs, state=state, backend="reference")[0], 1e-6)
    inputs["z"] = far
    apart = ops.hyena_filter(**inputs, state=state, backend="triton")
    assert torch.equal(apart[0], near[0]) and torch.equal(apart[1].iir, near[1].iir)
    far.requires_grad_()
    y, after = ops.hyena_filter(**inputs, state=state, backend="triton")
    ramps = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape) for t in (y, *after)]
    loss = sum((t.double() * ramp).sum() for t, ramp in zip((y, *after), ramps, strict=True))
    (dz,) = torch.autograd.grad(loss, [far])
    assert torch.equal(dz, expected["z"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(dtype):
    inputs = make(5, batch=1, channels=4, modes=2, dtype=dtype, heads=2)
    state = random_state(inputs)
    parameters = tuple(inputs[name].float() for name in PARAMETERS)
    mask = torch.tensor([[False, True, True, True, True]])
    operands = (inputs["z"], *parameters, *state)
    leaves = tuple(t.clone().requires_grad_() for t in operands)
    torch.library.opcheck(torch.ops.stripedrag.triton_hyena_filter, (*leaves, mask, 2, True))
    torch.library.opcheck(torch.ops.stripedrag.triton_hyena_filter, (*operands, None, 2, False))
    torch.library.opcheck(torch.ops.stripedrag.triton_hyena_step, (inputs["z"][:, 0], *operands[1:], 2))


def test_gradients_are_float32_sums_whatever_z_is(tolerances):
    inputs = make(40, dtype=torch.bfloat16)
    state = random_state(inputs)
    found, expected = (gradients(inputs, state, backend) for backend in ("triton", "reference"))  # of one rounded dy
    for name in ("poles", "residues", "skip"):
        assert found[name].dtype == torch.float32
        assert_close(found[name], expected[name], tolerances["gradient", torch.float32], name)


def test_every_multiprocessor_has_its_programs_and_chunks_are_as_long_as_that_leaves(monkeypatch):
    monkeypatch.setattr(gpu, "CHUNK_TOKENS", (64, 512))
    tokens = {length: gpu.chunk_tokens(1, length, 4096, 132) for length in (1, 2048, 8192, 32_768, 131_072, 2**20)}
    assert tokens == {1: 64, 2048: 64, 8192: 128, 32_768: 512, 131_072: 512, 2**20: 512}
    assert gpu.chunk_tokens(64, 2048, 4096, 132) == 512
    for length, chunk in tokens.items():
        programs = 64 * -(-length // chunk)
        assert chunk == 64 or programs >= gpu.PROGRAMS_A_MULTIPROCESSOR * 132


def test_it_says_why_it_cannot_run(monkeypatch):
    backend = BACKENDS["triton"]
    assert backend.refuses(CPU) is None, "in its interpreter"
    assert "TRITON_INTERPRET is set" in backend.refuses(torch.device("cuda"))
    assert backend.refuses(CPU, taps=9) == "it takes up to 8 taps and 16 modes; this filter has 9 and 1"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backend.refuses(CPU) == "it runs on CUDA devices"
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert backend.refuses(device) == "it needs a device of compute capability 8.0; this one has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert backend.refuses(device) is None
    monkeypatch.setattr(sysconfig, "get_path", lambda *asked: "/nowhere")
    assert "Triton needs Python's headers to launch what it compiles; install python3-dev" in backend.refuses(device)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "Triton needs a C compiler to launch what it compiles, gcc, clang or what CC names" in backend.refuses(
        device
    )
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert backend.refuses(device) == "it needs triton 3.7; 3.3.1 is installed"
    monkeypatch.setattr(triton, "__version__", "3.10.0+git")
    assert backend.refuses(device, modes=17) == "it takes up to 8 taps and 16 modes; this filter has 3 and 17"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.refuses(device) == "triton is not installed; `pip install 'stripedrag[gpu]'` on Linux"


def test_a_gpu_takes_it_and_where_it_cannot_run_torch_serves_and_says_so_once(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert select(None, torch.device("cuda", 7)).name == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.warns(UserWarning, match=r"triton kernels cannot be used: it needs .* 7\.0\. The torch backend serves"):
        assert select(None, torch.device("cuda", 8)).name == "torch"
    assert select(None, torch.device("cuda", 8)).name == "torch"  # a second warning would be an error here


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_takes_what_was_chosen_and_looks_at_no_file(monkeypatch, dynamic):
    """As a model on a GPU that is compiled whole; here the choice alone."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def chosen(x):
        return x + len(select(None, torch.device("cuda", 9), *x.shape).name)

    torch.compiler.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=dynamic)
    assert compiled(torch.zeros(3, 2)).max().item() == len("triton")
    assert compiled(torch.zeros(4, 8)).max().item() == len("triton")


def test_calls_past_the_dispatcher_and_through_it_are_the_same():
    inputs = make(9, batch=1, channels=4, modes=2, heads=2, dtype=torch.float32)
    state = random_state(inputs)
    with torch.no_grad():
        y, after = ops.hyena_filter(**inputs, state=state, backend="triton")
    graded, graded_after = ops.hyena_filter(**inputs, state=state, backend="triton")
    assert torch.equal(y, graded) and all(map(torch.equal, after, graded_after))
    z = inputs.pop("z")[:, 0]
    apart = ops.HyenaState(state.fir.clone(), torch.cat([state.iir, state.iir], dim=-1)[..., :2])
    assert not apart.iir.is_contiguous()  # so that the operator lays it out anew
    with torch.no_grad():
        kept = ops.HyenaState(*(t.clone() for t in state))
        one, other = (ops.hyena_step(z, **inputs, state=s, backend="triton")[0] for s in (kept, apart))
    assert torch.equal(one, other) and all(map(torch.equal, kept, apart))


def test_tensors_of_the_cpu_never_take_the_interpreter_unasked():
    assert select(None, CPU).name != "triton"


def ahead(*options):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "stripedrag.kernels.ahead", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    rows = [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr or [row for row in rows if row.stack]
    return rows


def test_nothing_is_compiled_where_kernels_are_interpreted(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ahead"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "TRITON_INTERPRET is set, with which nothing is compiled; unset it" in capsys.readouterr().err


def test_the_kernels_of_the_7b_compile_for_an_h100_without_spills(tmp_path):
    rows = ahead("--capability", 90, "--dtype", "bf16", "--modes", 2, "--mask", 0, "--to", tmp_path / "table.md")
    print("\n" + (tmp_path / "table.md").read_text())
    assert {row.kernel for row in rows} == set(gpu.KERNELS)
    assert all(row.stack == 0 and 16 <= row.registers <= 255 for row in rows)
    assert (tmp_path / "table.md").read_text() == table(rows)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_and_configuration_compiles_without_spills(capability):
    """The filters of the 7B and Evo, and the largest that are taken: 16 modes, 8 taps and a mask."""
    sm = ("--capability", capability)
    rows = ahead(*sm, "--dtype", "bf16", "--modes", 2, 8, "--mask", 0)
    rows += ahead(*sm, "--dtype", "fp32", "--modes", 16, "--taps", 8, "--mask", 1)
    print("\n" + table(rows))
    assert all(row.stack == 0 for row in rows)
