"""A saved state goes on as if reading had never stopped, many times over, and is refused where it does not belong."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stripedrag.errors import CheckpointError, UsageError
from stripedrag.model import StripedHyenaForCausalLM
from stripedrag.model.cache import new_cache
from stripedrag.model.generation import prefill
from stripedrag.model.state import StripedHyenaState


def split(golden, at):
    return golden.ids[:1, :at], golden.ids[:1, at:]


@pytest.mark.parametrize("at", [1, 2, 17])
def test_going_on_from_a_loaded_state_gives_the_logits_of_never_having_stopped(golden, model, tmp_path, at):
    prefix, rest = split(golden, at)
    cache = new_cache(model.config)
    stopped, whole = prefill(model, prefix, cache), prefill(model, rest, cache)
    StripedHyenaState.read(model, prefix).save(tmp_path / "state.safetensors")
    state = StripedHyenaState.load(tmp_path / "state.safetensors", model)
    assert torch.equal(state.input_ids, prefix) and torch.equal(state.logits, stopped) and len(state) == at
    for cache in (state.copy(), state.copy()):
        assert torch.equal(prefill(model, rest, cache), whole)
    torch.testing.assert_close(prefill(model, rest, state.fork()), whole, rtol=0, atol=5e-5)
    assert torch.equal(prefill(model, rest, state.copy()), whole)  # the fork left the state as it was


def test_forks_generate_what_each_continuation_gets_alone_and_share_the_prefix(golden, model):
    prefix, _ = split(golden, 20)
    state = StripedHyenaState.read(model, prefix)
    alone = model.generate(golden.ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    many = model.generate(
        golden.ids[:1].repeat(3, 1), past_key_values=state.fork(3), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(many, alone.repeat(3, 1))
    attention = model.config.attn_layer_idxs[0]
    assert state.fork(3).layers[attention].keys.data_ptr() == state.fork(2).layers[attention].keys.data_ptr()
    beams = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    assert torch.equal(
        model.generate(golden.ids[:1], past_key_values=state.fork(3), **beams), model.generate(golden.ids[:1], **beams)
    )


def test_a_fork_takes_no_padding(sh_tiny, tmp_path):
    model = StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path), dtype=torch.float32).eval()
    forked = StripedHyenaState.read(model, sh_tiny.ids[:1, :8]).fork(2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="a forked cache takes no attention_mask with padding"):
        model(sh_tiny.ids[:, 8:9], attention_mask=mask, past_key_values=forked)


def test_a_state_that_cannot_be_written_leaves_nothing(sh_tiny, tmp_path, monkeypatch):
    model = StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path / "m"), dtype=torch.float32).eval()
    state = StripedHyenaState.read(model, sh_tiny.ids[:1, :8])

    def full(tensors, path, **options):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stripedrag.model.state.save_file", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path / "out" / "state.safetensors")
    assert [*(tmp_path / "out").iterdir()] == []


def test_a_state_of_another_model_is_refused_by_name(sh_tiny, model, golden, tmp_path):
    prefix, _ = split(golden, 8)
    path = tmp_path / "state.safetensors"
    StripedHyenaState.read(model, prefix).save(path)
    other = StripedHyenaForCausalLM.from_pretrained(golden.write(tmp_path / "other"), dtype=torch.float32).eval()
    assert len(StripedHyenaState.load(path, other)) == 8  # the same weights in another folder
    with pytest.raises(CheckpointError, match="other weights, another dtype or another window"):
        StripedHyenaState.load(path, other.to(torch.bfloat16))
    with torch.no_grad():
        model.backbone.norm.scale[0] += 1
    with pytest.raises(CheckpointError, match="is of the model"):
        StripedHyenaState.load(path, model)


def test_what_says_nothing_of_the_numbers_makes_no_other_model(sh_tiny, tmp_path):
    model = StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path / "model")).eval()
    StripedHyenaState.read(model, sh_tiny.ids[:1, ::2]).save(tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "again")
    model.config.use_cache, model.config.pad_token_id = False, 0
    again = StripedHyenaForCausalLM.from_pretrained(tmp_path / "again").eval()
    for same in (model, again):
        assert torch.equal(StripedHyenaState.load(tmp_path / "state.safetensors", same).input_ids, sh_tiny.ids[:1, ::2])


def test_a_state_keeps_its_ids_when_the_callers_change(sh_tiny, tmp_path):
    model = StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path / "model")).eval()
    ids = sh_tiny.ids[:1].clone()
    state = StripedHyenaState.read(model, ids)
    ids.zero_()
    assert torch.equal(state.input_ids, sh_tiny.ids[:1])


def test_a_damaged_file_is_refused_by_name(sh_tiny, tmp_path):
    model = StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path / "model")).eval()
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    StripedHyenaState.read(model, sh_tiny.ids[:1]).save(good)
    bad.write_bytes(good.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is damaged"):
        StripedHyenaState.load(bad, model)
    data = bytearray(good.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    with pytest.raises(CheckpointError, match="its tensors have another sha256"):
        StripedHyenaState.load(bad, model)
    shutil.copy(tmp_path / "model" / "model.safetensors", bad)
    with pytest.raises(CheckpointError, match="is no saved state"):
        StripedHyenaState.load(bad, model)
    with pytest.raises(FileNotFoundError):
        StripedHyenaState.load(tmp_path / "none", model)


def test_what_has_no_state_is_refused(sh_tiny, tmp_path):
    model = StripedHyenaForCausalLM.from_pretrained(sh_tiny.write(tmp_path / "model")).eval()
    for shape in ((2, 3), (1, 0), (3,)):
        with pytest.raises(UsageError, match=r"a prefix is \(1, P\)"):
            StripedHyenaState.read(model, torch.zeros(shape, dtype=torch.long))
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config).eval()
    state = StripedHyenaState.read(llama, torch.arange(5)[None])
    ids = torch.arange(5, 9)[None]
    expected = llama(torch.arange(9)[None]).logits[:, -1]
    torch.testing.assert_close(prefill(llama, ids, state.copy()), expected)
    with pytest.raises(UsageError, match="a llama cannot read a forked cache"):
        state.fork(2)
    with pytest.raises(UsageError, match="rows is 0"):
        StripedHyenaState.read(model, sh_tiny.ids[:1]).fork(0)
