"""Every architecture among the baselines, tiny and random, under its name in a hub cache, and read as any model is.

Tokenizers are trained here, of the family's kind and with its control tokens; chat templates are in the family's form.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import constants
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from stripedrag.errors import BudgetError, UsageError
from stripedrag.model import StripedHyenaConfig, generation, new_cache
from stripedrag.model.baselines import BASELINES, at_hand, template_options
from stripedrag.model.cache import GrowingLayer
from stripedrag.model.loading import load_model
from stripedrag.rag import Pipeline, Span
from stripedrag.rag.completion import Completion
from stripedrag.rag.prompt import ChatFormat, PromptFormat

NEW_TOKENS = 16
SLIDING_WINDOW = 24
TEXT = "It was found in 1774 by Priestley, or 1773 by Scheele, é. He wrote of fire air."
CONTENT = f"Oxygen\n{TEXT}\n\nQuestion: Who found it?"
SPAN = Span("doc", "Oxygen", 0, len(TEXT), TEXT, 1.0)
INST = "{{ '[INST] ' + message.content.strip() + ' [/INST]' }}{% else %}{{ raise_exception('only users') }}{% endif %}"
LLAMA_2 = "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token }}" + INST + "{% endfor %}"
MISTRAL = "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}" + INST + "{% endfor %}"
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN3 = CHATML + "{% if enable_thinking is defined and not enable_thinking %}" + NO_THOUGHT + "{% endif %}"
CHATML_TURN = f"<|im_start|>user\n{CONTENT}<|im_end|>\n<|im_start|>assistant\n"


def sentencepiece(text, bos="<s>", eos="</s>", control=(), add_bos_token=True, **options):
    """Llama's kind: spaces are part of words, bytes stand in for unknown characters, a text begins with a space."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", bos, eos, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, bos_token=bos, eos_token=eos, add_bos_token=add_bos_token, **options
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(control)})
    return tokenizer


def byte_level(text, bos, eos, control=(), words=()):
    """GPT-2's kind; a BOS, where there is one, is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in ("<pad>", bos, eos, *control) if token]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    if bos:
        begin = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>")


def yi_tokenizer(text):
    control = ("<|im_start|>", "<|im_end|>")
    return sentencepiece(text, "<|startoftext|>", "<|endoftext|>", control, add_bos_token=False)


@dataclass(frozen=True)
class Family:
    name: str
    tokenizer: Callable
    config: Callable
    sizes: dict
    template: str | None
    prompt: str
    bos: int = 1
    end: str | None = None


DEFAULT_SIZES = dict(intermediate_size=64, num_hidden_layers=3, num_key_value_heads=2)
FAMILIES = (
    Family(
        "llama-2-7b-chat",
        sentencepiece,
        LlamaConfig,
        DEFAULT_SIZES | dict(max_position_embeddings=4096),
        LLAMA_2,
        f"<s>[INST] {CONTENT} [/INST]",
    ),
    Family(
        "yi-6b-chat",
        yi_tokenizer,
        LlamaConfig,
        DEFAULT_SIZES | dict(max_position_embeddings=4096),
        CHATML,
        CHATML_TURN,
        bos=0,
        end="<|im_end|>",
    ),
    Family(  # a base model, and the one with a sliding window
        "mistral-7b",
        lambda text: sentencepiece(text, legacy=True),
        MistralConfig,
        DEFAULT_SIZES | dict(max_position_embeddings=32768, sliding_window=SLIDING_WINDOW),
        None,
        f"<s>{CONTENT}\nAnswer:",
    ),
    Family(  # its tokenizer begins every text with a space, after control tokens too
        "mistral-7b-instruct",
        lambda text: sentencepiece(text, legacy=True),
        MistralConfig,
        DEFAULT_SIZES | dict(max_position_embeddings=32768, sliding_window=None),
        MISTRAL,
        f"<s> [INST] {CONTENT} [/INST]",
    ),
    Family(
        "lfm2-350m",
        lambda text: byte_level(text, "<|startoftext|>", "<|im_end|>", ["<|im_start|>"]),
        Lfm2Config,
        DEFAULT_SIZES
        | dict(max_position_embeddings=128000, num_hidden_layers=4, full_attn_idxs=[2], block_multiple_of=8),
        "{{ bos_token }}" + CHATML,
        f"<|startoftext|>{CHATML_TURN}",
    ),
    Family(
        "qwen3-0.6b",
        lambda text: byte_level(text, None, "<|im_end|>", ["<|im_start|>"], ["<think>", "</think>"]),
        Qwen3Config,
        DEFAULT_SIZES | dict(max_position_embeddings=40960, head_dim=8),
        QWEN3,
        CHATML_TURN + NO_THOUGHT,
        bos=0,
    ),
    Family(
        "stripedhyena-nous-7b",
        sentencepiece,
        StripedHyenaConfig,
        dict(num_layers=3, attn_layer_idxs=[1], max_seqlen=32768, inner_mlp_size=64),
        None,
        f"<s>### Instruction:\n{CONTENT}\n\n### Response:\n",
    ),
)


def of(*names):
    """Only these families."""
    return pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in names], ids=names, indirect=True)


@pytest.fixture(scope="module")
def hub(tmp_path_factory, articles):
    """A hub cache with a tiny model in the place of each family's."""
    cache = tmp_path_factory.mktemp("hub")
    text = (articles / "Oxygen.txt").read_text()
    for family in FAMILIES:
        tokenizer = family.tokenizer(text)
        tokenizer.chat_template = family.template
        config = family.config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_attention_heads=4,
            initializer_range=0.4,  # so that the logits, and the tokens, differ
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
            **family.sizes,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if "<0x00>" in tokenizer.get_vocab():  # else it would write bytes that are no UTF-8, which no stream decodes
            with torch.no_grad():
                model.get_output_embeddings().weight[3:259] = 0
        if family.end:  # as Yi-6B-Chat: the generation config has an end of its own
            model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(family.end)
        folder = cache / f"models--{BASELINES[family.name].hub_id.replace('/', '--')}"
        copy = folder / "snapshots" / "0a1b"
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0a1b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(hub, family):
    assert at_hand(family.name)
    return load_model(family.name, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def prompt(loaded, family):
    return PromptFormat(loaded[1], template_options(family.name))


@pytest.fixture(scope="module")
def ids(prompt):
    return prompt.ids("Who found it?", [SPAN])


@pytest.fixture(scope="module")
def generated(loaded, ids):
    """What transformers' own loop decodes greedily, its end token left out."""
    model, _ = loaded
    prompt = torch.tensor([ids])
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS)
    made = tokens[0, len(ids) :].tolist()
    assert len(set(made)) > 3, "a loop of a few tokens would prove little"
    ends = generation.stop_ids(model)
    return [token for token in made if token not in ends]


