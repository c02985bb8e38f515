"""The text that a model writes after a prompt: prefilled once, decoded as it is read, timed and counted."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from tokenizers import Tokenizer

from stripedrag.errors import UsageError
from stripedrag.model.cache import cache_bytes, new_cache
from stripedrag.model.generation import Sampling, decode, decode_together, prefill, stop_ids
from stripedrag.model.memory import row_bytes
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.rag.context_cache import ContextCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stripedrag.rag.refusal import Refusal

_ROWS = 64  # replies that are decoded together


@dataclass
class Completed:
    """What a model wrote after a prompt of `prompt_tokens`, of which `reused_tokens` were read before.

    `text` is all so far, `token_ids` the tokens that were decoded for it, `finish` the reason to end: "stop" for the
    model's end token or a stop string (which is not part of the text), "length" for `max_new_tokens`, None before the
    end; `refused` says that a refusal stands in the reply's place, whole, whatever the limit and the stop strings.
    `prefill_s` and `decode_s` are wall seconds, `cache_bytes` is what the cache holds.
    """

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cache_bytes: int = 0
    reused_tokens: int = 0
    refused: bool = False


class Completion(Completed):
    """Iterate once for pieces of text, whole characters each; the attributes grow with the iteration.

    The reader's own time between pieces is not counted.
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
        contexts: ContextCache | None = None,
        marks: Sequence[int] = (),
        own_from: int | None = None,
        is_reply: bool = False,
        refusal: "Refusal | None" = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """What `contexts`, which is of this model, knows of the prompt's beginning is not read again, and it keeps that
        beginning up to the last of `marks`, as `ContextCache.read` does. The text of a reply is what comes after the
        space that it may begin with. `progress` hears how many of how many tokens of the prompt are read.
        """
        super().__init__(len(prompt_ids))
        self._contexts, self._marks, self._own_from, self._progress = contexts, marks, own_from, progress
        self._is_reply, self._refusal = is_reply, refusal
        self._model, self._tokenizer, self._prompt_ids = model, tokenizer, list(prompt_ids)
        self._max_new_tokens, self._sampling, self._stop = max_new_tokens, sampling or Sampling(), tuple(stop)
        self.pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def _run(self) -> Generator[str, None, None]:
        started = time.perf_counter()
        if self._contexts is None:
            cache = new_cache(self._model.config)
            ids = torch.tensor([self._prompt_ids], device=self._model.device)
            logits = prefill(self._model, ids, cache, progress=self._progress)
        else:
            reading = self._contexts.read(
                self._prompt_ids, self._marks, own_from=self._own_from, progress=self._progress
            )
            logits, cache, self.reused_tokens = reading
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        mark = time.perf_counter()
        self.prefill_s = mark - started
        if self._refusal and self._refusal.holds(logits):
            _refuse(self, self._refusal, self._max_new_tokens)
            self.cache_bytes = cache_bytes(cache)
            yield self.text
            return
        tokens = decode(
            self._model,
            logits,
            cache,
            max_new_tokens=self._max_new_tokens,
            stop_ids=stop_ids(self._model),
            sampling=self._sampling,
        )
        written = _Written(self._tokenizer.backend_tokenizer, self._stop, is_reply=self._is_reply)
        for token in tokens:
            self.token_ids.append(token)
            ready = written.after(token)
            if ready:
                self.text += ready
                self.decode_s += time.perf_counter() - mark
                yield ready
                mark = time.perf_counter()
            if written.stopped:
                break
        self.decode_s += time.perf_counter() - mark
        self.cache_bytes = cache_bytes(cache)
        last = written.rest()
        self.text += last
        self.finish = _finish(written, self.token_ids, self._max_new_tokens)
        if last:
            yield last


