"""FillContext: one call of the model, its window full of nodes, and everything told that was left out."""

import asyncio
import random
from pathlib import Path

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.llms.stripedhyena import StripedHyena

from stripedrag.errors import BudgetError, UsageError
from stripedrag.eval.data_formats import Chapter
from stripedrag.indexes import Document as DocumentOfOurs
from stripedrag.indexes import Index
from stripedrag.jsonl import read_lines
from stripedrag.rag.completion import Completed
from stripedrag.rag.llama_index import BudgetRetriever, FillContext, IndexEmbedding
from tiny_striped import tiny_striped

QUESTION = "When did Genghis Khan die, and where?"


class Recording(StripedHyena):
    """Notes the prompts that it is asked; its generation alone is replaced where `answers` says so."""

    def __init__(self, folder, *, answers=None, **fields):
        super().__init__(str(folder), **fields)
        object.__setattr__(self, "prompts", [])
        make = self._engine.completion

        def completion(ids, **options):
            self.prompts.append(ids)
            return make(ids, **options) if answers is None else Said(ids, answers)

        self._engine.completion = completion


class Said(Completed):
    """In the place of generation: a text that was known before."""

    def __init__(self, ids, text):
        super().__init__(len(ids), token_ids=[1])
        self.pieces = self.say(text)

    def say(self, text):
        self.text, self.finish = text, "stop"
        yield text


@pytest.fixture(scope="session")
def folder_of(tokenizer, tmp_path_factory):
    """A tiny model with a window of so many tokens, saved."""

    def make(window_tokens):
        folder = tmp_path_factory.mktemp("window")
        tiny_striped(tokenizer, window_tokens=window_tokens).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def stock_index(articles):
    """All articles, cut and embedded by LlamaIndex's own ingestion pipeline."""
    documents = [
        Document(text=path.read_text(), metadata={"title": path.stem}, doc_id=path.stem)
        for path in sorted(articles.glob("*.txt"))
    ]
    steps = [SentenceSplitter(chunk_size=160, chunk_overlap=0), IndexEmbedding()]
    nodes = IngestionPipeline(transformations=steps).run(documents=documents)
    return VectorStoreIndex(nodes, embed_model=IndexEmbedding())


def asked(llm, retriever, **options):
    engine = RetrieverQueryEngine(retriever, FillContext(llm, **options))
    response = engine.query(QUESTION)
    (prompt,) = llm.prompts
    return response, prompt


def held(response, prompt, llm, *, at_least):
    """The window is as full as was said, and what was found is read or told."""
    told = response.metadata["fill_context"]
    assert told["prompt_tokens"] == len(prompt)
    assert told["window_tokens"] == llm.model_window
    assert at_least * llm.model_window <= len(prompt) + llm.max_tokens <= llm.model_window
    read, dropped = {node.node_id for node in response.source_nodes}, {one["node_id"] for one in told["dropped"]}
    assert not read & dropped
    return read, dropped


@pytest.mark.weights
@pytest.mark.parametrize("window", [8192, 32768])
def test_one_call_fills_the_window(window, folder_of, stock_index):
    llm = Recording(folder_of(window), max_tokens=8, answers=None if window == 8192 else "In 1227.")
    response, prompt = asked(llm, stock_index.as_retriever(similarity_top_k=1000))
    read, dropped = held(response, prompt, llm, at_least=0.95)
    assert len(read | dropped) == len(stock_index.index_struct.nodes_dict) < 1000
    text = llm._engine.tokenizer.decode(prompt)
    assert text.count(f"Question: {QUESTION}") == 1
    for node in response.source_nodes:
        assert node.text.strip()[:60] in text
    assert str(response)


