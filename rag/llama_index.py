"""StripedHyena as a LlamaIndex LLM: completes, chats and streams, also asynchronously, and never overfills its window.

The class for `from llama_index.llms.stripedhyena import StripedHyena`. Any model that `load_model` takes will do.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from typing import Any

import torch
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from stripedrag.errors import BudgetError, UsageError
from stripedrag.model.baselines import template_options, window_tokens
from stripedrag.model.generation import Sampling
from stripedrag.model.loading import DEFAULT_MODEL, load_model
from stripedrag.rag.completion import Completion
from stripedrag.rag.prompt import ChatFormat

_OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "stop")


class StripedHyena(CustomLLM):
    """A local StripedHyena for LlamaIndex; also a transformer that transformers loads.

    `metadata.context_window` is the model's window less what its chat template adds, since LlamaIndex counts neither.
    A call takes `max_tokens`, `temperature`, `top_p`, `seed` and `stop` as keyword arguments, which override the
    fields; another one raises `UsageError`. A prompt that leaves no room for the answer raises `BudgetError`.
    `raw` and `additional_kwargs` hold plain values: the reason to finish, and token counts.
    """

    model: str = Field(default=DEFAULT_MODEL, description="A prepared model, a folder or a hub id.")
    max_tokens: int = Field(default=256, gt=0, description="Tokens kept for the answer.")
    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Sample from this share of the probability.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    stop: list[str] = Field(default_factory=list, description="Strings that end an answer.")

    _model: Any = PrivateAttr()
    _tokenizer: Any = PrivateAttr()
    _format: ChatFormat = PrivateAttr()

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **fields: Any,
    ) -> None:
        unknown = sorted(fields.keys() - type(self).model_fields.keys())
        if unknown:
            raise UsageError(f"StripedHyena has no field {unknown[0]!r}; it has {', '.join(_OPTIONS)}")
        super().__init__(model=model, **fields)
        self._model, self._tokenizer = load_model(model, dtype=dtype, device=device)
        self._format = ChatFormat(self._tokenizer, template_options(model))

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex shows."""
        return "StripedHyena"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans with."""
        wrapper = len(self._completion_ids(""))
        return LLMMetadata(
            context_window=self._window - wrapper,
            num_output=self.max_tokens,
            is_chat_model=self._format.has_template,
            model_name=self.model,
            system_role=MessageRole.SYSTEM,
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The completion of a prompt; `formatted` ones are taken as they are, others become a user message."""
        return _last(self._completions(prompt, formatted, kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The completion as it grows: `delta` is what is new, `text` all so far."""
        return self._completions(prompt, formatted, kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The model's reply to a conversation."""
        return _last(self._replies(messages, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The reply as it grows: `delta` is what is new, `message` all so far."""
        return self._replies(messages, kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `complete`, without blocking the event loop."""
        return await asyncio.to_thread(lambda: _last(self._completions(prompt, formatted, kwargs)))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As `stream_complete`, without blocking the event loop."""
        return _in_thread(self._completions(prompt, formatted, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`, without blocking the event loop."""
        return await asyncio.to_thread(lambda: _last(self._replies(messages, kwargs)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As `stream_chat`, without blocking the event loop."""
        return _in_thread(self._replies(messages, kwargs))

    @property
    def _window(self) -> int:
        return window_tokens(self._model, self.model)

    def _completion_ids(self, prompt: str, formatted: bool = False) -> list[int]:
        if formatted:
            return self._format.control_ids(prompt)
        if not self._format.has_template:
            return [*self._format.first_ids, *self._format.plain_ids(prompt)]
        return self._format.chat_ids([("user", prompt)])

    def _completions(
        self, prompt: str, formatted: bool, options: dict[str, Any]
    ) -> Generator[CompletionResponse, None, None]:
        ids = self._completion_ids(prompt, formatted)
        is_reply = not formatted and self._format.has_template
        for text, delta, usage, raw in self._generate(ids, options, is_reply=is_reply):
            yield CompletionResponse(text=text, delta=delta, additional_kwargs=usage, raw=raw)

    def _replies(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Generator[ChatResponse, None, None]:
        ids = self._format.chat_ids([(str(message.role.value), _text(message)) for message in messages])
        for text, delta, usage, raw in self._generate(ids, options, is_reply=True):
            message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
            yield ChatResponse(message=message, delta=delta, additional_kwargs=usage, raw=raw)

    def _generate(
        self, ids: list[int], options: dict[str, Any], *, is_reply: bool
    ) -> Iterator[tuple[str, str, dict[str, int], dict[str, str]]]:
        """Text so far, what is new, token counts and the reason to finish ("" until the last)."""
        settings = self._settings(options)
        reserve = settings["max_tokens"]
        if not ids:
            raise UsageError("the prompt has no tokens; give some text")
        if len(ids) + reserve > self._window:
            raise BudgetError(
                f"the prompt has {len(ids)} tokens and max_tokens is {reserve}; {self.model} has a window of "
                f"{self._window}. Shorten the prompt or lower max_tokens."
            )
        completion = Completion(
            self._model,
            self._tokenizer,
            ids,
            max_new_tokens=reserve,
            sampling=Sampling(settings["temperature"], settings["top_p"], settings["seed"]),
            stop=settings["stop"],
            is_reply=is_reply,
        )
        for piece in completion:
            yield completion.text, piece, _usage(ids, completion), {"finish_reason": ""}
        yield completion.text, "", _usage(ids, completion), {"finish_reason": str(completion.finish)}

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            raise UsageError(f"StripedHyena takes no option {unknown[0]!r}; it takes {', '.join(_OPTIONS)}")
        given = {name: value for name, value in options.items() if value is not None}
        settings = {name: given.get(name, getattr(self, name)) for name in _OPTIONS}
        if isinstance(settings["stop"], str):
            settings["stop"] = [settings["stop"]]
        if "" in settings["stop"]:
            raise UsageError("stop holds an empty string, which would end every answer at once; leave it out")
        if settings["max_tokens"] < 1:
            raise UsageError(f"max_tokens is {settings['max_tokens']}; it is at least 1")
        return settings


def _usage(prompt_ids: list[int], completion: Completion) -> dict[str, int]:
    prompt, made = len(prompt_ids), len(completion.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _text(message: ChatMessage) -> str:
    other = [block.block_type for block in message.blocks if block.block_type != "text"]
    if other:
        raise UsageError(f"a message holds a block of type {other[0]!r}; this model reads text only")
    return message.content or ""


def _last(responses: Iterator[Any]) -> Any:
    *_, last = responses
    last.delta = None
    return last


async def _in_thread(responses: Generator[Any, None, None]) -> AsyncGenerator[Any, None]:
    """The items of a blocking iterator, each computed in a thread; its exception is raised here."""
    end = object()
    step: asyncio.Future[Any] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, responses, end))
            item = await asyncio.shield(step)
            if item is end:
                return
            yield item
    finally:
        if step is not None and not step.done():  # cancelled: the token under way ends first
            await asyncio.wait([step])
        responses.close()
