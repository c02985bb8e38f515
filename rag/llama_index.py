"""StripedHyena as a LlamaIndex LLM: completes, chats and streams, also asynchronously, and never overfills its window.

The class for `from llama_index.llms.stripedhyena import StripedHyena`. Any model that `load_model` takes will do.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
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
from stripedrag.model.generation import Sampling
from stripedrag.model.loading import DEFAULT_MODEL, load_model
from stripedrag.rag.completion import Completion
from stripedrag.rag.prompt import chat_ids


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

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(model=model, **fields)
        self._model, self._tokenizer = load_model(model, dtype=dtype, device=device)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex shows."""
        return "StripedHyena"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans with."""
        wrapper = len(self._completion_ids("")) if self._tokenizer.chat_template else 1
        return LLMMetadata(
            context_window=self._window - wrapper,
            num_output=self.max_tokens,
            is_chat_model=bool(self._tokenizer.chat_template),
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
        return int(self._model.config.max_position_embeddings)

    def _completion_ids(self, prompt: str, formatted: bool = False) -> list[int]:
        if formatted or not self._tokenizer.chat_template:
            ids: list[int] = self._tokenizer(prompt, add_special_tokens=not formatted, verbose=False).input_ids
            return ids
        return chat_ids(self._tokenizer, [("user", prompt)])

    def _completions(self, prompt: str, formatted: bool, options: dict[str, Any]) -> Iterator[CompletionResponse]:
        ids = self._completion_ids(prompt, formatted)
        for text, delta, usage, raw in self._generate(ids, options):
            yield CompletionResponse(text=text, delta=delta, additional_kwargs=usage, raw=raw)

    def _replies(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Iterator[ChatResponse]:
        ids = chat_ids(self._tokenizer, [(str(message.role.value), message.content or "") for message in messages])
        for text, delta, usage, raw in self._generate(ids, options):
            message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
            yield ChatResponse(message=message, delta=delta, additional_kwargs=usage, raw=raw)

    def _generate(
        self, ids: list[int], options: dict[str, Any]
    ) -> Iterator[tuple[str, str, dict[str, int], dict[str, str]]]:
        """Text so far, what is new, token counts and the reason to finish ("" until the last)."""
        settings = self._settings(options)
        reserve = settings["max_tokens"]
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
        )
        for piece in completion:
            yield completion.text, piece, _usage(ids, completion), {"finish_reason": ""}
        yield completion.text, "", _usage(ids, completion), {"finish_reason": str(completion.finish)}

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "seed", "stop")
        unknown = sorted(options.keys() - set(names))
        if unknown:
            raise UsageError(f"StripedHyena takes no option {unknown[0]!r}; it takes {', '.join(names)}")
        settings = {name: options.get(name, getattr(self, name)) for name in names}
        if isinstance(settings["stop"], str):
            settings["stop"] = [settings["stop"]]
        if settings["max_tokens"] < 1:
            raise UsageError(f"max_tokens is {settings['max_tokens']}; it is at least 1")
        return settings


def _usage(prompt_ids: list[int], completion: Completion) -> dict[str, int]:
    prompt, made = len(prompt_ids), len(completion.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _last(responses: Iterator[Any]) -> Any:
    *_, last = responses
    last.delta = None
    return last


async def _in_thread(responses: Iterator[Any]) -> AsyncGenerator[Any, None]:
    """The items of a blocking iterator, each computed in a thread; its exception is raised here."""
    end = object()
    try:
        while (item := await asyncio.to_thread(next, responses, end)) is not end:
            yield item
    finally:
        close = getattr(responses, "close", None)
        if close is not None:
            await asyncio.to_thread(close)
