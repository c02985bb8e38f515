"""What every room's tests share: the table of tolerances, the golden vectors, and a network that is switched off."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRITON_INTERPRET"] = "1"  # said before triton is imported: no test has a GPU
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("untimed")

GOLDEN = Path(__file__).parent / "golden"

# The one table of tolerances: loosening an entry is a commit of its own, with its reason.
# Absolute where the name says so; else relative to the largest magnitude of the expected tensor.
TOLERANCES = {
    ("filter", torch.float64): 1e-9,  # absolute, the spec's gate
    ("filter", torch.float32): 5e-4,  # absolute, the spec's gate
    ("backend", torch.float64): 1e-10,
    ("backend", torch.float32): 5e-6,
    ("backend", torch.bfloat16): 8e-3,  # one rounding of the output: 2^-8, and one more where a sum ties
    ("backend", torch.float16): 1e-3,
    ("gradient", torch.float64): 1e-9,
    ("gradient", torch.float32): 2e-5,
    ("gradient", torch.bfloat16): 2e-2,
    ("logits", torch.float32): 5e-5,  # absolute, the spec's gate
    ("state", torch.float32): 2e-4,  # the spec's gate
}


@pytest.fixture(scope="session")
def tolerances() -> dict[tuple[str, torch.dtype], float]:
    return TOLERANCES


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN
