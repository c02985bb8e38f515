"""Our index as a LlamaIndex vector store: nodes in, found by words and meaning, deleted and filtered for good.

store = IndexVectorStore("nodes")
index = VectorStoreIndex.from_vector_store(store, embed_model=MockEmbedding(1))  # the store embeds, not LlamaIndex
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from stripedrag.errors import UsageError
from stripedrag.indexes.documents import Document
from stripedrag.indexes.index import Index
from stripedrag.indexes.search import Method
from stripedrag.rag.llama_index.search import title

_METHODS: dict[VectorStoreQueryMode, Method] = {
    VectorStoreQueryMode.DEFAULT: "hybrid",
    VectorStoreQueryMode.HYBRID: "hybrid",
    VectorStoreQueryMode.TEXT_SEARCH: "lexical",
    VectorStoreQueryMode.SPARSE: "lexical",
}
_OPERATORS = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.IN: "$in",
    FilterOperator.NIN: "$nin",
}
_Where = dict[str, dict[str, Any]]


class IndexVectorStore(BasePydanticVectorStore):
    """The nodes of LlamaIndex in an index of stripedrag: a node is a document there, under the node's id.

    `place` is an `Index`, or a folder or Postgres, where one is or is to be made. The index embeds by itself, a node
    under its title, so LlamaIndex's embedding is not used: give it `MockEmbedding(1)`. A node of any length is found
    whole, by its best passage; a query's text is searched by words and meaning ("text_search" and "sparse": by words
    alone). Filters compare metadata that are strings, numbers or bools, and all must hold; of another kind they raise
    `UsageError`. Nodes are on disk once `add` has returned: there is nothing to persist.
    """

    stores_text: bool = True
    is_embedding_query: bool = False
    place: str

    _index: Index = PrivateAttr()

    def __init__(
        self, place: "Index | str | Path", *, stores_text: bool = True, is_embedding_query: bool = False
    ) -> None:
        if not stores_text or is_embedding_query:
            raise UsageError(
                "this store holds texts and embeds by itself: stores_text is True, is_embedding_query False"
            )
        index = place if isinstance(place, Index) else (Index.open if Index.is_at(place) else Index.create)(place)
        super().__init__(place=str(index.place))
        self._index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place,)  # whoever gets a copy opens the index by itself

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> "IndexVectorStore":
        return type(self)(self._index)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex shows."""
        return "IndexVectorStore"

    @property
    def client(self) -> Index:
        """The index itself."""
        return self._index

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Add nodes, or replace those with the same ids, all or none of them; their ids. A node without any text, as of
        a blank page, holds nothing to find and is left out.
        """
        del kwargs
        documents = [document for document in map(_document, nodes) if document.text.strip()]
        if documents:
            self._index.add(documents)
        return [document.id for document in documents]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """As `add`, without blocking the event loop."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    def delete(self, ref_doc_id: str, **kwargs: Any) -> None:
        """Delete the nodes of a source document; none is no error."""
        del kwargs
        self._delete(lambda: self._index.document_ids({"ref_doc_id": ref_doc_id}))

    async def adelete(self, ref_doc_id: str, **kwargs: Any) -> None:
        """As `delete`, without blocking the event loop."""
        await asyncio.to_thread(self.delete, ref_doc_id, **kwargs)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> None:
        """Delete the nodes of these ids that a filter admits. Raises `UsageError` for neither: `clear` deletes all."""
        del kwargs
        if node_ids is None and not (filters and filters.filters):
            raise UsageError("delete_nodes has neither node_ids nor filters; give one, or call clear")
        self._delete(lambda: self._ids(node_ids, filters))

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes of these ids (None: all) that a filter admits, in the order of their ids."""
        return [self._node(node_id) for node_id in self._ids(node_ids, filters)]

    def clear(self) -> None:
        """Delete all nodes."""
        self._delete(self._index.document_ids)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The best `similarity_top_k` nodes for the query's text. Raises `UsageError` for a query without one."""
        del kwargs
        if query.query_str is None:
            raise UsageError("the query has no text; this store searches texts by itself, and takes no vector")
        if query.mode not in _METHODS:
            raise UsageError(f"no query mode {query.mode.value!r} here; choose one of {', '.join(_METHODS)}")
        where = _where(query.filters)
        if query.doc_ids:
            tests = where.setdefault("ref_doc_id", {})
            tests["$in"] = [doc_id for doc_id in query.doc_ids if doc_id in tests.get("$in", query.doc_ids)]
        # LlamaIndex's own retriever gives an empty list for all, and may name nodes that are gone
        node_ids = self._ids(query.node_ids, None) if query.node_ids else None
        if node_ids == [] or not self._index.document_count:
            return VectorStoreQueryResult([], [], [])
        best: dict[str, float] = {}
        k = query.similarity_top_k
        while True:  # a node of several passages may be found by each
            found = self._index.search(
                query.query_str, k=k, where=where, doc_ids=node_ids, unit="passage", method=_METHODS[query.mode]
            )
            for scored in found:
                best.setdefault(scored.chunk.doc_id, scored.score)
            if len(best) >= query.similarity_top_k or len(found) < k:
                break
            k *= 2
        ids = list(best)[: query.similarity_top_k]
        return VectorStoreQueryResult([self._node(i) for i in ids], [best[i] for i in ids], ids)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As `query`, without blocking the event loop."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def _ids(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[str]:
        admitted = self._index.document_ids(_where(filters))
        wanted = set(admitted if node_ids is None else node_ids)
        return [node_id for node_id in admitted if node_id in wanted]

    def _delete(self, select: Callable[[], list[str]]) -> None:
        while node_ids := select():
            try:
                self._index.delete(node_ids)
            except UsageError:  # another has deleted one of them meanwhile, so that none of ours went
                continue
            return

    def _node(self, node_id: str) -> BaseNode:
        document = self._index.document(node_id)
        return metadata_dict_to_node(dict(document.metadata), text=document.text)


def _document(node: BaseNode) -> Document:
    """A node under its id; metadata that are no scalars stay in its JSON alone, where no filter looks."""
    metadata = {
        name: value
        for name, value in node_to_metadata_dict(node, remove_text=True).items()
        if isinstance(value, str | int | float | bool | None)
    }
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    return Document(id=node.node_id, title=title(node), text=text, metadata=metadata)


def _where(filters: MetadataFilters | None) -> _Where:
    where: _Where = {}
    if filters is None:
        return where
    if filters.condition not in (None, FilterCondition.AND):
        raise UsageError(f"filters are joined by {filters.condition.value!r}; this store takes 'and' alone")
    for one in filters.filters:
        if not isinstance(one, MetadataFilter):
            raise UsageError("filters hold filters; this store takes a flat list, joined by 'and'")
        if one.operator not in _OPERATORS:
            known = ", ".join(operator.value for operator in _OPERATORS)
            raise UsageError(f"no filter operator {one.operator.value!r} here; choose one of {known}")
        tests = where.setdefault(one.key, {})
        operator = _OPERATORS[one.operator]
        if operator in tests:
            raise UsageError(f"filters have {one.operator.value!r} twice for {one.key!r}; give one")
        tests[operator] = one.value
    return where
