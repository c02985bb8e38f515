"""The tokenizer of Evo's StripedHyenas: a token a byte of UTF-8, as one of transformers' fast tokenizers."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTE_VOCABULARY = 512  # of the published models: 256 bytes, and rows that nothing trained
BYTE_EOS, BYTE_PAD = 0, 1  # which no text has
_EOS, _PAD = chr(BYTE_EOS), chr(BYTE_PAD)


class ByteTokenizer(PreTrainedTokenizerFast):
    """Ids are bytes; the end of a text is 0 and padding 1, which are control tokens, and there is no beginning. Where a
    text is to hold no control token, both bytes are 0.
    """

    def __init__(self, **settings: Any) -> None:
        vocabulary = {name: byte for byte, name in enumerate(_byte_names())}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_EOS))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        own = {"tokenizer_object": tokenizer, "padding_side": "left", "clean_up_tokenization_spaces": False}
        ends = {"eos_token": AddedToken(_EOS, special=True), "pad_token": AddedToken(_PAD, special=True)}
        inputs = {"model_input_names": ["input_ids", "attention_mask"]}
        super().__init__(**own | ends | inputs | settings)


def _byte_names() -> list[str]:
    """What each byte is called in a byte-level vocabulary (Radford et al. 2019): printable ones are themselves, the
    others the characters from U+0100 on, in their order; but the two control tokens, which no text has, themselves.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    names = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    return [_EOS, _PAD, *names[2:]]
