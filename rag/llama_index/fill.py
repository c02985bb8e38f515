"""A LlamaIndex synthesizer that fills the model's window with nodes and calls it once.

engine = RetrieverQueryEngine(index.as_retriever(similarity_top_k=1000), FillContext(llm))
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryType, TextNode
from llama_index.core.types import RESPONSE_TEXT_TYPE

from stripedrag.errors import BudgetError, UsageError
from stripedrag.indexes.documents import Chunk, Scored
from stripedrag.rag.defaults import POLICY
from stripedrag.rag.llama_index.llm import StripedHyena
from stripedrag.rag.llama_index.search import TITLES, place, title
from stripedrag.rag.packing import POLICIES, Policy, fill
from stripedrag.rag.prompt_template import default_template


@dataclass(frozen=True, slots=True)
class _Filled:
    """The passages as text, the nodes that they are of, those that were left out, and what was filled."""

    text: str
    read: list[NodeWithScore]
    report: dict[str, Any]


class FillContext(BaseSynthesizer):
    """Answers from as many of the nodes as fit into the window, taken in their order, with one call of the model.

    Nodes of one document that touch are joined, repeats are left out, and passages are ordered by `policy`, as
    `stripedrag.rag.Retriever` does. Tokens are the model's own, template, question and the answer's `max_tokens`
    included. `response.source_nodes` are the nodes that were read; `response.metadata["fill_context"]` has the tokens
    of the prompt and the window, and of each node that was left out its id and the reason. `llm` is our `StripedHyena`:
    another LLM does not say how many tokens it reads, and raises `UsageError`. Raises `BudgetError` where no node fits.
    """

    def __init__(
        self,
        llm: StripedHyena,
        *,
        policy: Policy = POLICY,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if not isinstance(llm, StripedHyena):
            raise UsageError(
                f"FillContext counts with the model's own tokenizer, which a {type(llm).__name__} does not give. Use "
                'StripedHyena, or LlamaIndex\'s "compact" with a PromptHelper for that LLM.'
            )
        if policy not in POLICIES:
            raise UsageError(f"no order policy {policy!r}; choose one of {', '.join(POLICIES)}")
        super().__init__(
            llm=llm, callback_manager=callback_manager, prompt_helper=llm.prompt_helper(), streaming=streaming
        )
        self._passages = default_template()
        question = self._passages.question_text("{query_str}")
        self._text_qa_template = text_qa_template or PromptTemplate("{context_str}" + question)
        self._policy = policy

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """The answer to a query from its nodes; see the class."""
        if not nodes:
            return super().synthesize(query, nodes, additional_source_nodes, **response_kwargs)
        filled = self._fill(_query(query), list(nodes), response_kwargs)
        response = super().synthesize(query, filled.read, additional_source_nodes, filled=filled, **response_kwargs)
        return _told(response, filled)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """As `synthesize`, without blocking the event loop."""
        if not nodes:
            return await super().asynthesize(query, nodes, additional_source_nodes, **response_kwargs)
        filled = await asyncio.to_thread(self._fill, _query(query), list(nodes), response_kwargs)
        response = await super().asynthesize(
            query, filled.read, additional_source_nodes, filled=filled, **response_kwargs
        )
        return _told(response, filled)

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], filled: _Filled | None = None, **prompt_args: Any
    ) -> RESPONSE_TEXT_TYPE:
        """The answer's text from passages, as many as fit; see the class."""
        call = self._llm.stream if self._streaming else self._llm.predict
        return call(
            self._text_qa_template, **self._arguments(query_str, text_chunks, filled, prompt_args), **prompt_args
        )

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], filled: _Filled | None = None, **prompt_args: Any
    ) -> RESPONSE_TEXT_TYPE:
        """As `get_response`, without blocking the event loop."""
        call = self._llm.astream if self._streaming else self._llm.apredict
        arguments = await asyncio.to_thread(self._arguments, query_str, text_chunks, filled, prompt_args)
        return await call(self._text_qa_template, **arguments, **prompt_args)

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)

    def _arguments(
        self, query_str: str, text_chunks: Sequence[str], filled: _Filled | None, prompt_args: Mapping[str, Any]
    ) -> dict[str, str]:
        if filled is None:
            nodes = [NodeWithScore(node=TextNode(text=text)) for text in text_chunks]
            filled = self._fill(query_str, nodes, prompt_args)
        return {"context_str": filled.text, "query_str": query_str}

    def _prompt_tokens(self, context_str: str, query_str: str, prompt_args: Mapping[str, Any]) -> int:
        arguments = {"context_str": context_str, "query_str": query_str, **prompt_args}
        return int(self._llm.template_tokens(self._text_qa_template, **arguments))

    def _fill(self, query_str: str, nodes: Sequence[NodeWithScore], prompt_args: Mapping[str, Any]) -> _Filled:
        candidates, titles = [], {}
        for rank, scored in enumerate(nodes, start=1):
            chunk, titles[chunk.doc_id] = _chunk(scored.node)
            candidates.append(Scored(chunk, scored.score or 0.0, rank))
        llm = self._llm
        room = llm.model_window - llm.max_tokens
        empty = self._prompt_tokens("", query_str, prompt_args)
        budget = room - empty
        while True:
            context = fill(
                candidates,
                titles,
                budget_tokens=budget,
                tokenizer=llm,
                render=self._passages.render,
                policy=self._policy,
            )
            text = self._passages.begin + "".join(map(self._passages.render, context.spans))
            tokens = self._prompt_tokens(text, query_str, prompt_args)
            if not context.spans:
                raise BudgetError(
                    f"{llm.model} has a window of {llm.model_window}, of which max_tokens takes {llm.max_tokens} and "
                    f"the prompt without passages {empty}; the best node does not fit into the rest. Lower "
                    "max_tokens, or cut the documents into smaller nodes."
                )
            if tokens <= room:
                break
            budget -= tokens - room  # in one piece the passages have more tokens than apart, which is rare
        reasons = {dropped.rank: dropped.reason for dropped in context.dropped}
        read = [scored for rank, scored in enumerate(nodes, start=1) if rank not in reasons]
        dropped = [{"node_id": nodes[rank - 1].node.node_id, "reason": reason} for rank, reason in reasons.items()]
        return _Filled(text, read, {"prompt_tokens": tokens, "window_tokens": llm.model_window, "dropped": dropped})


def _chunk(node: BaseNode) -> tuple[Chunk, str]:
    """A node as a chunk of its document, and the heading of its passage: what an LLM is to see of its metadata, or the
    title alone where that is all. Nodes of one document under several headings are not joined.
    """
    shown = node.get_metadata_str(mode=MetadataMode.LLM)
    names = set(node.metadata) - set(node.excluded_llm_metadata_keys)
    heading = title(node, names) if names and names <= set(TITLES) else shown
    doc_id, start = place(node)
    return Chunk.at(f"{doc_id}\n{heading}", start, node.get_content(metadata_mode=MetadataMode.NONE)), heading


def _query(query: QueryType) -> str:
    return query if isinstance(query, str) else query.query_str


def _told(response: RESPONSE_TYPE, filled: _Filled) -> RESPONSE_TYPE:
    response.metadata = {**(response.metadata or {}), "fill_context": filled.report}
    return response
