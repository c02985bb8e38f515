"""Baselines by name: what is known of them, where they are, and what is said when they are not."""

import json

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from stripedrag.errors import SetupError, UsageError
from stripedrag.model.baselines import BASELINES, at_hand, hub_id, snapshot, template_options, window_tokens
from stripedrag.model.generation import stop_ids
from stripedrag.model.loading import load_model, load_tokenizer, model_folder
from stripedrag.model.smollm2 import PREPARED, STRIPED, prepared_dir


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache, repository, **files):
    """A copy of a hub model in the cache, of files by name (a dot for each double underscore)."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    copy = folder / "snapshots" / "0a1b"
    copy.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("0a1b")
    for name, text in files.items():
        (copy / name.replace("__", ".")).write_text(text)
    return copy


def test_a_name_is_neither_a_prepared_model_nor_a_path_and_a_hub_id_belongs_to_one_name():
    assert not set(BASELINES) & set(PREPARED)
    assert all("/" not in name for name in BASELINES)
    assert all(baseline.hub_id.count("/") == 1 for baseline in BASELINES.values())
    assert len({baseline.hub_id for baseline in BASELINES.values()}) == len(BASELINES)


def test_options_and_window_are_found_by_name_and_by_hub_id_and_no_other_model_has_any():
    assert hub_id("qwen3-8b") == "Qwen/Qwen3-8B"
    assert hub_id("someone/else") == "someone/else"
    for name in ("qwen3-8b", "Qwen/Qwen3-8B"):
        assert template_options(name) == {"enable_thinking": False}
    assert template_options("llama-2-7b-chat") == template_options("someone/else") == template_options(STRIPED) == {}


@pytest.mark.parametrize(
    "name,allowed,window",
    [
        ("lfm2-1.2b", 128000, 32768),
        ("Qwen/Qwen3-0.6B", 40960, 32768),
        ("mistral-7b", 32768, 8192),
        ("llama-2-7b", 2048, 2048),
        ("someone/else", 128000, 128000),
    ],
)
def test_a_window_is_what_config_allows_and_what_a_baseline_was_trained_on(name, allowed, window):
    class Model:
        config = LlamaConfig(max_position_embeddings=allowed)

    assert window_tokens(Model(), name) == window


def test_a_baseline_is_at_hand_once_config_and_every_shard_are_in_the_cache(cache):
    assert not at_hand("yi-6b")
    put(cache, "01-ai/Yi-6B", config__json="{}")
    assert not at_hand("yi-6b")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    copy = put(cache, "01-ai/Yi-6B", model__safetensors__index__json=json.dumps(index))
    put(cache, "01-ai/Yi-6B", **{"1__safetensors": ""})
    assert not at_hand("yi-6b")
    put(cache, "01-ai/Yi-6B", **{"2__safetensors": ""})
    assert at_hand("yi-6b")
    assert at_hand("01-ai/Yi-6B")
    assert snapshot("yi-6b") == model_folder("yi-6b") == model_folder("01-ai/Yi-6B") == copy


@pytest.mark.parametrize("weights", ["model__safetensors", "pytorch_model__bin"])
def test_weights_in_one_file_are_whole(cache, weights):
    put(cache, "Qwen/Qwen3-4B", config__json="{}", **{weights: ""})
    assert at_hand("qwen3-4b")


def test_folders_are_at_hand_and_what_is_no_hub_id_is_not(cache, tmp_path):
    assert at_hand(str(tmp_path))
    assert model_folder(tmp_path) == tmp_path
    assert not at_hand("no/such/folder")
    assert not at_hand("no-such-model")


@pytest.mark.weights
def test_prepared_models_are_at_hand(cache):
    assert at_hand(STRIPED)
    assert model_folder() == prepared_dir(STRIPED)


def test_a_prepared_model_that_is_missing_is_not_at_hand(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("STRIPEDRAG_CACHE", str(tmp_path))
    assert not at_hand(STRIPED)
    with pytest.raises(SetupError, match="Run `stripedrag setup`"):
        load_tokenizer()


def test_a_missing_baseline_is_told_with_the_command_that_fetches_it(cache):
    with pytest.raises(SetupError, match=r"no whole copy of Qwen/Qwen3-8B\. Fetch it with `stripedrag fetch qwen3-8b`"):
        model_folder("qwen3-8b")
    with pytest.raises(
        SetupError,
        match=r"the baseline 'qwen3-8b' is Qwen/Qwen3-8B on the hub, which did not give it \(.+\)\. Fetch it",
    ):
        load_model("qwen3-8b")


def test_an_unknown_model_is_told_with_every_known_name(cache):
    with pytest.raises(
        UsageError, match=r"no model 'lama-2-7b': it is not one of .*smollm2.*, llama-2-7b, .*qwen3-8b, "
    ):
        load_model("lama-2-7b")
    with pytest.raises(UsageError, match=r"the model 'lama-2-7b' has no tokenizer"):
        load_tokenizer("lama-2-7b")


@pytest.mark.parametrize("config,ids", [(2, {2}), ([2, 7], {2, 7}), (None, set())])
def test_the_config_ends_an_answer_where_the_generation_config_does_not_say(config, ids):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            eos_token_id=config,
        )
    )
    model.generation_config.eos_token_id = None
    assert stop_ids(model) == ids
    model.generation_config.eos_token_id = [5, 6]
    assert stop_ids(model) == {5, 6}
