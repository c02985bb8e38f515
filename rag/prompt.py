"""Prompts as token ids: passages, questions and messages inside the model's own chat template, counted exactly.

Ids are put together from pieces that are tokenized apart, so that a prompt's count is the sum of its pieces' counts.
Only the template's own text makes control tokens: what a document or a question says stays text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from stripedrag.errors import UsageError
from stripedrag.rag.packing import Context, Span
from stripedrag.rag.prompt_template import PromptTemplate, default_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONG_TOKENS = 512  # of a passage whose end is worth a block's


class ChatFormat:
    """A tokenizer's chat template around messages, and plain text beside it. Safe for several threads.

    transformers keeps the switch between control tokens and plain text inside the tokenizer, where one thread's call
    changes another's; so each mode has a tokenizer of its own here. `template_options` are keyword arguments of
    `apply_chat_template`; a `chat_template` among them stands in for the tokenizer's own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template_options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._options = tokenizer, dict(template_options or {})
        saved = tokenizer.backend_tokenizer.to_str()
        self._plain, self._control = _copy(saved, control=False), _copy(saved, control=True)
        # Llama's kind of tokenizer puts a space before every text, which a piece inside a prompt must not have.
        inner = _without_first_space(saved)
        self._inner_plain = self._plain if inner == saved else _copy(inner, control=False)
        self._inner_control = self._control if inner == saved else _copy(inner, control=True)
        self._added = [token.content for token in self._control.get_added_tokens_decoder().values()]

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template; a base model has none."""
        return bool(self._options.get("chat_template") or self._tokenizer.chat_template)

    @property
    def first_ids(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text: its BOS, or none."""
        encoding = self._control.encode("x")
        return encoding.ids[: encoding.special_tokens_mask.index(0)]

    def plain_ids(self, text: str) -> list[int]:
        """The ids of `text` alone; what looks like a control token in it is text too."""
        return self._plain.encode(_unicode(text), add_special_tokens=False).ids

    def inner_ids(self, text: str) -> list[int]:
        """The ids of `text` as a piece of a longer one: as `plain_ids`, but for the space that begins a text."""
        return self._inner_plain.encode(_unicode(text), add_special_tokens=False).ids

    def inner_offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters [start, end) of each token of `inner_ids`."""
        offsets: list[tuple[int, int]] = self._inner_plain.encode(_unicode(text), add_special_tokens=False).offsets
        return offsets

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
            ids = [*ids, *self.inner_ids(content), *part]
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
        options = {"tokenize": False, "add_generation_prompt": True, **self._options}
        try:
            text = str(self._tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses the roles {named}: {error}") from error
        places = [text.find(mark) for mark in marks]
        if -1 in places or places != sorted(places) or any(text.count(mark) > 1 for mark in marks):
            raise UsageError(f"the model's chat template does not keep messages of the roles {named} once and in order")
        first, _, text = text.partition(marks[0])
        parts = [self.control_ids(first)]
        for mark in marks[1:]:
            part, _, text = text.partition(mark)
            parts.append(self._inner_control_ids(part))
        return [*parts, self._inner_control_ids(text)]

    def _inner_control_ids(self, text: str) -> list[int]:
        """As `control_ids`, for text that goes on: up to its first control token it is a piece like any other."""
        start = min((place for token in self._added if (place := text.find(token)) >= 0), default=len(text))
        piece = self._inner_control.encode(text[:start], add_special_tokens=False).ids
        return [*piece, *self.control_ids(text[start:])]


class PromptFormat:
    """How a model is asked a question about passages; made once for its tokenizer. Options as in `ChatFormat`.

    `template` has the words around them; None is the default's.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template_options: Mapping[str, Any] | None = None,
        template: PromptTemplate | None = None,
    ) -> None:
        self.template = default_template() if template is None else template
        self._format = ChatFormat(tokenizer, template_options)
        if self._format.has_template:
            self._head, self._tail = self._format.template_ids(["user"])
        else:
            self._head, self._tail = self._format.first_ids, self._format.inner_ids(self.template.reply)
        self._head = [*self._head, *self.encode(self.template.begin)]

    def render(self, span: Span) -> str:
        """A passage as the model reads it."""
        return self.template.render(span)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of plain text, special tokens never among them: what a retriever counts with."""
        del add_special_tokens
        return self._format.inner_ids(text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters [start, end) of each token of `encode`."""
        return self._format.inner_offsets(text)

    def overhead_tokens(self, question: str) -> int:
        """Tokens of a prompt without any passage."""
        return len(self.ids(question, ()))

    def ids(self, question: str, spans: Sequence[Span]) -> list[int]:
        """The ids of the whole prompt."""
        return [*self.prefix_ids(spans), *self.question_ids(question)]

    def prefix_ids(self, spans: Sequence[Span]) -> list[int]:
        """What the prompts of all questions on these passages begin with."""
        return [*self._head, *(token for span in spans for token in self.encode(self.render(span)))]

    def marked_prefix_ids(self, context: Context) -> tuple[list[int], list[int]]:
        """As `prefix_ids`, and at which places in them other prompts part from this: where what is shared or a long
        passage ends, whole documents among them, and at the end."""
        ids, marks = list(self._head), []
        for span in context.spans:
            begun = len(ids)
            ids += self.encode(self.render(span))
            if len(ids) - begun >= _LONG_TOKENS or len(ids) - len(self._head) == context.shared_tokens:
                marks.append(len(ids))
        return ids, sorted({*marks, len(ids)})

    def question_ids(self, question: str) -> list[int]:
        """What comes after the passages."""
        return [*self.encode(self.template.question_text(question)), *self._tail]


def _unicode(text: str) -> str:
    """The text itself. Raises `UsageError` for one that no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text {text[:40]!r} has U+{ord(text[error.start]):04X}, which is no character; "
            "decode it as UTF-8 first"
        ) from error
    return text


def _copy(saved: str, *, control: bool) -> Tokenizer:
    """A tokenizer that reads control tokens in a text, or takes them for text."""
    copy = Tokenizer.from_str(saved)
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not control
    if not control:
        # Qwen3's <think> is an added token but no special one. Added runs of spaces are words, and stay whole.
        added = copy.get_added_tokens_decoder().values()
        copy.add_special_tokens([token for token in added if token.content.replace("\u2581", " ").strip()])
    return copy


def _without_first_space(saved: str) -> str:
    """A saved tokenizer that puts no space before a text; the same string where it never did."""
    description = json.loads(saved)
    bare = {part: _bare(description[part]) for part in ("normalizer", "pre_tokenizer")}
    return saved if bare.items() <= description.items() else json.dumps(description | bare)


def _bare(part: Any) -> Any:
    """A normalizer or pre-tokenizer, or a list of them, without what puts a space before a text."""
    if isinstance(part, list):
        return [_bare(item) for item in part if item.get("type") != "Prepend"]
    if not isinstance(part, dict):
        return part
    match part["type"]:
        case "Sequence":
            return {key: _bare(value) for key, value in part.items()}
        case "Prepend":
            return None
        case "Metaspace":
            return part | {"prepend_scheme": "never"}
        case "ByteLevel":
            return part | {"add_prefix_space": False}
    return part
