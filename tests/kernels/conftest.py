"""Triton's kernels run in its interpreter here, which is slow: small chunks, so that few tokens are several of them,
and sequences no longer than a backend's logic needs, but in `make test-all`.
"""

import importlib.util

import pytest

from stripedrag.kernels import cpu, gpu

LONGEST = 65  # tokens
LONG = {"test_golden_filters", "test_the_response_of_a_slow_pole_holds_over_a_long_sequence"}

gpu.CHUNK_TOKENS = (16, 512)


if importlib.util.find_spec("triton"):
    from triton.runtime import interpreter

    # A call of a device function of ours patches the language anew, which the kernel's own call did: most of the time.
    _patching_call = interpreter.InterpretedFunction.__call__

    def _call(self, *args, **kwargs):
        if self.fn.__module__.startswith("stripedrag.kernels."):
            return self.rewrite()(*args, **kwargs)
        return _patching_call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call


@pytest.fixture
def without_products(monkeypatch):
    """As on a processor that has no products of bfloat16."""
    monkeypatch.setattr(cpu, "_LACKS_BFLOAT16", True)


def pytest_collection_modifyitems(items):
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        is_long = given.get("length", 0) > LONGEST or item.originalname in LONG
        if given.get("backend") == "triton" and is_long:
            item.add_marker(pytest.mark.slow)
