"""What the `cpu` backend promises beyond the contract of every backend."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hyena_inputs import CPU, PARAMETERS, assert_close, gradients, make, random_state, widen, widen_state
from stripedrag.kernels import cpu, dispatch, ops

_ANY_SHAPE = "test_any_shape_gives_the_outputs_states_and_gradients_of_the_definition"

pytestmark = pytest.mark.skipif(cpu.refuses(CPU) is not None, reason=str(cpu.refuses(CPU)))


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_gives_the_outputs_states_and_gradients_of_the_definition(data):
    heads, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    channels = heads * width
    inputs = make(
        data.draw(st.integers(1, 70)),
        batch=data.draw(st.integers(1, 3)),
        channels=channels,
        modes=data.draw(st.integers(1, 16)),
        taps=data.draw(st.integers(1, 8)),
        groups=data.draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0])),
        heads=data.draw(st.sampled_from([None, heads])),
        dtype=torch.float64,
    )
    state = random_state(inputs)
    mask = torch.rand(inputs["z"].shape[:2], generator=torch.Generator().manual_seed(0)) > 0.2
    mask = data.draw(st.sampled_from([None, mask]))
    y, after = ops.hyena_filter(**inputs, state=state, padding_mask=mask, backend="cpu")
    exact, exact_after = ops.hyena_filter(**inputs, state=state, padding_mask=mask, backend="reference")
    assert_close(y, exact, 1e-11, "y")
    assert torch.equal(after.fir, exact_after.fir)
    assert_close(after.iir, exact_after.iir, 1e-11, "state.iir")
    exact_gradients = gradients(inputs, state, "reference", mask)
    for name, gradient in gradients(inputs, state, "cpu", mask).items():
        assert_close(gradient, exact_gradients[name], 1e-10, name)


@pytest.mark.parametrize("exact_backend", ["torch", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_hold_over_a_long_sequence(dtype, exact_backend, tolerances):
    inputs = make(65_536, batch=1, channels=4, modes=2, dtype=dtype)
    state = random_state(inputs)
    exact = gradients(widen(inputs), widen_state(state), exact_backend)
    for name, gradient in gradients(inputs, state, "cpu").items():
        assert_close(gradient, exact[name], tolerances["gradient", dtype], name)


@pytest.mark.parametrize("channels,heads", [(1024, None), (1040, None), (960, 6), (1024, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_outputs_that_pass_the_cache_are_those_of_the_definition(channels, heads, dtype, tolerances):
    inputs = make(700, batch=1, channels=channels, heads=heads, dtype=dtype)
    state = random_state(inputs)
    y, after = ops.hyena_filter(**inputs, state=state, backend="cpu")
    assert y.nbytes > 2**20
    exact, exact_after = ops.hyena_filter(**widen(inputs), state=widen_state(state), backend="torch")
    assert_close(y, exact, tolerances["backend", dtype], "y")
    assert_close(after.iir, exact_after.iir, tolerances["backend", after.iir.dtype], "state")
    exact_gradients = gradients(widen(inputs), widen_state(state), "torch")
    assert_close(gradients(inputs, state, "cpu")["z"], exact_gradients["z"], tolerances["gradient", dtype], "z")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_y_may_take_the_place_of_the_gate_in_z(dtype):
    inputs = make(1000, channels=300, dtype=dtype)
    y, after = ops.hyena_filter(**inputs, backend="cpu")
    z = inputs["z"].clone()
    with torch.no_grad():
        out, after_in_place = ops.hyena_filter(**(inputs | {"z": z}), out=z[..., :300], backend="cpu")
    assert out.data_ptr() == z.data_ptr()
    assert torch.equal(out, y)
    assert torch.equal(z[..., 300:], inputs["z"][..., 300:])
    assert all(torch.equal(a, b) for a, b in zip(after_in_place, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_call_past_the_dispatcher_gives_the_same_bits(with_mask, heads, dtype):
    inputs = make(70, channels=48, modes=5, groups=4, heads=heads, dtype=dtype)
    inputs["fir_weight"] = inputs["fir_weight"].mT.contiguous().mT  # not contiguous
    mask = torch.arange(70).expand(2, -1) > 3 if with_mask else None
    state = random_state(inputs)
    y, after = ops.hyena_filter(**inputs, state=state, padding_mask=mask, backend="cpu")
    for switched_off in (torch.no_grad(), torch.inference_mode()):
        with switched_off:
            plain, plain_after = ops.hyena_filter(**inputs, state=state, padding_mask=mask, backend="cpu")
        assert torch.equal(plain, y)
        assert all(torch.equal(a, b) for a, b in zip(plain_after, after, strict=True))


def test_what_watches_the_dispatcher_misses_no_call():
    inputs = make(9, batch=3)
    z = inputs.pop("z")
    y, _ = ops.hyena_filter(z, **inputs, backend="cpu")
    with torch.no_grad():
        mapped = torch.vmap(lambda row: ops.hyena_filter(row[None], **inputs, backend="cpu")[0][0])(z)
        with LoggedCalls() as calls:
            ops.hyena_filter(z, **inputs, backend="cpu")
            ops.linear(z[:1, 0], torch.nn.Parameter(torch.eye(36)))
    assert torch.equal(mapped, y)
    assert "stripedrag.hyena_filter.default" in calls.names
    assert any(name.startswith("aten.") for name in calls.names)


@torch.no_grad()
def test_a_negation_that_is_still_to_be_carried_out_is():
    inputs = make(9)
    z, state = inputs.pop("z"), random_state(make(9))
    expected, _ = ops.hyena_filter(-z, **inputs, backend="cpu")
    y, _ = ops.hyena_filter(torch._neg_view(z), **inputs, backend="cpu")
    assert torch.equal(y, expected)
    copies = [ops.HyenaState(*(t.clone() for t in state)) for _ in range(2)]
    expected, _ = ops.hyena_step(-z[:, 0], **inputs, state=copies[0], backend="cpu")
    y, _ = ops.hyena_step(torch._neg_view(z[:, 0].contiguous()), **inputs, state=copies[1], backend="cpu")
    assert torch.equal(y, expected)
    weight = torch.nn.Parameter(torch.eye(36))
    assert torch.equal(ops.linear(torch._neg_view(z[0, :1]), weight), -z[0, :1])


@torch.no_grad()
@pytest.mark.parametrize("shared", ["skip", "iir"])
def test_out_in_the_memory_of_what_is_still_read_is_refused(shared):
    inputs = make(9)
    state, memory = random_state(inputs), torch.zeros(2 * 9 * 12)
    if shared == "skip":
        inputs["skip"] = memory[:12]
    else:
        state = state._replace(iir=memory[: state.iir.numel()].view_as(state.iir))
    with pytest.raises(ValueError, match=f"out lies in the storage of {shared}"):
        ops.hyena_filter(**inputs, state=state, out=memory.view(2, 9, 12), backend="cpu")


class LoggedCalls(TorchDispatchMode):
    """Keeps the names of the operators that are called under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_backward_pass_is_told_that_y_overwrote_what_it_needs():
    inputs = make(9)
    z = inputs.pop("z")
    weight = torch.ones_like(z, requires_grad=True)
    loss = (weight * z).sum()
    with torch.no_grad():
        ops.hyena_filter(z, **inputs, out=z[..., : z.shape[-1] // 3], backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_pass_is_told_that_a_step_overwrote_its_state():
    inputs = make(9)
    z = inputs.pop("z").requires_grad_()
    _, state = ops.hyena_filter(z, **inputs, backend="cpu")
    loss = (state.iir**2).sum()
    with torch.no_grad():
        ops.hyena_step(z[:, 0].contiguous(), **inputs, state=state, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_that_was_not_prepared_for_is_refused():
    inputs = make(9)
    wide = [inputs[n] for n in PARAMETERS]
    z = inputs["z"].requires_grad_()
    y = torch.ops.stripedrag.hyena_filter(z, *wide, *random_state(inputs), None, 1, False)[0]
    with pytest.raises(RuntimeError, match="kept 0 numbers for its gradient, which needs"):
        y.sum().backward()


def test_the_number_of_threads_changes_no_bit():
    inputs = make(300, channels=96, modes=5, groups=48, heads=2)
    state = random_state(inputs)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y, after = ops.hyena_filter(**inputs, state=state, backend="cpu")
            runs.append([y, *after, *gradients(inputs, state, "cpu").values()])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modes", [2, 5])
def test_a_large_output_has_the_same_bits_however_it_is_written(modes, dtype):
    inputs = make(700, channels=512, modes=modes, dtype=dtype)
    y, _ = ops.hyena_filter(**inputs, backend="cpu")
    assert y.nbytes > 1 << 20  # past the cache
    for width in (513, 544):  # rows that begin anywhere are written as they come; whole lines apart, like y
        apart = torch.zeros(2, 700, width, dtype=dtype)
        ops.hyena_filter(**inputs, out=apart[..., :512], backend="cpu")
        assert torch.equal(apart[..., :512], y)
        assert not apart[..., 512:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_split_sequence_has_the_same_bits(dtype):
    inputs = make(200, channels=70, heads=2, dtype=dtype)
    z = inputs.pop("z")
    whole, end = ops.hyena_filter(z, **inputs, backend="cpu")
    for cut in (1, 2, 31, 32, 33, 199):
        first, state = ops.hyena_filter(z[:, :cut], **inputs, backend="cpu")
        second, state = ops.hyena_filter(z[:, cut:], **inputs, state=state, backend="cpu")
        assert torch.equal(torch.cat([first, second], dim=1), whole)
        assert all(torch.equal(a, b) for a, b in zip(state, end, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["wide", "like z"])
@pytest.mark.parametrize("heads,groups", [(None, 70), (2, 7), (70, 1)])
def test_a_step_takes_parameters_of_either_dtype(dtype, kept, heads, groups, tolerances):
    inputs = make(5, channels=70, modes=3, groups=groups, heads=heads, dtype=dtype)
    if kept == "wide":
        inputs |= {n: inputs[n].to(inputs["poles"].dtype) for n in ("fir_weight", "fir_bias")}
    else:
        inputs |= {"skip": inputs["skip"].to(dtype)}
    z = inputs.pop("z")
    whole, end = ops.hyena_filter(z, **inputs, backend="cpu")
    _, state = ops.hyena_filter(z[:, :4], **inputs, backend="cpu")
    with torch.no_grad():
        y, state = ops.hyena_step(z[:, 4], **inputs, state=state, backend="cpu")
    assert_close(y, whole[:, 4], tolerances["backend", dtype])
    assert torch.equal(state.fir, end.fir)
    assert_close(state.iir, end.iir, tolerances["backend", end.iir.dtype])


def test_a_step_writes_states_that_are_not_contiguous():
    inputs = make(6)
    z = inputs.pop("z")
    _, state = ops.hyena_filter(z[:, :5], **inputs, backend="cpu")
    spread = ops.HyenaState(*(torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0] for t in state))
    assert not spread.iir.is_contiguous()
    expected, _ = ops.hyena_step(z[:, 5], **inputs, state=state, backend="cpu")
    y, _ = ops.hyena_step(z[:, 5], **inputs, state=spread, backend="cpu")
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(spread, state, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_mask", [False, True])
def test_the_operators_pass_opcheck(dtype, with_mask):
    inputs = make(40, channels=6, heads=2, dtype=dtype)
    wide = inputs["poles"].dtype
    state = random_state(inputs)
    operands = [inputs["z"], *(inputs[n].to(wide) for n in PARAMETERS), *state]
    mask = torch.arange(40).expand(2, -1) > 3 if with_mask else None
    leaves = [t.clone().requires_grad_() for t in operands]
    torch.library.opcheck(torch.ops.stripedrag.hyena_filter, (*leaves, mask, 2, True))
    torch.library.opcheck(torch.ops.stripedrag.hyena_filter, (*operands, mask, 2, False))
    out = torch.empty(2, 40, 6, dtype=dtype)
    torch.library.opcheck(torch.ops.stripedrag.hyena_filter_out, (*operands, mask, 2, out))
    token = inputs["z"][:, 0].contiguous()
    torch.library.opcheck(torch.ops.stripedrag.hyena_step, (token, *operands[1:], 2))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_operator_compiles_without_a_graph_break(compiler):
    inputs = make(50, channels=6, heads=2)
    state = random_state(inputs)

    def loss(z, poles, state):
        y, after = ops.hyena_filter(**(inputs | dict(z=z, poles=poles)), state=state)
        return (y * y).sum() + after.iir.sum()

    leaves = inputs["z"].clone().requires_grad_(), inputs["poles"].clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves, state), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for a, b in zip(torch.autograd.grad(compiled(*leaves, state), leaves), expected, strict=True):
        assert_close(a, b, 1e-6)

    def into(z, out):
        return ops.hyena_filter(**(inputs | dict(z=z)), out=out)[0] + 1

    with torch.no_grad():
        out, z = torch.zeros(2, 50, 6), inputs["z"]
        assert_close(
            torch.compile(into, fullgraph=True, backend=compiler)(z, out), into(z, torch.zeros_like(out)), 1e-6
        )
        assert_close(out + 1, into(z, torch.zeros_like(out)), 1e-6)

    def step(z, state):
        return ops.hyena_step(z, **{n: inputs[n] for n in (*PARAMETERS, "heads")}, state=state)[0] + 1

    with torch.no_grad():
        ours, theirs = (ops.HyenaState(*(t.clone() for t in state)) for _ in range(2))
        compiled_step = torch.compile(step, fullgraph=True, backend=compiler)
        for t in range(3):
            assert_close(compiled_step(inputs["z"][:, t], ours), step(inputs["z"][:, t], theirs), 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_filters_beyond_its_limits_go_to_the_torch_backend_with_a_warning():
    dispatch._chosen.cache_clear()
    inputs = make(20, modes=17)
    with pytest.warns(
        UserWarning, match=r"takes up to 8 taps and 16 modes; this filter has 3 and 17\. The torch backend"
    ):
        y, _ = ops.hyena_filter(**inputs)
    expected, _ = ops.hyena_filter(**inputs, backend="torch")
    assert torch.equal(y, expected)
    with pytest.raises(dispatch.BackendError, match="cpu refused: it takes up to 8 taps and 16 modes"):
        ops.hyena_filter(**inputs, backend="cpu")


def test_without_the_extension_the_torch_backend_serves_and_says_so_once(monkeypatch, recwarn):
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "_MISSING", "its extension is not there", raising=False)
    dispatch._chosen.cache_clear()
    inputs = make(20)
    for _ in range(2):
        _, state = ops.hyena_filter(**inputs)
        with torch.no_grad():
            ops.hyena_step(inputs["z"][:, 0], **{n: inputs[n] for n in (*PARAMETERS, "heads")}, state=state)
    dispatch._chosen.cache_clear()
    told = [str(w.message) for w in recwarn]
    assert told == [
        "the cpu kernels cannot be used: its extension is not there. The torch backend serves, more slowly."
    ]


def test_one_openmp_library_serves_torch_and_the_kernels():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what a process has loaded")
    # In a process of its own: faiss, which other tests load, carries another.
    program = "from stripedrag.kernels import cpu; print(open('/proc/self/maps').read())"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert "_native" in loaded
    assert len(set(re.findall(r"\S*lib(?:gomp|omp|iomp5)\S*\.so\S*", loaded))) == 1


@pytest.mark.skipif(cpu.instruction_set() == "native", reason="one instruction set on this kind of processor")
def test_every_instruction_set_gives_the_same_numbers(tmp_path):
    program = (
        "import sys, torch; from stripedrag.kernels import cpu, ops; saved = torch.load(sys.argv[1]); "
        "y, after = ops.hyena_filter(**saved, backend='cpu'); "
        "torch.save((cpu.instruction_set(), y, *after), sys.argv[2])"
    )
    inputs = make(100, channels=50, modes=7, taps=4, heads=2)
    torch.save(inputs, tmp_path / "inputs.pt")
    exact, exact_after = ops.hyena_filter(**widen(inputs), backend="reference")
    levels = ["v2", "v3", "v4"][: ["v2", "v3", "v4"].index(cpu.instruction_set()) + 1]
    for level in levels:
        arguments = [sys.executable, "-c", program, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
        subprocess.run(arguments, check=True, env=os.environ | {"STRIPEDRAG_ISA": level}, cwd=tmp_path)
        used, y, _, iir = torch.load(tmp_path / "outputs.pt")
        assert used == level
        assert_close(y, exact, 5e-6, level)
        assert_close(iir, exact_after.iir, 5e-6, level)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["v2", "v3"])
def test_the_lesser_instruction_sets_keep_the_whole_contract(level):
    if cpu.instruction_set() not in ("v3", "v4") or level == cpu.instruction_set():
        pytest.skip("this processor runs no higher instruction set")
    here = Path(__file__).parent
    files = [here / "test_contract.py", here / "test_linear.py", f"{__file__}::{_ANY_SHAPE}"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not reference", *files],
        check=True,
        cwd=here.parents[1],
        env=os.environ | {"STRIPEDRAG_ISA": level},
    )


def test_an_instruction_set_that_is_not_there_is_named():
    program = "import torch; from stripedrag.kernels import cpu; print(cpu.refuses(torch.device('cpu')))"
    told = subprocess.check_output(
        [sys.executable, "-c", program], env=os.environ | {"STRIPEDRAG_ISA": "v9"}, text=True
    )
    assert re.search(r"does not load: STRIPEDRAG_ISA is 'v9'; this processor runs (v4, v3, v2|v3, v2|v2|native)", told)


@pytest.mark.slow
def test_without_a_compiler_the_package_installs_and_answers_with_the_torch_backend(tmp_path):
    root, false = Path(__file__).parents[2], shutil.which("false")
    environment = os.environ | {"CXX": false, "CC": false}
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*run, "wheel", "-q", "--no-deps", "-w", tmp_path, root], check=True, timeout=600, env=environment)
    (wheel,) = tmp_path.glob("stripedrag-*.whl")
    subprocess.run([*run, "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=300)
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
        "import torch; from stripedrag.kernels import dispatch; from stripedrag.rag.doctor import examine; "
        "print(dispatch.select(None, torch.device('cpu')).name, examine()['kernel backends on cpu']['cpu'])"
    )
    told = subprocess.check_output(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        text=True,
    )
    assert told.startswith(
        "torch refused: its extension is not there: no C++17 compiler worked when stripedrag was installed"
    )
