"""What a context takes is estimated from above, and what fits is what the estimate says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import LinearAttentionLayer

from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM, memory
from stripedrag.model.cache import cache_bytes, new_cache
from stripedrag.model.generation import prefill
from stripedrag.model.shared import fork


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = StripedHyenaConfig(
        vocab_size=64,
        hidden_size=64,
        num_layers=3,
        attn_layer_idxs=[1],
        num_attention_heads=4,
        proj_groups=2,
        max_seqlen=4096,
        tie_embeddings=True,
    )
    return StripedHyenaForCausalLM(config).eval()


def test_a_token_takes_what_the_cache_says(model):
    sizes = []
    for length in (10, 110):
        cache = new_cache(model.config)
        prefill(model, torch.ones(1, length, dtype=torch.long), cache)
        sizes.append(cache_bytes(cache))
    assert memory.token_bytes(model) == (sizes[1] - sizes[0]) / 100
    half = StripedHyenaForCausalLM(model.config).to(torch.bfloat16)
    assert memory.token_bytes(half) == memory.token_bytes(model) / 2


@pytest.mark.parametrize("tokens", [1, 30])
def test_a_row_takes_what_it_adds_to_the_replies_decoded_together(model, tokens):
    cache = new_cache(model.config)
    prefill(model, torch.ones(1, 10, dtype=torch.long), cache)
    held = []
    for rows in (3, 5):
        rows_of = fork(cache, rows)
        prefill(model, torch.ones(rows, tokens, dtype=torch.long), rows_of)
        layers = [layer for layer in rows_of.layers if isinstance(layer, LinearAttentionLayer)]
        states = [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]
        held.append(sum(state.nbytes for state in states) + rows * tokens * memory.token_bytes(model))
    added = (held[1] - held[0]) / 2
    states = memory.state_bytes(model)
    assert added == states + tokens * memory.token_bytes(model)
    assert memory.row_bytes(model, tokens) == 2 * states + tokens * memory.token_bytes(model) * 3 // 2


@given(free=st.integers(10**7, 10**12), kept=st.sampled_from([0, 10**6, 10**8, 2**31, 10**13]))
def test_what_fits_takes_what_is_free_and_one_more_token_does_not_fit(model, free, kept):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda device: free)
        tokens = memory.fitting_tokens(model, kept_bytes=kept)
    if tokens:
        assert memory.context_bytes(model, tokens, kept_bytes=kept) <= free + 1
    assert memory.context_bytes(model, tokens + 2, kept_bytes=kept) > free


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    available = memory.free_bytes(torch.device("cpu"))
    assert available > 10**8
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) > 10**8
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("30000000\n")
    (tmp_path / "memory.stat").write_text("anon 20000000\ninactive_file 5000000\n")
    assert memory.free_bytes(torch.device("cpu")) == 25_000_000
    older = tmp_path / "memory"
    older.mkdir()
    (older / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (older / "memory.usage_in_bytes").write_text("30000000\n")
    (older / "memory.stat").write_text("total_inactive_file 0\n")
    assert memory.free_bytes(torch.device("cpu")) == 25_000_000
    (older / "memory.limit_in_bytes").write_text("40000000\n")
    assert memory.free_bytes(torch.device("cpu")) == 10_000_000
