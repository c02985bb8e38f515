"""The configuration of a StripedHyena, in the words of the published config.json files.

An unknown key is refused: a misspelt one would otherwise fall back to its default without a sign.
"""

import math
from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedConfig

from stripedrag.errors import CheckpointError
from stripedrag.model.byte_tokenizer import BYTE_EOS, BYTE_PAD, BYTE_VOCABULARY

# Keys of published configs that choose among implementations, training set-ups or nothing at all.
DEAD_KEYS = frozenset(
    "auto_map column_split inference_mode log_intermediate_values make_vocab_size_divisible_by max_batch_size "
    "max_sequence_len mlp_init_method mlp_output_init_method model_parallel_size pile_parallel_size "
    "pipe_parallel_size prefill_style rng_fork smeared_gqa split_k0 tokenizer_type use_flash_attention_2 "
    "use_flash_attn use_flash_depthwise use_flashfft".split()
)
# Keys that transformers takes itself, beside the fields of its base class and the generation settings.
_TRANSFORMERS_KEYS = frozenset(
    "attn_implementation experts_implementation model_type name_or_path num_labels output_attentions "
    "quantization_config "
    "torch_dtype".split()
)

_COUNTS = (
    "vocab_size hidden_size num_layers num_attention_heads proj_groups state_size short_filter_length "
    "hyena_filter_groups inner_size_multiple_of max_seqlen"
).split()
_BY_VOCABULARY = -1  # an id of a control token that the config does not name

_SWITCHES = (
    "short_filter_bias column_split_hyena use_flash_rmsnorm final_norm mha_out_proj_bias qkv_proj_bias "
    "use_interpolated_rotary_pos_emb tie_embeddings use_cache"
).split()


