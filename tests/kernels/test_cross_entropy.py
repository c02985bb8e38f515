"""`ops.linear_cross_entropy` against torch's loss of whole logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from stripedrag.kernels import cross_entropy, ops


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
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels)
    gradients = torch.autograd.grad(exact, (hidden, weight))
    ours = ops.linear_cross_entropy(hidden, weight, labels)
    theirs = F.cross_entropy((hidden @ weight.T).float(), labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for got, wanted in zip(torch.autograd.grad(ours, (hidden, weight)), gradients, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - wanted).norm() < 0.01 * wanted.norm()


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


def test_without_any_label_the_mean_is_no_number_and_the_sum_nothing():
    hidden, weight, labels = operands()
    none = torch.full_like(labels, -1)
    assert math.isnan(ops.linear_cross_entropy(hidden, weight, none, ignore_index=-1))
    assert ops.linear_cross_entropy(hidden, weight, none, ignore_index=-1, reduction="sum") == 0


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
