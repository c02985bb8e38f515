"""The retriever fills a budget: never over it, with what it left out told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripedrag.errors import UsageError
from stripedrag.indexes import Document, Index, MiniLMEmbedder
from stripedrag.rag import Retriever
from stripedrag.rag.packing import POLICIES

QUESTIONS = ("Who discovered oxygen?", "When did the oil crisis begin?", "warsaw theatre", "?")


@pytest.fixture(scope="session")
def chunk_sizes(index, tokenizer):
    chunks = [chunk for doc_id in index.document_ids() for chunk in index.chunks(doc_id)]
    return {(c.doc_id, c.start, c.end): len(tokenizer.encode(c.text, add_special_tokens=False)) for c in chunks}


@pytest.fixture(scope="session")
def minilm():
    return MiniLMEmbedder()


@settings(max_examples=40)
@given(question=st.sampled_from(QUESTIONS), budget=st.integers(1, 6000), policy=st.sampled_from(POLICIES))
def test_the_budget_is_never_exceeded_and_never_left_with_room_for_a_whole_chunk(
    index, tokenizer, chunk_sizes, question, budget, policy
):
    context = Retriever(index, policy=policy).retrieve(question, budget_tokens=budget, tokenizer=tokenizer)
    counted = sum(len(tokenizer.encode(span.text, add_special_tokens=False)) for span in context.spans)
    assert counted == context.tokens <= budget
    if context.dropped:
        assert budget - context.tokens < max(chunk_sizes.values()) + 2  # joining may save or cost a token


@settings(max_examples=25)
@given(question=st.sampled_from(QUESTIONS), budget=st.integers(1, 6000))
def test_every_chunk_that_was_found_is_in_a_span_or_among_the_dropped(index, chunk_sizes, question, budget):
    context = Retriever(index).retrieve(question, budget_tokens=budget)
    dropped = {(d.doc_id, d.start, d.end) for d in context.dropped}
    taken = {
        key
        for key in chunk_sizes
        for s in context.spans
        if s.doc_id == key[0] and s.start <= key[1] and key[2] <= s.end
    }
    assert not taken & dropped
    assert sum(s.end - s.start for s in context.spans) == sum(end - start for _, start, end in taken)
    found = {(h.chunk.doc_id, h.chunk.start, h.chunk.end) for h in index.search(question, k=len(taken | dropped))}
    assert found == taken | dropped, "what was considered is the head of the ranking"


def test_spans_are_the_documents_own_characters_and_neighbours_are_joined(index):
    context = Retriever(index).retrieve("oxygen", budget_tokens=2500)
    assert len(context.spans) < 20
    for span in context.spans:
        assert span.text == index.document(span.doc_id).text[span.start : span.end]
        touching = [s for s in context.spans if s.doc_id == span.doc_id and s.start == span.end]
        assert not touching


def test_a_budget_for_everything_gives_every_document_whole(index):
    context = Retriever(index).retrieve("oxygen", budget_tokens=10**6)
    assert not context.dropped
    assert {(s.doc_id, s.text) for s in context.spans} == {(i, index.document(i).text) for i in index.document_ids()}


def test_policies_order_the_same_spans(index):
    contexts = {p: Retriever(index, policy=p).retrieve("oxygen and oil", budget_tokens=900) for p in POLICIES}
    rank = contexts["rank"].spans
    assert len({s.doc_id for s in rank}) > 1
    assert rank[0].score == max(s.score for s in rank)
    assert contexts["best-last"].spans == rank[::-1]
    edges = contexts["edges"].spans
    assert sorted(edges, key=rank.index) == list(rank)
    distances = [min(place, len(edges) - 1 - place) for place in map(edges.index, rank)]
    assert distances == [n // 2 for n in range(len(rank))], "the better, the nearer to an edge"
    assert sorted(contexts["document"].spans, key=str) == sorted(rank, key=str)
    documents = [s.doc_id for s in contexts["document"].spans]
    assert documents == sorted(documents, key=[s.doc_id for s in rank].index)
    for one, two in zip(contexts["document"].spans, contexts["document"].spans[1:], strict=False):
        assert one.doc_id != two.doc_id or one.end < two.start


def test_top_k_is_the_same_filling_of_fewer_candidates(index):
    retriever = Retriever(index)
    top = retriever.retrieve("oxygen and oil", budget_tokens=4000, max_chunks=3)
    assert top == retriever.fill(index.search("oxygen and oil", k=3), budget_tokens=4000)
    assert sum(len(span.text) for span in top.spans) == sum(
        len(scored.chunk.text) for scored in index.search("oxygen and oil", k=3)
    )
    assert top.dropped == ()


def test_the_budget_is_filled_up_to_the_first_chunk_that_does_not_fit(index, tokenizer):
    retriever = Retriever(index)
    for budget in (50, 333, 1200, 2500):
        context = retriever.retrieve("Who discovered oxygen?", budget_tokens=budget, tokenizer=tokenizer)
        found = index.search("Who discovered oxygen?", k=1000)
        ranks = [dropped.rank for dropped in context.dropped if dropped.reason == "budget"]
        repeats = {dropped.rank for dropped in context.dropped if dropped.reason == "repeat"}
        taken = [scored.chunk.text for scored in found[: ranks[0] - 1] if scored.rank not in repeats]
        assert ranks == list(range(ranks[0], ranks[-1] + 1))
        more = retriever.fill(found[: ranks[0]], budget_tokens=10**6, tokenizer=tokenizer)
        assert more.tokens > budget >= context.tokens
        assert sum(map(len, taken)) == sum(len(span.text) for span in context.spans)


def test_counting_is_what_a_filling_costs_and_few_counts_do(index, tokenizer):
    class Counting:
        chars = 0

        def encode(self, text, *, add_special_tokens):
            self.chars += len(text)
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    counting = Counting()
    context = Retriever(index).retrieve("Who discovered oxygen?", budget_tokens=4000, tokenizer=counting)
    assert counting.chars < 5 * sum(len(span.text) for span in context.spans)


def test_repeats_are_left_out_and_told(tmp_path, minilm):
    """The same page under two names, and again with its last word changed, which may be what is asked for."""
    text = "The lighthouse of Veyrac was built in 1862 by the engineer Aurel Costin on the outermost rock of the bay. "
    documents = [
        Document("a", "", text),
        Document("b", "", text),
        Document("c", "", text[:-5] + "sea."),
        Document("d", "", "Another lighthouse stands at Orlat and was never lit."),
    ]
    with Index.create(tmp_path / "i", embedder=minilm) as made:
        made.add(documents)
        retriever = Retriever(made)
        context = retriever.retrieve("Who built the lighthouse of Veyrac?", budget_tokens=1000)
        assert {span.doc_id for span in context.spans} == {"a", "c", "d"}
        assert {(dropped.doc_id, dropped.reason) for dropped in context.dropped} == {("b", "repeat")}
        kept = retriever.fill(made.search("lighthouse", k=9), budget_tokens=1000, keep_repeats=True)
        assert {span.doc_id for span in kept.spans} == {"a", "b", "c", "d"} and kept.dropped == ()
        spans = retriever.retrieve("Who built the lighthouse?", budget_tokens=1000, doc_ids=["b", "d"]).spans
        assert {span.doc_id for span in spans} == {"b", "d"}
        assert retriever.retrieve("lighthouse", budget_tokens=1000, where={"year": 1}).spans == ()


def test_bad_requests_are_named(index):
    with pytest.raises(UsageError, match="max_chunks is 0; it is at least 1, or None for as many as fit"):
        Retriever(index).retrieve("oxygen", budget_tokens=10, max_chunks=0)
    with pytest.raises(UsageError, match="no order policy 'best'; choose one of rank, best-last, document, edges"):
        Retriever(index, policy="best")
    with pytest.raises(UsageError, match="budget_tokens is 0; it is at least 1"):
        Retriever(index).retrieve("oxygen", budget_tokens=0)
    with pytest.raises(UsageError, match="blank"):
        Retriever(index).retrieve("  ", budget_tokens=10)
