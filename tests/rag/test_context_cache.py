"""What was read is not read again, in memory or on disk, within the bytes that were given, and never wrongly."""

import os
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stripedrag.model.cache import extend
from stripedrag.model.generation import prefill
from stripedrag.rag import context_cache, context_files
from stripedrag.rag.context_cache import ContextCache
from stripedrag.rag.context_files import ContextFiles
from tiny_striped import tiny_striped

VOCABULARY = 50


class Letters:
    def __len__(self):
        return VOCABULARY


@pytest.fixture(scope="module")
def model():
    return tiny_striped(Letters(), window_tokens=512)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(context_cache, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(context_cache, "LEAST_BLOCK_TOKENS", 4)


def ids(length, seed=0):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, prompt):
    return ContextCache(model, memory_bytes=0).read(prompt).logits


@settings(max_examples=25)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 60), st.sets(st.integers(1, 60), max_size=4)),
        min_size=1,
        max_size=6,
    )
)
def test_any_stream_of_prompts_is_read_as_each_is_alone(model, prompts):
    contexts = ContextCache(model)
    for seed, length, marks in prompts:
        prompt = [*ids(20, seed % 2), *ids(length, seed)]
        known = contexts.known_tokens(prompt[:-1])
        reading = contexts.read(prompt, sorted(marks))
        assert reading.reused_tokens == known < len(prompt)
        assert reading.cache.get_seq_length() == len(prompt)
        assert torch.allclose(reading.logits, alone(model, prompt), atol=1e-5)


def test_a_prompt_goes_on_from_the_last_mark_that_both_have(model):
    contexts, common = ContextCache(model), ids(40)
    first = contexts.read([*common, *ids(9, 1)], [10, 12, 40])
    assert first.reused_tokens == 0
    assert contexts.read([*common, *ids(9, 2)], [40]).reused_tokens == 40
    assert contexts.read([*common[:30], *ids(9, 3)], [30]).reused_tokens == 26, "10, then 16 tokens of a block"
    assert contexts.read([*common[:30], *ids(9, 4)], [30]).reused_tokens == 30
    assert contexts.read(common, [40]).reused_tokens == 30, "one token is left to be read"
    assert contexts.read(ids(40, 5), [40]).reused_tokens == 0
    cache, known = contexts.read_beginning(common, [])
    assert known == 40 and cache.get_seq_length() == 40


def test_what_is_a_prompts_own_is_one_block_from_mark_to_mark(model):
    contexts, prompt, heard = ContextCache(model), ids(120), []
    contexts.read(prompt, [40, 90, 110], own_from=40, progress=lambda read, whole: heard.append((read, whole)))
    assert heard == [(16, 120), (32, 120), (40, 120), (90, 120), (110, 120), (120, 120)]
    assert [contexts.known_tokens(prompt[:n]) for n in (39, 89, 109, 119)] == [32, 40, 90, 110]
    reading = contexts.read([*prompt[:100], *ids(9, 1)], [40, 90, 100], own_from=40)
    assert reading.reused_tokens == 90
    assert torch.allclose(reading.logits, alone(model, [*prompt[:100], *ids(9, 1)]), atol=1e-5)


def test_a_cache_belongs_to_whom_it_was_given(model):
    contexts, prompt = ContextCache(model), ids(30)
    one, other = contexts.read(prompt, [20]), contexts.read(prompt, [20])
    prefill(model, torch.tensor([ids(10, 1)]), one.cache)
    for layer in one.cache.layers:
        for tensor in (layer.keys,) if hasattr(layer, "keys") else (layer.recurrent_states[0], layer.conv_states[0]):
            tensor.fill_(torch.nan)
    more = torch.tensor([ids(3, 2)])
    assert torch.allclose(prefill(model, more, other.cache), alone(model, [*prompt, *ids(3, 2)]), atol=1e-5)
    assert torch.equal(contexts.read(prompt, [20]).logits, other.logits)


def test_no_more_memory_is_taken_than_was_given_and_the_least_used_is_forgotten(model):
    one = ContextCache(model)
    one.read(ids(33), [16, 32])
    block_bytes = one.held_bytes // 2
    contexts = ContextCache(model, memory_bytes=4 * block_bytes)
    for seed in (0, 1):
        contexts.read(ids(33, seed), [16, 32])
    contexts.read(ids(33, 0), [32])  # used again
    contexts.read(ids(17, 2), [16])
    assert contexts.held_bytes <= contexts.memory_bytes
    assert [contexts.known_tokens(ids(33, seed)) for seed in (0, 1, 2)] == [32, 16, 16], "the end of 1 was forgotten"
    contexts.read(ids(200, 3), [16 * n for n in range(1, 13)])
    assert contexts.held_bytes <= contexts.memory_bytes
    assert [contexts.known_tokens(ids(n, seed)) for n, seed in ((33, 0), (33, 1), (17, 2), (200, 3))] == [0, 0, 0, 64]
    contexts.clear()
    assert contexts.held_bytes == contexts.known_tokens(ids(33)) == 0


