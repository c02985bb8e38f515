"""MiniLM as it runs on this machine."""

import numpy as np
import pytest
import torch

from stripedrag.errors import SetupError, UsageError
from stripedrag.indexes import MiniLMEmbedder

pytestmark = pytest.mark.weights

SENTENCES = ["A cat sits on the mat.", "Stocks fell sharply on Monday. " * 8, "", "The kitten is lying on a rug."]


def test_vectors_are_unit_vectors_in_the_order_of_their_texts(minilm: MiniLMEmbedder) -> None:
    done: list[int] = []
    vectors = minilm.embed(SENTENCES * 10, progress=done.append)
    assert vectors.shape == (40, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alone = np.concatenate([minilm.embed([sentence]) for sentence in SENTENCES])
    assert (vectors[:4] * alone).sum(axis=1).min() > 0.999
    assert alone[0] @ alone[3] > alone[0] @ alone[1] + 0.3
    assert done == [32, 8]


def test_a_query_is_embedded_as_a_passage_is(minilm: MiniLMEmbedder) -> None:
    assert minilm.embed_query(SENTENCES[0]) @ minilm.embed(SENTENCES[:1])[0] > 0.9999


def test_the_fast_dtype_gives_nearly_the_vectors_of_float32(minilm: MiniLMEmbedder) -> None:
    exact = MiniLMEmbedder(dtype=torch.float32).embed(SENTENCES)
    assert (minilm.embed(SENTENCES) * exact).sum(axis=1).min() > 0.998


def test_no_texts_are_no_vectors(minilm: MiniLMEmbedder) -> None:
    assert minilm.embed([]).shape == (0, 384)


def test_the_tokenizer_counts_what_the_model_reads(minilm: MiniLMEmbedder) -> None:
    for text in [*SENTENCES, "café naïve [SEP] 你好 한국어 😀 \u200b\x01 ½ ﬁ " + "x" * 99, "a " * 254]:
        ids = minilm._model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert minilm.tokenizer.encode(text, add_special_tokens=False).ids == ids


def test_every_token_up_to_the_limit_is_read(minilm: MiniLMEmbedder) -> None:
    longest = "word " * 253
    cats, cars = minilm.embed([longest + "cats", longest + "cars"])
    assert not np.array_equal(cats, cars)


def test_a_text_over_the_limit_is_refused_and_not_cut(minilm: MiniLMEmbedder) -> None:
    message = r"^text 1 of 2 has 255 wordpieces; all-MiniLM-L6-v2 reads 254\. Cut it into chunks first\.$"
    with pytest.raises(UsageError, match=message):
        minilm.embed(["a", "a " * 255])


def test_a_query_over_the_limit_is_refused(minilm: MiniLMEmbedder) -> None:
    message = r"^the query has 300 wordpieces; all-MiniLM-L6-v2 reads 254\. Ask a shorter question\.$"
    with pytest.raises(UsageError, match=message):
        minilm.embed_query("a " * 300)


def test_missing_weights_are_told_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: object) -> None:
        raise SetupError("the weights are not on this machine. Run `stripedrag setup`.")

    monkeypatch.setattr("stripedrag.weights.find", nowhere)
    with pytest.raises(SetupError, match="Run `stripedrag setup`"):
        MiniLMEmbedder()