def complete_together(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    beginning: Sequence[int],
    rests: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    contexts: ContextCache | None,
    marks: Sequence[int] = (),
    refusal: "Refusal | None" = None,
) -> list[Completed]:
    """The replies to prompts that begin alike, `beginning`, and go on with `rests`; arguments as in `Completion`.

    The beginning is read once, and kept in `contexts` where they are given. A StripedHyena decodes all replies
    together, another model one after another. Each has its share of the seconds, and the first alone has read what
    `contexts` did not know.
    """
    if not isinstance(model, StripedHyenaForCausalLM):
        contexts = contexts or ContextCache(model)  # until the last has read it
        alone = [
            Completion(
                model,
                tokenizer,
                [*beginning, *rest],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop,
                contexts=contexts,
                marks=[*marks, len(beginning)],
                is_reply=True,
                refusal=refusal,
            )
            for rest in rests
        ]
        for completion in alone:
            deque(completion, maxlen=0)
        return list(alone)
    started = time.perf_counter()
    cache, known = (contexts or ContextCache(model, memory_bytes=0)).read_beginning(beginning, marks)
    mark = time.perf_counter()
    replies = [_Written(tokenizer.backend_tokenizer, stop, is_reply=True) for _ in rests]
    texts, made, refused = [""] * len(rests), list[list[int]](), set[int]()
    for at in range(0, len(rests), _ROWS):

        def begins(row: int, logits: torch.Tensor, first: int = at) -> bool:
            if refusal and refusal.holds(logits):
                refused.add(first + row)
            return first + row not in refused

        def ends(row: int, token: int, first: int = at) -> bool:
            texts[first + row] += replies[first + row].after(token)
            return replies[first + row].stopped

        made += decode_together(
            model,
            cache,
            rests[at : at + _ROWS],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids(model),
            sampling=sampling or Sampling(),
            begins=begins,
            ends=ends,
        )
    ended = time.perf_counter()
    completed = []
    for number, (rest, tokens, written) in enumerate(zip(rests, made, replies, strict=True)):
        completed.append(
            Completed(
                prompt_tokens=len(beginning) + len(rest),
                text=texts[number] + written.rest(),
                token_ids=tokens,
                finish=_finish(written, tokens, max_new_tokens),
                prefill_s=(mark - started) / len(rests),
                decode_s=(ended - mark) / len(rests),
                cache_bytes=cache_bytes(cache),
                reused_tokens=known if number == 0 else len(beginning),
            )
        )
        if refusal and number in refused:
            _refuse(completed[-1], refusal, max_new_tokens)
    return completed


def together_bytes(model: "PreTrainedModel", replies: int, tokens: int) -> int:
    """Bytes that `complete_together` takes for so many replies of `tokens` (with what comes before each) beside what
    a single one takes.
    """
    if replies < 2 or not isinstance(model, StripedHyenaForCausalLM):
        return 0
    return (min(replies, _ROWS) - 1) * row_bytes(model, tokens)


def refuse_empty(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings. Raises `UsageError` where they are one string, or one is empty."""
    if isinstance(stop, str):
        raise UsageError(f"stop is the string {stop!r}; it is a list of strings. Write [{stop!r}].")
    stop = tuple(stop)
    if "" in stop:
        raise UsageError("stop holds an empty string, which would end every answer at once; leave it out")
    return stop


def _refuse(completed: Completed, refusal: "Refusal", max_new_tokens: int) -> None:
    completed.text, completed.finish, completed.refused = refusal.text, "stop", True
    completed.token_ids = list(refusal.ids[:max_new_tokens])


class _Written:
    """What the tokens of a reply say, up to the first of its stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, is_reply: bool) -> None:
        self._pieces, self._stop = _Pieces(tokenizer), stop
        self._held, self._begins = "", is_reply
        self.stopped = False

    def after(self, token: int) -> str:
        """What is sure to be said once `token` has come: what could begin a stop string waits."""
        self._held += self._pieces.after(token)
        if self._begins and self._held:
            self._held, self._begins = self._held.removeprefix(" "), False
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        self.stopped = bool(found)
        sure = min(found) if found else len(self._held) - max((_overlap(self._held, s) for s in self._stop), default=0)
        ready, self._held = self._held[:sure], "" if found else self._held[sure:]
        return ready

    def rest(self) -> str:
        """What was held back when no token comes any more."""
        return self._held


def _finish(written: _Written, token_ids: Sequence[int], max_new_tokens: int) -> Literal["stop", "length"]:
    return "length" if len(token_ids) == max_new_tokens and not written.stopped else "stop"


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
