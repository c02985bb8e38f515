"""Llama-family transformers under the names of a StripedHyena: which are taken, their config, their tensors.

A StripedHyena all of whose layers are attention is such a transformer; striping begins from that.
"""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from stripedrag.errors import CheckpointError
from stripedrag.model.config import StripedHyenaConfig

FAMILIES = ("llama", "mistral", "qwen2")


def striped_config(
    config: PreTrainedConfig, tensors: Collection[str], hyena_layers: Collection[int], *, modes: int, taps: int
) -> StripedHyenaConfig:
    """The config of a transformer whose `hyena_layers` have become Hyena layers; an empty collection changes nothing.

    `tensors` are the names of its tensors, which tell of biases. Raises `CheckpointError` for a network that no
    StripedHyena can stand for: another family, scaled rotary positions, a sliding window, heads of their own width.
    """
    _check(config, tensors)
    layers = range(config.num_hidden_layers)
    unknown = sorted(set(hyena_layers) - set(layers))
    if unknown:
        raise CheckpointError(f"the model has no layer {unknown[0]}; its layers are 0 to {layers[-1]}")
    return StripedHyenaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        attn_layer_idxs=[i for i in layers if i not in hyena_layers],
        num_attention_heads=config.num_attention_heads,
        proj_groups=config.num_attention_heads // config.num_key_value_heads,
        state_size=modes,
        short_filter_length=taps,
        column_split_hyena=False,
        inner_mlp_size=config.intermediate_size,
        mlp_activation="silu",
        eps=config.rms_norm_eps,
        use_flash_rmsnorm=True,
        qkv_proj_bias=any(name.endswith("q_proj.bias") for name in tensors),
        mha_out_proj_bias=any(name.endswith("o_proj.bias") for name in tensors),
        rotary_emb_base=_rotary(config)["rope_theta"],
        max_seqlen=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def striped_tensors(transformer: Mapping[str, Tensor], config: StripedHyenaConfig) -> dict[str, Tensor]:
    """A transformer's tensors under the names of a StripedHyena's backbone; attention only where `config` has it."""
    embedding = transformer["model.embed_tokens.weight"]
    tensors = {
        "embedding_layer.weight": embedding,
        "unembed.weight": embedding if config.tie_embeddings else transformer["lm_head.weight"],
        "norm.scale": transformer["model.norm.weight"],
    }
    for i in range(config.num_layers):
        source, block = f"model.layers.{i}.", f"blocks.{i}."
        tensors |= {
            block + "post_norm.scale": transformer[source + "post_attention_layernorm.weight"],
            block + "mlp.l1.weight": transformer[source + "mlp.gate_proj.weight"],
            block + "mlp.l2.weight": transformer[source + "mlp.up_proj.weight"],
            block + "mlp.l3.weight": transformer[source + "mlp.down_proj.weight"],
        }
        if i not in config.attn_layer_idxs:
            continue
        tensors[block + "pre_norm.scale"] = transformer[source + "input_layernorm.weight"]
        for kind, has in (("weight", True), ("bias", config.qkv_proj_bias)):
            if has:
                parts = [transformer[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                tensors[f"{block}inner_mha_cls.Wqkv.{kind}"] = torch.cat(parts)
        for kind, has in (("weight", True), ("bias", config.mha_out_proj_bias)):
            if has:
                tensors[f"{block}inner_mha_cls.out_proj.{kind}"] = transformer[f"{source}self_attn.o_proj.{kind}"]
    return tensors


def transformer_digest(transformer: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> str:
    """The sha256 of a model's tensors in `dtype`; in bfloat16 it is the same in whatever wider one they were loaded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(transformer.named_parameters()):
        tensor = parameter.detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _check(config: PreTrainedConfig, tensors: Collection[str]) -> None:
    kind = config.model_type
    if kind not in FAMILIES:
        raise CheckpointError(f"a {kind} model cannot be striped; those of the families {', '.join(FAMILIES)} can")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        raise CheckpointError(
            f"the model's {config.num_attention_heads} heads are {head_dim} wide, which is not its width of "
            f"{config.hidden_size} together; a StripedHyena's heads are"
        )
    if config.hidden_act != "silu":
        raise CheckpointError(f"the model's MLP has the activation {config.hidden_act!r}; 'silu' can be striped")
    rotary = _rotary(config)
    if rotary.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"the model scales its rotary positions ({rotary['rope_type']!r}); one with rotary positions as they are, "
            "'default', can be striped"
        )
    if (part := rotary.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(f"the model turns {part} of each head by its position; a StripedHyena turns all of it")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise CheckpointError(
            f"the model's attention sees a sliding window of {window} tokens; a StripedHyena's attention sees all"
        )
    if any(name.endswith("mlp.gate_proj.bias") for name in tensors):
        raise CheckpointError("the model's MLP has biases, which a StripedHyena's has not")


def _rotary(config: PreTrainedConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    return parameters
