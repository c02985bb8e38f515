"""What a cache holds can be taken in blocks and put together again, and shared by rows that go on from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM, generation
from stripedrag.model.cache import block, cache_bytes, extend, new_cache, refuses_blocks
from stripedrag.model.generation import Sampling, decode, decode_together, prefill
from stripedrag.model.shared import SharedLayer, fork

VOCABULARY = 61


@pytest.fixture(scope="module")
def striped():
    """Grouped-query attention, three to one, between Hyena layers."""
    torch.manual_seed(0)
    config = StripedHyenaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_layers=4,
        attn_layer_idxs=[1, 3],
        num_attention_heads=6,
        proj_groups=3,
        max_seqlen=512,
        state_size=4,
    )
    return StripedHyenaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tokens(length, seed=0):
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def read(model, ids):
    cache = new_cache(model.config)
    prefill(model, ids, cache)
    return cache


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 39), unique=True, max_size=4), kind=st.sampled_from(["striped", "llama"]))
def test_blocks_of_a_cache_make_the_cache_again(request, cuts, kind):
    model, ids = request.getfixturevalue(kind), tokens(40)
    cache, blocks, start = new_cache(model.config), [], 0
    for end in [*sorted(cuts), 40]:
        prefill(model, ids[:, start:end], cache)
        blocks.append(block(cache, start))
        start = end
    again = new_cache(model.config, expected_tokens=40)
    for held in blocks:
        extend(again, held)
    assert again.get_seq_length() == 40 and cache_bytes(again) == cache_bytes(cache)
    more = tokens(7, seed=1)
    for _ in range(2):  # the second has grown into the room of the first
        assert torch.equal(prefill(model, more, again), prefill(model, more, cache))


def test_a_block_is_a_copy(striped):
    cache = read(striped, tokens(20))
    held = block(cache, 0)
    kept = {name: tensor.clone() for name, tensor in held.items()}
    again = new_cache(striped.config)
    extend(again, held)
    prefill(striped, tokens(5, seed=1), again)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values) if hasattr(layer, "keys") else (layer.recurrent_states[0],):
            tensor.fill_(torch.nan)
    assert all(torch.equal(held[name], kept[name]) for name in kept)


def test_a_sliding_window_cannot_be_taken_in_blocks(striped, llama):
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    sliding = new_cache(MistralForCausalLM(config).config)
    assert "DynamicSlidingWindowLayer, which does not keep every token" in refuses_blocks(sliding)
    assert refuses_blocks(new_cache(striped.config)) is None and refuses_blocks(new_cache(llama.config)) is None


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    begun=st.sampled_from([1, 17, 64]),
    stops=st.sets(st.integers(0, VOCABULARY - 1), max_size=12),
)
def test_prompts_decoded_together_get_what_each_gets_alone(striped, lengths, begun, stops):
    shared = tokens(begun)
    rests = [tokens(length, seed=100 + i)[0].tolist() for i, length in enumerate(lengths)]
    options = dict(max_new_tokens=6, stop_ids=stops, sampling=Sampling())
    cache = read(striped, shared)
    before = cache_bytes(cache)
    together = decode_together(striped, cache, rests, **options)
    assert cache_bytes(cache) == before
    for rest, made in zip(rests, together, strict=True):
        alone = read(striped, shared)
        logits = prefill(striped, torch.tensor([rest]), alone)
        assert made == list(decode(striped, logits, alone, **options))


def test_a_step_of_the_model_takes_all_prompts_and_their_reading_no_more_than_a_segment(striped, monkeypatch):
    shapes = []
    heard = striped.register_forward_pre_hook(
        lambda model, arguments, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    shared, rests = tokens(12), [tokens(4, seed=i)[0].tolist() for i in range(7)]
    options = dict(max_new_tokens=6, stop_ids=(), sampling=Sampling())
    cache = read(striped, shared)
    shapes.clear()
    whole = decode_together(striped, cache, rests, **options)
    assert shapes == [(7, 4)] + [(7, 1)] * 5
    monkeypatch.setattr(generation, "SEGMENT_TOKENS", 12)
    shapes.clear()
    assert decode_together(striped, cache, rests, **options) == whole
    assert shapes == [(3, 4), (3, 4), (1, 4)] + [(7, 1)] * 5
    heard.remove()


def test_each_prompt_samples_as_it_does_alone(striped):
    shared, rests = tokens(12), [[3, 4], [5], [6, 7]]
    options = dict(max_new_tokens=5, stop_ids=(), sampling=Sampling(temperature=1.2, top_p=0.9, seed=4))
    together = decode_together(striped, read(striped, shared), rests, **options)
    for rest, made in zip(rests, together, strict=True):
        alone = read(striped, shared)
        assert made == list(decode(striped, prefill(striped, torch.tensor([rest]), alone), alone, **options))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("new", [1, 5])
def test_shared_attention_is_attention(dtype, tolerance, new):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    rows, kv_heads, group, width, begun = 3, 2, 3, 16, 70
    keys, values = random(1, kv_heads, begun, width), random(1, kv_heads, begun, width)
    layer, grown = SharedLayer(keys, values, rows), [[keys, values] for _ in range(rows)]
    for length in (4, new):
        q = random(rows, kv_heads * group, length, width)
        k, v = random(rows, kv_heads, length, width), random(rows, kv_heads, length, width)
        out = layer.attend(q, k, v)
        for row in range(rows):
            grown[row] = [torch.cat([old, x[row : row + 1]], 2) for old, x in zip(grown[row], (k, v), strict=True)]
            k_all, v_all = (x.double().repeat_interleave(group, 1) for x in grown[row])
            past = k_all.shape[2] - length
            mask = torch.ones(length, past + length, dtype=torch.bool).tril(past)
            expected = torch.nn.functional.scaled_dot_product_attention(q[row : row + 1].double(), k_all, v_all, mask)
            assert (out[row : row + 1].double() - expected).abs().max() < tolerance


def test_a_fork_shares_keys_and_values(striped):
    cache = read(striped, tokens(30))
    forked = fork(cache, 5)
    assert forked.get_seq_length() == 30
    for layer, of_fork in zip(cache.layers, forked.layers, strict=True):
        if isinstance(of_fork, SharedLayer):
            assert of_fork.keys.data_ptr() == layer.keys.data_ptr()
        else:
            assert of_fork.recurrent_states[0].shape[0] == 5
