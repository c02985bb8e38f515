"""StripedHyena as a LlamaIndex LLM: completes, chats and streams, also asynchronously, and never overfills its window.

The class for `from llama_index.llms.stripedhyena import StripedHyena`. Any model that `load_model` takes will do.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import ContextVar, copy_context
from typing import Any, Self, TypeVar

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
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.prompts import BasePromptTemplate

from stripedrag.errors import BudgetError, UsageError
from stripedrag.model.baselines import known_as, template_options, window_tokens
from stripedrag.model.cache import LEAST_BLOCK_TOKENS
from stripedrag.model.generation import Sampling
from stripedrag.model.loading import DEFAULT_MODEL, load_model
from stripedrag.model.quantization import Quantization
from stripedrag.rag.completion import Completion, refuse_empty
from stripedrag.rag.context_cache import BLOCK_TOKENS, MEMORY_BYTES, ContextCache
from stripedrag.rag.prompt import ChatFormat

_Response = TypeVar("_Response", CompletionResponse, ChatResponse)
_OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "stop")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_END: Any = object()
_abandoned: ContextVar[threading.Event | None] = ContextVar("_abandoned", default=None)  # of the call under way


class StripedHyena(CustomLLM):
    """A local StripedHyena for LlamaIndex; also a transformer that transformers loads.

    `metadata.context_window` is the model's window less what its chat template adds, since LlamaIndex counts neither.
    A call takes `max_tokens`, `temperature`, `top_p`, `seed` and `stop` as keyword arguments, which override the
    fields; another one raises `UsageError`. A prompt that leaves no room for the answer raises `BudgetError`.
    `additional_kwargs` holds token counts, `raw` the reason to finish, the counts and the seconds, as plain values.

    The beginnings of prompts are kept, in up to `cache_bytes` of memory, and not read again. Calls from several threads
    or tasks queue up: one step of the model at a time, and asynchronous calls one after another, in a thread of the
    model's own. A copy shares the model; a pickle holds the settings, without callbacks, and loads its own.
    """

    model: str = Field(default=DEFAULT_MODEL, description="A prepared model, a folder or a hub id.")
    dtype: str | None = Field(default=None, description="float32, bfloat16 or float16; None: what is fast there.")
    device: str | None = Field(default=None, description="As torch names it; None: a GPU where there is one.")
    window_tokens: int | None = Field(default=None, description="A longer window than trained on, by YaRN.")
    quantize: Quantization | None = Field(default=None, description="Weights made int8 or int4 while they are read.")
    cache_bytes: int = Field(default=MEMORY_BYTES, ge=0, description="Memory for what was read; 0 keeps nothing.")
    max_tokens: int = Field(default=256, gt=0, description="Tokens kept for the answer.")
    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Sample from this share of the probability.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    stop: list[str] = Field(default_factory=list, description="Strings that end an answer.")

    _engine: "_Engine" = PrivateAttr()

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **fields: Any,
    ) -> None:
        known = type(self).model_fields
        if unknown := sorted(fields.keys() - known.keys()):
            own = [name for name in known if name in StripedHyena.__annotations__]
            raise UsageError(f"StripedHyena has no field {unknown[0]!r}; it has {', '.join(own)}")
        fields |= {"dtype": dtype and str(dtype).removeprefix("torch."), "device": device and str(device)}
        super().__init__(model=str(model), **fields)
        if self.dtype not in (None, *_DTYPES):
            raise UsageError(f"no dtype {self.dtype!r}; choose one of {', '.join(_DTYPES)}, or None")
        refuse_empty(self.stop)  # what no call could use is refused before a model is loaded
        Sampling(self.temperature, self.top_p, self.seed)
        self._engine = _Engine(self)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "callback_manager"}
        return _made, (type(self), fields)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex shows."""
        return "StripedHyena"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans with."""
        wrapper = len(self._completion_ids(""))
        return LLMMetadata(
            context_window=self.model_window - wrapper,
            num_output=self.max_tokens,
            is_chat_model=self._engine.format.has_template,
            model_name=self.model,
            system_role=MessageRole.SYSTEM,
        )

    @property
    def model_window(self) -> int:
        """Tokens that prompt, template and answer may have together."""
        return self._engine.window_tokens

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The model's ids of a text within a prompt; what looks like a control token is text too."""
        del add_special_tokens
        return self._engine.format.inner_ids(text)

    def template_tokens(self, template: BasePromptTemplate, **arguments: Any) -> int:
        """How many tokens the model reads when `predict` or `stream` is called so, chat template and all."""
        if self.metadata.is_chat_model:
            return len(self._chat_ids(self._get_messages(template, **arguments)))
        return len(self._completion_ids(self._get_prompt(template, **arguments), formatted=True))

    def prompt_helper(self) -> PromptHelper:
        """What lets LlamaIndex's own synthesizers ("compact", say) fill this window: its tokens, and no overlap."""
        return PromptHelper(
            context_window=self.metadata.context_window,
            num_output=self.max_tokens,
            chunk_overlap_ratio=0.0,
            tokenizer=self.encode,
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The completion of a prompt; `formatted` ones are taken as they are, others become a user message."""
        return self._engine.last(self._completions(prompt, formatted, kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The completion as it grows: `delta` is what is new, `text` all so far."""
        return self._completions(prompt, formatted, kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The model's reply to a conversation."""
        return self._engine.last(self._replies(messages, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The reply as it grows: `delta` is what is new, `message` all so far."""
        return self._replies(messages, kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `complete`, without blocking the event loop; where it is cancelled it ends within a step of the model."""
        return await self._engine.alast(self._completions(prompt, formatted, kwargs))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As `stream_complete`, without blocking the event loop."""
        return self._engine.astream(self._completions(prompt, formatted, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`, without blocking the event loop; where it is cancelled it ends within a step of the model."""
        return await self._engine.alast(self._replies(messages, kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As `stream_chat`, without blocking the event loop."""
        return self._engine.astream(self._replies(messages, kwargs))

    def _completion_ids(self, prompt: str, formatted: bool = False) -> list[int]:
        form = self._engine.format
        if formatted and form.has_template:
            return form.control_ids(prompt)
        if form.has_template:
            return form.chat_ids([("user", prompt)])
        ids = form.control_ids(prompt) if formatted else form.plain_ids(prompt)
        first = form.first_ids
        return ids if ids[: len(first)] == first else [*first, *ids]

    def _chat_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self._engine.format.chat_ids([(str(message.role.value), _text(message)) for message in messages])

    def _completions(
        self, prompt: str, formatted: bool, options: dict[str, Any]
    ) -> Generator[CompletionResponse, None, None]:
        ids = self._completion_ids(prompt, formatted)
        is_reply = not formatted and self._engine.format.has_template
        for text, delta, usage, raw in self._generate(ids, options, is_reply=is_reply):
            yield CompletionResponse(text=text, delta=delta, additional_kwargs=usage, raw=raw)

    def _replies(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Generator[ChatResponse, None, None]:
        for text, delta, usage, raw in self._generate(self._chat_ids(messages), options, is_reply=True):
            message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
            yield ChatResponse(message=message, delta=delta, additional_kwargs=usage, raw=raw)

    def _generate(
        self, ids: list[int], options: dict[str, Any], *, is_reply: bool
    ) -> Iterator[tuple[str, str, dict[str, int], dict[str, Any]]]:
        """Text so far, what is new, token counts, and what `raw` holds (its reason to finish is "" until the last)."""
        settings = self._settings(options)
        reserve = settings["max_tokens"]
        if not ids:
            raise UsageError("the prompt has no tokens; give some text")
        if len(ids) + reserve > self.model_window:
            raise BudgetError(
                f"the prompt has {len(ids)} tokens and max_tokens is {reserve}; {self.model} has a window of "
                f"{self.model_window}. Shorten the prompt or lower max_tokens."
            )
        completion = self._engine.completion(
            ids,
            max_new_tokens=reserve,
            sampling=Sampling(settings["temperature"], settings["top_p"], settings["seed"]),
            stop=settings["stop"],
            is_reply=is_reply,
        )
        for piece in self._engine.in_turn(completion):
            yield completion.text, piece, _usage(completion), _raw(completion)
        yield completion.text, "", _usage(completion), _raw(completion)

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            raise UsageError(f"StripedHyena takes no option {unknown[0]!r}; it takes {', '.join(_OPTIONS)}")
        given = {name: value for name, value in options.items() if value is not None}
        settings = {name: given.get(name, getattr(self, name)) for name in _OPTIONS}
        if isinstance(settings["stop"], str):
            settings["stop"] = [settings["stop"]]
        settings["stop"] = refuse_empty(settings["stop"])
        if settings["max_tokens"] < 1:
            raise UsageError(f"max_tokens is {settings['max_tokens']}; it is at least 1")
        return settings


class _Engine:
    """A loaded model that takes one step at a time, whoever asks; copies of its LLM share it."""

    def __init__(self, llm: StripedHyena) -> None:
        self.model, self.tokenizer = load_model(
            llm.model,
            dtype=_DTYPES.get(llm.dtype or ""),
            device=llm.device,
            window_tokens=llm.window_tokens,
            quantize=llm.quantize,
        )
        known = known_as(self.model, llm.model)
        self.format = ChatFormat(self.tokenizer, template_options(known))
        self.window_tokens = window_tokens(self.model, known)
        self._contexts = ContextCache(self.model, memory_bytes=llm.cache_bytes)
        self._turn = threading.RLock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stripedhyena")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def completion(self, ids: list[int], **options: Any) -> Completion:
        """What follows a prompt. Its beginning is kept in blocks that are small near its end, where others part."""
        least = LEAST_BLOCK_TOKENS
        marks = range((max(0, len(ids) - BLOCK_TOKENS) // least + 1) * least, len(ids), least)
        return Completion(
            self.model,
            self.tokenizer,
            ids,
            contexts=self._contexts,
            marks=marks,
            progress=_unless(_abandoned.get()),
            **options,
        )

    def in_turn(self, pieces: Completion) -> Iterator[str]:
        """The pieces, each made when no other call makes one: a stream that nobody reads on blocks nobody."""
        with closing(pieces.pieces) as steps:  # a stream that nobody reads on gives its cache back
            while True:
                with self._turn:
                    piece = next(steps, None)
                if piece is None:
                    return
                yield piece

    def last(self, responses: Iterator[_Response]) -> _Response:
        """The last of the responses, with no other call between them."""
        with self._turn:
            (response,) = deque(responses, maxlen=1)
        response.delta = None
        return response

    async def alast(self, responses: Generator[_Response, None, None]) -> _Response:
        """As `last`, in the model's thread."""
        abandoned = threading.Event()

        def going() -> Iterator[_Response]:
            for response in responses:
                yield response
                if abandoned.is_set():
                    return

        try:
            return await self._run(abandoned, self.last, going())
        finally:
            abandoned.set()

    async def astream(self, responses: Generator[_Response, None, None]) -> AsyncGenerator[_Response, None]:
        """The responses, each made in the model's thread; an exception is raised here."""
        abandoned = threading.Event()
        try:
            while (response := await self._run(abandoned, next, responses, _END)) is not _END:
                yield response
        finally:
            abandoned.set()
            self._thread.submit(responses.close)  # after the token under way, where it was cancelled

    def _run(self, abandoned: threading.Event, call: Any, *arguments: Any) -> "asyncio.Future[Any]":
        context = copy_context()  # the caller's own is left as it is: its next call may be a synchronous one
        context.run(_abandoned.set, abandoned)
        return asyncio.get_running_loop().run_in_executor(self._thread, context.run, call, *arguments)


class _AbandonedError(Exception):
    """Ends the reading of a prompt whose answer nobody waits for; nobody hears it."""


def _unless(abandoned: threading.Event | None) -> Callable[[int, int], None]:
    def hear(done: int, of: int) -> None:
        if abandoned is not None and abandoned.is_set():
            raise _AbandonedError(f"{done} of {of} tokens were read")

    return hear


def _made(kind: type[StripedHyena], fields: dict[str, Any]) -> StripedHyena:
    return kind(**fields)


def _usage(completion: Completion) -> dict[str, int]:
    prompt, made = completion.prompt_tokens, len(completion.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "reused_tokens": completion.reused_tokens,
    }


def _raw(completion: Completion) -> dict[str, Any]:
    return {
        "finish_reason": completion.finish or "",
        "usage": _usage(completion),
        "prefill_s": completion.prefill_s,
        "decode_s": completion.decode_s,
    }


def _text(message: ChatMessage) -> str:
    other = [block.block_type for block in message.blocks if block.block_type != "text"]
    if other:
        raise UsageError(f"a message holds a block of type {other[0]!r}; this model reads text only")
    return message.content or ""
