"""The pipeline: retrieve by budget, prefill the model's context once, decode an answer, and say what it rests on."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from stripedrag.errors import BudgetError, StoreError, UsageError
from stripedrag.indexes.documents import Scored
from stripedrag.indexes.index import Index
from stripedrag.rag.answer import Answer, Timings, Usage, Warmed, cite
from stripedrag.rag.defaults import ANSWER_TOKENS, CONTEXT_TOKENS, POLICY, QUESTION_TOKENS, SHARED
from stripedrag.rag.limits import ContextTokens, Limit, Limits
from stripedrag.rag.packing import Context, Policy
from stripedrag.rag.prompt import PromptFormat
from stripedrag.rag.prompt_template import PromptTemplate
from stripedrag.rag.retriever import Retriever, Searchable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stripedrag.model.generation import Sampling
    from stripedrag.model.quantization import Quantization
    from stripedrag.rag.completion import Completed
    from stripedrag.rag.context_cache import ContextCache
    from stripedrag.rag.context_files import ContextFiles


Progress = Callable[[int, int], None]


class Pipeline:
    """An index and a model that answer questions together. Made by `open`; close it, or use it in a `with` statement.

    One question is answered at a time; the object is not safe for two threads at once.
    """

    def __init__(
        self,
        index: Searchable,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        model_name: str,
        policy: Policy = POLICY,
        shared: float | None = None,
        contexts: "ContextCache | None" = None,
        prompt: PromptTemplate | None = None,
        refuse_above: float | None = None,
    ) -> None:
        """`contexts` is a cache of this model; None keeps nothing that was read. The rest as in `open`."""
        from stripedrag.model.baselines import known_as, template_options
        from stripedrag.model.quantization import quantization
        from stripedrag.rag.refusal import refusal_for

        self.index, self.model, self.tokenizer, self.model_name = index, model, tokenizer, model_name
        self.contexts = contexts
        if shared is None:
            shared = SHARED if contexts and contexts.keeps and isinstance(index, Index) else 0.0
        self.retriever = Retriever(index, policy=policy, shared=shared)
        known, small = known_as(model, model_name), quantization(model)
        self.prompt = PromptFormat(tokenizer, template_options(known), prompt)
        self.refusal = refusal_for(known, self.prompt, refuse_above, bits=small and small.bits)
        self._opened = ExitStack()

    @classmethod
    def open(
        cls,
        index: str | Path | Searchable,
        *,
        model: str | Path | None = None,
        policy: Policy = POLICY,
        shared: float | None = None,
        dtype: "torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        window_tokens: int | None = None,
        quantize: "Quantization | None" = None,
        cache_bytes: int | None = None,
        context_files: "ContextFiles | None" = None,
        prompt: PromptTemplate | str | Path | None = None,
        refuse_above: float | None = None,
    ) -> "Pipeline":
        """A pipeline over an index with a model.

        Args:
            index: a place, an open one, or what stands in for one (`stripedrag.rag.llama_index.LlamaIndexSearch`).
            model: as `load_model` names it, as `dtype` and `device` are; None is the default.
            policy, shared: as in `Retriever`, so that of several questions about one document those after the first
                read only a part of their contexts, no less than 1,536 tokens. None shares 4/5, and nothing where
                nothing that was read is kept.
            window_tokens: a longer window than the model was trained on, see `load_model`.
            quantize: "int8" or "int4" for weights that take less memory, see `load_model`.
            cache_bytes: memory for what was read (None: 2 GiB; 0: nothing is kept in it).
            context_files: where it is kept on disk, if it is.
            prompt: a template or its file, in the place of `rag/prompt.toml`.
            refuse_above: an answer is "not in the documents" where the model gives the first token of that such a
                probability (None: what was measured for the model and the default prompt; 1: none, it says so itself).

        Raises what `Index.open`, `load_model` and `PromptTemplate.read` raise, and `UsageError` for fewer than 0 bytes
        and what is no share or probability.
        """
        from stripedrag.model.loading import DEFAULT_MODEL, load_model
        from stripedrag.rag.context_cache import MEMORY_BYTES, ContextCache

        cache_bytes = MEMORY_BYTES if cache_bytes is None else cache_bytes
        if cache_bytes < 0:
            raise UsageError(f"cache_bytes is {cache_bytes}; it is 0 (nothing is kept in memory) or more")
        template = PromptTemplate.read(prompt) if isinstance(prompt, str | Path) else prompt

        with ExitStack() as unless_well:
            opened = unless_well.enter_context(Index.open(index)) if isinstance(index, str | Path) else index
            name = DEFAULT_MODEL if model is None else model
            loaded, tokenizer = load_model(
                name, dtype=dtype, device=device, window_tokens=window_tokens, quantize=quantize
            )
            contexts = ContextCache(loaded, memory_bytes=cache_bytes, files=context_files)
            pipeline = cls(
                opened,
                loaded,
                tokenizer,
                model_name=str(name),
                policy=policy,
                shared=shared,
                contexts=contexts,
                prompt=template,
                refuse_above=refuse_above,
            )
            pipeline._opened = unless_well.pop_all()
        return pipeline

    def close(self) -> None:
        """Close the index, if `open` opened it."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def window_tokens(self) -> int:
        """The model's window; a baseline's is no longer than what it was trained on."""
        return self._limits().window.tokens

    def ask(
        self,
        question: str,
        context_tokens: ContextTokens | None = None,
        *,
        answer_tokens: int = ANSWER_TOKENS,
        sampling: "Sampling | None" = None,
        stop: Sequence[str] = (),
        context: Context | None = None,
        **narrow: Any,
    ) -> Answer:
        """The answer to a question, from one prefill of up to `context_tokens` less the answer's reserve.

        Args:
            question: what is asked.
            context_tokens: how many tokens prompt and answer may have together, by the model's own tokenizer. None is
                2,048, and where a `context` is given the model's window; "auto" is the window, or as much of it as
                the free memory takes, and `answer.usage.limited_by` says which.
            answer_tokens: how many of them are kept for the answer.
            sampling: None is greedy.
            stop: strings that end an answer, and are no part of it.
            context: what is read instead of what is retrieved, from `context_for` or `context_of`.
            **narrow: `where` and `doc_ids`, which documents may be retrieved from, as in `Index.search`.

        Raises:
            BudgetError: more context than the model's window or the free memory, or too little for a prompt and one
                passage.
            UsageError: a blank question, one that is longer than the embedder reads, or an empty stop string.
        """
        stream = self.stream(
            question,
            context_tokens,
            answer_tokens=answer_tokens,
            sampling=sampling,
            stop=stop,
            context=context,
            **narrow,
        )
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        question: str,
        context_tokens: ContextTokens | None = None,
        *,
        answer_tokens: int = ANSWER_TOKENS,
        sampling: "Sampling | None" = None,
        stop: Sequence[str] = (),
        context: Context | None = None,
        progress: Progress | None = None,
        **narrow: Any,
    ) -> "AnswerStream":
        """The answer's text as it is decoded; iterate to the end, then read `.answer`. Arguments as in `ask`.

        Retrieval is done on return; the model has not run yet. `progress` hears how many of how many tokens of the
        prompt are read.
        """
        start = time.perf_counter()
        from stripedrag.rag.completion import refuse_empty

        stop = refuse_empty(stop)
        reading = self._reading([question], context_tokens, answer_tokens, context, narrow)
        decoding = {"max_new_tokens": answer_tokens, "sampling": sampling, "stop": stop, "progress": progress}
        return AnswerStream(self, question, reading, decoding, time.perf_counter() - start)

    def ask_many(
        self,
        questions: Iterable[str],
        context_tokens: ContextTokens | None = None,
        *,
        answer_tokens: int = ANSWER_TOKENS,
        sampling: "Sampling | None" = None,
        stop: Sequence[str] = (),
        context: Context | None = None,
        **narrow: Any,
    ) -> list[Answer]:
        """The answers to several questions, in their order, from one context that they share: it is read once, and a
        StripedHyena decodes all answers together. Without a `context` it is filled with the best chunks of each
        question in turn. For a context of its own for each question, `ask` each. Arguments and errors as in `ask`.
        """
        if isinstance(questions, str):
            raise UsageError(
                f"questions is the string {questions!r}; it is a list of questions. Write [{questions!r}]."
            )
        questions = list(questions)
        start = time.perf_counter()
        if not questions:
            return []
        from stripedrag.rag.completion import complete_together, refuse_empty

        stop = refuse_empty(stop)
        reading = self._reading(questions, context_tokens, answer_tokens, context, narrow)
        retrieval_s = time.perf_counter() - start
        rests = [self.prompt.question_ids(question) for question in questions]
        completions = complete_together(
            self.model,
            self.tokenizer,
            reading.ids,
            rests,
            max_new_tokens=answer_tokens,
            sampling=sampling,
            stop=stop,
            contexts=self.contexts,
            marks=reading.marks,
            refusal=self.refusal,
        )
        return [
            self._answer(question, reading, [*reading.ids, *rest], completion, retrieval_s / len(questions))
            for question, rest, completion in zip(questions, rests, completions, strict=True)
        ]

    def context_for(
        self,
        questions: str | Sequence[str],
        context_tokens: ContextTokens = CONTEXT_TOKENS,
        *,
        answer_tokens: int = ANSWER_TOKENS,
        **narrow: Any,
    ) -> Context:
        """What fills a context for a question, or for several that are to share it; nothing is read yet.

        It leaves room for the longest question and an answer of `answer_tokens`. Arguments and errors as in `ask`.
        """
        questions = [questions] if isinstance(questions, str) else questions
        overhead = self._overhead(questions)
        limit = self._limits(len(questions), overhead + answer_tokens).of(context_tokens)
        return self._retrieved(questions, limit, limit.for_passages(overhead, answer_tokens), narrow)

    def _limits(self, replies: int = 1, tokens: int = 0) -> Limits:
        """What may be read, where so many replies of `tokens` are decoded together."""
        from stripedrag.rag.completion import together_bytes

        return Limits(self.model, self.model_name, self.contexts, together_bytes(self.model, replies, tokens))

    def _overhead(self, questions: Sequence[str]) -> int:
        return max((self.prompt.overhead_tokens(question) for question in questions), default=0)

    def _retrieved(
        self, questions: Sequence[str], limit: Limit, budget_tokens: int, narrow: Mapping[str, Any]
    ) -> Context:
        context = self.retriever.retrieve(
            questions, budget_tokens=budget_tokens, tokenizer=self.prompt, render=self.prompt.render, **narrow
        )
        return self._filled(context, limit)

    def context_of(
        self,
        doc_ids: Sequence[str],
        context_tokens: ContextTokens | None = None,
        *,
        question_tokens: int = QUESTION_TOKENS,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> Context:
        """Documents from their beginning, as many of their chunks as fill a context; what did not fit is `dropped`.

        It is the same for every question, of up to `question_tokens`. `context_tokens` None is the model's window, else
        as in `ask`. Raises `BudgetError` as `ask`, and `UsageError` for no document or one that the index has not.
        """
        if isinstance(doc_ids, str) or not doc_ids:
            raise UsageError(f"doc_ids is {doc_ids!r}; it is a list of one document or more")
        index = self.index
        if not isinstance(index, Index):
            raise UsageError(f"a {type(index).__name__} has no documents to read whole; open an index of stripedrag")
        limit = self._limits().of(self.window_tokens if context_tokens is None else context_tokens)
        overhead = self.prompt.overhead_tokens("") + question_tokens
        budget = limit.for_passages(overhead, answer_tokens)
        chunks = [chunk for doc_id in dict.fromkeys(doc_ids) for chunk in index.chunks(doc_id)]
        context = Retriever(index, policy="rank").fill(
            [Scored(chunk, 0.0, rank) for rank, chunk in enumerate(chunks, start=1)],
            budget_tokens=budget,
            tokenizer=self.prompt,
            render=self.prompt.render,
            keep_repeats=True,
        )
        return self._filled(context, limit)

    def warm(self, context: Context, *, progress: Progress | None = None) -> Warmed:
        """Read a context before it is asked about, so that `ask` with it begins with the question.

        `progress` hears how many of how many tokens are read. Raises `UsageError` where nothing is kept, and
        `StoreError` where not all of it was.
        """
        from stripedrag.model.cache import cache_bytes

        if self.contexts is None or not self.contexts.keeps:
            nowhere = "the pipeline has no context cache, or one of 0 bytes and no files that save"
            why = self.contexts.refuses if self.contexts else None
            raise UsageError(f"{self.model_name} keeps nothing that it has read: {why or nowhere}")
        ids, marks = self.prompt.marked_prefix_ids(context)
        start = time.perf_counter()
        cache, known = self.contexts.read_beginning(ids, marks, progress=progress)
        seconds = time.perf_counter() - start
        files = self.contexts.files
        if files and files.saves and self.contexts.known_tokens(ids, in_memory=False) < len(ids):
            reason = files.fault or f"it has more than the {files.disk_bytes} bytes that may be taken"
            raise StoreError(f"the context was read and could not be saved in {files.folder}: {reason}")
        if (kept := self.contexts.known_tokens(ids)) < len(ids):
            raise StoreError(
                f"the context was read, and {kept} of its {len(ids)} tokens are kept: there is room for "
                f"{self.contexts.memory_bytes} bytes; open the pipeline with more cache_bytes"
            )
        return Warmed(tokens=len(ids), reused_tokens=known, seconds=seconds, cache_bytes=cache_bytes(cache))

    def _filled(self, context: Context, limit: Limit) -> Context:
        if not context.spans:
            raise BudgetError(
                f"context_tokens is {limit.tokens}, which leaves {context.budget_tokens} for passages, and the best "
                f"chunk alone has more; raise it (its chunks have about {self.index.chunk_tokens} wordpieces)"
            )
        return context

    def _reading(
        self,
        questions: Sequence[str],
        context_tokens: ContextTokens | None,
        answer_tokens: int,
        context: Context | None,
        narrow: Mapping[str, Any],
    ) -> "_Reading":
        """What is read for the questions, the given context or a retrieved one."""
        overhead = self._overhead(questions)
        limits = self._limits(len(questions), overhead + answer_tokens)
        if context is None:
            limit = limits.of(CONTEXT_TOKENS if context_tokens is None else context_tokens)
            context = self._retrieved(questions, limit, limit.for_passages(overhead, answer_tokens), narrow)
            ids, marks = self.prompt.marked_prefix_ids(context)
            own_from = len(ids) - context.tokens + context.shared_tokens if self.retriever.shared else None
            return _Reading(context, context.tokens, limit, ids, marks, own_from)
        if narrow:
            raise UsageError(f"{next(iter(narrow))} narrows what is retrieved, and the context is given; leave one out")
        for question in questions:
            if not question.strip():
                raise UsageError(f"the question {question!r} is blank. Ask something.")
        ids, marks = self.prompt.marked_prefix_ids(context)
        passages = len(ids) - len(self.prompt.prefix_ids(()))  # by this model, whoever counted what was given
        needed = passages + overhead + answer_tokens
        limit = limits.of_filled(context_tokens, needed)
        room = limit.for_passages(overhead, answer_tokens)
        if passages > room:
            raise BudgetError(
                f"the context has {passages} tokens; of {limit.tokens} the question and the template take "
                f"{overhead} and the answer's reserve {answer_tokens}, which leaves {room}. Make it smaller "
                "(for a long question `context_of` takes question_tokens), or lower answer_tokens."
            )
        limits.refuse_memory(needed, ids)
        return _Reading(context, passages, limit, ids, marks)

    def _answer(
        self,
        question: str,
        reading: "_Reading",
        prompt_ids: Sequence[int],
        completed: "Completed",
        retrieval_s: float,
    ) -> Answer:
        from stripedrag.rag.refusal import is_refusal

        text = completed.text.strip()
        found = not (completed.refused or is_refusal(text))
        context, limit = reading.context, reading.limit
        best_first = context.spans[::-1] if context.policy == "best-last" else context.spans
        return Answer(
            question=question,
            text=text,
            found=found,
            citations=cite(text, question, best_first) if found else (),
            context=context,
            model=self.model_name,
            prompt=self.tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False),
            prompt_template_sha256=self.prompt.template.sha256,
            finish=completed.finish or "stop",
            usage=Usage(
                prompt_tokens=completed.prompt_tokens,
                reused_tokens=completed.reused_tokens,
                passage_tokens=reading.passage_tokens,
                answer_tokens=len(completed.token_ids),
                context_tokens=limit.tokens,
                limited_by=limit.by,
            ),
            timings=Timings(retrieval_s=retrieval_s, prefill_s=completed.prefill_s, decode_s=completed.decode_s),
            cache_bytes=completed.cache_bytes,
        )


