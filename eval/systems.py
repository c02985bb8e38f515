"""Systems: anything that answers. Language models in the product's own pipeline, a retriever alone, and stubs.

A stub proves the harness: `oracle` scores 1 everywhere and `empty` 0, `echo` what a question's own words are worth and
`chance` what another question's answer is.
"""

import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field, field_validator

from stripedrag.errors import UsageError
from stripedrag.eval.meter import Meter
from stripedrag.eval.places import holds
from stripedrag.eval.reading import DoesNotFitError, read
from stripedrag.eval.resources import span_of
from stripedrag.eval.schema import (
    Answered,
    Carried,
    LMDocument,
    LMResponses,
    Load,
    Losses,
    Question,
    Ranking,
    Record,
    Search,
    Text,
    digest,
)
from stripedrag.rag.packing import Span
from stripedrag.rag.retriever import Retriever

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stripedrag.eval.resources import Resources
    from stripedrag.rag.context_cache import ContextCache
    from stripedrag.rag.prompt import PromptFormat
    from stripedrag.rag.refusal import Refusal

_Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")]


class System(Protocol):
    """What a run asks of a system. `operations` are the kinds of samples that it can do."""

    @property
    def name(self) -> str:
        """Its name in the run."""

    @property
    def operations(self) -> frozenset[str]:
        """The operations of the samples that it can do."""

    def identity(self) -> Mapping[str, Any]:
        """All that its outputs depend on beside sample and task; part of every prediction's key."""

    def perform(self, sample: Any, task: Any, resources: "Resources", meter: Meter) -> Any:
        """An output for a sample of one of its operations; `meter` is told the seconds of prefill and decoding."""


class ModelSpec(Record):
    """A language model, as `load_model` names it, in the product's pipeline. `window_tokens` lowers the
    window, or stretches it by YaRN; `quantize` makes its weights small.

    `baseline` names the entry of `BASELINES` whose window and template a model has that is given as a folder.
    `refuse_above` as in `Pipeline.open`.
    """

    kind: Literal["model"]
    name: _Name
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:\d+)?)$")
    window_tokens: int | None = Field(default=None, ge=1)
    quantize: Literal["int8", "int4"] | None = None
    baseline: str | None = None
    refuse_above: float | None = Field(default=None, gt=0, le=1)

    @field_validator("baseline")
    @classmethod
    def _known(cls, baseline: str | None) -> str | None:
        from stripedrag.model.baselines import BASELINES, find

        try:
            known = baseline is None or find(baseline)
        except UsageError as error:
            raise ValueError(str(error)) from error
        if not known:
            raise ValueError(f"no baseline {baseline!r}; there is {', '.join(BASELINES)}")
        return baseline

    def open(self) -> "ModelSystem":
        """The system; its weights are read when its identity is asked for or it first performs."""
        return ModelSystem(self)


class RetrieverSpec(Record):
    """The product's search, without a language model."""

    kind: Literal["retriever"]
    name: _Name

    def open(self) -> "RetrieverSystem":
        """The system."""
        return RetrieverSystem(self.name)


class StubSpec(Record):
    """A system that proves the harness."""

    kind: Literal["stub"]
    name: Literal["oracle", "empty", "echo", "chance"]

    def open(self) -> "StubSystem":
        """The system."""
        return StubSystem(self.name)


AnySystem = Annotated[ModelSpec | RetrieverSpec | StubSpec, Field(discriminator="kind")]


