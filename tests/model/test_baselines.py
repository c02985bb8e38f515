"""Baselines by name: what is known of them, where they are, and what is said when they are not."""

import json
import lzma

import pytest
import torch
from huggingface_hub import constants
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

from stripedrag.errors import SetupError, UsageError
from stripedrag.model.baselines import BASELINES, at_hand, hub_id, snapshot, template_options, window_tokens
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.generation import stop_ids
from stripedrag.model.loading import load_model, load_tokenizer, model_folder
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.smollm2 import PREPARED, STRIPED, prepared_dir
from stripedrag.rag.prompt import ChatFormat


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


def test_a_variant_is_the_same_model_with_another_template():
    plain, training = template_options("stripedhyena-nous-7b"), template_options("stripedhyena-nous-7b:training")
    assert hub_id("stripedhyena-nous-7b:training") == hub_id("stripedhyena-nous-7b")
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    said = [
        load_tokenizer(STRIPED).apply_chat_template(messages, tokenize=False, **options)
        for options in (plain, training)
    ]
    bos = load_tokenizer(STRIPED).bos_token
    assert said[0] == f"{bos}### Instruction:\nWhy?\n\n### Response:\nSo.\n\n"
    assert said[1] == "### Instruction:\nWhy?\n### Response:\nSo.\n"
    for name in ("stripedhyena-nous-7b:other", "yi-6b:training", "yi-6b:"):
        with pytest.raises(UsageError, match=r"has no variant .*; it has (training|none)"):
            load_model(name)


def test_a_pinned_revision_is_what_is_at_hand(cache):
    copy = put(cache, "togethercomputer/evo-1-8k-base", config__json="{}", model__safetensors="")
    assert not at_hand("evo-1-8k")
    (cache / "models--togethercomputer--evo-1-8k-base" / "refs" / "1.1_fix").write_text("0a1b")
    assert snapshot("evo-1-8k") == copy


@pytest.fixture
def mistral(golden_dir, tmp_path):
    """A folder with the tokenizer of the published 7B as its files give it, and what SentencePiece makes of texts."""
    told = json.loads(lzma.decompress((golden_dir / "mistral_v1.json.xz").read_bytes()))
    vocabulary = {piece: place for place, (piece, _) in enumerate(told["pieces"])}
    scores = dict(told["pieces"])
    merges = [
        (-scores[piece], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece in list(vocabulary)[259:]  # after three control tokens and the bytes
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(
        vocabulary, [merge[3:] for merge in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    named = settings | {"tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    return tmp_path, told["ids"]


def test_the_published_7bs_read_text_as_sentencepiece_does(mistral, golden_dir):
    folder, expected = mistral
    published = json.loads((golden_dir / "hf_nous_7b_config.json").read_text())
    sizes = {"hidden_size": 32, "num_filters": 32, "num_attention_heads": 4, "inner_mlp_size": 48, "num_layers": 2}
    layers = {"attn_layer_idxs": [1], "hyena_layer_idxs": [0, 32]}  # one that is not there, as published
    torch.manual_seed(0)
    StripedHyenaForCausalLM(StripedHyenaConfig(**published | sizes | layers)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published | sizes | layers))
    (folder / "generation_config.json").unlink()
    model, tokenizer = load_model(folder, dtype=torch.float32)
    chat = ChatFormat(tokenizer, template_options("stripedhyena-nous-7b"))
    assert len(tokenizer) == 32000 and len(expected) == 9
    for text, ids in expected.items():
        assert chat.plain_ids(text) == ids
        assert "<s>" in text or tokenizer(text).input_ids == [1, *ids]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert tokenizer.padding_side == "left"
    assert stop_ids(model) == {2}
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    asked = "### Instruction:\nWhy is the sky blue?\n\n### Response:\n"
    assert chat.chat_ids([("user", "Why is the sky blue?")]) == [1, *expected[asked]]
    trained = ChatFormat(tokenizer, template_options("stripedhyena-nous-7b:training"))
    assert trained.chat_ids([("user", "Why?")]) == chat.plain_ids("### Instruction:\nWhy?\n### Response:\n")


@pytest.fixture
def evo(tmp_path):
    """A model with the files of Evo's repositories, tiny: code in the place of a tokenizer, and no ids of its ends."""
    config = StripedHyenaConfig(
        vocab_size=512, hidden_size=32, num_layers=2, attn_layer_idxs=[1], num_attention_heads=2, state_size=8,
        tie_embeddings=True, mlp_activation="gelu", use_flash_rmsnorm=False, inner_mlp_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    StripedHyenaForCausalLM(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        saved.pop(key, None)
    code = {"AutoTokenizer": ["togethercomputer/evo-1-131k-base--tokenizer.ByteTokenizer", None]}
    (tmp_path / "config.json").write_text(json.dumps(saved | {"auto_map": code}))
    (tmp_path / "generation_config.json").write_text('{"_from_model_config": true}')
    (tmp_path / "tokenizer.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token_id": 0, "eos_token_id": 0, "byte_level": true}')
    return tmp_path


def test_evo_reads_bytes_and_ends_with_byte_0(evo):
    model, tokenizer = load_model(evo, dtype=torch.float32)
    text = "ACGT é\u0100\u0101 \n\t😀"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("A\x00C").input_ids == [65, 0, 67]
    assert tokenizer.decode([65, 0, 67, 1], skip_special_tokens=True) == "AC"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 0, 1)
    assert stop_ids(model) == {0}
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 1)
    batch = tokenizer(["ACGT", "A"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[65, 67, 71, 84], [1, 1, 1, 65]]
    ended = model.generate(**batch, max_new_tokens=3, do_sample=False, prefix_allowed_tokens_fn=lambda row, ids: [0])
    assert ended[:, 4:].tolist() == [[0], [0]]


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
