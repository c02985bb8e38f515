"""Attention is attention: the native one to a rounding, for any threads and wherever a prompt is split; in parts."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from stripedrag.hardware import fast_dtype
from stripedrag.kernels import cpu, ops
from stripedrag.kernels.attention import attend, by_whole_heads, in_parts

native = pytest.mark.skipif(not cpu.has_attention(), reason="no native attention in bfloat16, or AMX")
has_kernels = pytest.mark.skipif(cpu.instruction_set() is None, reason="no native kernels")


def _made(heads=6, kv_heads=2, new=70, past=300, width=64, batch=1, seed=0):
    torch.manual_seed(seed)
    k, v = torch.randn(2, batch, kv_heads, past + new, width).bfloat16()
    return 2 * torch.randn(batch, heads, new, width).bfloat16(), k, v


def _exact(q, k, v):
    past = k.shape[2] - q.shape[2]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)


def _read(q, k, v):
    with torch.no_grad():
        attended = cpu.attention_at_once(q, k, v)
        if q.dtype == torch.float32 and not cpu.has_attention(torch.float32):
            return cpu.attention(q, k, v)  # which can be asked for where it is not chosen
        assert attended is not None
        if q.shape[2] > 1:  # one token is for another kernel
            assert torch.equal(attended.nan_to_num(), ops.attend(q, k, v).nan_to_num())
    return attended


def _read_one(q, k, v):
    with torch.no_grad():
        attended = cpu.token_attention_at_once(q, k, v)
        assert attended is not None and torch.equal(attended.nan_to_num(), ops.attend(q, k, v).nan_to_num())
    return attended


@has_kernels
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 9),
    keys=st.integers(1, 900),
    width=st.sampled_from([1, 3, 16, 31, 48, 64, 80, 128, 144]),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_one_token_reads_all_keys_for_any_threads(kv_heads, groups, keys, width, batch, dtype):
    q, k, v = (t.to(dtype) for t in _made(groups * kv_heads, kv_heads, 1, keys + 8, width, batch))
    k, v = k[:, :, :keys], v[:, :, :keys]  # as in a buffer: heads are not contiguous
    runs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(_read_one(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    assert (runs[0] - exact).abs().max() <= tolerance * max(1.0, v.abs().max().item())


@has_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_sees_what_is_no_number_and_overlooks_what_is_infinitely_far(dtype):
    q, k, v = (t.to(dtype) for t in _made(heads=2, kv_heads=1, new=1, past=299))
    far = k.clone()
    far[:, :, ::2] = -torch.inf * q[:, :1].sign()
    expected = _read_one(q[:, :1], k[:, :, 1::2].contiguous(), v[:, :, 1::2].contiguous())
    torch.testing.assert_close(_read_one(q[:, :1], far, v), expected, rtol=0, atol=1e-2)
    far[:, :, :256] = -torch.inf * q[:, :1].sign()
    expected = _read_one(q[:, :1], k[:, :, 257::2].contiguous(), v[:, :, 257::2].contiguous())
    torch.testing.assert_close(_read_one(q[:, :1], far, v), expected, rtol=0, atol=1e-2)
    v[0, 0, 17, 5] = torch.nan
    seen = _read_one(q, k, v).isnan()
    assert seen[..., 5].all() and seen.sum() == 2


def test_gradients_of_grouped_queries_are_those_of_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    dy = torch.randn(2, 6, 9, 16, dtype=torch.float64)
    wide = [t.repeat_interleave(3, dim=1) for t in (k, v)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, *wide, is_causal=True), (q, k, v), dy)
    for got, wanted in zip(torch.autograd.grad(ops.attend(q, k, v), (q, k, v), dy), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@native
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    new=st.integers(1, 330),
    past=st.integers(0, 600),
    width=st.sampled_from([16, 32, 48, 64, 80, 96, 128, 144]),
    batch=st.integers(1, 2),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_it_is_attention_for_any_threads_and_split(kv_heads, groups, new, past, width, batch, threads, dtype, data):
    q, k, v = (t.to(dtype) for t in _made(groups * kv_heads, kv_heads, new, past, width, batch))
    whole = _read(q, k, v)
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 8e-3}[dtype]
    assert (whole - _exact(q, k, v)).abs().max() <= tolerance * max(1.0, v.abs().max().item())
    cut = data.draw(st.integers(0, new - 1), "cut")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = [_read(q[:, :, :cut], k[:, :, : past + cut], v[:, :, : past + cut])] if cut else []
        parts = torch.cat([*first, _read(q[:, :, cut:], k, v)], 2)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(parts, whole)


@native
def test_strides_are_the_callers():
    q, k, v = _made(batch=2)
    room = torch.full(
        (2, 2, 2, 400, 64), torch.nan, dtype=torch.bfloat16
    )  # as a cache's buffers, longer than what is in them
    room[0, :, :, :370], room[1, :, :, :370] = k, v
    rows = torch.stack([q, q], 2).permute(0, 3, 1, 2, 4)[:, :, :, 0].transpose(1, 2)
    assert not rows.is_contiguous()
    assert torch.equal(_read(rows, *room[:, :, :, :370]), _read(q, k, v))


@native
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e12, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size(size, dtype):
    q, k, v = (t.to(dtype) for t in _made(new=20, past=500))
    k = (k * size).to(dtype)
    torch.testing.assert_close(_read(q, k, v), _exact(q, k, v).to(dtype), rtol=0, atol=4e-2)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_of_minus_infinity_weighs_nothing(dtype):
    q, k, v = (t.to(dtype) for t in _made(heads=1, kv_heads=1, new=20, past=300))
    q, k = q.abs(), k.abs()
    k[:, :, :280] = -torch.inf  # the whole of the first block, and some
    torch.testing.assert_close(_read(q, k, v), _exact(q, k, v).to(dtype), rtol=0, atol=4e-2)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_so_where_it_is_seen(dtype):
    q, k, v = (t.to(dtype) for t in _made(new=20, past=0))
    k[0, 0, 7, 3] = torch.nan
    nan = _read(q, k, v).isnan()
    assert nan[0, :3, 7:].all() and not nan[0, :3, :7].any() and not nan[0, 3:].any()


@native
def test_keys_that_several_rows_share_and_odd_strides():
    q, k, v = _made(heads=4, kv_heads=1, new=9, past=30, width=32, batch=3)
    one = torch.empty(1 + 39 * 33 + 32, dtype=torch.bfloat16)[1:]
    shared = one.as_strided((3, 4, 39, 32), (0, 0, 33, 1))  # every batch and head the same, 33 numbers a token
    one.as_strided((39, 32), (33, 1)).copy_(k[0, 0])
    expected = _read(q, shared.contiguous(), v.expand(-1, 4, -1, -1).contiguous())
    assert torch.equal(_read(q, shared, v.expand(-1, 4, -1, -1)), expected)
    with torch.inference_mode():
        assert torch.equal(ops.attend(q, shared, v.expand(-1, 4, -1, -1)), expected)


@native
def test_a_compiler_is_given_torchs_attention():
    q, k, v = _made(new=9, past=30)
    with torch.no_grad():
        compiled = torch.compile(ops.attend, fullgraph=True, backend="eager")(q, k, v)
    torch.testing.assert_close(compiled, _read(q, k, v), rtol=0, atol=4e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("past", [0, 1, 700])
@pytest.mark.parametrize("new", [1, 2, 65])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_new_tokens_read_what_came_before_and_themselves_causally(dtype, tolerance, past, new, kv_heads):
    torch.manual_seed(0)
    room = torch.randn(2, 2, kv_heads, past + new + 9, 16, dtype=dtype)  # as in a buffer: heads are not contiguous
    k, v = room[:, :, :, : past + new]
    q = torch.randn(2, new, 6, 16, dtype=dtype).transpose(1, 2)
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    wide = (t.double() for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    for seen in (None, mask[None, None]):
        torch.testing.assert_close(attend(q, k, v, seen), expected.to(dtype), rtol=0, atol=tolerance)
    with torch.no_grad():
        for read in (attend, in_parts):
            torch.testing.assert_close(read(q, k, v), expected.to(dtype), rtol=0, atol=tolerance)


def test_what_no_kernel_is_for_is_left_to_torch():
    q, k, v = _made()
    with torch.no_grad():
        assert cpu.attention_at_once(q.double(), k.double(), v.double()) is None
        if not cpu.has_attention(torch.float32):
            assert cpu.attention_at_once(q.float(), k.float(), v.float()) is None
        assert cpu.attention_at_once(q[..., :20], k[..., :20], v[..., :20]) is None
        assert cpu.attention_at_once(q.mT.contiguous().mT, k, v) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu.attention_at_once(q, k, v) is None
    assert cpu.attention_at_once(q.requires_grad_(), k, v) is None
    environment = os.environ | {"STRIPEDRAG_ISA": "v2"}
    program = "from stripedrag.kernels import cpu; print(cpu.instruction_set(), cpu.has_attention())"
    told = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert told.split() in (["v2", "False"], ["native", "False"], ["None", "False"])


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 6, 5, 64), (1, 4, 9, 64), (1, 4, 9, 64)),
        ((1, 6, 5, 64), (1, 2, 4, 64), (1, 2, 4, 64)),
        ((1, 6, 5, 64), (1, 2, 9, 64), (1, 2, 8, 64)),
        ((1, 6, 5, 64), (2, 2, 9, 64), (2, 2, 9, 64)),
        ((1, 6, 5, 64), (1, 2, 9, 32), (1, 2, 9, 32)),
        ((1, 6, 5, 64), (1, 0, 9, 64), (1, 0, 9, 64)),
        ((1, 6, 5, 64), (2, 9, 64), (2, 9, 64)),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(ValueError, match=r"q has shape \(1, 6, 5, 64\)"):
        ops.attend(*(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes))


@native
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    tokens=st.integers(2, 330),
    past=st.sampled_from([0, 5]),
    width=st.sampled_from([16, 48, 64, 128]),
    batch=st.integers(1, 2),
)
@example(kv_heads=2, groups=3, tokens=1100, past=0, width=16, batch=1)
def test_its_gradient_is_that_of_attention(kv_heads, groups, tokens, past, width, batch):
    operands = [t.requires_grad_() for t in _made(groups * kv_heads, kv_heads, tokens, past, width, batch)]
    wide = [t.detach().double().requires_grad_() for t in operands]
    y, exact = ops.attend(*operands), _exact(*wide)
    node, dtype = y.grad_fn, torch.bfloat16
    if cpu.lacks_products(y):  # whose products are of float32, and rounded once
        node, dtype = y.grad_fn.next_functions[0][0], torch.float32
    assert ("_Attention" in type(node).__name__) == (past == 0 and cpu.has_attention(dtype))  # the native one
    dy = torch.randn(y.shape).bfloat16()
    with torch.no_grad():
        assert past or torch.equal(y, ops.attend(*operands))
    mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
    theirs = by_whole_heads(*operands, mask)
    made = (torch.autograd.grad(out, given, dy) for out, given in ((y, operands), (theirs, operands), (exact, wide)))
    for ours, torchs, wanted in zip(*made, strict=True):
        error = (ours - wanted).norm()
        assert ours.dtype == torch.bfloat16
        assert error <= 1.25 * (torchs - wanted).norm() + 5e-3 * wanted.norm()
        if dtype is torch.float32 or tokens > 3:  # else an output that was rounded is 6 % wrong, torch's too
            assert error <= 5e-2 * wanted.norm() + 1e-2


@pytest.mark.skipif(not cpu.has_attention() or cpu.serves_bfloat16(), reason="no native gradient of attention")
@pytest.mark.parametrize(
    ("kv_heads", "groups", "tokens", "width", "batch"),
    [(1, 1, 2, 16, 1), (2, 3, 193, 64, 2), (3, 1, 384, 80, 1), (1, 4, 700, 128, 2), (5, 2, 192, 144, 1)],
)
def test_the_native_gradient_has_the_same_bits_for_any_threads(kv_heads, groups, tokens, width, batch):
    q, k, v = _made(groups * kv_heads, kv_heads, tokens, 0, width, batch)
    lse = torch.empty(q.shape[:3])
    y, dy = cpu.attention(q, k, v, lse), torch.randn(q.shape).bfloat16()
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            made.append(cpu.attention_gradient_at_once(dy, q, k, v, y, lse))
    finally:
        torch.set_num_threads(before)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(_exact(*wide), wide, dy)
    for gradients in made:
        for one, first, wanted in zip(gradients, made[0], exact, strict=True):
            assert torch.equal(one, first)
            assert (one - wanted).norm() <= 1e-2 * wanted.norm() + 1e-2


@native
def test_a_gradient_is_that_of_what_is_asked_for_in_any_layout():
    torch.manual_seed(0)
    rows = torch.randn(2, 40, 10, 16).bfloat16().requires_grad_()  # q, k and v of a product, as a model has them
    q, k, v = rows.transpose(1, 2).split((6, 2, 2), dim=1)
    (made,) = torch.autograd.grad(ops.attend(q, k, v).sum(), rows)  # of which dy is one number
    plain = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    y = ops.attend(*plain)
    each = torch.autograd.grad(y, plain, torch.ones_like(y))
    assert torch.equal(made.transpose(1, 2), torch.cat(each, dim=1))
    alone = ops.attend(plain[0].detach(), plain[1], plain[2].detach())
    assert torch.equal(torch.autograd.grad(alone, plain[1], torch.ones_like(y))[0], each[1])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT):
        y = ops.attend(*plain)
    for one, other in zip(torch.autograd.grad(y, plain, torch.ones_like(y)), each, strict=True):
        assert torch.equal(one, other)


def test_in_parts_is_torchs_alone(monkeypatch):
    monkeypatch.setattr(cpu, "attention", lambda *arguments: pytest.fail("torch's rival would be ours"))
    q, k, v = (t.to(fast_dtype()) for t in _made())
    with torch.inference_mode():
        got = in_parts(q, k, v)
    torch.testing.assert_close(got.double(), _exact(q, k, v), rtol=0, atol=3e-2)


@native
@torch.inference_mode()
def test_what_rows_share_is_read_by_the_native_kernel(monkeypatch):
    read, attention = [], cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *arguments: read.append(1) or attention(*arguments))
    q, k, v = _made(new=5, past=0, batch=3)
    _, keys, values = _made(new=70, past=0)
    ops.attend_shared(q, keys, values, k, v, torch.ones(3, 5, 5, dtype=torch.bool).tril())
    assert read == [1]


@native
def test_the_log_sum_exp_is_of_the_scaled_scores():
    q, k, v = _made(new=70, past=300, batch=2)
    lse = torch.full(q.shape[:3], torch.nan)
    cpu.attention(q, k, v, lse)
    wide = k.double().repeat_interleave(3, dim=1)
    scores = q.double() @ wide.transpose(-1, -2) / 8
    seen = torch.ones(70, 370, dtype=torch.bool).tril(300)
    torch.testing.assert_close(lse.double(), scores.masked_fill(~seen, -torch.inf).logsumexp(-1), rtol=1e-5, atol=1e-4)


@native
def test_under_autocast_a_gradient_is_that_of_narrow_numbers():
    operands = [t.float().requires_grad_() for t in _made(new=70, past=0)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.attend(*operands)
    narrow = [t.detach().bfloat16().requires_grad_() for t in operands]
    expected = ops.attend(*narrow)
    assert torch.equal(y, expected)
    dy = torch.ones_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, operands, dy), torch.autograd.grad(expected, narrow, dy), strict=True
    ):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize("way", ["plain", "mask", "gradient", "shared", "one token"])
def test_without_products_of_bfloat16_what_is_read_is_float32s_rounded(without_products, width, way):
    q, k, v = _made(new=1 if way == "one token" else 9, past=0 if way == "gradient" else 30, width=width, batch=2)
    wide = [t.float() for t in (q, k, v)]
    if way == "gradient":
        operands, of_wide = ([t.clone().requires_grad_() for t in given] for given in ((q, k, v), wide))
        made = [torch.autograd.grad(ops.attend(*given).sum(), given) for given in (operands, of_wide)]
    elif way == "shared":
        seen = torch.ones(2, 9, 30 + 9, dtype=torch.bool).tril(30)
        with torch.no_grad():
            made = [
                [ops.attend_shared(given[0], *(t[:1] for t in given[1:]), *given[1:], seen)]
                for given in ((q, k, v), wide)
            ]
    else:
        mask = torch.ones(2, 1, q.shape[2], k.shape[2], dtype=torch.bool) if way == "mask" else None
        layouts = ((q, k, v), (q, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))))
        with torch.no_grad():
            made = [[ops.attend(*given, mask) for given in layouts], [ops.attend(*wide, mask)] * 2]
    for ours, wanted in zip(*made, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), wanted, rtol=1e-2, atol=1e-2)