def test_the_prompt_reads_as_the_familys_template_with_one_bos(loaded, family, ids):
    _, tokenizer = loaded
    assert tokenizer.decode(ids) == family.prompt
    if family.bos:
        assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == family.bos


@of(*(family.name for family in FAMILIES if family.name != "mistral-7b"))
def test_the_template_alone_is_tokenized_as_the_tokenizer_does_it(loaded, family):
    _, tokenizer = loaded
    chat = ChatFormat(tokenizer, template_options(family.name))
    options = dict(add_generation_prompt=True, **template_options(family.name))
    mark = "|"  # merges with nothing around it
    whole = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, **options)
    assert chat.chat_ids([("user", mark)]) == tokenizer(whole, add_special_tokens=False).input_ids


@of("stripedhyena-nous-7b")
def test_the_tokenizer_has_the_template_that_its_card_tells(loaded):
    _, tokenizer = loaded
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert asked == "<s>### Instruction:\nWhy?\n\n### Response:\n"


def test_what_a_document_says_makes_no_control_token(loaded, family, prompt, ids):
    _, tokenizer = loaded
    controls = ["<s>", "</s>", "[INST]", "<|im_start|>", "<|im_end|>", "<|startoftext|>", "<think>"]
    filled = prompt.ids("Who found it?", [Span("doc", "".join(controls), 0, 9, " ".join(controls), 1.0)])
    special = set(tokenizer.added_tokens_decoder)
    assert [i for i in filled if i in special] == [i for i in ids if i in special]
    assert "".join(controls) in tokenizer.decode(filled)


@pytest.mark.parametrize("segment_tokens", [2048, 16, 1])
def test_greedy_decoding_gives_the_tokens_of_generate_in_segments_of_any_length(
    loaded, ids, generated, monkeypatch, segment_tokens
):
    assert len(ids) > 2 * SLIDING_WINDOW
    monkeypatch.setattr(generation, "SEGMENT_TOKENS", segment_tokens)
    completion = Completion(*loaded, ids, max_new_tokens=NEW_TOKENS)
    assert "".join(completion) == completion.text
    assert completion.token_ids == generated


def test_the_baselines_window_is_refused_where_the_config_would_allow_more(loaded, family, index):
    model, tokenizer = loaded
    pipeline = Pipeline(index, model, tokenizer, model_name=family.name)
    window = BASELINES[family.name].window_tokens
    assert pipeline.window_tokens == window <= model.config.max_position_embeddings
    with pytest.raises(
        BudgetError, match=rf"context_tokens is {window + 1}; {family.name} has a window of {window}\. Lower it"
    ):
        pipeline.ask("Who discovered oxygen?", window + 1)


def test_a_pipeline_answers_within_its_tokens(loaded, family, index):
    with Pipeline.open(index, model=family.name, dtype=torch.float32, device="cpu") as pipeline:
        answer = pipeline.ask("Who discovered oxygen?", 1500, answer_tokens=4)
    assert answer.model == family.name
    assert answer.context.spans
    assert answer.usage.prompt_tokens + 4 <= 1500


@of("mistral-7b")
def test_a_sliding_window_bounds_the_cache(loaded, ids):
    model, _ = loaded
    cache = new_cache(model.config)
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    generation.prefill(model, torch.tensor([ids]), cache)
    assert all(layer.keys.shape[-2] == SLIDING_WINDOW - 1 for layer in cache.layers)


@of("lfm2-350m")
def test_convolutions_and_attention_each_get_their_layer(loaded):
    kinds = [type(layer) for layer in new_cache(loaded[0].config).layers]
    assert kinds == [LinearAttentionLayer, LinearAttentionLayer, GrowingLayer, LinearAttentionLayer]


@of("mistral-7b-instruct", "stripedhyena-nous-7b")
def test_a_system_message_is_refused_where_the_format_has_none(loaded, family):
    chat = ChatFormat(loaded[1], template_options(family.name))
    with pytest.raises(UsageError, match="refuses the roles system, user"):
        chat.chat_ids([("system", "Be brief."), ("user", "Hi")])
