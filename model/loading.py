"""One way to any model: a prepared name, a baseline's name, a folder, or a hub id."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from stripedrag.errors import CheckpointError, SetupError, StoreError, StripedragError, UsageError, said
from stripedrag.hardware import fast_dtype
from stripedrag.kernels import cpu
from stripedrag.model.baselines import BASELINES, find, hub_id, revision, snapshot, template_options
from stripedrag.model.byte_tokenizer import ByteTokenizer
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.modeling import StripedHyenaForCausalLM, refuse_unfit
from stripedrag.model.quantization import QUANTIZATIONS, Quantization, QuantizationConfig
from stripedrag.model.smollm2 import PREPARED, STRIPED, prepared_dir

DEFAULT_MODEL = STRIPED
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: str | torch.device | None = None,
    window_tokens: int | None = None,
    quantize: Quantization | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: "stripedhyena-smol-135m" (the default), "smollm2-135m-instruct" (its transformer baseline), a
            name in `BASELINES`, a folder with config.json and safetensors, or a hub id. Only a baseline and a hub id
            can touch the network.
        dtype: None takes bfloat16 where the device multiplies it natively, else float32, but for a StripedHyena on a
            CPU whose native kernels serve bfloat16 as quickly (x86-64 with AVX2 and without AVX-512); "auto" the
            checkpoint's. To train, or for `torch.compile` on such a CPU, float32 is right.
        device: None takes a CUDA device where there is one, else the CPU.
        window_tokens: a longer window than the model was trained on, which it then reads by YaRN (Peng et al. 2023),
            with a warning; a shorter one changes nothing.
        quantize: "int8" or "int4" makes the weights of linear layers small while they are read, one tensor after the
            other; `dtype` is then that of the rest and of the arithmetic. `save_pretrained` writes what it made.

    Raises:
        SetupError: a prepared model that is not on this machine yet, or a baseline that the hub did not give.
        CheckpointError: tensors and a config that do not belong together, or are damaged.
        UsageError: a dtype that weights cannot have; a device that is not there; no such model, one without a
            tokenizer, one whose positions cannot be stretched, or one that is quantized already where it is asked for.
    """
    if quantize is not None and (not isinstance(quantize, str) or quantize not in QUANTIZATIONS):
        raise UsageError(f"quantize is {quantize!r}; weights can be {' or '.join(QUANTIZATIONS)}")
    if dtype not in (None, "auto", *_DTYPES):
        raise UsageError(f"dtype is {dtype}; weights are torch.float32, torch.bfloat16, torch.float16 or torch.float64")
    device = _device(device)
    source = _source(name_or_path)
    is_folder, pinned = Path(source).is_dir(), {"revision": revision(str(name_or_path)) or "main"}
    if is_folder and not (Path(source) / "config.json").is_file():
        raise UsageError(f"{source} has no config.json, so it is not a model folder")
    try:
        if window_tokens is not None and window_tokens < 1:
            raise UsageError(f"window_tokens is {window_tokens}; a window has at least 1")
        stated = PreTrainedConfig.get_config_dict(source, **pinned)[0].get("quantization_config")
        if not isinstance(stated, dict | None):
            raise UsageError(f"the config of {source} has the quantization_config {stated!r}; it is an object")
        config = AutoConfig.from_pretrained(source, **pinned)
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        if is_folder:
            _refuse_damaged(Path(source))
        stretched = window_tokens is not None and _stretch(config, window_tokens, str(name_or_path))
        # a StripedHyena refuses what does not fit by itself; of others transformers leaves it random
        options: dict[str, Any] = {} if isinstance(config, StripedHyenaConfig) else {"ignore_mismatched_sizes": True}
        if quantize is not None:
            if stated is not None:
                raise UsageError(f"the weights of {name_or_path} are quantized already; load it without {quantize}")
            origin = str(name_or_path) if name_or_path in PREPARED or find(str(name_or_path)) else None
            options["quantization_config"] = QuantizationConfig(QUANTIZATIONS[quantize], origin)
        dtype = dtype or default_dtype(device, is_striped=isinstance(config, StripedHyenaConfig))
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **pinned, **options
        )
        refuse_unfit(source, info)
        model = model.to(device).eval()
        model.has_stretched_window = stretched
        if stretched and isinstance(model, StripedHyenaForCausalLM):
            model.backbone.told_of_stretch = True
    except StripedragError:
        raise
    except _DAMAGES as error:
        name = str(name_or_path)
        if is_folder:
            raise UsageError(f"the model folder {source} cannot be read: {_first_line(error)}") from error
        if find(name):
            raise SetupError(
                f"the baseline {name!r} is {source} on the hub, which did not give it ({_first_line(error)}). "
                f"Fetch it with `stripedrag fetch {name}`, or give a folder."
            ) from error
        raise UsageError(
            f"no model {name!r}: it is not one of {', '.join([*PREPARED, *BASELINES])}, not a folder, and the hub did "
            f"not give it ({_first_line(error)})"
        ) from error
    return model, load_tokenizer(name_or_path)


def default_dtype(device: torch.device, *, is_striped: bool = True) -> torch.dtype:
    """What `load_model` takes unasked on a device, for a StripedHyena or for another model."""
    is_served = is_striped and device.type == "cpu" and cpu.serves_bfloat16()
    return torch.bfloat16 if is_served else fast_dtype(device)


