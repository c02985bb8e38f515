"""Tiny models: the golden ones as checkpoint folders, and a way to write such a folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import stripedrag.model  # noqa: F401  (registers the model)
from stripedrag.model import StripedHyenaForCausalLM

NAMES = ("sh_tiny", "evo_tiny")


class Golden:
    def __init__(self, name, directory):
        self.name = name
        meta = json.loads((directory / f"{name}.json").read_text())
        tensors = load_file(directory / f"{name}.safetensors")
        self.config = meta["config"]
        self.prompt_tokens = meta["prompt_len"]
        self.weights = {k: v for k, v in tensors.items() if not k.startswith("golden.")}
        self.expected = {k.removeprefix("golden."): v for k, v in tensors.items() if k.startswith("golden.")}
        self.ids = self.expected["input_ids"]

    def write(self, folder, *, prefix="", config=None, weights=None):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config or self.config))
        weights = self.weights if weights is None else weights
        save_file({prefix + k: v for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


@pytest.fixture(scope="session", params=NAMES)
def golden(request, golden_dir):
    return Golden(request.param, golden_dir)


@pytest.fixture(scope="session")
def sh_tiny(golden_dir):
    return Golden("sh_tiny", golden_dir)


@pytest.fixture
def model(golden, tmp_path):
    return StripedHyenaForCausalLM.from_pretrained(golden.write(tmp_path / golden.name), dtype=torch.float32).eval()
