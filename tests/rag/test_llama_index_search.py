"""A LlamaIndex retriever stands in for an index: its nodes fill the budget, joined where they overlap."""

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode

from stripedrag.errors import UsageError
from stripedrag.indexes import MiniLMEmbedder
from stripedrag.indexes.documents import Chunk, Scored
from stripedrag.rag import Pipeline, Retriever
from stripedrag.rag.llama_index import LlamaIndexSearch


class LettersEmbedding(BaseEmbedding):
    """How often each letter occurs."""

    def _get_text_embedding(self, text):
        return [1.0 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


class Fixed(BaseRetriever):
    """Returns the nodes that it was made with."""

    def __init__(self, *nodes):
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=node, score=1 / rank) for rank, node in enumerate(self.nodes, start=1)]


@pytest.fixture(scope="session")
def texts(articles):
    return {name: (articles / name).read_text() for name in ("Oxygen.txt", "Warsaw.txt")}


@pytest.fixture(scope="session")
def vector_store_index(texts):
    documents = [Document(id_=name, text=text, metadata={"title": name[:-4]}) for name, text in texts.items()]
    splitter = SentenceSplitter(chunk_size=100, chunk_overlap=30)
    return VectorStoreIndex.from_documents(documents, embed_model=LettersEmbedding(), transformations=[splitter])


def test_a_budget_is_filled_with_the_nodes_of_a_vector_store(vector_store_index, texts, tokenizer):
    stock = vector_store_index.as_retriever(similarity_top_k=2)
    search = LlamaIndexSearch(stock, tokenizer=tokenizer)
    for budget in (300, 1500, 10**6):
        context = Retriever(search).retrieve("Who lived in Warsaw?", budget_tokens=budget)
        assert 0 < context.tokens <= budget
        for span in context.spans:
            assert span.text == texts[span.doc_id][span.start : span.end]
            assert span.title == span.doc_id[:-4]
        ends = [(s.doc_id, s.start, s.end) for s in context.spans]
        assert not any(a != b and a[0] == b[0] and a[1] <= b[2] and b[1] <= a[2] for a in ends for b in ends)
    assert sum(len(span.text) for span in context.spans) >= 0.98 * sum(map(len, texts.values()))  # the splitter trims
    assert stock.similarity_top_k == 2


def test_nodes_without_a_place_are_documents_of_their_own():
    nodes = [TextNode(id_="a", text="Ada built it."), TextNode(id_="b", text="It stands on a rock.", metadata={})]
    context = Retriever(LlamaIndexSearch(Fixed(*nodes))).retrieve("who?", budget_tokens=100)
    assert [(s.doc_id, s.start, s.text) for s in context.spans] == [("a", 0, nodes[0].text), ("b", 0, nodes[1].text)]
    assert [s.score for s in context.spans] == [1.0, 0.5]


def test_overlaps_are_joined_once_and_only_where_the_texts_agree():
    text = "one two three four five six seven eight nine ten"

    def spans(*places):
        chunks = [Chunk.at("d", start, piece) for start, piece in places]
        found = [Scored(chunk, 1.0, rank) for rank, chunk in enumerate(chunks, start=1)]
        search = LlamaIndexSearch(Fixed())
        search._titles["d"] = ""
        context = Retriever(search).fill(found, budget_tokens=1000, keep_repeats=True)
        return sorted((span.start, span.text) for span in context.spans)

    assert spans((0, text[:20]), (10, text[10:30]), (12, text[12:15]), (30, text[30:])) == [(0, text)]
    assert spans((0, text[:30]), (5, text[5:20]), (25, text[25:40])) == [(0, text[:40])]
    assert spans((0, text[:20]), (10, "another text")) == [(0, text[:20]), (10, "another text")]
    assert spans((0, text[:20]), (21, text[21:30])) == [(0, text[:20]), (21, text[21:30])]


def test_a_retriever_that_gives_no_more_than_it_has_is_asked_for_no_more():
    """As LlamaIndex's BM25Retriever, whose search fails for more."""

    class Whole(BaseRetriever):
        def __init__(self):
            self.corpus, self.similarity_top_k = [TextNode(text=f"Ada built {n} of them.") for n in range(5)], 2
            super().__init__()

        def _retrieve(self, query_bundle):
            if self.similarity_top_k > len(self.corpus):
                raise ValueError("k is larger than the corpus")
            return [NodeWithScore(node=node, score=1.0) for node in self.corpus[: self.similarity_top_k]]

    assert len(Retriever(LlamaIndexSearch(Whole())).retrieve("who?", budget_tokens=4000).spans) == 5


def test_what_a_retriever_cannot_do_is_refused():
    search = LlamaIndexSearch(Fixed(TextNode(text="Ada built it.")))
    with pytest.raises(UsageError, match=r"takes no where and no doc_ids\. Give it MetadataFilters"):
        Retriever(search).retrieve("who?", budget_tokens=100, where={"year": 1990})
    with pytest.raises(UsageError, match="is blank"):
        search.search(" ", k=3)


@pytest.mark.weights
def test_a_pipeline_answers_from_it(tiny_folder):
    nodes = [TextNode(id_=str(n), text=f"The lighthouse of Veyrac was built in {1800 + n}. " * 8) for n in range(30)]
    with Pipeline.open(LlamaIndexSearch(Fixed(*nodes)), model=tiny_folder) as pipeline:
        answer = pipeline.ask("When was it built?", context_tokens=600, answer_tokens=8)
    assert answer.usage.prompt_tokens + 8 <= 600
    assert answer.context.spans[-1].doc_id == "0"
    assert any(dropped.reason == "budget" for dropped in answer.context.dropped)
    assert pipeline.index.tokenizer.get_vocab_size() == MiniLMEmbedder().tokenizer.get_vocab_size()
