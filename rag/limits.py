"""How many tokens prompt and answer may have together: what a caller asks, the model's window and the free memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from stripedrag.errors import BudgetError, UsageError
from stripedrag.rag.answer import LimitedBy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stripedrag.rag.context_cache import ContextCache

ContextTokens = int | Literal["auto"]
_MEMORY_SHARE = 0.8  # of what is free: the estimate is from above, and the machine has other work


class Limit(NamedTuple):
    """How many tokens prompt and answer may have together, and what says so."""

    tokens: int
    by: LimitedBy

    def for_passages(self, overhead: int, answer_tokens: int) -> int:
        """What is left when question and template take `overhead` tokens. Raises `BudgetError` where nothing is."""
        if answer_tokens < 1:
            raise BudgetError(f"answer_tokens is {answer_tokens}; an answer has at least 1")
        budget = self.tokens - answer_tokens - overhead
        if budget < 1 and self.by == "memory":
            raise BudgetError(
                f"the free memory takes {self.tokens} tokens of context; question and template take {overhead} of "
                f"them and the answer's reserve {answer_tokens}, which leaves nothing for passages. "
                "Free some memory, lower answer_tokens, or ask fewer questions at once."
            )
        if budget < 1:
            raise BudgetError(
                f"context_tokens is {self.tokens}: question and template take {overhead} of them and the answer's "
                f"reserve {answer_tokens}, which leaves nothing for passages. Raise it or lower answer_tokens."
            )
        return budget


class Limits:
    """What a model reads here, of which a context cache may keep what its memory takes, in the memory that is left by
    `beside_bytes`, those of other replies that are decoded together.
    """

    def __init__(
        self, model: "PreTrainedModel", model_name: str, contexts: "ContextCache | None", beside_bytes: int = 0
    ) -> None:
        self._model, self._name, self._contexts, self._beside_bytes = model, model_name, contexts, beside_bytes

    @property
    def window(self) -> Limit:
        """The model's window; a baseline's is no longer than what it was trained on."""
        from stripedrag.model.baselines import known_as, window_tokens

        return Limit(window_tokens(self._model, known_as(self._model, self._name)), "window")

    def of(self, context_tokens: ContextTokens) -> Limit:
        """The limit of a context that is to be filled. Raises `BudgetError` for more than window or memory take."""
        from stripedrag.model.memory import fitting_tokens

        if context_tokens == "auto":
            fitting = fitting_tokens(
                self._model, kept_bytes=self._keepable_bytes, beside_bytes=self._beside_bytes, share=_MEMORY_SHARE
            )
            return self.window if fitting >= self.window.tokens else Limit(fitting, "memory")
        limit = self.within_window(context_tokens)
        self.refuse_memory(limit.tokens)
        return limit

    def of_filled(self, context_tokens: ContextTokens | None, needed: int) -> Limit:
        """The limit of a context that is there already and needs so many tokens: they are what memory has to take,
        which `refuse_memory` sees to, and not the limit's.
        """
        if context_tokens is None:
            return self.window
        if context_tokens == "auto":
            auto = self.of("auto")
            return Limit(min(max(auto.tokens, needed), self.window.tokens), auto.by)
        return self.within_window(context_tokens)

    def within_window(self, context_tokens: int) -> Limit:
        """So many tokens. Raises `BudgetError` for more than the window."""
        if isinstance(context_tokens, str):
            raise UsageError(f"context_tokens is {context_tokens!r}; it is a number of tokens, or 'auto'")
        if context_tokens > self.window.tokens:
            raise BudgetError(
                f"context_tokens is {context_tokens}; {self._name} has a window of {self.window.tokens}. "
                "Lower it, or open the pipeline with window_tokens (`--window-tokens`) to stretch the window."
            )
        return Limit(context_tokens, "asked")

    def refuse_memory(self, tokens: int, beginning: Sequence[int] = ()) -> None:
        """Raises `BudgetError` where the free memory does not take `tokens`; what is kept of the prompt's `beginning`,
        token ids, is there already.
        """
        from stripedrag.model.memory import context_bytes, free_bytes, kept_token_bytes

        kept, free = self._keepable_bytes, free_bytes(self._model.device)
        needed = self._beside_bytes + context_bytes(self._model, tokens, kept_bytes=kept)
        if needed > free and beginning and self._contexts:
            new = tokens - self._contexts.known_tokens(beginning)
            kept = min(kept, int(new * kept_token_bytes(self._model)))
            needed = self._beside_bytes + context_bytes(self._model, tokens, kept_bytes=kept)
        if needed > free:
            others = f" ({self._beside_bytes / 1e9:.1f} GB of them for replies decoded together: ask fewer questions)"
            raise BudgetError(
                f"for {tokens} tokens of context {self._name} takes up to {needed / 1e9:.1f} GB of memory beside "
                f"its weights{others if self._beside_bytes else ''}; {max(free, 0) / 1e9:.1f} GB are free. "
                "Lower context_tokens, pass 'auto', or open the pipeline with a smaller cache_bytes."
            )

    @property
    def _keepable_bytes(self) -> int:
        """What the context cache may still take of the memory."""
        if self._contexts is None or self._contexts.refuses:
            return 0
        return max(0, self._contexts.memory_bytes - self._contexts.held_bytes)
