"""`ops.linear_cross_entropy` against torch's loss of whole logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stripedrag.kernels import cpu, cross_entropy, ops


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(30, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(30, (50,), generator=generator)
    labels[[0, 7, 49]] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_torchs(monkeypatch, rows, reduction):
    monkeypatch.setattr(cross_entropy, "_LOGITS", 30 * rows)
    hidden, weight, labels = operands(torch.float64)
    got = ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert ours[0][7].abs().max() == 0


def test_in_bfloat16_it_is_as_near_as_torch_is():
    hidden, weight, labels = operands(torch.bfloat16)
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, labels), wide)
    ours = ops.linear_cross_entropy(hidden, weight, labels)
    theirs = F.cross_entropy((hidden @ weight.T).float(), labels)
    if cpu.lacks_products(hidden):  # no logit is rounded
        assert ours.item() == pytest.approx(F.cross_entropy(wide[0] @ wide[1].T, labels).item(), rel=1e-6)
    else:
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs))
    for one, other, wanted in zip(*gradients, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - wanted).norm() < 1.2 * (other - wanted).norm()


def test_what_asks_for_no_gradient_gets_none():
    hidden, weight, labels = operands()
    whole = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    for one, (of_hidden, of_weight) in enumerate(((hidden, weight.detach()), (hidden.detach(), weight))):
        (made,) = torch.autograd.grad(ops.linear_cross_entropy(of_hidden, of_weight, labels), (hidden, weight)[one])
        assert torch.equal(made, whole[one])
    with torch.no_grad():
        assert not ops.linear_cross_entropy(hidden, weight, labels).requires_grad


def test_under_autocast_products_are_narrow():
    hidden, weight, labels = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = ops.linear_cross_entropy(hidden, weight, labels)
        expected = F.cross_entropy(hidden @ weight.T, labels)
    assert narrow.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (narrow, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("rows", [50, 0])
def test_without_any_label_the_mean_is_no_number_and_no_gradient_moves(rows):
    hidden, weight, labels = operands()
    none = torch.full_like(labels, -1)[:rows]
    for reduction, is_nan in (("mean", True), ("sum", False)):
        loss = ops.linear_cross_entropy(hidden[:rows], weight, none, ignore_index=-1, reduction=reduction)
        assert math.isnan(loss.item()) == is_nan
        assert is_nan or loss.item() == 0
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert not gradient.any()


def test_logits_live_a_part_at_a_time(monkeypatch):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    hidden, weight, labels = (torch.cat([tensor] * 20) if i != 1 else tensor for i, tensor in enumerate(operands()))
    monkeypatch.setattr(cross_entropy, "_LOGITS", 300)
    with Sizes() as sizes:
        torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    assert sizes.largest == hidden.numel() < len(hidden) * len(weight)


def test_it_compiles_as_one_graph():
    hidden, weight, labels = operands()
    compiled = torch.compile(ops.linear_cross_entropy, backend="eager", fullgraph=True)
    ours, theirs = compiled(hidden, weight, labels), ops.linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)), strict=True):
        assert torch.equal(one, other)


def test_a_second_derivative_is_refused():
    hidden, weight, labels = operands()
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="can be differentiated once; for more take the loss of whole logits"):
        torch.autograd.grad(loss, (hidden, weight), create_graph=True)


def test_bad_operands_are_named():
    hidden, weight, labels = operands()
    with pytest.raises(ValueError, match=r"hidden has shape \(50, 8\), weight \(30, 7\) and labels \(50,\)"):
        ops.linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels \(49,\); they are \(R, H\), \(V, H\) and \(R,\)"):
        ops.linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"labels holds 30; they are in \[0, 30\), or -100 where there is none"):
        ops.linear_cross_entropy(hidden, weight, labels.clone().fill_(30))
    with pytest.raises(ValueError, match=r"labels holds -100; they are in \[0, 30\), or -1 where"):
        ops.linear_cross_entropy(hidden, weight, labels, ignore_index=-1)
    with pytest.raises(ValueError, match="reduction is 'none'; it is 'mean' or 'sum'"):
        ops.linear_cross_entropy(hidden, weight, labels, reduction="none")
