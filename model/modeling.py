"""StripedHyena on transformers, of blocks (`layers.py`) of gated convolutions and of grouped-query attention.

Module names are those of the published tensors, so that a checkpoint loads as it is. Knows ids and tensors; nothing of
text. B batch, L length, H width, K taps, N modes.
"""

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from stripedrag.errors import CheckpointError, UsageError
from stripedrag.kernels import ops
from stripedrag.kernels.library import is_ordinary, is_watched
from stripedrag.model.cache import fit, new_cache
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.decode_step import DecodeStep, step_at_once
from stripedrag.model.layers import HyenaFilter, Linear, RMSNorm, StripedHyenaBlock

_ANGLES = 64  # positions of which cosines and sines are taken at once, where they come one by one


class StripedHyenaPreTrainedModel(PreTrainedModel):
    """What the backbone and the language model share: loading, saving and initialisation."""

    config_class = StripedHyenaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StripedHyenaBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # a Hyena state cannot be cropped: assisted generation refuses
    _can_record_outputs = {"hidden_states": StripedHyenaBlock}
    _keep_in_fp32_modules_strict = ["poles", "residues"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # recomputed in float32

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a tensor missing, unused, misshapen or not finite raises `CheckpointError`."""
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise CheckpointError("ignore_mismatched_sizes would leave weights random; a StripedHyena does not take it")
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        refuse_unfit(pretrained_model_name_or_path, info)
        if unused := info["unexpected_keys"]:
            raise _unfit(pretrained_model_name_or_path, "has unused", unused)
        if not_finite := [name for name, tensor in model.named_parameters() if not _is_finite(tensor)]:
            raise CheckpointError(
                f"the checkpoint {str(pretrained_model_name_or_path)!r} has weights that are infinite or no numbers in "
                f"{_listed(not_finite)}. Get a whole copy, or where {model.dtype} is too narrow for it another dtype"
            )
        generation = getattr(model, "generation_config", None)
        if generation is not None:  # published configs do not name the ends, and `generate` looks here alone
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(generation, name) is None:
                    setattr(generation, name, getattr(model.config, name))
        return (model, info) if wants_info else model

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers. Raises `UsageError` where the output is quantized, which cannot be resized."""
        is_change = new_num_tokens is not None or pad_to_multiple_of is not None
        if is_change and not isinstance(self.get_output_embeddings(), nn.Linear):
            raise UsageError(
                "the output layer is quantized and cannot be resized; resize the model that it was made from, save it, "
                "and quantize that"
            )
        resized: nn.Embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        return resized

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            init.ones_(module.scale)
        elif isinstance(module, HyenaFilter):
            # Identity FIR, and time constants log-spaced from 1.5 to 1000 tokens with a response that sums to one.
            modes = module.poles.shape[1]
            decay = torch.exp(-1.0 / torch.logspace(0.17609, 3, modes))
            poles, residues = torch.zeros_like(module.poles), torch.zeros_like(module.residues)
            poles[..., 0, 0], residues[..., 0, 0] = decay, (1 - decay) / modes
            init.copy_(module.poles, poles)
            init.copy_(module.residues, residues)
            taps = torch.zeros_like(module.short_filter_weight)
            taps[..., -1] = 1
            init.copy_(module.short_filter_weight, taps)
            init.zeros_(module.short_filter_bias)
            init.zeros_(module.D)


class StripedHyenaModel(StripedHyenaPreTrainedModel):
    """The backbone: embedding, blocks, final norm; and the unembedding, which published names put inside it."""

    _tied_weights_keys = {"unembed.weight": "embedding_layer.weight"}
    decode_step: DecodeStep | None = None
    angles: tuple[Any, Tensor, Tensor] | None = None  # of the tokens that are decoded

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__(config)
        self.embedding_layer = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(StripedHyenaBlock(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config)
        self.unembed: nn.Linear = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.told_of_stretch = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding_layer

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.embedding_layer = value

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.unembed

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the unembedding."""
        self.unembed = new_embeddings

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, H) after the final norm. Arguments as in `StripedHyenaForCausalLM.forward`."""
        del kwargs
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them and not both")
        x = inputs_embeds if input_ids is None else self._embedded(input_ids)
        assert x is not None
        if x.ndim != 3 or x.shape[1] == 0:
            raise ValueError(f"the input has shape {tuple(x.shape[:2])}; it is (B, L) with at least one token")
        if past_key_values is not None:
            fit(past_key_values, self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = x.shape[1]
        if past + length > self.config.max_seqlen:
            if length > 1:
                refuse_over_window(self.config, past + length)
            warnings.warn(f"the reply goes on beyond the window of {self.config.max_seqlen} tokens", stacklevel=2)
        elif (
            not torch.compiler.is_compiling()
            and not self.told_of_stretch
            and past + length > (trained := self.config.trained_tokens)
        ):
            self.told_of_stretch = True
            warnings.warn(
                f"{past + length} tokens are more than the {trained} that the model was trained on; its window of "
                f"{self.config.max_seqlen} is stretched by YaRN",
                stacklevel=2,
            )
        if past and torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise ValueError(
                f"the cache holds {past} tokens, through which no gradient flows; call under torch.no_grad(), or feed "
                "the whole sequence at once"
            )
        trusts_mask = torch.compiler.is_compiling() and length == 1 and past > 0  # a step's graph branches on no number
        real = _real_tokens(attention_mask, x.shape[:2], past, trusts_mask)
        pads_left = real is None or trusts_mask or bool((real[:, 1:] >= real[:, :-1]).all())
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and pads_left
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        if past_key_values is not None and not pads_left:
            raise ValueError(
                "attention_mask pads on the right or inside; a cache can be continued only from left-padded prompts "
                "(tokenizer.padding_side = 'left'), or pass use_cache=False"
            )
        is_step = length == 1 and past > 0 and real is None and not is_watched()
        if position_ids is None and is_step and not torch.is_grad_enabled():
            rotary = self._rotary_of_step(past, x)
        else:
            if position_ids is None:
                if real is None:
                    position_ids = torch.arange(past, past + length, device=x.device).unsqueeze(0)
                else:
                    position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            rotary = self._rotary(position_ids, x.dtype)
        padding_mask = None if real is None else real[:, past:]
        if padding_mask is not None and (trusts_mask or padding_mask.all()):
            padding_mask = None
        mask = _attention_mask(real, length, past, x.device)
        if length > 1 and self.decode_step is not None and not torch.compiler.is_compiling():
            self.decode_step = None  # what it holds of weights that were replaced can go
        stepped = step_at_once(self, x, rotary, past_key_values) if is_step else None
        if stepped is None:
            for block in self.blocks:
                x = block(x, rotary, mask, padding_mask, past_key_values=past_key_values)
        else:
            x = stepped
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids are {input_ids.dtype}; token ids are torch.int64 or torch.int32")
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(
                f"the input has shape {tuple(input_ids.shape)}; it is (B, L) with at least one row and one token"
            )
        try:
            embedded: Tensor = self.embedding_layer(input_ids)
        except IndexError:  # of a CPU; a GPU ends the process's use of it
            refuse_foreign_ids(input_ids, self.config.vocab_size)
            raise
        return embedded

    def _rotary_of_step(self, position: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `_rotary`, of one position for all rows: out of a table of its neighbours, which serves many steps."""
        config = self.config
        scales = config.rotary_emb_base, config.rotary_emb_yarn_factor, config.rotary_emb_scaling_factor
        begin = position - position % _ANGLES
        made_for = (begin, x.dtype, x.device, config.max_seqlen, config.use_interpolated_rotary_pos_emb, *scales)
        angles = self.angles
        if angles is None or angles[0] != made_for:
            positions = torch.arange(begin, begin + _ANGLES, device=x.device).unsqueeze(0)
            angles = self.angles = made_for, *self._rotary(positions, x.dtype)
        _, cos, sin = angles
        place = position - begin
        return cos[:, :, place : place + 1], sin[:, :, place : place + 1]

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B or 1, 1, L, head width / 2), taken in float32."""
        config = self.config
        exponent = torch.arange(0, config.head_dim, 2, device=position_ids.device).float() / config.head_dim
        frequency = 1.0 / config.rotary_emb_base**exponent
        temperature = 1.0
        if config.rotary_emb_yarn_factor > 1:
            frequency, temperature = _yarn(frequency, config)
        positions = position_ids.float()
        if config.use_interpolated_rotary_pos_emb:
            positions = positions / config.rotary_emb_scaling_factor
        angle = (positions.unsqueeze(-1) * frequency).unsqueeze(1)
        return (angle.cos() * temperature).to(dtype), (angle.sin() * temperature).to(dtype)


def _yarn(frequency: Tensor, config: StripedHyenaConfig) -> tuple[Tensor, float]:
    """Frequencies (D/2,) for a longer window, and the factor of cosines and sines (YaRN, Peng et al. 2023).

    Pairs that turn more than 32 times in the trained window keep their frequency, those that turn less than once have
    it divided, with a linear passage between, counted in pairs as published models do.
    """
    factor, base = config.rotary_emb_yarn_factor, config.rotary_emb_base
    trained = config.max_seqlen / factor

    def pair_that_turns(times: float) -> float:
        return config.head_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), config.head_dim - 1)
    pairs = torch.arange(len(frequency), device=frequency.device)
    divided = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (divided / factor + 1 - divided), 0.1 * math.log(factor) + 1


class StripedHyenaForCausalLM(StripedHyenaPreTrainedModel, GenerationMixin):
    """StripedHyena with its language-modelling head. Loads the published checkpoints and our own."""

    _tied_weights_keys = {"backbone.unembed.weight": "backbone.embedding_layer.weight"}

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__(config)
        self.backbone = StripedHyenaModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.backbone.unembed

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the unembedding."""
        self.backbone.unembed = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits (B, L, V), and the cache after the last token.

        Args:
            input_ids: (B, L); with a warm cache, the tokens that follow what it holds, any number of them.
            attention_mask: (B, past + L), 1 for a real token. With a cache, padding stands on the left, which a
                compiled step takes on trust.
            position_ids: (B or 1, L); by default counted over the real tokens.
            past_key_values: a cache from `new_cache`, an earlier call or `generate`; None begins one if `use_cache`.
            inputs_embeds: (B, L, H) in place of input_ids.
            labels: (B, L) token ids, -100 where there is none; gives the mean cross-entropy of the next token.
            use_cache: by default the config's word in evaluation, False in training and with padding on the right.
            logits_to_keep: only the logits of so many last tokens, or of these positions; 0 is all.
            skip_logits: gives the loss of `labels` alone, and None for the logits, which a long window has no memory
                for: they live a part at a time (`ops.linear_cross_entropy`).
            **kwargs: what transformers passes on: `output_hidden_states`, loss settings.

        Raises:
            ValueError: neither or both of ids and embeddings; ids that the vocabulary lacks; a prompt over the window;
                a mask of another length, or with padding between real tokens; padding that is not on the left while a
                cache is kept; a cache that is not a `DynamicCache`, or of layers of other kinds; a gradient through a
                warm cache; `skip_logits` without labels, or with an unembedding that is more than a weight.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = loss = None
        if skip_logits:
            loss = self._loss(outputs.last_hidden_state, labels, **kwargs)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.backbone.unembed(outputs.last_hidden_state[:, keep])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of labels (B, L) by hidden (B, L, H), without logits: as transformers takes it, over so many items
        where a batch is read in several parts.
        """
        unembed = self.backbone.unembed
        is_weight = (
            type(unembed) in (Linear, nn.Linear)
            and unembed.bias is None
            and is_ordinary(unembed.weight)
            and not (unembed._forward_hooks or unembed._forward_pre_hooks or "forward" in vars(unembed))
        )
        is_own_loss = hasattr(self, "_loss_function") or kwargs.get("shift_labels") is not None
        if labels is None or not is_weight or is_own_loss:
            raise ValueError(
                "skip_logits gives the loss alone: it takes labels (no shift_labels, no other loss_function), and an "
                "unembedding that is a weight and nothing more"
            )
        loss = ops.linear_cross_entropy(
            hidden[:, :-1].flatten(0, 1),
            unembed.weight,
            labels[:, 1:].flatten().to(hidden.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def _real_tokens(attention_mask: Tensor | None, shape: tuple[int, ...], past: int, trusts_mask: bool) -> Tensor | None:
    """The mask (B, past + L) as bool; None where there is none, or a look at it shows that every token is real."""
    if attention_mask is None:
        return None
    batch, length = shape
    if attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; with {past} tokens in the cache and {length} new "
            f"ones it is ({batch}, {past + length}): one entry for each token, also those in the cache"
        )
    real = attention_mask.bool()
    if trusts_mask:
        return real
    if real.all():
        return None
    if ((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any():
        raise ValueError(
            "attention_mask has padding between real tokens, through which a state would go on decaying; put a row's "
            "tokens side by side"
        )
    return real


def _attention_mask(real: Tensor | None, length: int, past: int, device: torch.device) -> Tensor | None:
    """Which keys a query may see, (B, 1, L, past + L) bool; None where it sees all up to its own."""
    if real is None:
        return None
    keys = torch.arange(past + length, device=device)
    queries = keys[past:, None]
    # A padded query sees itself alone: a row without any key would be NaN.
    return (((keys <= queries) & real[:, None, :]) | (keys == queries))[:, None]


AutoConfig.register("stripedhyena", StripedHyenaConfig)
AutoModel.register(StripedHyenaConfig, StripedHyenaModel)
AutoModelForCausalLM.register(StripedHyenaConfig, StripedHyenaForCausalLM)


def refuse_unfit(source: Any, info: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where a checkpoint that transformers loaded, with this `info`, left weights random."""
    if missing := info["missing_keys"]:
        raise _unfit(source, "lacks", missing)
    if misshapen := [f"{name} {tuple(got)} for {tuple(want)}" for name, got, want in info["mismatched_keys"]]:
        raise _unfit(source, "has misshapen", misshapen)


def refuse_over_window(config: PreTrainedConfig, tokens: int) -> None:
    """Raises `UsageError` for a prompt of so many tokens that a StripedHyena of this configuration does not read."""
    if isinstance(config, StripedHyenaConfig) and tokens > config.max_seqlen:
        raise UsageError(
            f"the prompt has {tokens} tokens and the window {config.max_seqlen}; shorten it, or stretch the window "
            "with load_model(…, window_tokens=…)"
        )


def refuse_foreign_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Raises `ValueError` for token ids that a vocabulary of this size lacks."""
    if not input_ids.numel():
        return
    least, most = map(int, input_ids.aminmax())
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"input_ids go from {least} to {most}; this model has the ids 0 to {vocabulary - 1}. "
            "Its own tokenizer gives no others"
        )


def _is_finite(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter):  # of a library for quantized weights, which compares no numbers
        return True
    return tensor.is_meta or not tensor.numel() or all(end.isfinite() for end in tensor.detach().aminmax())


def _unfit(source: Any, fault: str, names: Collection[str]) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {str(source)!r} {fault} tensors: {_listed(names)}. Its weights and its "
        "config.json are not of one model"
    )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