class StripedHyenaConfig(PreTrainedConfig):
    """A StripedHyena: Hyena layers, and attention in the layers that `attn_layer_idxs` names.

    Keys are those of the published checkpoints; a default is what most of them say. `inner_mlp_size` None
    means `m * ceil(int(8 * hidden_size / 3) / m)` with m = `inner_size_multiple_of`. `hyena_layer_idxs` is optional and
    must be what attention leaves over; the published 7B configs name a layer past the end, which is ignored. Ids of
    control tokens about which a config is silent are those of the published tokenizers: Llama's, or with 512 tokens
    Evo's bytes. None is none.

    One key is ours: `rotary_emb_yarn_factor` s reads up to `max_seqlen` tokens with a model that was trained on
    `max_seqlen` / s, by YaRN (Peng et al. 2023, section 3.4).

    Raises `CheckpointError` for an unknown key and for values that no StripedHyena has, each named.
    """

    model_type = "stripedhyena"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_seqlen",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_filters: int | None = None
    num_layers: int = 32
    attn_layer_idxs: list[int] | tuple[int, ...] = ()
    hyena_layer_idxs: list[int] | tuple[int, ...] | None = None
    num_attention_heads: int = 32
    proj_groups: int = 1
    state_size: int = 2
    short_filter_length: int = 3
    short_filter_bias: bool = True
    hyena_filter_groups: int = 1
    column_split_hyena: bool = True
    inner_mlp_size: int | None = None
    inner_size_multiple_of: int = 64
    mlp_activation: Literal["silu", "gelu"] = "silu"
    eps: float = 1e-5
    use_flash_rmsnorm: bool = True
    final_norm: bool = True
    mha_out_proj_bias: bool = False
    qkv_proj_bias: bool = False
    rotary_emb_base: float | int = 10000
    use_interpolated_rotary_pos_emb: bool = False
    rotary_emb_scaling_factor: float | int = 1
    rotary_emb_yarn_factor: float | int = 1
    max_seqlen: int = 32768
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = _BY_VOCABULARY
    eos_token_id: int | list[int] | None = _BY_VOCABULARY
    pad_token_id: int | None = _BY_VOCABULARY

    def __post_init__(self, **kwargs: Any) -> None:
        for key in DEAD_KEYS & kwargs.keys():
            del kwargs[key]
        known = (
            _TRANSFORMERS_KEYS | self.attribute_map.keys() | GenerationConfig._get_default_generation_params().keys()
        )
        unknown = sorted(key for key in kwargs.keys() - known if not key.startswith("_"))
        if unknown:
            raise CheckpointError(
                f"a StripedHyena config has no key {unknown[0]!r}"
                + (f" (nor {', '.join(map(repr, unknown[1:]))})" if unknown[1:] else "")
                + "; correct its spelling or remove it"
            )
        if self.num_filters is None:
            self.num_filters = self.hidden_size
        bytes_, words = {"bos": None, "eos": BYTE_EOS, "pad": BYTE_PAD}, {"bos": 1, "eos": 2, "pad": None}
        for name, token in (bytes_ if self.reads_bytes else words).items():
            if getattr(self, f"{name}_token_id") == _BY_VOCABULARY:
                setattr(self, f"{name}_token_id", token)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def layer_types(self) -> list[str]:
        """What transformers' hybrid cache keeps of each layer."""
        attention = set(self.attn_layer_idxs)
        return ["full_attention" if i in attention else "linear_attention" for i in range(self.num_layers)]

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads, each shared by `proj_groups` query heads."""
        return self.num_attention_heads // self.proj_groups

    @property
    def reads_bytes(self) -> bool:
        """Whether the vocabulary is that of Evo's, whose tokens are bytes."""
        return self.vocab_size == BYTE_VOCABULARY

    @property
    def trained_tokens(self) -> int:
        """How many tokens at a time the model was trained on, of which YaRN makes `max_seqlen`."""
        return round(self.max_seqlen / self.rotary_emb_yarn_factor)

    @property
    def filter_systems(self) -> int:
        """Modal systems of a Hyena layer: one a channel, or with G > 1 groups one for H/G neighbouring channels."""
        return self.hidden_size if self.hyena_filter_groups == 1 else self.hyena_filter_groups

    @property
    def mlp_size(self) -> int:
        """The inner width of the MLP."""
        if self.inner_mlp_size is not None:
            return self.inner_mlp_size
        multiple = self.inner_size_multiple_of
        return multiple * math.ceil(int(8 * self.hidden_size / 3) / multiple)

    def _check(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} is {value!r}; it is a whole number of at least 1")
        for name in ("eps", "rotary_emb_base", "rotary_emb_scaling_factor", "rotary_emb_yarn_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise CheckpointError(f"{name} is {value!r}; it is a number above 0")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} is {getattr(self, name)!r}; it is true or false")
        if self.rotary_emb_yarn_factor < 1 or (
            self.rotary_emb_yarn_factor > 1 and self.use_interpolated_rotary_pos_emb
        ):
            raise CheckpointError(
                f"rotary_emb_yarn_factor is {self.rotary_emb_yarn_factor}; it is at least 1, and 1 where "
                "use_interpolated_rotary_pos_emb scales positions already"
            )
        if self.mlp_activation not in ("silu", "gelu"):
            raise CheckpointError(f"mlp_activation is {self.mlp_activation!r}; it is 'silu' or 'gelu'")
        layers, attention = range(self.num_layers), set(self.attn_layer_idxs)
        if not attention or not attention <= set(layers):
            last = self.num_layers - 1
            raise CheckpointError(
                f"attn_layer_idxs is {sorted(attention)}; it names at least one of the layers 0 to {last}"
            )
        if self.hyena_layer_idxs is not None:
            hyena = {i for i in self.hyena_layer_idxs if i in layers}
            if hyena != set(layers) - attention:
                wrong = sorted(hyena ^ (set(layers) - attention))
                raise CheckpointError(
                    f"layers {wrong} are named by both or by neither of attn_layer_idxs and hyena_layer_idxs; "
                    "each layer is one or the other"
                )
        for value, name, divisor, by in (
            (self.hidden_size, "hidden_size", self.num_attention_heads, "num_attention_heads"),
            (self.num_attention_heads, "num_attention_heads", self.proj_groups, "proj_groups"),
            (self.hidden_size, "hidden_size", self.hyena_filter_groups, "hyena_filter_groups"),
        ):
            if divisor < 1 or value % divisor:
                raise CheckpointError(f"{name} is {value}, which is not a multiple of {by}, {divisor}")
        if self.head_dim % 2:
            raise CheckpointError(f"heads are {self.head_dim} wide; rotary positions turn pairs, so that is even")
        if self.num_filters != self.hidden_size:
            raise CheckpointError(
                f"num_filters is {self.num_filters}; a StripedHyena has one filter a channel: {self.hidden_size}"
            )
        for name in ("short_filter_bias", "final_norm"):
            if not getattr(self, name):
                raise CheckpointError(f"{name} is false; every published StripedHyena has it, and this code needs it")
