"""A linear layer on a few rows: torch's numbers, from the native kernel only where it is meant."""

import pytest
import torch
import torch.nn.functional as F

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
