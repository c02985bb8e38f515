"""Published models by name, to be read by the same pipeline as our StripedHyena. Knows hub ids and facts, no tensors.

`window_tokens` is the length that a model was trained to read, which its config's max_position_embeddings may exceed.
Sources are the model cards on the hub, and the config.json and tokenizer_config.json beside them, as stored copies
showed them; none of these models was run here.

- Llama-2: 4,096 (config; arXiv 2307.09288). Its chat template writes BOS itself.
- Yi-6B: 4k tokens for base and chat (README of github.com/01-ai/Yi); its tokenizer adds no BOS.
- Mistral-7B-v0.1: 8k, attention over the last 4,096 (config; card of Instruct-v0.2: "32k context window (vs 8k context
  in v0.1)", "No Sliding-Window Attention"; arXiv 2310.06825). Instruct is v0.2 and not v0.3: v0.2 has the vocabulary of
  v0.1, so that a budget buys both the same text. Its template refuses a system message.
- LFM2: "context length 32,768 tokens" (cards), though config says 128,000. Short convolutions and attention.
- Qwen3: "32,768 natively" (cards), though config says 40,960. It thinks before it answers, unless the template closes
  the thought by enable_thinking=False.
- StripedHyena-7B: "trained on sequences of up to 32k" (cards). The Nous card gives a prompt format, its tokenizer no
  template; the one here writes that format. Its training code wrote another, which is the variant "training".
- Evo-1: DNA, a byte a token; 8,192 and 131,072 (config). Of both the revision 1.1_fix: the first weights had "a wrong
  permutation of some projections" (cards; loaded so by github.com/evo-design/evo).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stripedrag.errors import SetupError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INSTRUCTION = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n### Response:\n' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + '\n\n' }}"
    "{% else %}{{ raise_exception('this format has user and assistant only') }}{% endif %}{% endfor %}"
)
_TRAINING_INSTRUCTION = _INSTRUCTION.replace("{{ bos_token }}", "").replace("\n\n", "\n")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Baseline:
    """A published model: where it is, how far it reads, and how its chat template is to be called.

    `licence` is the hub's name for it, `revision` one that is not its newest. `template_options` are keyword arguments
    of `apply_chat_template`, and so are those of each of the `variants`, which a model is asked for by NAME:VARIANT.
    """

    hub_id: str
    window_tokens: int
    licence: str
    note: str
    template_options: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    revision: str | None = None


def _qwen3(size: str) -> Baseline:
    return Baseline(
        f"Qwen/Qwen3-{size}", 32768, "apache-2.0", "chat, its thinking switched off", {"enable_thinking": False}
    )


def _lfm2(size: str) -> Baseline:
    return Baseline(f"LiquidAI/LFM2-{size}", 32768, "lfm1.0", "chat, short convolutions in 10 of 16 layers")


BASELINES: dict[str, Baseline] = {
    "stripedhyena-hessian-7b": Baseline("togethercomputer/StripedHyena-Hessian-7B", 32768, "apache-2.0", "base"),
    "stripedhyena-nous-7b": Baseline(
        "togethercomputer/StripedHyena-Nous-7B",
        32768,
        "apache-2.0",
        "chat",
        {"chat_template": _INSTRUCTION},
        variants={"training": {"chat_template": _TRAINING_INSTRUCTION}},
    ),
    "evo-1-8k": Baseline("togethercomputer/evo-1-8k-base", 8192, "apache-2.0", "DNA, base", revision="1.1_fix"),
    "evo-1-131k": Baseline("togethercomputer/evo-1-131k-base", 131_072, "apache-2.0", "DNA, base", revision="1.1_fix"),
    "llama-2-7b": Baseline("meta-llama/Llama-2-7b-hf", 4096, "llama2", "base, gated on the hub"),
    "llama-2-7b-chat": Baseline("meta-llama/Llama-2-7b-chat-hf", 4096, "llama2", "chat, gated on the hub"),
    "yi-6b": Baseline("01-ai/Yi-6B", 4096, "apache-2.0", "base"),
    "yi-6b-chat": Baseline("01-ai/Yi-6B-Chat", 4096, "apache-2.0", "chat"),
    "mistral-7b": Baseline("mistralai/Mistral-7B-v0.1", 8192, "apache-2.0", "base, sliding window of 4,096"),
    "mistral-7b-instruct": Baseline("mistralai/Mistral-7B-Instruct-v0.2", 32768, "apache-2.0", "chat, full attention"),
    "lfm2-350m": _lfm2("350M"),
    "lfm2-1.2b": _lfm2("1.2B"),
    "qwen3-0.6b": _qwen3("0.6B"),
    "qwen3-1.7b": _qwen3("1.7B"),
    "qwen3-4b": _qwen3("4B"),
    "qwen3-8b": _qwen3("8B"),
}
_BY_HUB_ID = {baseline.hub_id: baseline for baseline in BASELINES.values()}


def find(name: str) -> Baseline | None:
    """The baseline of a name or hub id, with or without ":VARIANT", whose template options it then has; else None.

    Raises `UsageError` for a variant that it has not.
    """
    plain, colon, variant = name.partition(":")
    found = BASELINES.get(plain) or _BY_HUB_ID.get(plain)
    if not found or not colon:
        return found
    if variant not in found.variants:
        raise UsageError(f"{plain} has no variant {variant!r}; it has {', '.join(found.variants) or 'none'}")
    return replace(found, template_options=found.variants[variant])


def hub_id(name: str) -> str:
    """Where a baseline is on the hub; any other name is taken for a hub id already."""
    found = find(name)
    return found.hub_id if found else name


def revision(name: str) -> str | None:
    """Which revision of a baseline is read; None is the newest."""
    found = find(name)
    return found.revision if found else None


def known_as(model: "PreTrainedModel", name: str) -> str:
    """The name by which what is known of a model is found: where it was made small, that of what it was made from."""
    from stripedrag.model.quantization import quantization

    kind = quantization(model)
    return (kind and kind.origin) or name


def template_options(name: str) -> Mapping[str, Any]:
    """Keyword arguments for the chat template of a baseline, by its name or hub id; none for any other model."""
    found = find(name)
    return found.template_options if found else {}


def window_tokens(model: "PreTrainedModel", name: str) -> int:
    """How many tokens a model reads: what its config allows, and for a baseline no more than it was trained on, unless
    `load_model` stretched its window."""
    if getattr(model, "has_stretched_window", False):
        return int(model.config.max_position_embeddings)
    allowed = int(model.config.max_position_embeddings)
    baseline = find(name)
    return min(allowed, baseline.window_tokens) if baseline else allowed


def at_hand(name: str) -> bool:
    """Whether the files of a model, named as for `load_model`, are on this machine. Asks no network."""
    from stripedrag.model.loading import model_folder

    try:
        model_folder(name)
    except UsageError:
        return False
    return True


def snapshot(name: str) -> Path:
    """The folder in the hub's cache with the config and the whole weights of a baseline or hub id. Asks no network.

    Raises `SetupError` where they are not all there.
    """
    repository, wanted = hub_id(name), revision(name)
    config = _cached(repository, "config.json", wanted)
    if config is None or not _has_weights(repository, wanted):
        copy = f"{repository} at {wanted}" if wanted else repository
        raise SetupError(f"the hub's cache has no whole copy of {copy}. Fetch it with `stripedrag fetch {name}`.")
    return config.parent


def _has_weights(repository: str, revision: str | None) -> bool:
    for name in _WEIGHTS:
        if _cached(repository, name, revision):
            return True
        if index := _cached(repository, f"{name}.index.json", revision):
            shards = set(json.loads(index.read_text())["weight_map"].values())
            return all(_cached(repository, shard, revision) for shard in shards)
    return False


def _cached(repository: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, file, revision=revision)
    except HFValidationError:  # no hub id at all: a path, say
        return None
    return Path(path) if isinstance(path, str) else None