@pytest.mark.slow
@pytest.mark.weights
def test_one_call_fills_a_window_of_128k(folder_of, tmp_path):
    """Of our own index, whose nodes are joined neighbours."""
    novels = Path(__file__).parents[2] / "eval" / "data" / "haystack" / "novels.jsonl.xz"
    chapters = read_lines(novels, Chapter)
    llm = Recording(folder_of(131072), max_tokens=64, answers="In 1227.")
    with Index.create(tmp_path / "index") as index:
        index.add(DocumentOfOurs(str(n), "", chapter.text) for n, chapter in zip(range(60), chapters, strict=False))
        retriever = BudgetRetriever(index, budget_tokens=140_000, tokenizer=llm)
        response, prompt = asked(llm, retriever)
    held(response, prompt, llm, at_least=0.95)


def test_our_retriever_gives_nodes_of_the_documents_characters(index):
    chunks = BudgetRetriever(index, budget_tokens=900).retrieve(QUESTION)
    joined = BudgetRetriever(index, budget_tokens=900, joined=True).retrieve(QUESTION)
    assert len(joined) < len(chunks)
    assert [node.score for node in chunks] == sorted((node.score for node in chunks), reverse=True)
    characters = []
    for found in (chunks, joined):
        for node in (scored.node for scored in found):
            assert index.document(node.ref_doc_id).text[node.start_char_idx : node.end_char_idx] == node.text
        characters.append(
            {(n.node.ref_doc_id, c) for n in found for c in range(n.node.start_char_idx, n.node.end_char_idx)}
        )
    assert characters[0] == characters[1]
    assert sum(len(index.tokenizer.encode(node.text, add_special_tokens=False)) for node in joined) <= 900
    everything = BudgetRetriever(index, budget_tokens=10**6)
    assert asyncio.run(everything.aretrieve(QUESTION)) == everything.retrieve(QUESTION)


def test_neighbours_are_joined_repeats_left_out_and_the_order_kept(folder_of):
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    text = "The lighthouse was built in 1862. It stands on the cape of Veyrac. Boats pass it by day and by night."
    halves = [(0, 34), (34, len(text))]
    nodes = [
        TextNode(text=text[a:b], start_char_idx=a, end_char_idx=b, relationships=source, metadata={"title": "Veyrac"})
        for a, b in halves
    ]
    other = TextNode(text="Bread rises because yeast makes carbon dioxide.", metadata={"title": "Bread", "year": 1990})
    again = TextNode(text="Bread rises because yeast makes carbon dioxide.")
    names = {"title": "SECRET", "file_name": "notes.txt"}
    hidden = TextNode(text="Salt is mined.", metadata=names, excluded_llm_metadata_keys=["title"])
    llm = Recording(folder_of(4096), max_tokens=8, answers="1862")
    scored = [
        NodeWithScore(node=node, score=1.0 - 0.1 * i)
        for i, node in enumerate([nodes[1], other, nodes[0], again, hidden])
    ]
    response = FillContext(llm).synthesize("When?", scored)
    (prompt,) = llm.prompts
    read = llm._engine.tokenizer.decode(prompt)
    assert f"title: Bread\nyear: 1990\n{other.text}\n\nVeyrac\n{text}\n\nQuestion: When?" in read
    assert response.metadata["fill_context"]["dropped"] == [{"node_id": again.node_id, "reason": "repeat"}]
    assert len(response.source_nodes) == 4
    assert "notes.txt\nSalt is mined." in read and "SECRET" not in read


@pytest.mark.parametrize("streaming", [False, True])
def test_streams_and_tasks_make_one_call_each(streaming, folder_of, index):
    llm = Recording(folder_of(4096), max_tokens=16)
    retriever = BudgetRetriever(index, budget_tokens=5000, tokenizer=llm)
    engine = RetrieverQueryEngine(retriever, FillContext(llm, streaming=streaming))
    whole = engine.query(QUESTION)
    said = "".join(whole.response_gen) if streaming else str(whole)

    async def ask():
        response = await engine.aquery(QUESTION)
        if not streaming:
            return response, str(response)
        return response, "".join([piece async for piece in response.async_response_gen()])

    response, text = asyncio.run(ask())
    assert text == said != ""
    assert len(llm.prompts) == 2
    assert response.metadata["fill_context"]["prompt_tokens"] == len(llm.prompts[1])


