"""RMSNorm and SwiGLU: the numbers and gradients of float64, from the native kernels only where these are meant."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hyena_inputs import CPU, assert_close
from stripedrag.kernels import cpu, ops

native = pytest.mark.skipif(cpu.refuses(CPU) is not None, reason=str(cpu.refuses(CPU)))
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16)


def numbers(*shape, dtype, seed=0, factor=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * factor).to(dtype)


def wide(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def norm_in_double(x, scale):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * scale


@pytest.mark.parametrize("shape", [(2, 3), (3, 31), (2, 5, 32), (1, 33), (130, 576), (700, 100)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_norm_and_its_gradients_are_those_of_float64(shape, dtype, scale_dtype, tolerances):
    x = numbers(*shape, dtype=dtype).requires_grad_()
    scale = (1 + numbers(shape[-1], dtype=torch.float32, seed=1)).to(scale_dtype).requires_grad_()
    dy = numbers(*shape, dtype=dtype, seed=2)
    exact_x, exact_scale = wide(x, scale)
    y, exact = ops.rms_norm(x, scale, EPS), norm_in_double(exact_x, exact_scale)
    assert y.dtype == dtype and y.shape == shape
    assert_close(y, exact, tolerances["backend", dtype])
    with torch.no_grad():
        assert torch.equal(ops.rms_norm(x, scale, EPS), y)
    y.backward(dy)
    exact.backward(dy.double())
    assert_close(x.grad, exact_x.grad, tolerances["gradient", dtype])
    assert_close(scale.grad, exact_scale.grad, tolerances["gradient", scale_dtype])


@pytest.mark.parametrize("shape", [(1,), (3, 31), (2, 5, 32), (1, 33), (130, 1536)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_and_its_gradients_are_those_of_float64(shape, dtype, tolerances):
    a, b = (numbers(*shape, dtype=dtype, seed=i, factor=4.0).requires_grad_() for i in (3, 4))
    dy = numbers(*shape, dtype=dtype, seed=5)
    exact_a, exact_b = wide(a, b)
    y, exact = ops.swiglu(a, b), F.silu(exact_a) * exact_b
    assert_close(y, exact, tolerances["backend", dtype])
    with torch.no_grad():
        assert torch.equal(ops.swiglu(a, b), y)
    y.backward(dy)
    exact.backward(dy.double())
    assert_close(a.grad, exact_a.grad, tolerances["gradient", dtype])
    assert_close(b.grad, exact_b.grad, tolerances["gradient", dtype])


@native
def test_the_gate_is_right_wherever_float32_is():
    a = torch.cat([torch.linspace(-100, 100, 40_001), torch.tensor([-0.0, 1e-30, -1e30, 3e38])])
    with torch.no_grad():
        y, exact = cpu.swiglu(a, torch.ones_like(a)), F.silu(a.double())
        assert ((y.double() - exact).abs() <= 4e-7 * exact.abs() + 1e-36).all()
        assert cpu.swiglu(torch.full((40,), float("inf")), torch.ones(40)).isposinf().all()
        assert cpu.swiglu(torch.full((40,), float("nan")), torch.ones(40)).isnan().all()
        assert cpu.rms_norm(torch.full((2, 40), float("nan")), torch.ones(40), EPS).isnan().all()


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    x, dy = numbers(900, 576, dtype=dtype), numbers(900, 576, dtype=dtype, seed=1)
    scale = numbers(576, dtype=torch.float32, seed=2)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            norms = cpu.rms_norm(x, scale, EPS), *cpu.rms_norm_gradient(x, scale, EPS, dy)
            runs.append((*norms, cpu.swiglu(x, dy), *cpu.swiglu_gradient(x, dy, dy)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


def test_float64_function_transforms_and_compilers_get_torchs_numbers_and_strides_ours():
    x, scale = numbers(3, 8, dtype=torch.float64).requires_grad_(), numbers(8, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x, scale: ops.rms_norm(x, scale, EPS), (x, scale))
    assert gradcheck(ops.swiglu, (x, x.detach().flip(0).requires_grad_()))
    row, one = numbers(4, 8, dtype=torch.float32), torch.ones(8)
    every = torch.func.vmap(lambda r: ops.rms_norm(r, one, EPS))(row)
    torch.testing.assert_close(every, ops.rms_norm(row, one, EPS))
    turned = row.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(ops.rms_norm(turned, one, EPS), ops.rms_norm(row, one, EPS))
    assert torch.equal(ops.swiglu(turned, row), ops.swiglu(row, row))
    compiled = torch.compile(lambda x: ops.swiglu(ops.rms_norm(x, one, EPS), x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(row), ops.swiglu(ops.rms_norm(row, one, EPS), row))


def test_a_scale_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(2, 8\) and scale \(7,\); they are"):
        ops.rms_norm(torch.ones(2, 8), torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"x has shape \(\) and scale \(8,\)"):
        ops.rms_norm(torch.tensor(1.0), torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"a is torch.float32 of shape \(2, 8\), b torch.float32 of \(8,\)"):
        ops.swiglu(torch.ones(2, 8), torch.ones(8))


@native
def test_a_tangent_of_forward_mode_is_not_lost():
    x, one = numbers(3, 8, dtype=torch.float32), torch.ones(8)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for y in (ops.rms_norm(dual, one, EPS), ops.swiglu(dual, dual)):
            assert torch.autograd.forward_ad.unpack_dual(y).tangent.abs().max() > 0


@native
def test_gradients_of_what_is_not_contiguous_are_right():
    x, scale = numbers(8, 5, dtype=torch.float32).t().requires_grad_(), torch.ones(16)[::2].requires_grad_()
    ops.swiglu(ops.rms_norm(x, scale, EPS), x).sum().backward()
    exact_x, exact_scale = wide(x, scale)
    (F.silu(norm_in_double(exact_x, exact_scale)) * exact_x).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.grad.double(), exact_scale.grad, rtol=1e-4, atol=1e-5)
