"""What tells a model from others, and tensors from damaged ones, as hashes that are written beside saved states."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

_OF_NO_NUMBERS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_SAMPLE = 128  # elements at each of three places of a tensor, which tell one model from another


def fingerprint(model: PreTrainedModel) -> str:
    """A sha256 of a model's config and of a few elements of each of its tensors: any two models that were trained apart
    have other ones, and so has one in another dtype or with another window. What says nothing of its numbers, as where
    it comes from and which tokens end a reply, is left out.
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _OF_NO_NUMBERS and not key.endswith("_token_id")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        middle = max(0, len(flat) // 2 - _SAMPLE)
        some = torch.cat([flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:]]).cpu()
        digest.update(f"{name.removeprefix('_orig_mod.')} {tuple(tensor.shape)} {tensor.dtype}".encode())
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
