"""Inputs of the Hyena operator for its tests, and how what comes out is compared."""

import math

import torch

from stripedrag.kernels import ops

PARAMETERS = ("fir_weight", "fir_bias", "poles", "residues", "skip")
CPU = torch.device("cpu")


def make(length, *, batch=2, channels=12, modes=3, taps=3, groups=None, heads=None, dtype=torch.float32, seed=0):
    """Inputs whose poles lie in the unit disc, one of them 0 and one of them slow."""
    rng = torch.Generator().manual_seed(seed)
    systems = groups or channels
    radius = torch.rand(systems, modes, generator=rng) * 0.99
    radius[0, 0], radius[-1, -1] = 0.0, 0.9995
    angle = torch.rand(systems, modes, generator=rng) * 3
    poles = torch.view_as_real(torch.polar(radius, angle)).unsqueeze(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        z=torch.randn(batch, length, 3 * channels, generator=rng).to(dtype),
        fir_weight=torch.randn(3 * channels, 1, taps, generator=rng).to(dtype),
        fir_bias=torch.randn(3 * channels, generator=rng).to(dtype),
        poles=poles.to(wide),
        residues=torch.randn(systems, modes, 1, 2, generator=rng).to(wide) / modes,
        skip=torch.randn(channels, generator=rng).to(wide),
        heads=heads,
    )


def random_state(inputs, seed=1):
    rng = torch.Generator().manual_seed(seed)
    z, modes, taps = inputs["z"], inputs["poles"].shape[1], inputs["fir_weight"].shape[-1]
    batch, channels = z.shape[0], z.shape[2] // 3
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return ops.HyenaState(
        torch.randn(batch, 3 * channels, taps - 1, generator=rng).to(z.dtype),
        torch.randn(batch, channels, modes, 2, generator=rng).to(wide),
    )


def _ramp(shape):
    """Weights that differ from element to element."""
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)


def widen(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def widen_state(state):
    return ops.HyenaState(state.fir.double(), state.iir.double())


def assert_close(actual, expected, tolerance, what=""):
    assert actual.shape == expected.shape, what
    if not expected.numel():
        return
    scale = expected.abs().max().double().clamp(min=1e-30)
    worst = (actual.double() - expected.double()).abs().max() / scale
    assert worst <= tolerance, f"{what}: off by {worst:.2e} of the largest value, allowed {tolerance:.0e}"


def gradients(inputs, state, backend, mask=None):
    """Gradients of the input, every parameter and the given state, for weights that differ from number to number."""
    leaves = [inputs[n].clone().requires_grad_() for n in ("z", *PARAMETERS)]
    leaves += [t.clone().requires_grad_() for t in state]
    y, after = ops.hyena_filter(
        *leaves[:6], heads=inputs["heads"], state=ops.HyenaState(*leaves[6:]), padding_mask=mask, backend=backend
    )
    # Linear in all three: the sine of a modal state of a hundred would turn an error well inside its own tolerance into
    # one of the gradient beyond that.
    loss = sum((t.double() * _ramp(t.shape)).sum() for t in (y, *after))
    return dict(zip(("z", *PARAMETERS, "state.fir", "state.iir"), torch.autograd.grad(loss, leaves), strict=True))
