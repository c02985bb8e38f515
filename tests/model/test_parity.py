"""The model computes what the reference implementation computed, also in the cases that the reference gets wrong.

`pytest -s tests/model/test_parity.py` prints the largest difference of every case.
"""

import pytest
import torch

from stripedrag.model import new_cache
from stripedrag.model.cache import hyena_state

F32 = torch.float32


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def gate(golden, case, actual, expected, tolerance):
    worst = (actual.double() - expected.double()).abs().max().item()
    print(f"\n  {golden.name:9s} {case:44s} {worst:.1e} (gate {tolerance:.0e})", end="")
    assert worst <= tolerance, f"{case}: off by {worst:.2e}, allowed {tolerance:.0e}"


def gate_states(golden, case, model, cache, moment, tolerances):
    for layer in range(model.config.num_layers):
        if model.config.layer_types[layer] == "full_attention":
            continue
        state = hyena_state(cache, layer)
        for kind, tensor in (("fir", state.fir), ("iir", state.iir)):
            expected = golden.expected[f"{moment}.{kind}_state.{layer}"]
            scale = expected.abs().max()
            gate(golden, f"{case}: {kind} state {layer}, relative", tensor / scale, expected / scale,
                 tolerances["state", F32])  # fmt: skip


def test_full_forward(golden, model, tolerances):
    logits = model(golden.ids, use_cache=False).logits
    gate(golden, "full forward", logits, golden.expected["full_logits"], tolerances["logits", F32])


def test_hidden_states(golden, model, tolerances):
    seen = {}
    model.backbone.embedding_layer.register_forward_hook(lambda m, i, out: seen.update(hidden_embed=out))
    for i, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({f"hidden_after_block.{i}": out}))
    model(golden.ids, use_cache=False)
    assert len(seen) == 1 + model.config.num_layers
    for name, hidden in seen.items():
        gate(golden, name, hidden, golden.expected[name], tolerances["logits", F32])


def test_transformers_own_hidden_states_are_those_of_the_blocks(golden, model, tolerances):
    hidden = model(golden.ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(hidden) == 1 + model.config.num_layers
    gate(golden, "output_hidden_states[0]", hidden[0], golden.expected["hidden_embed"], tolerances["logits", F32])
    for i in range(1, len(hidden) - 1):
        expected = golden.expected[f"hidden_after_block.{i - 1}"]
        gate(golden, f"output_hidden_states[{i}]", hidden[i], expected, tolerances["logits", F32])


def test_prefill_states_and_sixteen_cached_steps(golden, model, tolerances):
    cache, prompt = new_cache(model.config), golden.prompt_tokens
    logits = model(golden.ids[:, :prompt], past_key_values=cache).logits
    gate(golden, "prefill", logits, golden.expected["prefill_logits"], tolerances["logits", F32])
    gate_states(golden, "prefill", model, cache, "prefill", tolerances)
    steps = [model(golden.ids[:, [prompt + t]], past_key_values=cache).logits[:, 0] for t in range(16)]
    gate(golden, "16 cached steps", torch.stack(steps, 1), golden.expected["decode_logits"], tolerances["logits", F32])
    gate_states(golden, "after 16 steps", model, cache, "final", tolerances)


def test_a_prompt_of_one_token_continues_as_a_long_one_does(golden, model, tolerances):
    cache = new_cache(model.config)
    steps = [model(golden.ids[:, [t]], past_key_values=cache).logits[:, 0] for t in range(golden.ids.shape[1])]
    expected = golden.expected["full_logits"]
    gate(golden, "one-token prompt, then steps", torch.stack(steps, 1), expected, tolerances["logits", F32])
    gate_states(golden, "one-token prompt", model, cache, "final", tolerances)


@pytest.mark.parametrize("segment", [2, 3, 7, 16, 33, 63])
def test_a_prompt_in_segments_of_any_length(golden, model, segment, tolerances):
    cache = new_cache(model.config)
    parts = [model(ids, past_key_values=cache).logits for ids in golden.ids.split(segment, dim=1)]
    expected = golden.expected["full_logits"]
    gate(golden, f"segments of {segment}", torch.cat(parts, 1), expected, tolerances["logits", F32])
    gate_states(golden, f"segments of {segment}", model, cache, "final", tolerances)


@pytest.mark.parametrize("pads", [(0, 5), (3, 0), (1, 9), (7, 7)])
def test_left_padded_batches(golden, model, pads, tolerances):
    width = golden.ids.shape[1] + max(pads)
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    starts = [width - golden.ids.shape[1] - (max(pads) - pad) for pad in pads]
    for row, start in enumerate(starts):  # rows of unequal length, both ending at the right edge
        real = golden.ids[row, : width - start]
        ids[row, width - len(real) :], mask[row, width - len(real) :] = real, 1
    split = width - 20
    cache = new_cache(model.config)
    logits, first = [], 0
    for stop in (1, 2, 5, split):  # a segment of one padded token among them
        segment = model(ids[:, first:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        logits, first = [*logits, segment.logits], stop
    for t in range(split, width):
        logits.append(model(ids[:, [t]], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    logits = torch.cat(logits, 1)
    full = model(ids, attention_mask=mask, use_cache=False).logits
    for row in range(2):
        count = int(mask[row].sum())
        expected = golden.expected["full_logits"][row, :count]
        for case, actual in (("prefill and steps", logits), ("full", full)):
            gate(golden, f"left-padded by {pads}, {case}, row {row}", actual[row, width - count :], expected,
                 tolerances["logits", F32])  # fmt: skip


def test_a_left_padded_batch_of_one_token_rows(golden, model, tolerances):
    ids = torch.cat([torch.zeros(2, 4, dtype=torch.long), golden.ids[:, :1]], dim=1)
    mask = torch.tensor([[0, 0, 0, 0, 1]] * 2)
    cache = new_cache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    logits = model(golden.ids[:, 1:2], attention_mask=mask, past_key_values=cache).logits[:, 0]
    expected = golden.expected["full_logits"][:, 1]
    gate(golden, "padded one-token prompt, next step", logits, expected, tolerances["logits", F32])


def test_a_right_padded_batch_without_a_cache(golden, model, tolerances):
    ids = torch.cat([golden.ids, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    mask = (torch.arange(70)[None] < 64).long().expand(2, -1)
    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :64]
    gate(golden, "right-padded, no cache", logits, golden.expected["full_logits"], tolerances["logits", F32])


def test_bfloat16_stays_as_close_as_the_reference_in_bfloat16(golden, model):
    """The reference's own bfloat16 run is the yardstick: ours may not be further from float32 than it was."""
    exact = golden.expected["full_logits"]
    theirs = (golden.expected["full_logits_bf16run"].float() - exact).abs().mean().item()
    ours = (model.to(torch.bfloat16)(golden.ids, use_cache=False).logits.float() - exact).abs().mean().item()
    print(f"\n  {golden.name:9s} bfloat16, mean difference: ours {ours:.1e}, the reference's {theirs:.1e}", end="")
    assert ours <= theirs