def test_an_interruption_leaves_what_was_whole(model, interrupt):
    contexts, prompt = ContextCache(model), ids(60)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        contexts.read(prompt, [59])
    reading = contexts.read(prompt, [59])
    assert reading.reused_tokens == 32
    assert torch.allclose(reading.logits, alone(model, prompt), atol=1e-5)


def test_a_transformer_keeps_its_beginnings_and_a_sliding_window_none():
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    contexts = ContextCache(llama)
    for reused in (0, 30):
        reading = contexts.read(ids(40), [30])
        assert reading.reused_tokens == reused
        assert torch.allclose(reading.logits, alone(llama, ids(40)), atol=1e-5)
    sliding = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8)).eval()
    contexts = ContextCache(sliding)
    assert "which does not keep every token" in contexts.refuses
    assert [contexts.read(ids(40), [30]).reused_tokens for _ in range(2)] == [0, 0]


def test_another_process_finds_on_disk_what_was_read(model, tmp_path):
    prompt = ids(40)
    written = ContextCache(model, files=ContextFiles(tmp_path / "new" / "folder"))
    written.read(prompt, [10, 36])
    files = ContextFiles(tmp_path / "new" / "folder", saves=False)
    before = {path: path.stat().st_mtime_ns for path in files.folder.iterdir()}
    assert len(before) == 3 and files.size_bytes() == sum(path.stat().st_size for path in before)
    for memory_bytes in (0, 2**20):
        contexts = ContextCache(model, memory_bytes=memory_bytes, files=files)
        reading = contexts.read([*prompt[:36], *ids(5, 1)], [36])
        assert reading.reused_tokens == 36
        assert torch.allclose(reading.logits, alone(model, [*prompt[:36], *ids(5, 1)]), atol=1e-5)
        contexts.read(ids(40, 2), [30])
    assert before == {path: path.stat().st_mtime_ns for path in files.folder.iterdir()}, "read only"


def test_another_model_finds_nothing(model, tmp_path):
    contexts = ContextCache(model, files=ContextFiles(tmp_path))
    contexts.read(ids(40), [36])
    other = tiny_striped(Letters(), window_tokens=512)
    assert ContextCache(other, files=ContextFiles(tmp_path)).known_tokens(ids(40)) == 36
    with torch.no_grad():
        other.backbone.blocks[1].mlp.l3.weight.mul_(1.01)
    assert ContextCache(other, files=ContextFiles(tmp_path)).known_tokens(ids(40)) == 0
    for change in (dict(window_tokens=1024),):
        stretched = tiny_striped(Letters(), **change)
        assert ContextCache(stretched, files=ContextFiles(tmp_path)).known_tokens(ids(40)) == 0
    half = tiny_striped(Letters(), window_tokens=512).to(torch.bfloat16)
    assert ContextCache(half, files=ContextFiles(tmp_path)).known_tokens(ids(40)) == 0


@pytest.mark.parametrize("damage", ["a byte", "cut short", "empty", "another file"])
def test_a_damaged_file_is_told_and_its_tokens_are_read_anew(model, tmp_path, damage):
    files, prompt = ContextFiles(tmp_path), ids(40)
    ContextCache(model, files=files).read(prompt, [16, 32])
    first, second = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole = second.read_bytes()
    damaged = {
        "a byte": bytes([*whole[:-5], whole[-5] ^ 1, *whole[-4:]]),
        "cut short": whole[:-40],
        "empty": b"",
        "another file": first.read_bytes(),
    }
    second.write_bytes(damaged[damage])
    contexts = ContextCache(model, files=files)
    asking = ContextCache(model, files=ContextFiles(tmp_path, saves=False))
    with pytest.warns(UserWarning, match=r"is damaged \(.*\) and its tokens are read anew; remove it"):
        assert asking.read(prompt, [16, 32]).reused_tokens == 16 and second.exists()
    with pytest.warns(UserWarning, match=r"is damaged \(.*\) and its tokens are read anew; it is removed"):
        reading = contexts.read(prompt, [16, 32])
    assert reading.reused_tokens == 16 and torch.allclose(reading.logits, alone(model, prompt), atol=1e-5)
    assert ContextCache(model, files=files).read(prompt).reused_tokens == 32, "written again"


