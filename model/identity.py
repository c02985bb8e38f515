"""What tells a model from others, and tensors from damaged ones, as hashes that are written beside saved states."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLE = 128  # elements at each of three places of a tensor, which tell one model from another


def fingerprint(model: PreTrainedModel) -> str:
    """A sha256 of a model's config and of a few elements of each of its tensors: any two models that were trained apart
    have other ones, and so has one in another dtype or with another window.
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        middle = max(0, len(flat) // 2 - _SAMPLE)
        some = torch.cat([flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:]]).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], name: str = "") -> str:
    """A sha256 of a name and of tensors on the CPU, with their names, shapes and dtypes."""
    digest = hashlib.sha256(name.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
