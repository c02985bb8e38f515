"""One way to any model: a prepared name, a baseline's name, a folder, or a hub id."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stripedrag.errors import SetupError, StripedragError, UsageError
from stripedrag.hardware import fast_dtype
from stripedrag.model.baselines import BASELINES, hub_id, snapshot
from stripedrag.model.smollm2 import PREPARED, STRIPED, prepared_dir

DEFAULT_MODEL = STRIPED


def load_model(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: "stripedhyena-smol-135m" (the default), "smollm2-135m-instruct" (its transformer baseline), a
            name in `BASELINES`, a folder with config.json and safetensors, or a hub id. Only a baseline and a hub id
            can touch the network.
        dtype: None takes bfloat16 where the device multiplies it natively, else float32.
        device: None takes a CUDA device where there is one, else the CPU.

    Raises:
        SetupError: a prepared model that is not on this machine yet, or a baseline that the hub did not give.
        CheckpointError: a StripedHyena folder whose tensors and config do not belong together.
        UsageError: no such model, or one without a tokenizer.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or fast_dtype(device)
    source = _source(name_or_path)
    is_folder = Path(source).is_dir()
    if is_folder and not (Path(source) / "config.json").is_file():
        raise UsageError(f"{source} has no config.json, so it is not a model folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    except StripedragError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        name = str(name_or_path)
        if is_folder:
            raise UsageError(f"the model folder {source} cannot be read: {_first_line(error)}") from error
        if name in BASELINES:
            raise SetupError(
                f"the baseline {name!r} is {source} on the hub, which did not give it ({_first_line(error)}). "
                f"Fetch it with `hf download {source}`, or give a folder."
            ) from error
        raise UsageError(
            f"no model {name!r}: it is not one of {', '.join([*PREPARED, *BASELINES])}, not a folder, and the hub did "
            f"not give it ({_first_line(error)})"
        ) from error
    return model, load_tokenizer(name_or_path)


def load_tokenizer(name_or_path: str | os.PathLike[str] = DEFAULT_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, named as for `load_model`, without its weights.

    Raises `SetupError` for a prepared model that is not on this machine yet, `UsageError` for one without a fast
    tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(name_or_path))
    except (OSError, ValueError) as error:
        if isinstance(error, StripedragError):
            raise
        raise UsageError(f"the model {str(name_or_path)!r} has no tokenizer: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {str(name_or_path)!r} has no tokenizer.json; only such fast ones stream text"
        )
    return tokenizer


def model_folder(name_or_path: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The folder on this machine with the files of a model, named as for `load_model`. Asks no network.

    Raises `SetupError` where they are not on this machine.
    """
    source = _source(name_or_path)
    return Path(source) if Path(source).is_dir() else snapshot(str(source))


def _source(name_or_path: str | os.PathLike[str]) -> Any:
    """A folder or a hub id, as transformers takes it."""
    name = str(name_or_path)
    if name in PREPARED:
        return prepared_dir(name)
    return hub_id(name) if name in BASELINES else name_or_path


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
