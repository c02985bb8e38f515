"""Loading, saving, dtypes, gradients and transformers' own machinery around the model."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from stripedrag.errors import CheckpointError, UsageError
from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM, new_cache
from stripedrag.model.baselines import window_tokens
from stripedrag.model.cache import GrowingLayer
from stripedrag.model.generation import prefill
from stripedrag.model.layers import RMSNorm
from stripedrag.model.loading import load_model
from stripedrag.model.modeling import StripedHyenaModel
from stripedrag.model.smollm2 import STRIPED, prepared_dir


def test_auto_classes_know_the_model(golden, tmp_path):
    folder = golden.write(tmp_path)
    assert type(AutoConfig.from_pretrained(folder)) is StripedHyenaConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is StripedHyenaForCausalLM


def test_the_backbone_alone_gives_the_hidden_states(golden, model, tmp_path):
    backbone = AutoModel.from_pretrained(golden.write(tmp_path)).eval()
    assert type(backbone) is StripedHyenaModel
    with torch.no_grad():
        hidden = backbone(golden.ids).last_hidden_state
        logits = model(golden.ids).logits
        assert torch.equal(backbone.unembed(hidden), logits)
        embedded = model.get_input_embeddings()(golden.ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, logits)
        last = model(golden.ids, logits_to_keep=3).logits  # by products of another shape
        torch.testing.assert_close(last, logits[:, -3:], rtol=0, atol=5e-5)


def test_names_with_and_without_the_backbone_prefix_load_alike(golden, tmp_path):
    bare = StripedHyenaForCausalLM.from_pretrained(golden.write(tmp_path / "bare"))
    prefixed = StripedHyenaForCausalLM.from_pretrained(golden.write(tmp_path / "prefixed", prefix="backbone."))
    assert_same_tensors(bare, prefixed)
    assert torch.equal(bare.backbone.embedding_layer.weight, golden.weights["embedding_layer.weight"])


def test_save_and_load_is_the_identity(golden, model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = StripedHyenaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_tensors(model, again)
    drop = {"transformers_version", "architectures", "dtype", "_name_or_path"}
    before, after = model.config.to_dict(), again.config.to_dict()
    assert {k: v for k, v in before.items() if k not in drop} == {k: v for k, v in after.items() if k not in drop}


@pytest.mark.parametrize("name", ["blocks.0.filter.poles", "blocks.1.mlp.l2.weight", "norm.scale"])
def test_a_missing_tensor_is_named(sh_tiny, tmp_path, name):
    weights = {k: v for k, v in sh_tiny.weights.items() if k != name}
    with pytest.raises(CheckpointError, match=rf"lacks tensors: .*{name}\. Its weights and its config.json"):
        StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path, weights=weights))


def test_an_unused_tensor_is_named(sh_tiny, tmp_path):
    weights = sh_tiny.weights | {"blocks.0.filter.extra": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"has unused tensors: .*blocks\.0\.filter\.extra"):
        StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path, weights=weights))


def test_a_misshapen_tensor_is_named_with_both_shapes(sh_tiny, tmp_path):
    weights = sh_tiny.weights | {"blocks.0.filter.D": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"misshapen tensors: .*filter\.D \(3,\) for \(64,\)"):
        StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path, weights=weights))


def test_mismatched_sizes_cannot_be_ignored(sh_tiny, tmp_path):
    with pytest.raises(CheckpointError, match="ignore_mismatched_sizes would leave weights random"):
        StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path), ignore_mismatched_sizes=True)


def test_the_stored_inv_freq_is_ignored(sh_tiny, tmp_path):
    name = "blocks.1.inner_mha_cls.rotary_emb.inv_freq"
    assert name in sh_tiny.weights
    weights = sh_tiny.weights | {name: torch.full_like(sh_tiny.weights[name], 7.0)}
    model = StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path, weights=weights)).eval()
    with torch.no_grad():
        logits = model(sh_tiny.ids).logits
    assert (logits - sh_tiny.expected["full_logits"]).abs().max() < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_poles_stay_fp32_when_loaded_in_half_precision(golden, tmp_path, dtype):
    model = StripedHyenaForCausalLM.from_pretrained(golden.write(tmp_path), dtype=dtype)
    assert_only_systems_are_fp32(model, dtype)
    assert torch.equal(model.backbone.blocks[0].filter.poles, golden.weights["blocks.0.filter.poles"])


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_poles_stay_fp32_when_the_model_is_cast(golden, model, cast):
    cast(model)
    assert_only_systems_are_fp32(model, model.backbone.norm.scale.dtype)
    assert torch.equal(model.backbone.blocks[0].filter.residues, golden.weights["blocks.0.filter.residues"])


def test_gradients_reach_every_parameter_and_checkpointing_changes_none(model, golden):
    def gradients():
        model.zero_grad()
        model.train()
        model(golden.ids, labels=golden.ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in plain.values())
    model.activation_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[n], checkpointed[n], atol=1e-6) for n in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_norm_is_that_of_its_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(StripedHyenaConfig(hidden_size=24, num_attention_heads=2, num_layers=2, attn_layer_idxs=[1]))
    norm.scale.data = torch.randn(24, generator=generator)
    x = torch.randn(3, 5, 24, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(3, 5, 24, generator=generator).to(dtype)
    got = torch.autograd.grad(norm(x), (x, norm.scale), dy)
    wide, scale = x.detach().double().requires_grad_(), norm.scale.detach().double().requires_grad_()
    formula = wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * scale
    wanted = torch.autograd.grad(formula, (wide, scale), dy.double())
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-2 if g.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    each = torch.func.vmap(torch.func.grad(lambda row: norm(row).float().sum()))(x.detach())
    torch.testing.assert_close(each, torch.autograd.grad(norm(x).float().sum(), x)[0], rtol=1e-2, atol=1e-5)
    with torch.no_grad():
        plain = norm(x)
    assert torch.equal(plain, norm(x).detach())


def test_the_loss_is_the_cross_entropy_of_the_next_token(model, golden):
    labels = golden.ids.clone()
    labels[:, :10] = -100
    with torch.no_grad():
        loss = model(golden.ids, labels=labels, use_cache=False).loss
    expected = torch.nn.functional.cross_entropy(
        golden.expected["full_logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert torch.allclose(loss, expected, atol=1e-5)


def test_the_loss_is_there_without_logits(model, golden, monkeypatch):
    labels = golden.ids.clone()
    labels[0, :10] = labels[0, 20]
    items = [{"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}]
    for options in ({}, *items, {"ignore_index": int(golden.ids[0, 20])}):
        gradients = []
        for skip_logits in (False, True):
            out = model(golden.ids, labels=labels, skip_logits=skip_logits, use_cache=False, **options)
            assert (out.logits is None) == skip_logits
            gradients.append((out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    wanted = "skip_logits gives the loss alone: it takes labels"
    with pytest.raises(ValueError, match=wanted):
        model(golden.ids, skip_logits=True)
    with pytest.raises(ValueError, match=wanted):
        model(golden.ids, labels=labels, shift_labels=labels, skip_logits=True)
    unembed = model.backbone.unembed
    for watch in (unembed.register_forward_hook, unembed.register_forward_pre_hook):
        hook = watch(lambda *_: None)
        with pytest.raises(ValueError, match=wanted):
            model(golden.ids, labels=labels, skip_logits=True)
        hook.remove()
    monkeypatch.setattr(model, "_loss_function", lambda **_: 0, raising=False)
    with pytest.raises(ValueError, match=wanted):
        model(golden.ids, labels=labels, skip_logits=True)


def test_generate_repeats_our_own_greedy_steps(model, golden):
    prompt = golden.ids[:1, :20]
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = prompt
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def test_a_prefill_of_our_own_can_be_continued_by_generate(model, golden):
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = new_cache(model.config)
    prefill(model, golden.ids[:1, :20], cache)
    continued = model.generate(golden.ids[:1, :25], past_key_values=cache, **options)
    assert torch.equal(continued, model.generate(golden.ids[:1, :25], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_leaves_the_operator_in_fp32(model, golden, dtype):
    with torch.no_grad():
        exact = model(golden.ids, use_cache=False).logits
    with torch.autocast("cpu", dtype=dtype):
        out = model(golden.ids, labels=golden.ids, use_cache=False)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (out.logits - exact).abs().mean() < 0.03


def test_segments_are_read_under_autocast(model, golden):
    def last():
        cache = new_cache(model.config)
        for segment in golden.ids[:, :30].split(20, dim=1):
            logits = model(segment, past_key_values=cache).logits[:, -1]
        return logits.float()

    with torch.no_grad():
        expected = last()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(last(), expected, rtol=0, atol=0.3)


def test_generate_stops_at_eos(model, golden):
    prompt = golden.ids[:1, :20]
    free = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    eos = int(free[0, 23])
    stopped = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
    first = 20 + free[0, 20:].tolist().index(eos)
    assert torch.equal(stopped[0], free[0, : first + 1])


def test_a_published_config_without_ends_has_its_tokenizers(golden, tmp_path):
    ends = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert not ends & golden.config.keys()
    model = AutoModelForCausalLM.from_pretrained(golden.write(tmp_path / "published"), dtype=torch.float32)
    expected = (None, 0, 1) if golden.name == "evo_tiny" else (1, 2, None)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == expected
    prompt = golden.ids[:1, :20]
    eos = int(model.generate(prompt, max_new_tokens=3, do_sample=False, min_new_tokens=3)[0, -1])
    folder = golden.write(tmp_path / "named", config=golden.config | {"eos_token_id": eos})
    named = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = named.generate(prompt, max_new_tokens=12, do_sample=False)[0, 20:].tolist()
    assert made.index(eos) == len(made) - 1 <= 2
    none = StripedHyenaForCausalLM(type(model.config)(**golden.config | dict.fromkeys(ends)))
    none.save_pretrained(tmp_path / "none")
    none = AutoModelForCausalLM.from_pretrained(tmp_path / "none")
    for config in (none.config, none.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_sampling_gives_several_rows_and_assistants_are_refused(model, golden):
    prompt = golden.ids[:, :20]
    options = dict(max_new_tokens=6, do_sample=True, temperature=1.5, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    many = model.generate(prompt, num_return_sequences=3, **options)
    assert many.shape == (6, 26) and torch.equal(many[::3, :20], prompt)
    assert len({tuple(row) for row in many[:3].tolist()}) > 1
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, num_return_sequences=3, use_cache=False, **options), many)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(prompt, assistant_model=model, max_new_tokens=2)


def test_generate_on_a_left_padded_batch_is_generate_on_each_row(model, golden):
    rows = [golden.ids[0, :20], golden.ids[1, :13]]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = [model.generate(row[None], **options)[0, -8:] for row in rows]
    ids = torch.stack([rows[0], torch.cat([torch.zeros(7, dtype=torch.long), rows[1]])])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    together = model.generate(ids, attention_mask=mask, **options)[:, -8:]
    assert torch.equal(together, torch.stack(alone))
    beams = [model.generate(row[None], num_beams=3, **options)[0, -8:] for row in rows]
    assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=3, **options)[:, -8:], torch.stack(beams))


def test_beams_and_prefill_chunks_change_no_token(model, golden):
    prompt = golden.ids[:, :21]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=8, **options), plain)
    for cache in (new_cache(model.config), DynamicCache(), DynamicCache(config=model.config)):
        assert torch.equal(model.generate(prompt, **options, past_key_values=cache), plain)
    beams = model.generate(prompt, num_beams=3, **options)
    assert torch.equal(beams, model.generate(prompt, num_beams=3, use_cache=False, **options))
    assert not torch.equal(beams, plain)


def test_the_cache_of_a_hyena_layer_does_not_grow(model, golden):
    from stripedrag.model.cache import cache_bytes

    def held(tokens):
        cache = new_cache(model.config)
        with torch.no_grad():
            model(golden.ids[:, :tokens], past_key_values=cache)
        config = model.config
        heads = config.num_key_value_heads * config.head_dim
        attention = sum(kind == "full_attention" for kind in config.layer_types)
        return cache_bytes(cache) - attention * 2 * 2 * tokens * heads * 4

    states = 2 * 4 * 64 * (3 * 2 + model.config.state_size * 2) * (4 - len(model.config.attn_layer_idxs))
    assert held(10) == held(60) == states


def test_keys_and_values_grow_are_cropped_and_are_replaced():
    def of(*places):
        return torch.tensor(places, dtype=torch.float32).view(1, 1, -1, 1).expand(2, 3, -1, 4)

    layer = GrowingLayer()
    assert layer.get_seq_length() == 0 and layer.keys is None
    for start, length in ((0, 5), (5, 1), (6, 1), (7, 9)):
        keys, values = layer.update(of(*range(start, start + length)), -of(*range(start, start + length)))
    assert torch.equal(keys, of(*range(16))) and torch.equal(values, -keys) and torch.equal(layer.keys, keys)
    layer.crop(-10)
    assert torch.equal(layer.update(of(50), -of(50))[0], of(*range(6), 50))
    assert torch.equal(layer.values, -of(*range(6), 50))
    with pytest.raises(ValueError, match="tokens_to_remove is 3"):
        layer.crop(3)
    before = layer.keys.clone()
    layer.batch_select_indices(torch.tensor([0]))
    assert torch.equal(layer.update(of(51)[:1], -of(51)[:1])[1], -of(*range(6), 50, 51)[:1])
    assert torch.equal(before, of(*range(6), 50))
    layer.reset()
    assert torch.equal(layer.update(of(1), of(2))[1], of(2))


def test_a_decode_step_compiles_without_graph_breaks_and_is_not_compiled_for_every_length(model, golden):
    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    compiled, plain = new_cache(model.config), new_cache(model.config)
    with torch.no_grad():
        for cache in (compiled, plain):
            model(golden.ids[:, :20], past_key_values=cache)
        for place in range(20, 60):
            ids = golden.ids[:, place : place + 1]
            expected = model(ids, past_key_values=plain, use_cache=True).logits
            torch.testing.assert_close(step(ids, past_key_values=compiled, use_cache=True).logits, expected)
    assert 1 <= counter.frame_count <= 4, "a length of its own"


def test_a_decode_step_compiles_without_graph_breaks_beside_padding(sh_tiny, tmp_path):
    """As `generate` calls it."""
    golden = sh_tiny
    model = StripedHyenaForCausalLM.from_pretrained(golden.write(tmp_path), dtype=torch.float32).eval()
    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    compiled, plain = new_cache(model.config), new_cache(model.config)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        for cache in (compiled, plain):
            model(golden.ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        for place in range(20, 40):
            given = dict(input_ids=golden.ids[:, place : place + 1], attention_mask=mask[:, : place + 1])
            expected = model(**given, past_key_values=plain, use_cache=True).logits
            torch.testing.assert_close(step(**given, past_key_values=compiled, use_cache=True).logits, expected)
    assert 1 <= counter.frame_count <= 4, "a length of its own"


@pytest.mark.parametrize("factor", [2.0, 4.0, 7.5])
def test_a_stretched_window_turns_positions_as_transformers_does(factor):
    window = int(512 * factor)
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 512, "rope_theta": 1e5}
    sizes = dict(hidden_size=128, num_attention_heads=2, max_position_embeddings=window)
    positions = torch.arange(0, window, 37)[None]
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=yarn))(torch.zeros(1), positions)
    config = StripedHyenaConfig(
        hidden_size=128,
        num_attention_heads=2,
        num_layers=2,
        attn_layer_idxs=[1],
        max_seqlen=window,
        rotary_emb_base=1e5,
        rotary_emb_yarn_factor=window / 512,
    )
    found = StripedHyenaForCausalLM(config).backbone._rotary(positions, torch.float32)
    torch.testing.assert_close(found[0][:, 0], cos[..., :32], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1][:, 0], sin[..., :32], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["striped", "llama"])
def test_a_model_is_loaded_with_a_longer_window_and_says_so(golden, tmp_path, family):
    tokenizer = AutoTokenizer.from_pretrained(prepared_dir(STRIPED))
    sizes = dict(hidden_size=32, num_attention_heads=2, vocab_size=len(tokenizer), max_position_embeddings=256)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, intermediate_size=32))
    else:
        model = StripedHyenaForCausalLM(StripedHyenaConfig(**sizes, num_layers=2, attn_layer_idxs=[1]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    as_it_is, _ = load_model(tmp_path, dtype=torch.float32, window_tokens=100)
    with pytest.warns(
        UserWarning, match="was trained on 256 tokens at a time; its window of 1024 is stretched by YaRN"
    ):
        stretched, _ = load_model(tmp_path, dtype=torch.float32, window_tokens=1024)
    assert stretched.config.max_position_embeddings == 1024
    with torch.no_grad():
        assert torch.equal(as_it_is(ids).logits, model.eval()(ids).logits)
        assert not torch.allclose(stretched(ids).logits, as_it_is(ids).logits, atol=1e-6)
    assert window_tokens(stretched, "llama-2-7b") == 1024  # whatever the name says
    stretched.save_pretrained(tmp_path)
    if family == "striped":
        with pytest.warns(UserWarning, match="was trained on 256 tokens at a time; its window of 2048"):
            load_model(tmp_path, dtype=torch.float32, window_tokens=2048)
    else:
        with pytest.raises(UsageError, match=r"or scales them already\. Ask for at most 1024 tokens"):
            load_model(tmp_path, window_tokens=2048)


def test_a_stretched_window_is_warned_of_where_it_is_used(golden, tmp_path):
    """Also where the config is stretched, and nobody asked `load_model` for a window."""
    config = StripedHyenaConfig(
        hidden_size=32, num_attention_heads=2, num_layers=2, attn_layer_idxs=[1], vocab_size=64, max_seqlen=40,
        rotary_emb_yarn_factor=2.5,
    )  # fmt: skip
    StripedHyenaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    cache = new_cache(model.config)
    ids = torch.ones(1, 16, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.warns(
            UserWarning, match="17 tokens are more than the 16 that the model was trained on; its window"
        ):
            model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # a second warning would be an error here


def test_right_padding_is_read_without_a_cache_and_holes_are_refused(model, golden):
    """As a tokenizer pads that was not told which side, for `Trainer.evaluate`."""
    mask = (torch.arange(70)[None] < torch.tensor([[64], [50]])).long()
    ids = torch.cat([golden.ids, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask)
        torch.testing.assert_close(outputs.logits[0, :64], golden.expected["full_logits"][0], rtol=0, atol=5e-5)
        torch.testing.assert_close(outputs.logits[1, :50], golden.expected["full_logits"][1, :50], rtol=0, atol=5e-5)
        assert outputs.past_key_values is None
        with pytest.raises(ValueError, match="attention_mask has padding between real tokens"):
            model(golden.ids[:, :3], attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]), use_cache=False)


def test_more_tokens_can_be_embedded(golden, tmp_path):
    folder = golden.write(tmp_path)
    for kind in (AutoModelForCausalLM, AutoModel):
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        output, before = model.get_output_embeddings, model.config.vocab_size
        with torch.no_grad():
            expected = output()(model(golden.ids, output_hidden_states=True).hidden_states[-1])
            model.resize_token_embeddings(before + 3)
            logits = output()(model(golden.ids, output_hidden_states=True).hidden_states[-1])
        assert logits.shape[-1] == model.config.vocab_size == before + 3
        torch.testing.assert_close(logits[..., :before], expected, rtol=0, atol=5e-5)


def test_bad_calls_are_named(model, golden):
    with pytest.raises(ValueError, match="one of them and not both"):
        model()
    with pytest.raises(ValueError, match=r"the input has shape \(2, 0\)"):
        model(golden.ids[:, :0])
    with pytest.raises(ValueError, match=r"the input has shape \(5,\)"):
        model(golden.ids[0, :5])
    with pytest.raises(ValueError, match=r"the input has shape \(2, 0\)"):
        prefill(model, golden.ids[:, :0], new_cache(model.config))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\); with 0 tokens in the cache and 5 new"):
        model(golden.ids[:, :5], attention_mask=torch.ones(2, 3))
    cache = new_cache(model.config)
    model(golden.ids[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match=r"the cache holds 5 tokens, through which no gradient flows; call under"):
        model(golden.ids[:, 5:8], past_key_values=cache)
    with pytest.raises(ValueError, match="the cache is a StaticCache; a StripedHyena takes a DynamicCache"):
        model(golden.ids[:, :5], past_key_values=StaticCache(config=model.config, max_cache_len=64))
    other = new_cache(LlamaConfig(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"the cache has 0 layers of states among its 4, which are not this Striped"):
        model(golden.ids[:, :5], past_key_values=other)
    with pytest.raises(ValueError, match="pads on the right or inside"):
        model(golden.ids[:, :3], attention_mask=torch.tensor([[1, 1, 0]] * 2), use_cache=True)
    vocabulary, window = model.config.vocab_size, model.config.max_seqlen
    for wrong in (vocabulary, -1):
        with pytest.raises(ValueError, match=rf"{wrong}.*this model has the ids 0 to {vocabulary - 1}"):
            model(torch.tensor([[0, wrong]]))
        cache = new_cache(model.config)
        with pytest.raises(ValueError, match=rf"{wrong}.*this model has the ids 0 to {vocabulary - 1}"):
            prefill(model, torch.tensor([[0] * 40 + [wrong]]), cache)
        assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"input_ids are torch\.float32"):
        model(golden.ids.float())
    with pytest.raises(ValueError, match=f"the prompt has {window + 1} tokens and the window {window}; shorten it"):
        model(torch.zeros(1, window + 1, dtype=torch.long))


def test_a_reply_beyond_the_window_is_warned_of(model, golden):
    window = model.config.max_seqlen
    cache = new_cache(model.config)
    with torch.no_grad():
        model(torch.zeros(1, window, dtype=torch.long), past_key_values=cache)
        with pytest.warns(UserWarning, match=f"beyond the window of {window} tokens"):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)


def test_damaged_weights_are_named(sh_tiny, tmp_path):
    name = "blocks.0.mlp.l1.weight"
    for bad in (torch.nan, torch.inf):
        damaged = sh_tiny.weights[name].clone()
        damaged[0, 0] = bad
        folder = sh_tiny.write(tmp_path / str(bad), weights=sh_tiny.weights | {name: damaged})
        with pytest.raises(CheckpointError, match=rf"infinite or no numbers in backbone\.{name}\. Get a whole copy"):
            StripedHyenaForCausalLM.from_pretrained(folder)
    file = sh_tiny.write(tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .*; get a whole copy"):
        load_model(tmp_path / "cut")
    with pytest.raises(UsageError, match=r"dtype is torch\.int8; weights are torch\.float32"):
        load_model(sh_tiny.write(tmp_path / "whole"), dtype=torch.int8)


def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(tmp_path):
    for name in ("gpu", "cuda:7", "xpu"):
        with pytest.raises(UsageError, match=rf"device is '{name}', which torch does not have here \(.+\); take 'cpu'"):
            load_model(tmp_path / "no-folder", device=name)


def assert_same_tensors(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def assert_only_systems_are_fp32(model, dtype):
    for name, parameter in model.named_parameters():
        system = name.endswith(("poles", "residues"))
        assert parameter.dtype == (torch.float32 if system else dtype), name
