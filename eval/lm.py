"""A model as lm-evaluation-harness asks it: log-likelihoods and greedy texts, a sequence at a time, in bounded memory.

Tokens, stop strings and rolling windows come from lm-eval's own functions, so that figures agree with its `hf` model
(tests/eval/test_lm_eval.py). Two things differ: log-probabilities are taken in float32 whatever the model's dtype, and
a request that does not fit the window is refused, where `hf` cuts off its beginning.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from stripedrag.errors import UsageError
from stripedrag.eval.losses import SEGMENT_TOKENS, prefix_token_id
from stripedrag.eval.reading import DoesNotFitError
from stripedrag.eval.schema import LMRequest
from stripedrag.model.cache import new_cache
from stripedrag.model.generation import Sampling, decode, prefill, stop_ids

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

_OF_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p"})  # without a say in greedy decoding


class WindowOverflow(DoesNotFitError):  # noqa: N818
    """A request whose tokens are more than the window; the message has both numbers."""


class HarnessLM(TemplateLM):
    """A causal language model for `lm_eval.simple_evaluate(model=…)`, and for our own runs by way of `respond_all`.

    `window_tokens` None sets no limit but a StripedHyena's own. Every method raises `WindowOverflow` for a request
    that does not fit and `UsageError` for one that no greedy decoder can answer; a text of `loglikelihood_rolling`
    always fits, since it is read window by window.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, window_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.window_tokens = model, tokenizer, window_tokens
        self._device = model.device

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether greedy decoding would write it."""
        del disable_tqdm
        return [(nats, greedy) for nats, greedy in self._respond("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, in disjoint windows that each begin with the token before them."""
        del disable_tqdm
        return self._respond("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, decoded greedily, without the stop string that ended it."""
        del disable_tqdm
        return self._respond("generate_until", requests)

    def respond(self, request: LMRequest) -> Any:
        """One response, which JSON can hold: [nats, is greedy], nats, or a text."""
        return self.respond_all([request])[0]

    def respond_all(self, requests: Sequence[LMRequest]) -> list[Any]:
        """A response for each request, in their order; a context that several continue is read once."""
        pairs = [self._pair(*request.arguments) for request in requests if request.kind == "loglikelihood"]
        scored = iter(self._score(pairs))

        def answer(request: LMRequest) -> Any:
            if request.kind == "loglikelihood":
                return list(next(scored))
            return (self._rolling if request.kind == "loglikelihood_rolling" else self._text)(*request.arguments)

        return [answer(request) for request in requests]

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end token, which ends a generated text as the model's own does."""
        end: int | None = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none. Raises `UsageError`."""
        return prefix_token_id(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; with special tokens by the tokenizer's default, but no second BOS where the text has one."""
        del kwargs
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        del kwargs
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _respond(self, kind: Any, instances: Sequence[Any]) -> list[Any]:
        return self.respond_all([LMRequest(kind=kind, arguments=instance.args) for instance in instances])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation; after an empty context the continuation follows the prefix token."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                after = after[1:]
        if not after:
            raise UsageError(
                f"the continuation {continuation!r} of a context that ends in {context[-20:]!r} has no tokens of its "
                f"own, so it has no likelihood. Give the task other choices or another target_delimiter."
            )
        return before, after

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        sharing: dict[tuple[int, ...], list[int]] = {}
        for place, (context, continuation) in enumerate(pairs):
            # The last token is only predicted, never read.
            self._refuse_overflow(len(context), len(continuation) - 1)
            sharing.setdefault(tuple(context), []).append(place)
        scores = [(0.0, True)] * len(pairs)
        for shared, places in sharing.items():
            cache = new_cache(self.model.config)
            logits = prefill(self.model, self._ids(shared), cache)
            for place in places:
                own = cache if place == places[-1] else copy.deepcopy(cache)
                scores[place] = self._continue(logits, own, pairs[place][1])
        return scores

    def _continue(self, logits: Tensor, cache: "DynamicCache", continuation: Sequence[int]) -> tuple[float, bool]:
        """Nats of a continuation of what `cache` holds, and whether each of its tokens is the likeliest."""
        targets = self._ids(continuation)[0]
        nats, greedy, start = 0.0, True, 0
        for rows in self._predictions(logits, cache, targets[:-1]):
            wanted = targets[start : start + len(rows)]
            greedy = greedy and bool((rows.argmax(-1) == wanted).all())
            nats += float(rows.float().log_softmax(-1).gather(1, wanted[:, None]).double().sum())
            start += len(rows)
        return nats, greedy

    def _predictions(self, logits: Tensor, cache: "DynamicCache", ids: Tensor) -> Iterator[Tensor]:
        """Logits (n, V) of what comes next: before `ids` (L,), then after each of them, a segment at a time."""
        yield logits
        for start in range(0, len(ids), SEGMENT_TOKENS):
            segment = ids[None, start : start + SEGMENT_TOKENS]
            yield self.model(input_ids=segment, past_key_values=cache, use_cache=True).logits[0]

    def _rolling(self, text: str) -> float:
        ids = self.tok_encode(text)
        windows = get_rolling_token_windows(
            token_list=ids,
            prefix_token=self.prefix_token_id,
            max_seq_len=self.window_tokens or max(len(ids), 1),
            context_len=1,
        )
        return math.fsum(nats for nats, _ in self._score([make_disjoint_window(window) for window in windows]))

    def _text(self, context: str, gen_kwargs: Mapping[str, Any]) -> str:
        until, max_new_tokens = greedy_settings(gen_kwargs)
        given = has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self.tok_encode(context, add_special_tokens=not given) or [self.prefix_token_id]
        self._refuse_overflow(len(ids), max_new_tokens)
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(until, eos=eos)
        stopped = stop_sequences_criteria(self.tokenizer, until, initial_decoder_input_length=0, batch_size=1)
        ends, made, cache = stop_ids(self.model), list[int](), new_cache(self.model.config)
        logits = prefill(self.model, self._ids(ids), cache)
        # No stop ids for `decode`: a token that ends the text is decoded with it, and dropped as special, as `hf` does.
        for token in decode(self.model, logits, cache, max_new_tokens=max_new_tokens, stop_ids=(), sampling=Sampling()):
            made.append(token)
            if token in ends or any(stop(torch.tensor([made]), None) for stop in stopped):
                break
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        cut: str = postprocess_generated_text(text, stop=until, think_end_token=None)
        return cut

    def _refuse_overflow(self, context: int, more: int) -> None:
        if self.window_tokens is not None and context + more > self.window_tokens:
            raise WindowOverflow(
                f"{context + more} tokens, {context} of them context; the window has {self.window_tokens}"
            )

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)


def greedy_settings(gen_kwargs: Mapping[str, Any]) -> tuple[list[str], int]:
    """The stop strings and the most new tokens that a `generate_until` request names (lm-eval's 256 where it does not).

    Raises `UsageError` where it asks for more than greedy decoding.
    """
    asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), DEFAULT_MAX_GEN_TOKS))
    until, max_new_tokens = asked.pop("until"), asked.pop("max_gen_toks")
    if asked.pop("do_sample"):
        raise UsageError(
            f"a request asks for sampling (temperature {asked.get('temperature')}); texts are decoded greedily here. "
            f"Set do_sample: false in the task's generation_kwargs."
        )
    if strangers := sorted(set(asked) - _OF_SAMPLING):
        raise UsageError(
            f"a request sets {', '.join(strangers)} for generation; greedy decoding here takes until and max_gen_toks. "
            f"Leave them out of the task's generation_kwargs."
        )
    return list(until), max_new_tokens
