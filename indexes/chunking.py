"""Cuts a document into tiles: chunks without gap or overlap that fit into the embedder.

Contract: the first tile starts at 0, the last ends at the end of the text, each starts where the one before it ended;
so the tiles rebuild the document and neighbours can be joined. Each holds at most `chunk_tokens` wordpieces, counted on
the tile's own text, and at most `CHARS_PER_TOKEN * chunk_tokens` characters. No tile but the last is shorter than half
of what would have fitted.
Limits: sentence ends are found by their punctuation, so "e.g. this" may be cut after the abbreviation; a text without
white space is cut between any two characters, which may part a letter from its combining accent.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stripedrag.errors import UsageError
from stripedrag.indexes.documents import Chunk, Document

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# One character can be many tokens (U+FDFA is 18 under NFKC): with this many, every single character fits.
MIN_CHUNK_TOKENS = 32
# English runs at 4 to 5 characters a wordpiece, but a word of 5,000 letters is one [UNK] and spaces are none: without a
# limit on characters one tile could be a megabyte, which no reader of the tile has room for.
CHARS_PER_TOKEN = 8

# The best place to cut comes first. A tile keeps the white space after it, so that the next one starts with a word.
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?…][\"')\]”’»]*\s+|[。！？][”’」』）]*\s*")  # noqa: RUF001
_WORD_END = re.compile(r"\s+")
_BOUNDARIES = (_PARAGRAPH_END, _SENTENCE_END, _WORD_END)


class TileChunker:
    """Cuts by `tokenizer` (which must neither truncate nor pad) into tiles of at most `chunk_tokens` wordpieces.

    Raises `UsageError` where `chunk_tokens` is below `MIN_CHUNK_TOKENS`.
    """

    name = "tiles-1"  # part of the manifest: another way to cut is another name

    def __init__(self, tokenizer: "Tokenizer", chunk_tokens: int) -> None:
        if chunk_tokens < MIN_CHUNK_TOKENS:
            raise UsageError(f"chunk_tokens is {chunk_tokens}; it must be at least {MIN_CHUNK_TOKENS}. Raise it.")
        self.chunk_tokens = chunk_tokens
        self.max_chars = CHARS_PER_TOKEN * chunk_tokens
        self._tokenizer = tokenizer

    def cut(self, document: Document) -> Iterator[Chunk]:
        """The document's tiles in order; none where its text is empty. Takes time linear in the text.

        Each tile is found in a window of `max_chars` that starts where the tile does, rather than from one encoding of
        the whole document: a window's tokens are those of the tile itself, however the tokenizer treats what stands
        before it, and a document of a gigabyte needs no more memory than a short one.
        """
        yield from self.tiles(document.id, document.text)

    def tiles(self, doc_id: str, text: str, offset: int = 0) -> Iterator[Chunk]:
        """The tiles of `text`, which stands at character `offset` of document `doc_id`."""
        start = 0
        while start < len(text):
            window = text[start : start + self.max_chars]
            longest = self._longest(window)
            end = longest if start + longest == len(text) else self._best_end(window, longest)
            yield Chunk.at(doc_id, offset + start, window[:end])
            start += end

    def _longest(self, window: str) -> int:
        """How many characters of `window` fit. Encodes again after each cut: the tokens of a part may be others."""
        end = len(window)
        while end > 1:
            encoding = self._tokenizer.encode(window[:end], add_special_tokens=False)
            if len(encoding) <= self.chunk_tokens:
                break
            first_too_many, _ = encoding.offsets[self.chunk_tokens]
            end = max(1, min(end - 1, first_too_many))
        return end

    def _best_end(self, window: str, longest: int) -> int:
        """The last paragraph end in the second half of what fits, else sentence end, else word end, else all of it."""
        for boundary in _BOUNDARIES:
            ends = [found.end() for found in boundary.finditer(window, 0, longest)]
            if ends and ends[-1] >= longest / 2 and self._fits(window[: ends[-1]]):
                return ends[-1]
        return longest

    def _fits(self, text: str) -> bool:
        return len(self._tokenizer.encode(text, add_special_tokens=False)) <= self.chunk_tokens
