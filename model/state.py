"""What a model knows after a prefix, as one value: read once, saved to a file, and gone on from any number of times.

P tokens of the prefix, V words. A StripedHyena's is small: keys and values of its attention layers alone, and of each
Hyena layer a state of the same size after any number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from stripedrag.errors import CheckpointError, UsageError, said
from stripedrag.files import written_whole
from stripedrag.model import shared
from stripedrag.model.cache import block, cache_bytes, extend, new_cache, refuses_blocks
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.generation import prefill
from stripedrag.model.identity import fingerprint, tensors_sha256

_FORMAT = "stripedrag.state.1"


@dataclass(frozen=True, eq=False)
class StripedHyenaState:
    """The prefix `input_ids` (1, P) int64, the `logits` (1, V) of the token after it, and all that the model with this
    `model_fingerprint` keeps of it. `fork` and `copy` give caches to go on with; the state itself stays as it is.
    """

    input_ids: Tensor
    logits: Tensor
    model_fingerprint: str
    _cache: DynamicCache
    _config: PreTrainedConfig

    @classmethod
    def read(
        cls, model: PreTrainedModel, input_ids: Tensor, *, progress: Callable[[int, int], None] | None = None
    ) -> "StripedHyenaState":
        """The state after `input_ids` (1, P), which are read in segments of bounded memory.

        `progress` hears how many tokens are read, of how many. Raises `UsageError` for ids of another shape, and for a
        model whose cache forgets tokens (sliding windows).
        """
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise UsageError(f"input_ids has shape {tuple(input_ids.shape)}; a prefix is (1, P), P of at least 1")
        cache = new_cache(model.config)
        if why := refuses_blocks(cache):
            raise UsageError(f"the state of this model cannot be taken out: {why}")
        logits = prefill(model, input_ids.to(model.device), cache, progress=progress)
        ids = input_ids.detach().cpu().clone(memory_format=torch.contiguous_format)
        return cls(ids, logits, fingerprint(model), cache, model.config)

    def __len__(self) -> int:
        """The tokens of the prefix, P."""
        return int(self.input_ids.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return cache_bytes(self._cache)

    def fork(self, rows: int = 1) -> DynamicCache:
        """A cache for so many continuations, as a batch: its rows share the prefix's keys and values, which are not
        copied, and each has Hyena states of its own. Raises `UsageError` for a model that is no StripedHyena.
        """
        if rows < 1:
            raise UsageError(f"rows is {rows}; a fork has at least 1")
        if not isinstance(self._config, StripedHyenaConfig):
            raise UsageError(f"a {self._config.model_type} cannot read a forked cache; take copies")
        return shared.fork(self._cache, rows)

    def copy(self) -> DynamicCache:
        """A cache of one continuation with all of the prefix copied: for a transformer, or a long continuation."""
        cache = new_cache(self._config, expected_tokens=len(self))
        extend(cache, block(self._cache, 0))
        return cache

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state as one safetensors file, whole or not at all."""
        held = {name: tensor.cpu() for name, tensor in block(self._cache, 0).items()}
        tensors = held | {"input_ids": self.input_ids, "logits": self.logits.cpu().contiguous()}
        about = {"format": _FORMAT, "model": self.model_fingerprint, "sha256": tensors_sha256(tensors)}
        try:
            with written_whole(Path(path)) as scratch:
                save_file(tensors, scratch, metadata=about)
        except SafetensorError as error:  # what it says of a full disk
            raise OSError(f"the state cannot be written to {path}: {said(error)}") from error

    @classmethod
    def load(cls, path: str | PathLike[str], model: PreTrainedModel) -> "StripedHyenaState":
        """A state that `save` wrote, for the same model, on that model's device.

        Raises `CheckpointError` for a file that is none, is damaged, or is of another model (other weights, dtype or
        window); what it is of is looked at before its tensors are read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise CheckpointError(f"{path} is no saved state ({_FORMAT}); give a file that `save` wrote")
                if about.get("model") != (ours := fingerprint(model)):
                    raise CheckpointError(
                        f"{path} is of the model {about.get('model', '')[:12]}, and this one is {ours[:12]}: other "
                        "weights, another dtype or another window. Load it with the model that it was saved from, in "
                        "its dtype"
                    )
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({said(error)}); read the prefix again") from error
        if tensors_sha256(tensors) != about.get("sha256"):
            raise CheckpointError(f"{path} is damaged (its tensors have another sha256); read the prefix again")
        ids, logits = tensors.pop("input_ids"), tensors.pop("logits").to(model.device)
        cache = new_cache(model.config)
        extend(cache, {name: tensor.to(model.device) for name, tensor in tensors.items()})
        return cls(ids, logits, ours, cache, model.config)
