"""Prompts as token ids: passages, questions and messages inside the model's own chat template, counted exactly.

Ids are put together from pieces that are tokenized apart, so that a prompt's count is the sum of its pieces' counts.
Only the template's own text makes control tokens: what a document or a question says stays text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stripedrag.errors import UsageError
from stripedrag.rag.retriever import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptFormat:
    """How a model is asked a question about passages; made once for its tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        if tokenizer.chat_template:
            self._head, self._tail = _template_ids(tokenizer, ["user"])
        else:  # a base model
            self._head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            self._tail = plain_ids(tokenizer, "\nAnswer:")

    def render(self, span: Span) -> str:
        """A passage as the model reads it."""
        return f"{span.title}\n{span.text.strip()}\n\n"

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of plain text, special tokens never among them: what a retriever counts with."""
        del add_special_tokens
        return plain_ids(self._tokenizer, text)

    def overhead_tokens(self, question: str) -> int:
        """Tokens of a prompt without any passage."""
        return len(self.ids(question, ()))

    def ids(self, question: str, spans: Sequence[Span]) -> list[int]:
        """The ids of the whole prompt."""
        passages = [i for span in spans for i in self.encode(self.render(span))]
        return [*self._head, *passages, *self.encode(f"Question: {question.strip()}"), *self._tail]


def chat_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[tuple[str, str]]) -> list[int]:
    """The ids of a conversation of (role, content), up to where the model's turn begins.

    Raises `UsageError` where there is no message, where the model has no chat template, or where it refuses the roles.
    """
    if not messages:
        raise UsageError("the conversation has no message; give at least one")
    first, *parts = _template_ids(tokenizer, [role for role, _ in messages])
    ids = first
    for (_, content), part in zip(messages, parts, strict=True):
        ids = [*ids, *plain_ids(tokenizer, content), *part]
    return ids


def plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of `text` alone; what looks like a control token in it is text too."""
    return _ids(tokenizer, text, split_special_tokens=True)


def _template_ids(tokenizer: "PreTrainedTokenizerBase", roles: Sequence[str]) -> list[list[int]]:
    """The ids of the chat template around messages of these roles: before the first, between them, after the last."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use complete, not chat")
    marks = [f"\u2e28{place}\u2e29" for place in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise UsageError(f"the chat template refuses the roles {', '.join(roles)}: {error}") from error
    parts = []
    for mark in marks:
        part, _, rest = rest.partition(mark)
        parts.append(part)
    return [_ids(tokenizer, part, split_special_tokens=False) for part in (*parts, rest)]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, split_special_tokens: bool) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
    ).input_ids
    return ids