class _Reading(NamedTuple):
    """What a prompt begins with, and how many tokens prompt and answer may have. `marks` are where others part, before
    `own_from` they may anywhere.
    """

    context: Context
    passage_tokens: int
    limit: Limit
    ids: Sequence[int]
    marks: Sequence[int]
    own_from: int | None = None


class AnswerStream:
    """An answer under way. Iterating gives pieces of text; `answer` is whole once the iteration has ended."""

    def __init__(
        self,
        pipeline: Pipeline,
        question: str,
        reading: _Reading,
        decoding: Mapping[str, Any],
        retrieval_s: float,
    ) -> None:
        self.context = reading.context
        self._answer: Answer | None = None
        self._pieces = self._run(pipeline, question, reading, decoding, retrieval_s)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises RuntimeError before the stream has ended."""
        if self._answer is None:
            raise RuntimeError("the answer is not whole yet: iterate the stream to its end first")
        return self._answer

    def _run(
        self,
        pipeline: Pipeline,
        question: str,
        reading: _Reading,
        decoding: Mapping[str, Any],
        retrieval_s: float,
    ) -> Iterator[str]:
        from stripedrag.rag.completion import Completion

        prompt_ids = [*reading.ids, *pipeline.prompt.question_ids(question)]
        completion = Completion(
            pipeline.model,
            pipeline.tokenizer,
            prompt_ids,
            contexts=pipeline.contexts,
            marks=reading.marks,
            own_from=reading.own_from,
            is_reply=True,
            refusal=pipeline.refusal,
            **decoding,
        )
        yield from completion
        self._answer = pipeline._answer(question, reading, prompt_ids, completion, retrieval_s)
