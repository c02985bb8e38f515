"""The text that a model writes after a prompt: prefilled once, decoded as it is read, timed and counted."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from tokenizers import Tokenizer

from stripedrag.model.cache import cache_bytes, new_cache
from stripedrag.model.generation import Prefix, Sampling, decode, prefill, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Completion:
    """Iterate once for pieces of text, whole characters each; the attributes grow with the iteration.

    `text` is all so far, `token_ids` the tokens that were decoded for it, `finish` the reason to end: "stop" for the
    model's end token or a stop string (which is not part of the text), "length" for `max_new_tokens`, None before the
    end. `prefill_s` and `decode_s` are wall seconds, the reader's own time between pieces not counted; `cache_bytes`
    is what the cache holds.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        prefix: Prefix | None = None,
        is_reply: bool = False,
    ) -> None:
        """`prefix`, with which the prompt begins and does not end, is not read again. The text of a reply is what comes
        after the space that it may begin with.
        """
        known = () if prefix is None else prefix.ids
        if len(known) >= len(prompt_ids) or known != tuple(prompt_ids[: len(known)]):
            raise ValueError("the prompt does not begin with the prefix, or has nothing after it")
        self._prefix, self._is_reply = prefix, is_reply
        self.text = ""
        self.token_ids: list[int] = []
        self.finish: Literal["stop", "length"] | None = None
        self.prefill_s = self.decode_s = 0.0
        self.cache_bytes = 0
        self._model, self._tokenizer, self._prompt_ids = model, tokenizer, list(prompt_ids)
        self._max_new_tokens, self._sampling, self._stop = max_new_tokens, sampling or Sampling(), tuple(stop)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self) -> Iterator[str]:
        started = time.perf_counter()
        known = 0 if self._prefix is None else len(self._prefix.ids)
        cache = new_cache(self._model.config) if self._prefix is None else self._prefix.fork()
        logits = prefill(self._model, torch.tensor([self._prompt_ids[known:]], device=self._model.device), cache)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        mark = time.perf_counter()
        self.prefill_s = mark - started
        tokens = decode(
            self._model,
            logits,
            cache,
            max_new_tokens=self._max_new_tokens,
            stop_ids=stop_ids(self._model),
            sampling=self._sampling,
        )
        pieces, held, finish = _Pieces(self._tokenizer.backend_tokenizer), "", None
        begins = self._is_reply
        for token in tokens:
            self.token_ids.append(token)
            held += pieces.after(token)
            if begins and held:
                held, begins = held.removeprefix(" "), False
            found = [place for text in self._stop if (place := held.find(text)) >= 0]
            if found:
                held, finish = held[: min(found)], "stop"
                break
            # What could be the beginning of a stop string waits until it is known not to be one.
            keep = max((_overlap(held, text) for text in self._stop), default=0)
            ready, held = held[: len(held) - keep], held[len(held) - keep :]
            if ready:
                self.text += ready
                self.decode_s += time.perf_counter() - mark
                yield ready
                mark = time.perf_counter()
        self.decode_s += time.perf_counter() - mark
        self.cache_bytes = cache_bytes(cache)
        self.text += held
        full = len(self.token_ids) == self._max_new_tokens
        self.finish = "length" if full and finish is None else "stop"
        if held:
            yield held


class _Pieces:
    """Text token by token, whole characters each.

    The tokens since the last piece are decoded with that piece's own before them, since a tokenizer may write a token
    otherwise at the beginning. tokenizers' `DecodeStream` does the same, and raises where bytes that make no character
    follow some that do.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._last: list[int] = []
        self._new: list[int] = []

    def after(self, token: int) -> str:
        """What `token` completes; empty while the bytes of a character are not all there."""
        self._new.append(token)
        before, whole = self._tokenizer.decode(self._last), self._tokenizer.decode([*self._last, *self._new])
        if len(whole) <= len(before) or whole.endswith("\ufffd"):
            return ""
        self._last, self._new = self._new, []
        return whole[len(before) :]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