def test_a_template_of_the_users_is_counted_too(folder_of, index):
    llm = Recording(folder_of(2048), max_tokens=8, answers="1227", system_prompt="You know history. " * 20)
    template = PromptTemplate("Answer in one word. " * 30 + "{query_str}\n\n{context_str}\n\nRemember: {query_str}")
    response, prompt = asked(llm, BudgetRetriever(index, budget_tokens=9000, tokenizer=llm), text_qa_template=template)
    held(response, prompt, llm, at_least=0.95)
    synthesizer = FillContext(llm)
    synthesizer.update_prompts({"text_qa_template": template})
    assert synthesizer.get_prompts()["text_qa_template"].template == template.template
    assert synthesizer.get_response(QUESTION, ["It was in 1227."]) == "1227"
    toned = FillContext(llm, text_qa_template=PromptTemplate("{tone}{context_str}{query_str}"))
    nodes = BudgetRetriever(index, budget_tokens=9000, tokenizer=llm).retrieve(QUESTION)
    assert str(toned.synthesize(QUESTION, nodes, tone="Be kind. " * 100)) == "1227"
    assert 0.9 * llm.model_window < len(llm.prompts[-1]) + llm.max_tokens <= llm.model_window


def test_the_stock_synthesizer_fills_it_in_one_call_with_our_prompt_helper(folder_of, stock_index):
    llm = Recording(folder_of(8192), max_tokens=8, answers="1227")
    nodes = stock_index.as_retriever(similarity_top_k=32).retrieve(QUESTION)
    compact = get_response_synthesizer(llm=llm, prompt_helper=llm.prompt_helper(), response_mode="compact")
    compact.synthesize(QUESTION, nodes)
    assert len(llm.prompts) == 1


def test_no_text_however_it_is_cut_overfills_or_leaves_room_for_the_next(folder_of, index):
    """Random stretches of documents, with and without a place, in random order."""
    llm = Recording(folder_of(2048), max_tokens=8, answers="x")
    dice = random.Random(0)
    ids = index.document_ids()
    for _ in range(20):
        nodes = []
        for _ in range(60):
            document = index.document(dice.choice(ids))
            start = dice.randrange(len(document.text) - 10)
            node = TextNode(text=document.text[start : start + dice.randrange(5, 900)] or "x")
            if dice.random() < 0.5:
                node.start_char_idx = start
                node.relationships = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document.id)}
            nodes.append(NodeWithScore(node=node, score=dice.random()))
        llm.prompts.clear()
        response = FillContext(llm).synthesize(QUESTION, nodes)
        (prompt,) = llm.prompts
        assert len(prompt) + llm.max_tokens <= llm.model_window
        left_out = [one["node_id"] for one in response.metadata["fill_context"]["dropped"] if one["reason"] == "budget"]
        by_id = {node.node_id: node for node in nodes}
        room = llm.model_window - llm.max_tokens - len(prompt)
        assert room <= len(llm.encode(f"\n{by_id[left_out[0]].text}\n\n")) + 1


def test_what_it_cannot_do_is_refused(folder_of):
    llm = Recording(folder_of(256), max_tokens=64, answers="x")
    long = NodeWithScore(node=TextNode(text="oxygen " * 400))
    with pytest.raises(BudgetError, match="has a window of 256, of which max_tokens takes 64 and the prompt without"):
        FillContext(llm).synthesize(QUESTION, [long])
    assert llm.prompts == []
    with pytest.raises(UsageError, match="counts with the model's own tokenizer, which a MockLLM does not give"):
        FillContext(MockLLM())
    assert str(FillContext(llm).synthesize(QUESTION, [])) == "Empty Response"
    with pytest.raises(UsageError, match="no order policy 'best'; choose one of rank, best-last"):
        FillContext(llm, policy="best")
