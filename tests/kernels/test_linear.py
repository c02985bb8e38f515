"""A linear layer on a few rows: torch's numbers, from the native kernel only where it is meant."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from hyena_inputs import CPU, assert_close
from stripedrag.kernels import cpu, ops

native = pytest.mark.skipif(cpu.refuses(CPU) is not None, reason=str(cpu.refuses(CPU)))


def layer(rows, columns, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(rows, columns, generator=rng).to(dtype))
    return torch.randn(1, 1, columns, generator=rng).to(dtype), weight, torch.randn(rows, generator=rng).to(dtype)


@native
@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 31), (5, 32), (7, 33), (64, 576), (2, 1000), (700, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_row_is_multiplied_as_in_float64(rows, columns, dtype, with_bias, tolerances):
    x, weight, bias = layer(rows, columns, dtype)
    bias = bias if with_bias else None
    with torch.no_grad():
        y = cpu.linear_at_once(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y is not None
    assert y.shape == (1, 1, rows)
    assert y.dtype == dtype
    assert_close(y, exact, tolerances["backend", dtype])


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [31, 64, 576, 1000])
@pytest.mark.parametrize("batch", [2, 3, 4, 5, 7, 8])
def test_a_row_has_the_bits_that_it_has_alone(dtype, columns, batch):
    _, weight, bias = layer(70, columns, dtype)
    x = torch.randn(batch, 1, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        together = cpu.linear_at_once(x, weight, bias)
        alone = [cpu.linear_at_once(row, weight, bias) for row in x]
    assert together.shape == (batch, 1, 70)
    assert torch.equal(together, torch.stack(alone))


@native
@given(
    batch=st.integers(1, 300),
    rows=st.integers(1, 120),
    columns=st.integers(1, 600),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
@example(batch=97, rows=1600, columns=300, with_bias=True, threads=1, dtype=torch.bfloat16, data=None)
@example(batch=481, rows=3, columns=257, with_bias=True, threads=2, dtype=torch.bfloat16, data=None)
def test_many_rows_are_multiplied_as_in_float64_and_each_as_it_is_alone(
    batch, rows, columns, with_bias, threads, dtype, data
):
    _, weight, bias = layer(rows, columns, dtype)
    weight, bias = weight.detach(), bias if with_bias else None
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = cpu.gemm(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    sizes = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    assert whole.dtype == dtype and ((whole - exact).abs() <= tolerance * sizes).all()
    cut = batch // 2 if data is None else data.draw(st.integers(0, batch), "cut")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [cpu.gemm(part, weight, bias) for part in (x[:cut], x[cut:]) if len(part)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), whole)


@native
def test_what_is_no_number_stays_in_its_row_and_its_column():
    x, weight = torch.ones(100, 40).bfloat16(), torch.ones(50, 40).bfloat16()
    x[70, 3], weight[20, 7] = torch.nan, torch.inf
    y = cpu.gemm(x, weight)
    assert y[70].isnan().all() and y.isnan().sum() == 50
    assert y[:70, 20].isinf().all() and y.isinf().sum() == 99


@native
@pytest.mark.skipif(cpu.instruction_set() not in ("v3", "v4"), reason="without fused products nothing is quicker")
def test_many_rows_in_bfloat16_are_ours_where_the_processor_has_no_products_of_it(without_products):
    x, weight, bias = layer(70, 64, torch.bfloat16)
    wide = torch.randn(2, 11, 3 * 64).bfloat16()[..., :64]  # as the Hyena operator leaves them
    with torch.no_grad():
        for x_of_any_layout in (wide, wide[:, :3]):
            made = cpu.linear_at_once(x_of_any_layout, weight, bias)
            assert made is not None and torch.equal(ops.linear(x_of_any_layout, weight, bias), made)
        assert torch.equal(cpu.linear_at_once(wide, weight, bias), cpu.gemm(wide.contiguous(), weight, bias))
        assert cpu.linear_at_once(wide.float(), torch.nn.Parameter(weight.float()), bias.float()) is None
        assert cpu.linear_at_once(x[..., :0], weight, bias) is None


@pytest.mark.parametrize("shape", [(2, 11, 64), (64,), (0, 64)])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_products_of_bfloat16_a_gradient_is_float32s_and_nothing_wide_is_kept(
    without_products, autocast, shape
):
    _, weight, bias = layer(70, 64, torch.bfloat16)
    given = torch.randn(shape).bfloat16().requires_grad_(), weight, bias.requires_grad_()
    kept = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.linear(*given)
    assert set(kept) == {torch.bfloat16}
    dy = torch.randn(y.shape).bfloat16()
    wide = [t.detach().float().requires_grad_() for t in given]
    exact = F.linear(*wide)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=4e-3, atol=1e-5)
    made = torch.autograd.grad(y, given, dy), torch.autograd.grad(exact, wide, dy.float())
    for ours, wanted in zip(*made, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), wanted, rtol=4e-3, atol=1e-4)


def test_without_products_of_bfloat16_other_weights_and_dtypes_are_left_alone(without_products):
    x, weight, bias = layer(6, 32, torch.float32)
    many = x.expand(9, 1, 32)
    assert torch.equal(ops.linear(many, weight, bias), F.linear(many, weight, bias))
    with pytest.raises(RuntimeError):  # torch's own word on dtypes that are mixed
        ops.linear(many.bfloat16(), weight, bias)

    class Foreign(torch.Tensor):
        pass

    foreign = weight.detach().bfloat16().as_subclass(Foreign)
    assert type(ops.linear(many.bfloat16(), foreign)) is Foreign


@native
def test_the_number_of_threads_changes_no_bit():
    x, weight, bias = layer(1500, 576, torch.bfloat16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                runs.append(ops.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.repeat(1, 9, 1), w, b),  # many rows
        lambda x, w, b: (x[:, :0], w, b),  # none
        lambda x, w, b: (x.double(), torch.nn.Parameter(w.double()), b.double()),
        lambda x, w, b: (x, torch.nn.Parameter(w.detach().t().contiguous().t()), b),
        lambda x, w, b: (x, w.detach(), b),  # no parameter: perhaps a view, perhaps of a quantized kind
        lambda x, w, b: (torch.cat([x, x], dim=-1)[..., ::2], w, b),  # strided
    ],
)
def test_what_is_not_a_few_plain_rows_goes_to_torch(change):
    x, weight, bias = change(*layer(6, 32, torch.float32))
    with torch.no_grad():
        assert cpu.linear_at_once(x, weight, bias) is None
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))


def test_autocast_is_left_to_torch():
    x, weight, bias = layer(6, 32, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16


def test_a_gradient_flows_through_one_row():
    x, weight, bias = layer(6, 32, torch.float32)
    ops.linear(x, weight, bias).sum().backward()
    assert torch.equal(weight.grad, x[0].expand(6, -1))


def test_a_row_of_another_length_gets_torchs_error():
    x, weight, _ = layer(6, 32, torch.float32)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(x[..., :31], weight)
