"""The config reads published files as they are, and refuses what it does not know."""

import json

import pytest
from transformers import AutoConfig

from stripedrag.errors import CheckpointError
from stripedrag.model import StripedHyenaConfig

TINY = dict(hidden_size=64, num_layers=2, attn_layer_idxs=[1], num_attention_heads=8)


@pytest.fixture(scope="module")
def published(golden_dir):
    return json.loads((golden_dir / "hf_nous_7b_config.json").read_text())


def test_the_published_7b_config_is_read_as_it_is(published, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is StripedHyenaConfig
    assert config.layer_types == ["linear_attention", "full_attention"] * 16
    assert (config.num_hidden_layers, config.max_position_embeddings) == (32, 32768)
    assert (config.num_key_value_heads, config.head_dim, config.mlp_size) == (8, 128, 14336)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert (config.column_split_hyena, config.use_flash_rmsnorm, config.rotary_emb_base) == (True, True, 500000)
    for key in ("prefill_style", "use_flash_attn", "auto_map"):
        assert not hasattr(config, key), "dead keys are dropped"


def test_older_revisions_with_flash_attention_2_are_read(published):
    older = {k: v for k, v in published.items() if k != "use_flash_attn"} | {"use_flash_attention_2": True}
    assert StripedHyenaConfig(**older).num_layers == 32


def test_the_inner_size_is_rounded_up_to_its_multiple():
    assert StripedHyenaConfig(**TINY, inner_size_multiple_of=16).mlp_size == 176
    assert StripedHyenaConfig(**TINY).mlp_size == 192


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(state_sise=4), r"no key 'state_sise'; correct its spelling or remove it"),
        (dict(a=1, b=2), r"no key 'a' \(nor 'b'\)"),
        (dict(attn_layer_idxs=[]), r"attn_layer_idxs is \[\]; it names at least one of the layers 0 to 1"),
        (dict(attn_layer_idxs=[2]), r"attn_layer_idxs is \[2\]"),
        (dict(hyena_layer_idxs=[0, 1]), r"layers \[1\] are named by both or by neither"),
        (dict(hyena_layer_idxs=[]), r"layers \[0\] are named by both or by neither"),
        (dict(num_attention_heads=7), "hidden_size is 64, which is not a multiple of num_attention_heads, 7"),
        (dict(proj_groups=3), "num_attention_heads is 8, which is not a multiple of proj_groups, 3"),
        (dict(hyena_filter_groups=5), "hidden_size is 64, which is not a multiple of hyena_filter_groups, 5"),
        (dict(state_size=0), "state_size is 0; it is a whole number of at least 1"),
        (dict(eps=0.0), r"eps is 0.0; it is a number above 0"),
        (dict(column_split_hyena="yes"), "column_split_hyena is 'yes'; it is true or false"),
        (dict(mlp_activation="relu"), "mlp_activation is 'relu'; it is 'silu' or 'gelu'"),
        (dict(num_attention_heads=64), "heads are 1 wide; rotary positions turn pairs"),
        (dict(num_filters=32), "num_filters is 32; a StripedHyena has one filter a channel: 64"),
        (dict(final_norm=False), "final_norm is false"),
        (dict(short_filter_bias=False), "short_filter_bias is false"),
    ],
)
def test_what_no_stripedhyena_has_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        StripedHyenaConfig(**(TINY | change))


def test_filter_groups_share_systems():
    assert StripedHyenaConfig(**TINY).filter_systems == 64
    assert StripedHyenaConfig(**TINY, hyena_filter_groups=4).filter_systems == 4
