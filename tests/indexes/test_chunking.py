"""The chunker's properties, with MiniLM's tokenizer and with one of bytes, whose slices tokenize quite differently."""

import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from stripedrag.errors import UsageError
from stripedrag.indexes import Chunk, Document, MiniLMEmbedder, TileChunker
from stripedrag.indexes.chunking import CHARS_PER_TOKEN, MIN_CHUNK_TOKENS

BYTES = Tokenizer(models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
WORDS = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
WORDS.pre_tokenizer = pre_tokenizers.Whitespace()

pieces = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "\n\n",
            "\r\n\r\n",
            ". ",
            "。",
            " ",
            "   ",
            "word ",
            "e\u0301",
            "\u200b",
            "\x00\x01",
            "[SEP]",
            "한국어",
            "😀👩‍👩‍👧",
            "ﷺ",
        ]
    ),
    st.builds(
        lambda text, times: text * times, st.sampled_from(["x", " ", "é", "你", "\n", "😀", "ab "]), st.integers(1, 700)
    ),
)
texts = st.lists(pieces, max_size=25).map("".join)


def cut(tokenizer: Tokenizer, text: str, chunk_tokens: int = MIN_CHUNK_TOKENS) -> list[Chunk]:
    return list(TileChunker(tokenizer, chunk_tokens).cut(Document("d", "", text)))


def lengths(tokenizer: Tokenizer, chunks: list[Chunk]) -> list[int]:
    return [len(tokenizer.encode(chunk.text, add_special_tokens=False)) for chunk in chunks]


def assert_tiles(tokenizer: Tokenizer, text: str, chunk_tokens: int) -> None:
    chunks = cut(tokenizer, text, chunk_tokens)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.start for chunk in chunks] == [0, *(chunk.end for chunk in chunks)][: len(chunks)]
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end] != ""
        assert chunk.id == f"d#{chunk.start}-{chunk.end}"
        assert len(chunk.text) <= CHARS_PER_TOKEN * chunk_tokens
    assert max(lengths(tokenizer, chunks), default=0) <= chunk_tokens


@given(texts, st.sampled_from([32, 33, 50]), st.sampled_from([BYTES, WORDS]))
def test_tiles_rebuild_the_document_and_never_exceed_the_limit(
    text: str, chunk_tokens: int, tokenizer: Tokenizer
) -> None:
    assert_tiles(tokenizer, text, chunk_tokens)


@pytest.mark.weights
@given(text=texts, chunk_tokens=st.sampled_from([32, 33, 254]))
def test_tiles_rebuild_the_document_and_never_exceed_the_limit_of_minilm(
    minilm: MiniLMEmbedder, text: str, chunk_tokens: int
) -> None:
    assert_tiles(minilm.tokenizer, text, chunk_tokens)


def test_a_character_of_many_tokens_still_fits() -> None:
    tokenizer = Tokenizer(models.BPE(BYTES.get_vocab(), []))
    tokenizer.normalizer = normalizers.NFKC()  # 'ﷺ' becomes 18 characters, 33 bytes and more
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert_tiles(tokenizer, "ﷺ" * 20, 40)


@pytest.mark.parametrize(
    ("text", "first_end"),
    [
        ("a " * 25 + "b.\n\n" + "c. " * 40, "b.\n\n"),
        ("a " * 25 + "b.\r\n\r\n" + "c. " * 40, "b.\r\n\r\n"),
        ("a " * 25 + 'b." ' + "c " * 40, 'b." '),
        ("a " * 25 + "b。" + "c " * 40, "b。"),
        ("a " * 60, "a "),
        ("\n\nb. " + "a " * 60, "a "),  # the only paragraph end stands in the first half
    ],
)
def test_a_tile_ends_with_a_paragraph_else_a_sentence_else_a_word(text: str, first_end: str) -> None:
    first, second = cut(WORDS, text)[:2]
    assert first.text.endswith(first_end)
    assert not second.text[0].isspace()


def test_a_text_without_space_is_cut_where_it_fits() -> None:
    assert [chunk.end - chunk.start for chunk in cut(BYTES, "x" * 100)] == [31, 31, 31, 7]  # a byte is the prefix space


def test_a_word_of_thousands_of_letters_is_one_token_and_still_cut() -> None:
    assert [len(chunk.text) for chunk in cut(WORDS, "x" * 600)] == [256, 256, 88]


def test_an_empty_text_has_no_tiles() -> None:
    assert cut(WORDS, "") == []


def test_a_text_that_fits_is_one_tile() -> None:
    assert [chunk.text for chunk in cut(WORDS, "One. Two.\n\nThree. ")] == ["One. Two.\n\nThree. "]


@pytest.mark.parametrize("unit", ["x", " ", "\n", "a ", ". ", ".", "[SEP]", '."', "\u0301"])
def test_cutting_takes_time_linear_in_the_text(unit: str) -> None:
    def seconds(characters: int) -> float:
        start = time.process_time()
        cut(WORDS, unit * (characters // len(unit)), 254)
        return time.process_time() - start

    seconds(10_000)
    assert seconds(400_000) < 40 * max(seconds(40_000), 0.005)  # quadratic would be 100


@pytest.mark.weights
def test_a_long_document_raises_no_warning_of_its_length(
    minilm: MiniLMEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunks = cut(minilm.tokenizer, "A sentence of a few words. " * 2000, 254)
    assert caplog.text == ""
    assert min(lengths(minilm.tokenizer, chunks[:-1])) > 240


def test_a_limit_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^chunk_tokens is 31; it must be at least 32\. Raise it\.$"):
        TileChunker(WORDS, 31)
