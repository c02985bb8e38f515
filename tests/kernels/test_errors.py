"""A bad input to the operator gets one clear error that names the value, the limit and the mend."""

import os
import shutil

import pytest
import torch

from stripedrag.errors import BackendError
from stripedrag.kernels import ops
from stripedrag.kernels.dispatch import BACKENDS, select


@pytest.fixture
def inputs():
    return dict(
        z=torch.zeros(2, 5, 12),
        fir_weight=torch.zeros(12, 1, 3),
        fir_bias=torch.zeros(12),
        poles=torch.zeros(4, 2, 1, 2),
        residues=torch.zeros(4, 2, 1, 2),
        skip=torch.zeros(4),
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(z=torch.zeros(2, 12)), r"z has shape \(2, 12\); a sequence is \(B, L, 3H\)"),
        (dict(z=torch.zeros(2, 0, 12)), "with L of at least 1"),
        (dict(z=torch.zeros(2, 5, 0)), "0 channels; it takes float16, bfloat16, float32 or float64 and 3H"),
        (dict(z=torch.zeros(2, 5, 13)), "13 channels; it takes float16, bfloat16, float32 or float64 and 3H"),
        (dict(z=torch.zeros(2, 5, 12, dtype=torch.long)), "z is torch.int64"),
        (dict(fir_weight=torch.zeros(12, 3)), r"fir_weight has shape \(12, 3\); for this z it is \(12, 1, K\)"),
        (dict(fir_bias=torch.zeros(4)), r"fir_bias has shape \(4,\); for this z it is \(12,\)"),
        (dict(skip=torch.zeros(12)), r"skip has shape \(12,\); for this z it is \(4,\)"),
        (dict(poles=torch.zeros(3, 2, 1, 2)), "with G a divisor of 4"),
        (dict(residues=torch.zeros(4, 3, 1, 2)), "they go in pairs"),
        (dict(poles=torch.zeros(4, 2, 1, 2).bfloat16()), "a pole of 0.9995 becomes 1; keep it in float32"),
        (dict(residues=torch.zeros(4, 2, 1, 2).double()), "residues torch.float64 .* they go in pairs"),
        (dict(skip=torch.zeros(4, dtype=torch.long)), "skip is torch.int64; it takes a floating dtype"),
        (dict(heads=3), "heads is 3; it is an int that divides H, which is 4"),
        (dict(heads=2.0), r"heads is 2\.0; it is an int that divides H, which is 4"),
        (dict(padding_mask=torch.ones(2, 5)), "padding_mask is torch.float32"),
        (dict(padding_mask=torch.ones(2, 4, dtype=torch.bool)), r"of shape \(2, 5\), True for a real token"),
        (dict(skip=torch.zeros(4, device="meta")), "skip is on meta and z on cpu; move them together"),
        (
            dict(state=ops.HyenaState(torch.zeros(1, 12, 2), torch.zeros(2, 4, 2, 2))),
            r"state.fir is torch.float32 of shape \(1, 12, 2\)",
        ),
        (
            dict(state=ops.HyenaState(torch.zeros(2, 12, 2), torch.zeros(2, 4, 2, 2).transpose(-1, -2))),
            "its last axis contiguous",
        ),
        (
            dict(state=ops.HyenaState(torch.zeros(2, 12, 2), torch.zeros(2, 4, 2, 2).bfloat16())),
            "state.iir is torch.bfloat16",
        ),
    ],
)
def test_bad_inputs_are_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        ops.hyena_filter(**(inputs | change))


@pytest.mark.parametrize(
    "out,message",
    [
        (
            torch.zeros(2, 5, 3),
            r"out is torch.float32 of shape \(2, 5, 3\) on cpu; for this z it is .* of shape \(2, 5, 4\)",
        ),
        (torch.zeros(2, 5, 4).double(), "out is torch.float64"),
        (torch.zeros(2, 4, 5).transpose(1, 2), "its last axis contiguous"),
        (torch.zeros(1, 5, 4).expand(2, -1, -1), "several of its rows share memory"),
        (torch.zeros(99).as_strided((2, 5, 4), (20, 3, 1)), "several of its rows share memory"),
        ("the value in z", r"out lies in the storage of z; of that it may only be z\[..., :H\]"),
        ("the gate, column-split", r"in the plain layout \(heads=None\)"),
        ("a gradient", "no gradient flows through out"),
    ],
)
def test_a_bad_out_is_named(inputs, out, message):
    if out == "a gradient":
        inputs["skip"], out = torch.zeros(4, requires_grad=True), torch.zeros(2, 5, 4)
    elif isinstance(out, str):
        inputs["heads"] = 2 if "column" in out else None
        out = inputs["z"][..., :4] if "column" in out else inputs["z"][..., 8:]
    with pytest.raises(ValueError, match=message):
        ops.hyena_filter(**inputs, out=out)


def test_a_step_takes_one_token(inputs):
    state = ops.HyenaState(torch.zeros(2, 12, 2), torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"one token is \(B, 3H\)"):
        ops.hyena_step(**inputs, state=state)


def test_a_step_refuses_to_record_a_gradient(inputs):
    state = ops.HyenaState(torch.zeros(2, 12, 2), torch.zeros(2, 4, 2, 2))
    inputs["z"] = torch.zeros(2, 12, requires_grad=True)
    with pytest.raises(ValueError, match=r"not differentiable; call it under torch.no_grad"):
        ops.hyena_step(**inputs, state=state)


def test_a_misspelt_backend_is_corrected(inputs):
    with pytest.raises(
        BackendError, match=r"no kernel backend 'torhc'; did you mean 'torch'\? On this machine: .*torch"
    ):
        ops.hyena_filter(**inputs, backend="torhc")


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(BackendError, match=r"torch refused: .*float64, which MPS does not have"):
        select("torch", torch.device("mps"))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_where_a_compiler_is_the_native_kernels_are():
    """Their other tests are skipped without them, and a build that fails leaves the package installed."""
    assert BACKENDS["cpu"].refuses(torch.device("cpu")) is None
    assert select(None, torch.device("cpu")).name == "cpu"


def test_the_reference_is_never_chosen_unasked():
    assert not BACKENDS["reference"].automatic
    assert select(None, torch.device("cpu")).name != "reference"
