"""Text comes in whole characters, whatever tokens it is made of."""

import pytest
from tokenizers import Tokenizer, decoders, models

from stripedrag.rag.completion import Completion, _Pieces, complete_together
from stripedrag.rag.context_cache import ContextCache


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


def test_a_prompt_that_goes_on_from_a_known_beginning_is_answered_as_if_it_was_read_whole(tiny_model, tokenizer):
    common = tokenizer("Oxygen was found twice, and named once. " * 20).input_ids
    contexts = ContextCache(tiny_model)
    for place, question in enumerate(("Who found it?", "When?", "Who found it?")):
        prompt = [*common, *tokenizer(question).input_ids]
        whole = Completion(tiny_model, tokenizer, prompt, max_new_tokens=8)
        known = Completion(tiny_model, tokenizer, prompt, max_new_tokens=8, contexts=contexts, marks=[len(common)])
        assert list(known) == list(whole) and known.token_ids == whole.token_ids
        assert known.cache_bytes == whole.cache_bytes
        assert (known.reused_tokens, whole.reused_tokens) == (len(common) if place else 0, 0)


@pytest.mark.parametrize("rests", [1, 3, 70])
def test_replies_made_together_are_those_made_alone(tiny_model, tokenizer, rests):
    common = tokenizer("Oxygen was found twice, and named once. " * 20).input_ids
    questions = [tokenizer(f" Who found {'it ' * (n % 5)}{n}?").input_ids for n in range(rests)]
    contexts = ContextCache(tiny_model)
    together = complete_together(tiny_model, tokenizer, common, questions, max_new_tokens=5, contexts=contexts)
    for place, (question, completed) in enumerate(zip(questions, together, strict=True)):
        alone = Completion(tiny_model, tokenizer, [*common, *question], max_new_tokens=5, is_reply=True)
        assert "".join(alone) == completed.text and alone.token_ids == completed.token_ids
        assert completed.finish == alone.finish and completed.prompt_tokens == alone.prompt_tokens
        assert completed.reused_tokens == (len(common) if place else 0)


def test_a_stop_string_ends_each_reply_and_no_other(tiny_model, tokenizer):
    common = tokenizer("Oxygen was found twice, and named once. " * 20).input_ids
    questions = [tokenizer(f" Who found it, number {n}?").input_ids for n in range(5)]
    contexts = ContextCache(tiny_model)
    plain = complete_together(tiny_model, tokenizer, common, questions, max_new_tokens=12, contexts=contexts)
    stop = [plain[0].text[3:6], plain[3].text[2:7]]
    ended = complete_together(tiny_model, tokenizer, common, questions, max_new_tokens=12, contexts=contexts, stop=stop)
    assert ended[0].finish == ended[3].finish == "stop"
    for question, whole, short in zip(questions, plain, ended, strict=True):
        places = [place for text in stop if (place := whole.text.find(text)) >= 0]
        assert short.text == whole.text[: min(places, default=None)]
        alone = Completion(tiny_model, tokenizer, [*common, *question], max_new_tokens=12, stop=stop, is_reply=True)
        assert ("".join(alone), alone.finish, alone.token_ids) == (short.text, short.finish, short.token_ids)
