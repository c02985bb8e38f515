"""StripedHyena on transformers: blocks of gated convolutions in state-space form, and of grouped-query attention.

Module names are those of the published tensors, so that a checkpoint loads as it is. Knows ids and tensors; nothing of
text. B batch, L length, H width, K taps, N modes.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from stripedrag.errors import CheckpointError, UsageError
from stripedrag.kernels import ops
from stripedrag.model.cache import fit, hyena_state, new_cache, store_hyena_state
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.shared import SharedLayer

_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "gelu": lambda a, b: F.gelu(a) * b,  # the erf form
}


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) computed in float32, with either placement of eps."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.eps
        self.eps_inside = config.use_flash_rmsnorm

    def forward(self, x: Tensor) -> Tensor:
        """Like x (…, H): x / sqrt(mean(x²) + eps) · scale, or with eps beside the root."""
        if self.eps_inside:
            return ops.rms_norm(x, self.scale, self.eps)
        wide = x.float()
        root = (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.eps).reciprocal()
        return (wide * root * self.scale.float()).to(x.dtype)


class Linear(nn.Linear):
    """torch's linear layer, a single row at a time through our kernels."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, out) for input (…, in)."""
        return ops.linear(input, self.weight, self.bias)


class GatedMLP(nn.Module):
    """l3(act(l1 x) · l2 x), without biases (Shazeer 2020)."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__()
        self.l1 = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.l2 = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.l3 = Linear(config.mlp_size, config.hidden_size, bias=False)
        self.activation = config.mlp_activation

    def forward(self, x: Tensor) -> Tensor:
        """Like x (…, H)."""
        gated = _GATES[self.activation](self.l1(x), self.l2(x))
        out: Tensor = self.l3(gated)
        return out


class HyenaFilter(nn.Module):
    """The parameters of the Hyena operator, under their published names. Poles and residues stay float32."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__()
        width, systems, modes = config.hidden_size, config.filter_systems, config.state_size
        self.short_filter_weight = nn.Parameter(torch.empty(3 * width, 1, config.short_filter_length))
        self.short_filter_bias = nn.Parameter(torch.empty(3 * width))
        self.poles = nn.Parameter(torch.empty(systems, modes, 1, 2, dtype=torch.float32))
        self.residues = nn.Parameter(torch.empty(systems, modes, 1, 2, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(width))
        self.heads = config.num_attention_heads if config.column_split_hyena else None

    def forward(
        self, z: Tensor, state: ops.HyenaState | None, padding_mask: Tensor | None, *, may_overwrite: bool = False
    ) -> tuple[Tensor, ops.HyenaState]:
        """y (B, L, H) and the state after it, for z (B, L, 3H); see `ops.hyena_filter`."""
        # Where the layout allows it y takes the place of the gate in z: mapping new memory takes longer than the work.
        in_place = (
            may_overwrite
            and self.heads is None
            and z.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and ops.writes_out(z, self.short_filter_weight.shape[-1], self.poles.shape[1])
        )
        out = z[..., : self.D.shape[0]] if in_place else None
        return ops.hyena_filter(z, *self._operands(), heads=self.heads, state=state, padding_mask=padding_mask, out=out)

    def step(self, z: Tensor, state: ops.HyenaState) -> Tensor:
        """y (B, H) for one token z (B, 3H); the state is overwritten."""
        return ops.hyena_step(z, *self._operands(), heads=self.heads, state=state)[0]

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.short_filter_weight, self.short_filter_bias, self.poles, self.residues, self.D

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the parameters, but never cast poles and residues: in bfloat16 a pole of 0.9995 becomes 1."""
        systems = (self.poles, self.residues)

        def keep_wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            is_system = any(tensor is system or tensor is system.grad for system in systems)
            return tensor.to(moved.device) if is_system and moved.dtype != tensor.dtype else moved

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return self


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with half-split rotary positions (Su et al. 2021)."""

    def __init__(self, config: StripedHyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.Wqkv = Linear(config.hidden_size, rows, bias=config.qkv_proj_bias)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, bias=config.mha_out_proj_bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """Like x (B, L, H). `mask` (B, 1, L, keys) bool, True where a query may look; None is causal."""
        batch, length, _ = x.shape
        q, k, v = (
            self.Wqkv(x)
            .view(batch, length, -1, self.head_dim)
            .transpose(1, 2)
            .split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        layer = None if cache is None else cache.layers[self.layer_idx]
        if isinstance(layer, SharedLayer):
            if mask is not None and not torch.compiler.is_compiling():
                raise ValueError("a forked cache takes no attention_mask with padding; its beginning has none")
            shared: Tensor = self.out_proj(layer.attend(q, k, v).transpose(1, 2).reshape(batch, length, -1))
            return shared
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attended = ops.attend(q, k, v, mask).transpose(1, 2).reshape(batch, length, -1)
        projected: Tensor = self.out_proj(attended)
        return projected


class StripedHyenaBlock(GradientCheckpointingLayer):
    """x + mixer(pre_norm(x)), then x + mlp(post_norm(x)). The mixer is the Hyena operator or attention."""

    def __init__(self, config: StripedHyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_attention = layer_idx in config.attn_layer_idxs
        self.pre_norm = RMSNorm(config)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config)
        if self.is_attention:
            self.inner_mha_cls = Attention(config, layer_idx)
        else:
            self.projections = Linear(config.hidden_size, 3 * config.hidden_size)
            self.filter = HyenaFilter(config)
            self.out_filter_dense = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        """Like x (B, L, H)."""
        normed = self.pre_norm(x)
        if self.is_attention:
            x = x + self.inner_mha_cls(normed, rotary, attention_mask, past_key_values)
        else:
            x = x + self._hyena(normed, padding_mask, past_key_values)
        out: Tensor = x + self.mlp(self.post_norm(x))
        return out

    def _hyena(self, x: Tensor, padding_mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        z = self.projections(x)
        state = hyena_state(cache, self.layer_idx)
        if state is not None and z.shape[1] == 1 and padding_mask is None and not torch.is_grad_enabled():
            y = self.filter.step(z[:, 0], state).unsqueeze(1)
        else:
            # Nobody else holds z, unless a hook has seen it.
            y, after = self.filter(z, state, padding_mask, may_overwrite=not self.projections._forward_hooks)
            if cache is not None:
                store_hyena_state(cache, self.layer_idx, after)
        mixed: Tensor = self.out_filter_dense(y)
        return mixed


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
        for block in self.blocks:
            x = block(x, rotary, mask, padding_mask, past_key_values=past_key_values)
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
            **kwargs: what transformers passes on: `output_hidden_states`, loss settings.

        Raises:
            ValueError: neither or both of ids and embeddings; ids that the vocabulary lacks; a prompt over the window;
                a mask of another length, or with padding between real tokens; padding that is not on the left while a
                cache is kept; a cache that is not a `DynamicCache`, or of layers of other kinds; a gradient through a
                warm cache.
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
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.backbone.unembed(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Like x (B, heads, L, head width), each half-split pair turned by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


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
