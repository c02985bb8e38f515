"""Our index as a vector store of LlamaIndex: its own machinery adds, finds, filters and deletes nodes."""

import asyncio
import copy
import pickle

import pytest
from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import (
    FilterCondition,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.llms.stripedhyena import StripedHyena

from stripedrag.errors import UsageError
from stripedrag.rag.llama_index import FillContext, IndexVectorStore

UNUSED = MockEmbedding(1)


def where(*filters, **options):
    return MetadataFilters(filters=list(filters), **options)


@pytest.fixture
def books():
    return [
        Document(
            doc_id=f"book {year}",
            text=f"The lighthouse of {place} was built in {year}. " + "Ships pass it by day and by night. " * 60,
            metadata={"title": place, "year": year, "tags": ["light", "sea"]},
        )
        for place, year in (("Veyrac", 1862), ("Lorme", 1901), ("Costal", 1955))
    ]


@pytest.fixture
def store(tmp_path, books):
    """Filled by LlamaIndex's ingestion pipeline."""
    store = IndexVectorStore(tmp_path / "index")
    splitter = SentenceSplitter(chunk_size=150, chunk_overlap=20)
    IngestionPipeline(transformations=[splitter, UNUSED], vector_store=store).run(documents=books)
    return store


def test_nodes_come_back_as_they_went_in(store):
    nodes = store.get_nodes()
    assert len(nodes) > 9
    for node in nodes:
        assert isinstance(node, TextNode)
        assert node.metadata["tags"] == ["light", "sea"]
        assert node.ref_doc_id == f"book {node.metadata['year']}"
        assert node.start_char_idx is not None
        assert store.get_nodes([node.node_id])[0].text == node.text
    assert store.client.document_count == len(nodes)


def test_a_stock_index_finds_by_words_and_meaning_and_an_opened_one_does_too(store):
    for opened in (store, IndexVectorStore(store.place)):
        retriever = VectorStoreIndex.from_vector_store(opened, embed_model=UNUSED).as_retriever(similarity_top_k=3)
        found = retriever.retrieve("When was the lighthouse of Lorme built?")
        assert len(found) == 3
        assert found[0].node.metadata["year"] == 1901
        assert found[0].node.text.startswith("The lighthouse of Lorme")
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert asyncio.run(retriever.aretrieve("When was the lighthouse of Lorme built?"))[0] == found[0]


def test_as_many_nodes_come_as_are_asked_for(store):
    """Of a store whose first node has more passages than are asked for."""
    store.add([TextNode(id_="long", text="The lighthouse of Lorme shines on every ship. " * 200)])
    for k in (1, 2, 5, 10**4):
        result = store.query(VectorStoreQuery(query_str="the lighthouse of Lorme", similarity_top_k=k))
        assert len(set(result.ids)) == len(result.nodes) == min(k, store.client.document_count)
    assert "long" in result.ids


def test_filters_and_modes_narrow_what_is_found(store):
    def years(*filters, mode=VectorStoreQueryMode.DEFAULT, query="the lighthouse", **options):
        asked = VectorStoreQuery(
            query_str=query, similarity_top_k=100, filters=where(*filters) if filters else None, mode=mode, **options
        )
        return {node.metadata["year"] for node in store.query(asked).nodes}

    assert years() == {1862, 1901, 1955}
    after = MetadataFilter(key="year", operator=">", value=1862)
    assert years(after) == {1901, 1955}
    assert years(after, MetadataFilter(key="year", operator="<", value=1950)) == {1901}
    assert years(MetadataFilter(key="title", operator="in", value=["Veyrac", "Costal"])) == {1862, 1955}
    assert years(doc_ids=["book 1955"]) == {1955}
    one = store.get_nodes(filters=where(MetadataFilter(key="year", value=1901)))[0]
    assert years(node_ids=[one.node_id]) == {1901}
    assert years(query="Costal", mode=VectorStoreQueryMode.TEXT_SEARCH) == {1955}


def test_what_is_deleted_is_gone(store):
    store.delete("book 1862")
    store.delete("no such book")
    assert {node.ref_doc_id for node in store.get_nodes()} == {"book 1901", "book 1955"}
    store.delete_nodes(filters=where(MetadataFilter(key="year", value=1901)))
    assert {node.ref_doc_id for node in store.get_nodes()} == {"book 1955"}
    asyncio.run(store.adelete("book 1955"))
    assert store.get_nodes() == []
    store.add([TextNode(text="one")])
    store.clear()
    assert store.client.document_count == 0


def test_an_ingestion_pipeline_replaces_a_document_that_changed(tmp_path, books):
    store = IndexVectorStore(tmp_path / "index")
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=150, chunk_overlap=0), UNUSED],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
    )
    pipeline.run(documents=books)
    books[0].set_content("The lighthouse of Veyrac fell in 1999.")
    asyncio.run(pipeline.arun(documents=books))
    (node,) = store.get_nodes(filters=where(MetadataFilter(key="ref_doc_id", value="book 1862")))
    assert node.text == "The lighthouse of Veyrac fell in 1999."