class ModelSystem:
    """Reads questions through the product's prompt and decodes greedily."""

    operations = frozenset({"answer", "perplexity", "cost", "lm_eval"})

    def __init__(self, spec: ModelSpec) -> None:
        self.name, self._spec = spec.name, spec
        self._shared: tuple[int, ...] = ()  # what the last question shared with others

    @cached_property
    def _loaded(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        import torch

        from stripedrag.model.loading import load_model

        if (self._spec.device or "").startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"system {self.name!r} asks for {self._spec.device}; there is no CUDA device here")
        dtype = None if self._spec.dtype is None else getattr(torch, self._spec.dtype)
        model, tokenizer = load_model(
            self._spec.model,
            dtype=dtype,
            device=self._spec.device,
            window_tokens=self._spec.window_tokens,
            quantize=self._spec.quantize,
        )
        with torch.no_grad():  # weights that are mapped from a file are read by their first use: no part of a sample
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device))
        return model, tokenizer

    @cached_property
    def _known_as(self) -> str:
        """The name by which its window, template and threshold are looked up."""
        from stripedrag.model.baselines import known_as

        return self._spec.baseline or known_as(self._loaded[0], self._spec.model)

    @cached_property
    def _prompt(self) -> "PromptFormat":
        from stripedrag.model.baselines import template_options
        from stripedrag.rag.prompt import PromptFormat

        return PromptFormat(self._loaded[1], template_options(self._known_as))

    @cached_property
    def window_tokens(self) -> int:
        """The model's window, or the lower one that the suite asks for."""
        from stripedrag.model.baselines import window_tokens

        window = window_tokens(self._loaded[0], self._known_as)
        return min(window, self._spec.window_tokens or window)

    def identity(self) -> Mapping[str, Any]:
        """Weights, tokenizer, prompt, dtype, device and kernels. Loads the model."""
        from stripedrag.model.loading import model_folder
        from stripedrag.weights import sha256

        model, _ = self._loaded
        files = sorted(
            path
            for path in model_folder(self._spec.model).iterdir()
            if path.suffix in (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model")
        )
        probe = Span("id", "title", 0, 4, "text", 0.0)
        return {
            "model": self._spec.model,
            "files": {path.name: sha256(path.resolve()) for path in files},
            "dtype": str(model.dtype).removeprefix("torch."),
            **({"quantize": self._spec.quantize} if self._spec.quantize else {}),
            "device": model.device.type,
            "backend": _backend(model),
            "window_tokens": self.window_tokens,
            "prompt_sha256": digest(self._prompt.ids("question?", [probe])),
            "decoding": "greedy",
            "refuse_above": self._refusal and self._refusal.above,
        }

    def perform(self, sample: Any, task: Any, resources: "Resources", meter: Meter) -> Any:
        """See `System`. Raises `DoesNotFitError` where the task's overflow policy allows no cut."""
        del resources
        match sample:
            case Question():
                return self._answer(sample, task, meter)
            case Text():
                return self._losses(sample)
            case Load():
                return self._carry(sample, meter)
            case LMDocument():
                return LMResponses(responses=tuple(self._harness_lm.respond_all(sample.requests)))
        raise TypeError(f"{self.name} cannot do {type(sample).__name__}")

    def _answer(self, question: Question, task: Any, meter: Meter) -> Answered:
        from stripedrag.rag.completion import Completion

        model, tokenizer = self._loaded
        prompt = read(
            self._prompt,
            question,
            answer_tokens=task.answer_tokens,
            window_tokens=self.window_tokens,
            overflow=task.overflow,
        )
        marks: list[int] = []
        if question.shared:
            ids = self._prompt.prefix_ids([span_of(passage) for passage in prompt.passages])
            marks = [len(ids)]
            if self._shared != tuple(ids):
                self._contexts.clear()  # its memory is needed
                self._shared = tuple(ids)
        completion = Completion(
            model,
            tokenizer,
            prompt.ids,
            max_new_tokens=task.answer_tokens,
            contexts=self._contexts if question.shared else None,
            marks=marks,
            refusal=self._refusal,
        )
        for _ in completion:
            pass
        meter.prefill_s, meter.decode_s = completion.prefill_s, completion.decode_s
        return Answered(
            text=completion.text.strip(),
            finish=completion.finish or "stop",
            prompt_tokens=len(prompt.ids),
            answer_tokens=len(completion.token_ids),
            cut_tokens=prompt.cut_tokens,
            gold_survived=prompt.gold_survived,
            cache_bytes=completion.cache_bytes,
        )

    @cached_property
    def _refusal(self) -> "Refusal | None":
        from stripedrag.model.quantization import quantization
        from stripedrag.rag.refusal import refusal_for

        small = quantization(self._loaded[0])
        return refusal_for(self._known_as, self._prompt, self._spec.refuse_above, bits=small and small.bits)

    @cached_property
    def _contexts(self) -> "ContextCache":
        from stripedrag.rag.context_cache import ContextCache

        return ContextCache(self._loaded[0], memory_bytes=sys.maxsize)

    def _losses(self, text: Text) -> Losses:
        from stripedrag.eval.losses import losses, prefix_token_id

        model, tokenizer = self._loaded
        offsets = self._prompt.offsets(text.text)
        self._refuse_overflow(1 + len(offsets))
        head, starts = [prefix_token_id(tokenizer)], [start for start, _ in offsets]
        return losses(model, self._prompt.encode(text.text), starts, text.boundaries, head=head)

    def _carry(self, load: Load, meter: Meter) -> Carried:
        import torch

        from stripedrag.model.cache import cache_bytes, new_cache
        from stripedrag.model.generation import Sampling, decode, prefill

        model, _ = self._loaded
        self._refuse_overflow(load.prompt_tokens + load.decode_tokens)
        ids = torch.tensor([self._prompt.encode(load.text)[: load.prompt_tokens]], device=model.device)
        cache, clock = new_cache(model.config), _clock(model)
        started = clock()
        steps = decode(
            model,
            prefill(model, ids, cache),
            cache,
            max_new_tokens=load.decode_tokens,
            stop_ids=(),
            sampling=Sampling(),
        )
        next(steps)  # the prefill's own token: with it the time to the first token ends
        prefilled = clock()
        made = 1 + sum(1 for _ in steps)
        meter.prefill_s, meter.decode_s = prefilled - started, clock() - prefilled
        return Carried(prompt_tokens=ids.shape[1], decode_tokens=made, cache_bytes=cache_bytes(cache))

    def _refuse_overflow(self, tokens: int) -> None:
        if tokens > self.window_tokens:
            raise DoesNotFitError(f"{tokens} tokens; the window has {self.window_tokens}")

    @cached_property
    def _harness_lm(self) -> Any:
        from stripedrag.eval.lm import HarnessLM

        model, tokenizer = self._loaded
        return HarnessLM(model, tokenizer, window_tokens=self.window_tokens)


class RetrieverSystem:
    """Ranks documents by their best passage, and says at which budgets and in which best k all evidence is."""

    operations = frozenset({"search"})
    _PASSAGES = 200

    def __init__(self, name: str) -> None:
        self.name = name

    def identity(self) -> Mapping[str, Any]:
        """The embedder and how many passages are ranked; the index's content belongs to the task."""
        from stripedrag.indexes.embedding import MiniLMEmbedder

        embedder = MiniLMEmbedder()
        return {"embedder": embedder.name, "sha256": embedder.sha256, "passages": self._PASSAGES}

    def perform(self, sample: Search, task: Any, resources: "Resources", meter: Meter) -> Ranking:
        """See `System`. Budgets count the reference tokenizer's tokens of the passages alone."""
        del meter
        index = task.index(resources)
        budgets, tops = (task.budgets, task.tops) if sample.evidence else ((), ())
        found = index.search(sample.query, k=max((self._PASSAGES, *tops)), unit="passage")
        passages = [scored.chunk for scored in found]
        inside: dict[int, bool] = {}
        for budget in budgets:
            context = Retriever(index).retrieve(sample.query, budget_tokens=budget, tokenizer=resources.prompt)
            inside[budget] = bool(holds(context.spans, sample.evidence))
        top = {k: bool(holds(passages[:k], sample.evidence)) for k in tops}
        doc_ids = dict.fromkeys(passage.doc_id for passage in passages)
        return Ranking(doc_ids=tuple(doc_ids), evidence_in_budget=inside, evidence_in_top=top)


class StubSystem:
    """Answers without reading: with a reference, with nothing, with the question, or with another's reference."""

    def __init__(self, name: Literal["oracle", "empty", "echo", "chance"]) -> None:
        self.name = name
        self.operations = frozenset({"answer", "lm_eval", "search"} if name == "oracle" else {"answer"})

    def identity(self) -> Mapping[str, Any]:
        """Its name."""
        return {"stub": self.name}

    def perform(self, sample: Any, task: Any, resources: "Resources", meter: Meter) -> Any:
        """See `System`."""
        del meter
        if isinstance(sample, LMDocument):
            return LMResponses(responses=tuple(task.oracle(sample)))
        if isinstance(sample, Search):
            budgets, tops = (task.budgets, task.tops) if sample.evidence else ((), ())
            inside, top = dict.fromkeys(budgets, True), dict.fromkeys(tops, True)
            return Ranking(doc_ids=sample.relevant, evidence_in_budget=inside, evidence_in_top=top)
        return Answered(text=self._words(sample, task, resources), finish="stop", prompt_tokens=0, answer_tokens=0)

    def _words(self, question: Question, task: Any, resources: "Resources") -> str:
        if self.name == "oracle":
            return str(task.oracle(question))
        if self.name == "echo":
            return question.question
        if self.name == "chance":
            right = task.oracle(question)
            others = [answer for answer in resources.answers[task.name] if answer != right]
            return resources.rng("chance", question.id).choice(others) if others else ""
        return ""


def _clock(model: "PreTrainedModel") -> Callable[[], float]:
    """Wall seconds, read when the model's device has done all that it was given."""

    def now() -> float:
        if model.device.type == "cuda":
            import torch

            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    return now


def _backend(model: "PreTrainedModel") -> str:
    """What computes the Hyena operator of a StripedHyena; "none" for a model without one."""
    from stripedrag.kernels import dispatch
    from stripedrag.model.modeling import StripedHyenaForCausalLM

    if not isinstance(model, StripedHyenaForCausalLM):
        return "none"
    config = model.config
    return dispatch.select(None, model.device, config.short_filter_length, config.state_size).name
