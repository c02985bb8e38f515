"""Weights of 8 and 4 bits: what they stand for, and products with it, natively and by torch."""

import pytest
import torch
import torch.nn.functional as F

from hyena_inputs import CPU, assert_close
from stripedrag.kernels import cpu, quantized
from stripedrag.kernels.quantized import QuantizedWeight, dequantize, quantize

native = pytest.mark.skipif(cpu.refuses(CPU) is not None, reason=str(cpu.refuses(CPU)))
SHAPES = [(1, 1), (3, 31), (5, 32), (7, 33), (64, 576), (2, 1000), (700, 300), (9, 128), (3, 4200)]


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def meant(q):
    """What stored numbers stand for, in float64, number by number of their definition."""
    if q.bits == 8:
        return q.weight.squeeze(1).double() * q.scale.double()[:, None]
    wide = torch.empty(len(q.weight), q.columns, dtype=torch.float64)
    for column in range(q.columns):
        block, j, i = column // 128, column // 32 % 4, column % 32
        level = (q.weight[:, block, i].long() >> (4 * j)) & 15
        wide[:, column] = level * q.scale[:, column // 32].double() + q.offset[:, column // 32].double()
    return wide


def input_row(columns, dtype, seed=1):
    return torch.randn(1, 1, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("rows,columns", SHAPES)
def test_8_bits_are_the_nearest_of_255_levels(rows, columns):
    w = weight(rows, columns)
    q = quantize(w, 8)
    assert torch.equal(q.scale, w.abs().amax(1) / 127)
    assert ((meant(q) - w).abs() <= 0.5001 * q.scale.double()[:, None]).all()
    assert q.weight.shape == (rows, 1, columns)
    assert q.weight.abs().amax(2).eq(127).all()


@pytest.mark.parametrize("rows,columns", SHAPES)
def test_4_bits_are_within_a_level_of_groups_of_32(rows, columns):
    w = weight(rows, columns)
    q = quantize(w, 4)
    assert q.weight.shape == (rows, -(-columns // 128), 32)
    ranges = F.pad(w, (0, -columns % 32)).unflatten(1, (-1, 32))
    levels = (ranges.amax(-1) - ranges.amin(-1)) / 15
    error = F.pad((meant(q) - w).abs(), (0, -columns % 32)).unflatten(1, (-1, 32)).amax(-1)
    assert (error <= 2 * levels + 1e-5).all()  # where a range is drawn together its ends are cut
    if columns >= 300:
        assert error.square().mean().sqrt() < 2 * levels.square().mean().sqrt()
        assert (meant(q) - w).norm() < 0.1 * w.norm()


def test_fitting_the_levels_lessens_the_error(monkeypatch):
    w = weight(50, 640)
    fitted = (meant(quantize(w, 4)) - w).norm()
    monkeypatch.setattr(quantized, "_REFITS", 0)
    assert fitted < 0.95 * (meant(quantize(w, 4)) - w).norm()


@pytest.mark.parametrize("bits", quantized.BITS)
def test_equal_numbers_are_kept(bits):
    for value in (0.0, 0.25, -3.0):
        q = quantize(torch.full((3, 70), value), bits)
        assert_close(dequantize(q, torch.float32), torch.full((3, 70), value), 1e-6)


@pytest.mark.parametrize("bits", quantized.BITS)
def test_rows_are_quantized_alike_in_one_go_and_in_parts(bits, monkeypatch):
    w = weight(30, 200)
    monkeypatch.setattr(cpu, "_native", None)
    whole = quantize(w, bits)
    monkeypatch.setattr(quantized, "_QUANTIZED_AT_ONCE", 7 * 200)
    assert_same(whole, quantize(w, bits))


@pytest.mark.parametrize("bits", quantized.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_it_stands_for_what_is_defined(bits, dtype, rows, columns, tolerances):
    q = quantize(weight(rows, columns), bits)
    w = dequantize(q, dtype)
    assert w.dtype == dtype
    assert w.is_contiguous()
    assert_close(w, meant(q), tolerances["backend", dtype if dtype != torch.float64 else torch.float32])


@pytest.mark.parametrize("bits", quantized.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_products_are_those_of_float64(bits, dtype, with_bias, rows, columns, tolerances):
    q, x = quantize(weight(rows, columns), bits), input_row(columns, dtype)
    bias = weight(1, rows)[0].to(dtype) if with_bias else None
    for batch in (x, x.expand(2, 3, -1).contiguous(), x.expand(5, 2, -1)):  # one row, a few, many
        with torch.no_grad():
            y = quantized.linear(batch, q, bias)
        assert y.shape == (*batch.shape[:-1], rows)
        assert y.dtype == dtype
        exact = F.linear(batch.double(), meant(q), None if bias is None else bias.double())
        assert_close(y, exact, tolerances["backend", dtype])


@native
@pytest.mark.parametrize("bits", quantized.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(bits, dtype):
    q, x, runs = quantize(weight(1500, 576), bits), input_row(576, dtype), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                runs.append((cpu.quantized_linear_at_once(x, q, None), dequantize(q, dtype)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert torch.equal(run[0], runs[0][0])
        assert torch.equal(run[1], runs[0][1])


@native
@pytest.mark.parametrize("bits", quantized.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_among_eight(bits, dtype):
    q = quantize(weight(37, 5000), bits)  # more columns than a run
    x = torch.randn(2, 4, 5000, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        together = cpu.quantized_linear_at_once(x, q, None)
        for place in range(8):
            row = x[place // 4, place % 4].clone()
            assert torch.equal(cpu.quantized_linear_at_once(row, q, None), together[place // 4, place % 4])


@pytest.mark.parametrize("bits", quantized.BITS)
def test_many_rows_go_by_tiles_of_the_weight(bits, monkeypatch):
    q, x = quantize(weight(100, 96), bits), torch.randn(2, 5, 96)
    with torch.no_grad():
        whole = quantized.linear(x, q)
        monkeypatch.setattr(quantized, "_TILE_BYTES", 7 * 4 * 96)
        assert_close(quantized.linear(x, q), whole, 1e-6)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_torch_quantizes_to_4_bits_as_well(rows, columns, dtype, monkeypatch):
    w = weight(rows, columns).to(dtype)
    ours = quantize(w, 4)
    assert_same(ours, quantize(w.t().contiguous().t(), 4))
    monkeypatch.setattr(cpu, "_native", None)
    theirs = quantize(w, 4)
    differ = (meant(ours) != meant(theirs)).double().mean()
    assert differ < 0.01, "but for a last bit of a sum here and there, they are the same"
    errors = [(meant(q) - w).norm() for q in (ours, theirs)]
    assert abs(errors[0] - errors[1]) <= 1e-3 * errors[1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", quantized.BITS)
def test_what_is_no_number_stays_none(bits, bad):
    w = weight(3, 200)
    w[1, 77] = bad
    finite = dequantize(quantize(w, bits), torch.float32).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


@native
@pytest.mark.parametrize("bits", quantized.BITS)
def test_torch_does_the_same_without_the_extension(bits, monkeypatch):
    q, x = quantize(weight(60, 200), bits), input_row(200, torch.float32)
    with torch.no_grad():
        ours = quantized.linear(x, q), dequantize(q, torch.bfloat16)
        monkeypatch.setattr(cpu, "_native", None)
        assert_close(quantized.linear(x, q), ours[0], 1e-6)
        assert_close(dequantize(q, torch.bfloat16), ours[1], 8e-3)


@pytest.mark.parametrize("bits", quantized.BITS)
def test_a_gradient_flows_to_x_and_bias_and_keeps_no_wide_weight(bits):
    q, x = quantize(weight(6, 40), bits), torch.randn(2, 3, 40, requires_grad=True)
    bias, kept = torch.randn(6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        y = quantized.linear(x, q, bias)
    assert not kept
    dy = torch.randn(2, 3, 6)
    y.backward(dy)
    assert_close(x.grad, dy.double() @ meant(q), 1e-5)
    assert_close(bias.grad, dy.sum((0, 1)), 1e-5)


@pytest.mark.parametrize("rows", [7, 900])
def test_autocast_decides_the_dtype_whatever_the_size(rows, monkeypatch):
    monkeypatch.setattr(quantized, "_TILE_BYTES", 4 * 40 * 64)
    q, x = quantize(weight(rows, 40), 8), torch.randn(16, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantized.linear(x, q).dtype == torch.bfloat16
        assert quantized.linear(x[:1], q).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", quantized.BITS)
def test_it_is_mapped_over_biases(bits, monkeypatch):
    monkeypatch.setattr(quantized, "_TILE_BYTES", 4 * 40 * 2)
    q, x, biases = quantize(weight(6, 40), bits), torch.randn(3, 40), torch.randn(5, 6)
    with torch.no_grad():
        mapped = torch.vmap(lambda bias: quantized.linear(x, q, bias))(biases)
        assert_close(mapped, torch.stack([quantized.linear(x, q, bias) for bias in biases]), 1e-5)


@pytest.mark.parametrize("bits", quantized.BITS)
def test_function_transforms_see_it_as_torch(bits):
    q, x = quantize(weight(6, 40), bits), torch.randn(3, 40)
    w = dequantize(q, torch.float32)
    assert_close(torch.func.vmap(lambda row: quantized.linear(row, q))(x), F.linear(x, w), 1e-5)
    assert_close(torch.func.jvp(lambda x: quantized.linear(x, q), (x,), (x,))[1], F.linear(x, w), 1e-5)


@native
@pytest.mark.parametrize("bits", quantized.BITS)
def test_a_few_rows_that_are_not_contiguous_are_read_as_stored(bits):
    q, hidden = quantize(weight(6, 40), bits), torch.randn(4, 7, 40)
    with torch.no_grad():
        y = cpu.quantized_linear_at_once(hidden[:, -1:], q, None)
        for row in range(4):
            assert torch.equal(y[row, 0], quantized.linear(hidden[row, -1], q))


@pytest.mark.parametrize("is_native", [True, False])
def test_very_large_and_very_small_numbers_are_kept(is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(cpu, "_native", None)
    small = torch.tensor([[190.0, -190.0, 64.0, 5.0]], dtype=torch.float64) * 2.0**-149
    assert_close(dequantize(quantize(small.float(), 8), torch.float32).double() * 2.0**149, small * 2.0**149, 0.4)
    large = weight(3, 64) * 1e27
    assert_close(dequantize(quantize(large, 4), torch.float32) / 1e27, large / 1e27, 0.1)


@pytest.mark.parametrize("bits", quantized.BITS)
def test_a_compiler_sees_it_as_torch(bits):
    q, x = quantize(weight(6, 40), bits), input_row(40, torch.float32)
    with torch.no_grad():
        compiled = torch.compile(lambda x: quantized.linear(x, q), fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), quantized.linear(x, q), 1e-6)


@native
@pytest.mark.parametrize(
    "change",
    [
        lambda x, q: (x.expand(3, 3, -1).contiguous(), q),  # more than 8 rows
        lambda x, q: (x.double(), q),
        lambda x, q: (x, q._replace(scale=q.scale.to(torch.bfloat16))),  # by a cast of a whole model
        lambda x, q: (x, q._replace(weight=q.weight.transpose(0, 2).contiguous().transpose(0, 2))),
        lambda x, q: (x, q._replace(scale=q.scale[:5])),
        lambda x, q: (x, q._replace(columns=39)),
        lambda x, q: (x.view(1, 40, 1), q),
    ],
)
def test_what_is_not_one_plain_row_is_no_native_call(change):
    x, q = change(input_row(40, torch.float32), quantize(weight(6, 40), 8))
    with torch.no_grad():
        assert cpu.quantized_linear_at_once(x, q, None) is None


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="bits is 3; weights are quantized to 8 or 4"):
        quantize(weight(2, 3), 3)
    with pytest.raises(ValueError, match=r"the weight is torch.int64 of shape \(2, 3\); it is \(out, in\), floating"):
        quantize(torch.ones(2, 3, dtype=torch.int64), 8)
    with pytest.raises(ValueError, match=r"x has shape \(1, 1, 4\); for this weight it is \(…, 3\)"):
        quantized.linear(input_row(4, torch.float32), quantize(weight(2, 3), 8))


def assert_same(one: QuantizedWeight, other: QuantizedWeight):
    assert one.columns == other.columns
    for a, b in zip(one[:3], other[:3], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("bits", [8, 4])
def test_without_products_of_bfloat16_many_rows_are_multiplied_in_float32(without_products, bits):
    q, bias = quantize(weight(70, 300), bits), torch.randn(70).bfloat16()
    x = torch.randn(2, 11, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized.linear(x, q, bias)
    exact = F.linear(x.float(), dequantize(q, torch.float32), bias.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=4e-3, atol=1e-4)