def load_tokenizer(name_or_path: str | os.PathLike[str] = DEFAULT_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, named as for `load_model`, without its weights. No code of a model is run: Evo's
    StripedHyenas, whose tokenizer is code, read bytes.

    Raises `SetupError` for a prepared model that is not on this machine yet, `UsageError` for one without a fast
    tokenizer.
    """
    source, wanted = _source(name_or_path), revision(str(name_or_path)) or "main"
    try:
        has_file, has_settings = (_has(source, name, wanted) for name in ("tokenizer.json", "tokenizer_config.json"))
        if not has_file:
            config = AutoConfig.from_pretrained(source, revision=wanted)
            if isinstance(config, StripedHyenaConfig) and config.reads_bytes:
                return ByteTokenizer()
        # By the file as it is. AutoTokenizer makes Llama's and Mistral's anew: it drops spaces that begin a text.
        kind = PreTrainedTokenizerFast if has_file and has_settings else AutoTokenizer
        tokenizer = kind.from_pretrained(source, revision=wanted, trust_remote_code=False)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"  # as what generates needs it
        if tokenizer.chat_template is None:
            tokenizer.chat_template = template_options(str(name_or_path)).get("chat_template")
    except StripedragError:
        raise
    except _DAMAGES as error:
        raise UsageError(f"the model {str(name_or_path)!r} has no tokenizer: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {str(name_or_path)!r} has no tokenizer.json; only such fast ones stream text"
        )
    return tokenizer


def save_quantized(name_or_path: str | os.PathLike[str], to: str | os.PathLike[str], quantize: Quantization) -> int:
    """Write a model with small weights and its tokenizer as the new folder `to`, whole or not at all; the bytes of its
    weights.

    Raises `UsageError` where something is at `to`, `StoreError` where nothing can be written there, and what
    `load_model` raises.
    """
    target = Path(to)
    if target.exists():
        raise UsageError(f"{target} is there already; name a folder that is not")
    scratch = target.with_name(f".{target.name}.part")
    try:
        with _writing(target):  # what cannot be written is told before the work
            if scratch.exists():  # of a process that was killed
                shutil.rmtree(scratch)
            scratch.mkdir(parents=True)
        model, tokenizer = load_model(name_or_path, dtype="auto", device="cpu", quantize=quantize)
        with _writing(target):
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(tensor.nbytes for tensor in model.parameters())


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"could not write {target} ({said(error)}). Free space there or name another folder"
        ) from error


def model_folder(name_or_path: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The folder on this machine with the files of a model, named as for `load_model`. Asks no network.

    Raises `SetupError` where they are not on this machine.
    """
    source = _source(name_or_path)
    return Path(source) if Path(source).is_dir() else snapshot(str(name_or_path))


def _device(wanted: str | torch.device | None) -> torch.device:
    """The device, or the best there is; raises `UsageError` for one that is not there."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device is {str(wanted)!r}, which torch does not have here ({_first_line(error)}); take 'cpu', or for "
            "example 'cuda:0' where there is one"
        ) from error
    return device


def _refuse_damaged(folder: Path) -> None:
    """Look at the heads of the files of weights, before any is read: one that is cut short does not fit its own."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"the model folder {folder} cannot be read: {path.name} is damaged ({said(error)}); get a whole copy"
            ) from error


def _stretch(config: PreTrainedConfig, window_tokens: int, name: str) -> bool:
    """Make a config read `window_tokens` by YaRN; False where it reads them already."""
    window = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    is_striped = isinstance(config, StripedHyenaConfig) and not config.use_interpolated_rotary_pos_emb
    if window is not None and window_tokens <= window:
        return False
    if window is None or not (is_striped or rotary.get("rope_type") == "default"):
        raise UsageError(
            f"the window of {name} cannot be stretched: it has no rotary positions, or scales them already. Ask for "
            f"{'none' if window is None else f'at most {window} tokens'}."
        )
    if is_striped:
        trained = config.trained_tokens
        config.rotary_emb_yarn_factor = window_tokens / trained
        config.max_seqlen = window_tokens
    else:
        trained = window
        yarn = {"rope_type": "yarn", "factor": window_tokens / trained, "original_max_position_embeddings": trained}
        config.rope_parameters = rotary | yarn
        config.max_position_embeddings = window_tokens
    warnings.warn(
        f"{name} was trained on {trained} tokens at a time; its window of {window_tokens} is stretched by YaRN",
        stacklevel=3,
    )
    return True


def _source(name_or_path: str | os.PathLike[str]) -> Any:
    """A folder or a hub id, as transformers takes it."""
    name = str(name_or_path)
    if name in PREPARED:
        return prepared_dir(name)
    return hub_id(name) if find(name) else name_or_path


def _has(source: Any, name: str, revision: str) -> bool:
    """Whether a folder, or the hub, has a file."""
    return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


# what transformers raises of a damaged folder
_DAMAGES = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)


def _first_line(error: Exception) -> str:
    first, *others = str(error).strip().splitlines() or [""]
    if isinstance(error, LookupError | ArithmeticError) or not first:  # which say a key, or nothing
        return f"{type(error).__name__} {first}".strip()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
