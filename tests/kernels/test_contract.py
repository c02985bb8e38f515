"""What every backend of the Hyena operator promises. A backend that is registered is tested here unasked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hyena_inputs import CPU, assert_close, gradients, make, random_state, widen, widen_state
from stripedrag.kernels import ops
from stripedrag.kernels.dispatch import BACKENDS

LENGTHS = (1, 2, 63, 64, 65, 1000)


def runnable(name):
    reason = BACKENDS[name].refuses(CPU)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


@pytest.fixture(params=[runnable(name) for name in BACKENDS])
def backend(request):
    return request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, so that an output which a backend forgets to write is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_backend_computes_the_definition(backend, length, dtype, tolerances, poisoned):
    inputs = make(length, dtype=dtype, heads=3)
    state = random_state(inputs)
    y, after = ops.hyena_filter(**inputs, state=state, backend=backend)
    exact, exact_after = ops.hyena_filter(**widen(inputs), state=widen_state(state), backend="reference")
    assert y.dtype == dtype
    assert after.iir.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(y, exact, tolerances["backend", dtype], "y")
    assert torch.equal(after.fir.double(), exact_after.fir)
    assert_close(
        after.iir, exact_after.iir, tolerances["backend", after.iir.dtype], "state"
    )  # the state never sees a rounded output


@pytest.mark.parametrize("name", ["filter_plain", "filter_colsplit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_filters(backend, name, dtype, golden_dir, tolerances):
    golden = load_file(golden_dir / f"{name}.safetensors")
    parameters = dict(
        fir_weight=golden["short_filter_weight"],
        fir_bias=golden["short_filter_bias"],
        poles=golden["poles"],
        residues=golden["residues"],
        skip=golden["D"],
        heads=2 if name == "filter_colsplit" else None,
        backend=backend,
    )
    z, half = golden["z"].to(dtype), golden["z"].shape[1] // 2
    first, middle = ops.hyena_filter(z[:, :half], **parameters)
    second, final = ops.hyena_filter(z[:, half:], **parameters, state=middle)
    gate = tolerances["filter", dtype]
    worst = (torch.cat([first, second], dim=1) - golden["y"]).abs().max().item()
    print(f"\n  {name} {backend} {dtype}: {worst:.1e} (gate {gate:.0e})", end="")
    assert worst <= gate
    for state, moment in ((middle, "mid"), (final, "final")):
        assert torch.equal(state.fir, golden[f"fir_state_{moment}"].to(dtype))
        assert_close(state.iir, golden[f"iir_state_{moment}"], tolerances["state", torch.float32])


@settings(max_examples=25)
@given(data=st.data())
def test_splitting_a_sequence_and_carrying_the_state_changes_nothing(data):
    backend = data.draw(st.sampled_from([n for n, b in BACKENDS.items() if b.refuses(CPU) is None]))
    length = data.draw(st.integers(2, 40 if backend == "triton" else 200))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=1, max_size=4)))
    inputs = make(length, dtype=torch.float64, seed=data.draw(st.integers(0, 99)))
    z = inputs.pop("z")
    whole, end = ops.hyena_filter(z, **inputs, backend=backend)
    parts, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        y, state = ops.hyena_filter(z[:, start:stop], **inputs, state=state, backend=backend)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10 * whole.abs().max().item())
    assert torch.equal(state.fir, end.fir)
    assert torch.allclose(state.iir, end.iir, rtol=0, atol=1e-10 * end.iir.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_continue_a_prefill(backend, dtype, tolerances):
    inputs = make(70, dtype=dtype, heads=2)
    z = inputs.pop("z")
    whole, end = ops.hyena_filter(z, **inputs, backend=backend)
    _, state = ops.hyena_filter(z[:, :60], **inputs, backend=backend)
    for t in range(60, 70):
        addresses = state.fir.data_ptr(), state.iir.data_ptr()
        y, state = ops.hyena_step(z[:, t], **inputs, state=state, backend=backend)
        assert (state.fir.data_ptr(), state.iir.data_ptr()) == addresses, "the state is updated in place"
        assert_close(y, whole[:, t], 2 * tolerances["backend", dtype], f"step {t}")
    assert torch.equal(state.fir, end.fir)
    assert_close(state.iir, end.iir, 2 * tolerances["backend", state.iir.dtype], "state")


@pytest.mark.parametrize("length", [7, 64, 150])
def test_no_output_depends_on_a_later_input(backend, length):
    inputs = make(length, dtype=torch.float64)
    y, _ = ops.hyena_filter(**inputs, backend=backend)
    cut = length // 2
    inputs["z"][:, cut:] = torch.randn_like(inputs["z"][:, cut:])
    changed, _ = ops.hyena_filter(**inputs, backend=backend)
    assert_close(changed[:, :cut], y[:, :cut], 1e-12)
    assert not torch.equal(changed[:, cut:], y[:, cut:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3, 65, 130])
def test_every_gradient_is_that_of_the_definition(backend, length, dtype, tolerances):
    inputs = make(length, dtype=dtype, groups=4, heads=3)
    state = random_state(inputs)

    actual = gradients(inputs, state, backend)
    exact = gradients(widen(inputs), widen_state(state), "reference")
    for name, gradient in actual.items():
        assert_close(gradient, exact[name], tolerances["gradient", dtype], name)


@pytest.mark.parametrize("modes,taps,groups,heads", [(1, 2, 1, None), (16, 8, 6, 12), (2, 3, 12, 1), (8, 1, 2, 4)])
def test_every_shape_of_a_filter(backend, modes, taps, groups, heads, tolerances):
    inputs = make(90, modes=modes, taps=taps, groups=groups, heads=heads)
    y, after = ops.hyena_filter(**inputs, backend=backend)
    exact, exact_after = ops.hyena_filter(**widen(inputs), backend="reference")
    assert_close(y, exact, tolerances["backend", torch.float32])
    assert_close(after.iir, exact_after.iir, tolerances["backend", torch.float32])
    assert after.fir.shape == (2, 36, taps - 1)


def test_a_non_contiguous_input_is_read_by_its_strides(backend):
    inputs = make(66, dtype=torch.float64)
    y, after = ops.hyena_filter(**inputs, backend=backend)
    inputs["z"] = inputs["z"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["poles"] = inputs["poles"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["fir_weight"] = inputs["fir_weight"].repeat(1, 1, 2)[..., :3]
    assert not inputs["z"].is_contiguous()
    strided, strided_after = ops.hyena_filter(**inputs, backend=backend)
    assert_close(strided, y, 1e-12)
    assert_close(strided_after.iir, after.iir, 1e-12)


def test_left_padding_changes_no_real_token(backend):
    inputs = make(80, dtype=torch.float64)
    alone, alone_after = ops.hyena_filter(**inputs, backend=backend)
    junk = torch.full((2, 13, 36), 1e3, dtype=torch.float64)
    inputs["z"] = torch.cat([junk, inputs["z"]], dim=1)
    mask = torch.arange(93)[None].expand(2, -1) >= 13
    y, after = ops.hyena_filter(**inputs, padding_mask=mask, backend=backend)
    assert_close(y[:, 13:], alone, 1e-12)
    assert y[:, :13].abs().max() == 0
    assert torch.equal(after.fir, alone_after.fir)
    assert_close(after.iir, alone_after.iir, 1e-12)


def test_y_goes_where_the_caller_says(backend):
    inputs = make(70)
    y, after = ops.hyena_filter(**inputs, backend=backend)
    wide = torch.full((2, 75, 40), 7.0)
    with torch.no_grad():
        out, state = ops.hyena_filter(**inputs, out=wide[:, 3:73, 5:17], backend=backend)
    assert out.data_ptr() == wide[:, 3:73, 5:17].data_ptr()
    assert torch.equal(out, y)
    assert torch.equal(state.iir, after.iir)
    out.fill_(7.0)
    assert (wide == 7.0).all()


def test_a_given_state_is_not_modified(backend):
    inputs = make(20)
    state = random_state(inputs)
    kept = ops.HyenaState(*(t.clone() for t in state))
    ops.hyena_filter(**inputs, state=state, backend=backend)
    assert torch.equal(state.fir, kept.fir)
    assert torch.equal(state.iir, kept.iir)


def test_the_response_of_a_slow_pole_holds_over_a_long_sequence(backend):
    if backend == "reference":
        pytest.skip("a token at a time; its float64 self is what this would compare with")
    length = 20_000
    inputs = make(length, batch=1, channels=1, modes=1, taps=1)
    inputs |= dict(fir_weight=torch.ones(3, 1, 1), fir_bias=torch.zeros(3), skip=torch.zeros(1))
    inputs |= dict(poles=torch.tensor([0.9999, 0.0]).view(1, 1, 1, 2), residues=torch.tensor([1.0, 0]).view(1, 1, 1, 2))
    inputs["z"] = torch.ones(1, length, 3)
    y, _ = ops.hyena_filter(**inputs, backend=backend)
    pole = inputs["poles"][0, 0, 0, 0].double()
    exact = (1 - pole ** torch.arange(1, length + 1)) / (1 - pole)
    assert ((y[0, :, 0] - exact).abs() / exact).max() < 1e-5
