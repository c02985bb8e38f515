"""Prompts as token ids: passages, questions and messages inside the model's own chat template, counted exactly.

Ids are put together from pieces that are tokenized apart, so that a prompt's count is the sum of its pieces' counts.
Only the template's own text makes control tokens: what a document or a question says stays text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from tokenizers import Tokenizer

from stripedrag.errors import UsageError
from stripedrag.rag.retriever import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatFormat:
    """A tokenizer's chat template around messages, and plain text beside it. Safe for several threads.

    transformers keeps the switch between control tokens and plain text inside the tokenizer, where one thread's call
    changes another's; so each mode has a tokenizer of its own here.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        saved = tokenizer.backend_tokenizer.to_str()
        self._plain, self._control = Tokenizer.from_str(saved), Tokenizer.from_str(saved)
        for copy in (self._plain, self._control):
            copy.no_truncation()
            copy.no_padding()
        self._plain.encode_special_tokens = True
        self._control.encode_special_tokens = False

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template; a base model has none."""
        return bool(self._tokenizer.chat_template)

    def plain_ids(self, text: str) -> list[int]:
        """The ids of `text` alone; what looks like a control token in it is text too."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text {text[:40]!r} has U+{ord(text[error.start]):04X}, which is no character; "
                "decode it as UTF-8 first"
            ) from error
        return self._plain.encode(text, add_special_tokens=False).ids

    def control_ids(self, text: str) -> list[int]:
        """The ids of text that is trusted to hold control tokens: a template's, or a prompt formatted by the caller."""
        return self._control.encode(text, add_special_tokens=False).ids

    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The ids of a conversation of (role, content), up to where the model's turn begins.

        Raises `UsageError` where there is no message, where the model has no chat template, or where its template
        refuses these roles or does not keep each message once and in order.
        """
        if not messages:
            raise UsageError("the conversation has no message; give at least one")
        ids, *parts = self.template_ids([role for role, _ in messages])
        for (_, content), part in zip(messages, parts, strict=True):
            ids = [*ids, *self.plain_ids(content), *part]
        return ids

    def template_ids(self, roles: Sequence[str]) -> list[list[int]]:
        """The ids of the template around messages of these roles: before the first, between them, after the last."""
        if not self.has_template:
            raise UsageError(
                f"the tokenizer {self._tokenizer.name_or_path!r} has no chat template; use complete, not chat"
            )
        named = ", ".join(roles)
        marks = [f"\u2e28{place}\u2e29" for place in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses the roles {named}: {error}") from error
        places = [text.find(mark) for mark in marks]
        if -1 in places or places != sorted(places) or any(text.count(mark) > 1 for mark in marks):
            raise UsageError(f"the model's chat template does not keep messages of the roles {named} once and in order")
        parts = []
        for mark in marks:
            part, _, text = text.partition(mark)
            parts.append(part)
        return [self.control_ids(part) for part in (*parts, text)]


class PromptFormat:
    """How a model is asked a question about passages; made once for its tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._format = ChatFormat(tokenizer)
        if self._format.has_template:
            self._head, self._tail = self._format.template_ids(["user"])
        else:
            self._head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            self._tail = self._format.plain_ids("\nAnswer:")

    def render(self, span: Span) -> str:
        """A passage as the model reads it."""
        return f"{span.title}\n{span.text.strip()}\n\n"

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of plain text, special tokens never among them: what a retriever counts with."""
        del add_special_tokens
        return self._format.plain_ids(text)

    def overhead_tokens(self, question: str) -> int:
        """Tokens of a prompt without any passage."""
        return len(self.ids(question, ()))

    def ids(self, question: str, spans: Sequence[Span]) -> list[int]:
        """The ids of the whole prompt."""
        passages = [i for span in spans for i in self.encode(self.render(span))]
        return [*self._head, *passages, *self.encode(f"Question: {question.strip()}"), *self._tail]
