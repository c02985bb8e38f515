"""Text comes in whole characters, whatever tokens it is made of."""

import pytest
from tokenizers import Tokenizer, decoders, models

from stripedrag.model.generation import Prefix
from stripedrag.rag.completion import Completion, _Pieces


def byte_tokenizer(*words):
    """A tokenizer of Llama's kind: words, and a token for each byte."""
    vocabulary = [f"<0x{byte:02X}>" for byte in range(256)] + list(words)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def pieces(tokenizer, tokens):
    made = _Pieces(tokenizer)
    return [made.after(token) for token in tokens]


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    word = 256
    tokens = [word, *"é€".encode(), word]
    assert pieces(byte_tokenizer("ab"), tokens) == ["ab", "", "é", "", "", "€", "ab"]


def test_bytes_that_make_no_character_do_not_end_the_answer():
    word = 256
    text = "".join(pieces(byte_tokenizer("ab"), [*"é".encode(), 0xC3, word, word]))
    assert text.startswith("é") and text.endswith("ab")


def test_pieces_of_the_default_tokenizer_are_its_text(tokenizer):
    text = "Grüße aus Łódź: 3 € für 🍎🍏, naïve façade."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(pieces(tokenizer.backend_tokenizer, ids)) == text


def test_a_prompt_that_goes_on_from_a_prefix_is_answered_as_if_it_was_read_whole(tiny_model, tokenizer):
    common = tokenizer("Oxygen was found twice, and named once. " * 20).input_ids
    prefix = Prefix(tiny_model, common)
    for question in ("Who found it?", "When?", "Who found it?"):
        prompt = [*common, *tokenizer(question).input_ids]
        whole = Completion(tiny_model, tokenizer, prompt, max_new_tokens=8)
        forked = Completion(tiny_model, tokenizer, prompt, max_new_tokens=8, prefix=prefix)
        assert list(forked) == list(whole) and forked.token_ids == whole.token_ids
        assert forked.cache_bytes == whole.cache_bytes
    for prompt in (common, [5, *common], common[:3]):
        with pytest.raises(ValueError, match="does not begin with the prefix, or has nothing after it"):
            Completion(tiny_model, tokenizer, prompt, max_new_tokens=8, prefix=prefix)
