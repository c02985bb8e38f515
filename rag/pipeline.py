"""The pipeline: retrieve by budget, prefill the model's context once, decode an answer, and say what it rests on."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stripedrag.errors import BudgetError, UsageError
from stripedrag.indexes.index import Index
from stripedrag.rag.answer import Answer, Timings, Usage, cite
from stripedrag.rag.defaults import ANSWER_TOKENS, CONTEXT_TOKENS, POLICY
from stripedrag.rag.prompt import PromptFormat
from stripedrag.rag.retriever import Context, Policy, Retriever, Searchable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stripedrag.model.generation import Sampling


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
    ) -> None:
        from stripedrag.model.baselines import template_options

        self.index, self.model, self.tokenizer, self.model_name = index, model, tokenizer, model_name
        self.retriever = Retriever(index, policy=policy)
        self.prompt = PromptFormat(tokenizer, template_options(model_name))
        self._opened = ExitStack()

    @classmethod
    def open(
        cls,
        index: str | Path | Searchable,
        *,
        model: str | Path | None = None,
        policy: Policy = POLICY,
        dtype: "torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        window_tokens: int | None = None,
    ) -> "Pipeline":
        """A pipeline over an index with a model, as `load_model` names it; None is the default.

        The index is a place, an open one, or what stands in for one (`stripedrag.rag.llama_index_search`).
        `window_tokens` asks for a longer window than the model was trained on, see `load_model`. Raises what
        `Index.open` and `load_model` raise.
        """
        from stripedrag.model.loading import DEFAULT_MODEL, load_model

        with ExitStack() as unless_well:
            opened = unless_well.enter_context(Index.open(index)) if isinstance(index, str | Path) else index
            name = DEFAULT_MODEL if model is None else model
            loaded, tokenizer = load_model(name, dtype=dtype, device=device, window_tokens=window_tokens)
            pipeline = cls(opened, loaded, tokenizer, model_name=str(name), policy=policy)
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
        from stripedrag.model.baselines import window_tokens

        return window_tokens(self.model, self.model_name)

    def ask(
        self,
        question: str,
        context_tokens: int = CONTEXT_TOKENS,
        *,
        answer_tokens: int = ANSWER_TOKENS,
        sampling: "Sampling | None" = None,
    ) -> Answer:
        """The answer to a question, from one prefill of up to `context_tokens` less the answer's reserve.

        Args:
            question: what is asked.
            context_tokens: how many tokens prompt and answer may have together, by the model's own tokenizer.
            answer_tokens: how many of them are kept for the answer.
            sampling: None is greedy.

        Raises:
            BudgetError: more context than the model's window, or too little for a prompt and one passage.
            UsageError: a blank question, or one that is longer than the embedder reads.
        """
        stream = self.stream(question, context_tokens, answer_tokens=answer_tokens, sampling=sampling)
        for _ in stream:
            pass
        return stream.answer

    def ask_many(self, questions: Iterable[str], context_tokens: int = CONTEXT_TOKENS, **options: Any) -> list[Answer]:
        """The answers to several questions, in their order; `options` are those of `ask`."""
        if isinstance(questions, str):
            raise UsageError(
                f"questions is the string {questions!r}; it is a list of questions. Write [{questions!r}]."
            )
        return [self.ask(question, context_tokens, **options) for question in questions]

    def stream(
        self,
        question: str,
        context_tokens: int = CONTEXT_TOKENS,
        *,
        answer_tokens: int = ANSWER_TOKENS,
        sampling: "Sampling | None" = None,
    ) -> "AnswerStream":
        """The answer's text as it is decoded; iterate to the end, then read `.answer`. Arguments as in `ask`.

        Retrieval is done on return; the model has not run yet.
        """
        budget = self._passage_budget(question, context_tokens, answer_tokens)
        start = time.perf_counter()
        context = self.retriever.retrieve(
            question, budget_tokens=budget, tokenizer=self.prompt, render=self.prompt.render
        )
        retrieval_s = time.perf_counter() - start
        if not context.spans:
            raise BudgetError(
                f"context_tokens is {context_tokens}, which leaves {budget} for passages, and the best chunk alone has "
                f"more; raise it (its chunks have about {self.index.chunk_tokens} wordpieces)"
            )
        return AnswerStream(self, question, context, context_tokens, answer_tokens, sampling, retrieval_s)

    def _passage_budget(self, question: str, context_tokens: int, answer_tokens: int) -> int:
        if answer_tokens < 1:
            raise BudgetError(f"answer_tokens is {answer_tokens}; an answer has at least 1")
        if context_tokens > self.window_tokens:
            raise BudgetError(
                f"context_tokens is {context_tokens}; {self.model_name} has a window of {self.window_tokens}. "
                "Lower it, or open the pipeline with window_tokens (`--window-tokens`) to stretch the window."
            )
        overhead = self.prompt.overhead_tokens(question)
        budget = context_tokens - answer_tokens - overhead
        if budget < 1:
            raise BudgetError(
                f"context_tokens is {context_tokens}: question and template take {overhead} of them and the answer's "
                f"reserve {answer_tokens}, which leaves nothing for passages. Raise it or lower answer_tokens."
            )
        return budget


class AnswerStream:
    """An answer under way. Iterating gives pieces of text; `answer` is whole once the iteration has ended."""

    def __init__(
        self,
        pipeline: Pipeline,
        question: str,
        context: Context,
        context_tokens: int,
        answer_tokens: int,
        sampling: "Sampling | None",
        retrieval_s: float,
    ) -> None:
        self.context = context
        self._answer: Answer | None = None
        self._pieces = self._run(pipeline, question, context_tokens, answer_tokens, sampling, retrieval_s)

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
        context_tokens: int,
        answer_tokens: int,
        sampling: "Sampling | None",
        retrieval_s: float,
    ) -> Iterator[str]:
        from stripedrag.rag.completion import Completion

        prompt_ids = pipeline.prompt.ids(question, self.context.spans)
        completion = Completion(
            pipeline.model,
            pipeline.tokenizer,
            prompt_ids,
            max_new_tokens=answer_tokens,
            sampling=sampling,
            is_reply=True,
        )
        yield from completion
        text = completion.text.strip()
        best_first = self.context.spans[::-1] if self.context.policy == "best-last" else self.context.spans
        self._answer = Answer(
            question=question,
            text=text,
            citations=cite(text, question, best_first),
            context=self.context,
            model=pipeline.model_name,
            finish=completion.finish or "stop",
            usage=Usage(
                prompt_tokens=len(prompt_ids),
                passage_tokens=self.context.tokens,
                answer_tokens=len(completion.token_ids),
                context_tokens=context_tokens,
            ),
            timings=Timings(retrieval_s=retrieval_s, prefill_s=completion.prefill_s, decode_s=completion.decode_s),
            cache_bytes=completion.cache_bytes,
        )
