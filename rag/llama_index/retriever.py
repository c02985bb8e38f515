"""Our retriever in LlamaIndex: nodes that fill a budget of tokens rather than so many nodes."""

import asyncio
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from stripedrag.rag.packing import Tokenizer
from stripedrag.rag.prompt_template import default_template
from stripedrag.rag.retriever import Retriever, Searchable

if TYPE_CHECKING:
    from stripedrag.indexes.filters import Where


class BudgetRetriever(BaseRetriever):
    """The best chunks of an index that fit into `budget_tokens`, best first, as nodes.

    Each node says of which document it is (`ref_doc_id`) and at which characters, so that `FillContext` joins
    neighbours; with `joined` they come as one node already, for other synthesizers. Tokens are those of `tokenizer`, as
    `StripedHyena` is one (None: the embedder's), of the joined passages under their titles. `where` narrows as in
    `Index.search`. For `FillContext`, `budget_tokens` is the window or more.
    """

    def __init__(
        self,
        index: Searchable,
        *,
        budget_tokens: int,
        joined: bool = False,
        tokenizer: Tokenizer | None = None,
        where: "Where | None" = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(callback_manager=callback_manager)
        self._retriever, self._joined = Retriever(index), joined
        self._options: dict[str, Any] = {
            "budget_tokens": budget_tokens,
            "tokenizer": tokenizer,
            "where": where,
            "render": default_template().render,
        }

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._joined:
            spans = self._retriever.retrieve(query_bundle.query_str, **self._options).spans
            return [_node(s.doc_id, s.title, s.start, s.text, s.score) for s in spans]
        found = self._retriever.retrieve_chunks(query_bundle.query_str, **self._options)
        titles = self._retriever.index.titles({scored.chunk.doc_id for scored in found})
        chunks = [(scored.chunk, scored.score) for scored in found]
        return [_node(c.doc_id, titles.get(c.doc_id, ""), c.start, c.text, score) for c, score in chunks]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(doc_id: str, title: str, start: int, text: str, score: float) -> NodeWithScore:
    node = TextNode(
        id_=f"{doc_id}#{start}-{start + len(text)}",
        text=text,
        metadata={"title": title},
        start_char_idx=start,
        end_char_idx=start + len(text),
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=doc_id)},
    )
    return NodeWithScore(node=node, score=score)