def test_a_file_that_cannot_be_read_now_is_not_removed(model, tmp_path, monkeypatch):
    files, prompt = ContextFiles(tmp_path), ids(40)
    ContextCache(model, files=files).read(prompt, [16, 32])

    def refused(*arguments, **options):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(context_files, "safe_open", refused)
        with pytest.warns(UserWarning, match=r"cannot be read \(Too many open files\); its tokens are read anew"):
            assert ContextCache(model, files=files).read(prompt, [16, 32]).reused_tokens == 0
    assert ContextCache(model, files=files).read(prompt).reused_tokens == 32


def test_what_memory_knows_is_saved_again_where_the_disk_lost_it(model, tmp_path):
    contexts, prompt = ContextCache(model, files=ContextFiles(tmp_path)), ids(40)
    contexts.read(prompt, [16, 32])
    for path in tmp_path.iterdir():
        path.unlink()
    assert contexts.read([*prompt, 1], [16, 32, 40]).reused_tokens == 32
    assert ContextCache(model, files=ContextFiles(tmp_path)).read([*prompt, 1, 2]).reused_tokens == 40


def test_saved_blocks_are_loaded_one_at_a_time_into_buffers_that_take_all(model, tmp_path, monkeypatch):
    files, prompt = ContextFiles(tmp_path), ids(100)
    ContextCache(model, files=files).read(prompt, [16, 32, 48, 64, 80, 96])
    load, loaded, alive, buffers = files.load, [], [], set()

    def watched(*arguments):
        alive.append(sum(tensor() is not None for tensor in loaded))
        found = load(*arguments)
        loaded.extend(weakref.ref(tensor) for tensor in found.values())
        return found

    def extended(cache, held):
        extend(cache, held)
        buffers.update(layer.keys.data_ptr() for layer in cache.layers if hasattr(layer, "keys"))

    monkeypatch.setattr(files, "load", watched)
    monkeypatch.setattr(context_cache, "extend", extended)
    reading = ContextCache(model, memory_bytes=0, files=files).read(prompt)
    assert reading.reused_tokens == 96
    assert len(alive) == 6 and max(alive) <= len(loaded) / 6, "no more than the block before"
    assert len(buffers) == 1


def test_a_file_that_goes_away_is_no_fault(model, tmp_path, monkeypatch):
    files = ContextFiles(tmp_path)
    ContextCache(model, files=files).read(ids(40), [16, 32])
    listed = files.children()
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(files, "children", lambda: listed)
    assert ContextCache(model, files=files).read(ids(40), [16, 32]).reused_tokens == 0


def test_no_more_disk_is_taken_than_was_given_and_the_least_used_is_forgotten(model, tmp_path):
    ContextCache(model, files=ContextFiles(tmp_path)).read(ids(33), [16, 32])
    block_bytes = max(path.stat().st_size for path in tmp_path.iterdir())
    files = ContextFiles(tmp_path, disk_bytes=4 * block_bytes)
    for seed in (1, 0):
        time.sleep(0.01)
        ContextCache(model, files=files).read(ids(33, seed), [16, 32])
    time.sleep(0.01)
    ContextCache(model, files=files).read(ids(17, 2), [16])
    contexts = ContextCache(model, files=files)
    assert files.size_bytes() <= files.disk_bytes
    assert [contexts.known_tokens(ids(33, seed)) for seed in (0, 1, 2)] == [32, 16, 16], "the end of 1 was forgotten"
    ContextCache(model, files=files).read(ids(200, 3), [16 * n for n in range(1, 13)])
    assert files.size_bytes() <= files.disk_bytes
    assert ContextCache(model, files=files).known_tokens(ids(200, 3)) == 64, "its own beginning was not given up"


def test_a_disk_that_refuses_is_told_once_and_the_answer_is_given(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    files = ContextFiles(tmp_path / "file")
    contexts = ContextCache(model, files=files)
    with pytest.warns(
        UserWarning, match=r"no longer saved in .*file: .*Free space there, or give another folder"
    ) as told:
        reading = contexts.read(ids(40), [16, 32])
    assert len(told) == 1 and isinstance(files.fault, OSError)
    assert torch.allclose(reading.logits, alone(model, ids(40)), atol=1e-5)
    assert contexts.read(ids(40), [16, 32]).reused_tokens == 32, "memory has it"


def test_what_a_killed_process_left_is_removed(model, tmp_path):
    old, young = tmp_path / ".one.1.part", tmp_path / ".two.2.part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    ContextCache(model, files=ContextFiles(tmp_path)).read(ids(20), [16])
    assert young.exists() and not old.exists()