def test_a_stock_index_adds_and_refreshes(tmp_path, books):
    store = IndexVectorStore(tmp_path / "index")
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex.from_documents(books[:2], storage_context=context, embed_model=UNUSED)
    index.insert(books[2])
    index.delete_ref_doc("book 1901")
    assert {node.ref_doc_id for node in store.get_nodes()} == {"book 1862", "book 1955"}


@pytest.mark.weights
def test_the_whole_way_from_documents_to_an_answer(store):
    llm = StripedHyena(max_tokens=16)
    retriever = VectorStoreIndex.from_vector_store(store, embed_model=UNUSED).as_retriever(similarity_top_k=4)
    response = RetrieverQueryEngine(retriever, FillContext(llm)).query("When was the lighthouse of Costal built?")
    assert "1955" in str(response)


def test_a_blank_page_a_node_that_is_gone_and_an_empty_store_stop_nothing(store, tmp_path):
    empty = IndexVectorStore(tmp_path / "empty")
    retriever = VectorStoreIndex.from_vector_store(empty, embed_model=UNUSED).as_retriever()
    assert retriever.retrieve("lighthouse") == []
    pages = [Document(text="A real page.", metadata={"page": 1}), Document(text=" ", metadata={"page": 2})]
    context = StorageContext.from_defaults(vector_store=empty)
    VectorStoreIndex.from_documents(pages, storage_context=context, embed_model=UNUSED)
    assert [node.text for node in empty.get_nodes()] == ["A real page."]
    one = store.get_nodes()[0].node_id
    assert store.query(VectorStoreQuery(query_str="lighthouse", node_ids=[one, "gone"], similarity_top_k=5)).ids == [
        one
    ]
    assert store.query(VectorStoreQuery(query_str="lighthouse", node_ids=["gone"])).ids == []


def test_a_filter_and_documents_that_are_asked_for_must_both_hold(store):
    def found(doc_ids, *filtered):
        only = where(MetadataFilter(key="ref_doc_id", operator="in", value=list(filtered)))
        asked = VectorStoreQuery(query_str="the lighthouse", similarity_top_k=50, doc_ids=doc_ids, filters=only)
        return {node.ref_doc_id for node in store.query(asked).nodes}

    assert found(["book 1862", "book 1901"], "book 1901", "book 1955") == {"book 1901"}
    assert found(["book 1862"], "book 1901") == set()


def test_copies_open_the_same_index(store):
    for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store), IndexVectorStore.from_dict(store.to_dict())):
        assert [node.node_id for node in other.get_nodes()] == [node.node_id for node in store.get_nodes()]


def test_what_it_cannot_do_is_refused(store, tmp_path):
    with pytest.raises(UsageError, match="the query has no text; this store searches texts by itself"):
        store.query(VectorStoreQuery(query_embedding=[1.0]))
    with pytest.raises(UsageError, match="no query mode 'mmr' here; choose one of default, hybrid"):
        store.query(VectorStoreQuery(query_str="x", mode=VectorStoreQueryMode.MMR))
    one = MetadataFilter(key="year", value=1901)
    with pytest.raises(UsageError, match="filters are joined by 'or'; this store takes 'and' alone"):
        store.get_nodes(filters=where(one, condition=FilterCondition.OR))
    with pytest.raises(UsageError, match="filters hold filters; this store takes a flat list"):
        store.get_nodes(filters=where(where(one)))
    with pytest.raises(UsageError, match="no filter operator 'text_match' here; choose one of ==, !="):
        store.get_nodes(filters=where(MetadataFilter(key="title", operator="text_match", value="x")))
    with pytest.raises(UsageError, match="filters have '==' twice for 'year'"):
        store.get_nodes(filters=where(one, one))
    with pytest.raises(UsageError, match="has neither node_ids nor filters; give one, or call clear"):
        store.delete_nodes()
    with pytest.raises(UsageError, match="has neither node_ids nor filters; give one, or call clear"):
        store.delete_nodes(filters=where())
    with pytest.raises(UsageError, match="this store holds texts and embeds by itself"):
        IndexVectorStore(tmp_path / "other", is_embedding_query=True)
    assert store.add([]) == []
