"""Questions about one document begin their contexts alike, and lose nothing that they rank high."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripedrag.errors import UsageError
from stripedrag.indexes import Document, Index
from stripedrag.rag import Pipeline, Retriever
from stripedrag.rag.defaults import SHARED
from stripedrag.rag.llama_index import LlamaIndexSearch

OXYGEN = ("Who discovered oxygen?", "What is liquid oxygen used for?", "How much oxygen is in the air we breathe?")
OTHERS = ("When was the Warsaw Uprising?", "Who was Genghis Khan?", "What did the oil crisis of 1973 change?")


@settings(max_examples=40, deadline=None)
@given(
    question=st.sampled_from(OXYGEN + OTHERS),
    budget=st.integers(1, 5000),
    shared=st.sampled_from([0.1, 0.5, 2 / 3, 0.9]),
    own=st.sampled_from([0, 500, 2048]),
    policy=st.sampled_from(["rank", "best-last", "document"]),
)
def test_it_stays_within_the_budget_and_tells_what_it_left_out(index, question, budget, shared, own, policy):
    context = Retriever(index, policy=policy, shared=shared, own_tokens=own).retrieve(question, budget_tokens=budget)
    lengths = [len(index.tokenizer.encode(span.text, add_special_tokens=False)) for span in context.spans]
    assert sum(lengths) == context.tokens <= budget
    assert context.shared_tokens <= max(0, min(shared * budget, budget - own))
    assert any(sum(lengths[:n]) == context.shared_tokens for n in range(len(lengths) + 1))
    for span in context.spans:
        assert index.document(span.doc_id).text[span.start : span.end] == span.text
    dropped = {(one.doc_id, one.start) for one in context.dropped}
    for scored in index.search(question, k=3):
        chunk = scored.chunk
        inside = any(s.doc_id == chunk.doc_id and s.start <= chunk.start and chunk.end <= s.end for s in context.spans)
        assert inside or (chunk.doc_id, chunk.start) in dropped


@pytest.mark.parametrize("budget", [900, 2500])
def test_questions_on_one_document_begin_alike_and_end_with_their_own(index, budget):
    contexts = [
        Retriever(index, policy="best-last", shared=2 / 3, own_tokens=0).retrieve(question, budget_tokens=budget + n)
        for n, question in enumerate(OXYGEN)
    ]
    beginnings, own = set(), set()
    for context in contexts:
        n, tokens = 0, 0
        while tokens < context.shared_tokens:
            tokens += len(index.tokenizer.encode(context.spans[n].text, add_special_tokens=False))
            n += 1
        beginnings.add(tuple((span.doc_id, span.start, span.end) for span in context.spans[:n]))
        own.add(context.spans[n:])
    assert len(beginnings) == 1
    ((first, start, _), *_) = next(iter(beginnings))
    assert first == "Oxygen.txt" and start == 0
    assert contexts[0].shared_tokens > budget / 2
    assert len(own) > 1


def test_of_a_long_document_it_is_the_stretch_around_the_best_chunk(tmp_path):
    parts = [
        f"In the year {1000 + n} the town of Veyrac built bridge number {n} over the river. " * 4 for n in range(60)
    ]
    with Index.create(tmp_path / "index") as index:
        index.add([Document("chronicle", "Chronicle", "".join(parts))])
        retriever = Retriever(index, shared=0.5, own_tokens=0)
        for year in (1003, 1030, 1059):
            context = retriever.retrieve(f"What was built in the year {year}?", budget_tokens=1200)
            start = min(span.start for span in context.spans[:1])
            texts = "".join(span.text for span in context.spans)
            assert f"In the year {year}" in texts
            assert context.shared_tokens > 300
            assert (start == 0) == (year == 1003)


def test_a_pipeline_reads_what_is_shared_once(index, tiny_model, tokenizer):
    from stripedrag.rag.context_cache import ContextCache

    pipeline = Pipeline(
        index, tiny_model, tokenizer, model_name="tiny", shared=2 / 3, contexts=ContextCache(tiny_model)
    )
    plain = Pipeline(index, tiny_model, tokenizer, model_name="tiny", shared=2 / 3)
    pipeline.retriever.own_tokens = plain.retriever.own_tokens = 0
    for n, question in enumerate(OXYGEN):
        answer = pipeline.ask(question, 2048, answer_tokens=4)
        assert answer.usage.reused_tokens >= (answer.context.shared_tokens if n else 0)
        assert answer.text == plain.ask(question, 2048, answer_tokens=4).text


def test_several_questions_share_their_context_and_no_beginning(index):
    plain, shared = Retriever(index), Retriever(index, shared=0.5, own_tokens=0)
    assert shared.retrieve(OXYGEN[0], budget_tokens=900).shared_tokens
    assert shared.retrieve(OXYGEN, budget_tokens=900) == plain.retrieve(OXYGEN, budget_tokens=900)


def test_a_document_that_is_gone_before_it_is_read_is_not_shared(index, monkeypatch):
    def gone(doc_id):
        raise UsageError(f"no document {doc_id}")

    shared = Retriever(index, shared=0.5, own_tokens=0)
    monkeypatch.setattr(index, "chunks", gone)
    assert shared.retrieve(OXYGEN[0], budget_tokens=900).shared_tokens == 0


def test_a_question_about_several_documents_shares_nothing(tmp_path):
    with Index.create(tmp_path / "index") as index:
        index.add(
            [Document(f"town-{n}", f"Town {n}", f"The mayor of town {n} is called Mayor {n}. " * 20) for n in range(9)]
        )
        plain, shared = Retriever(index), Retriever(index, shared=0.5, own_tokens=0)
        everywhere = "What are the mayors called?"
        assert shared.retrieve(everywhere, budget_tokens=900) == plain.retrieve(everywhere, budget_tokens=900)
        assert shared.retrieve(
            "What is the mayor of town 7 called?", budget_tokens=900, doc_ids=["town-7"]
        ).shared_tokens


def test_a_budget_of_less_than_twice_ones_own_shares_nothing(index):
    plain, shared = Retriever(index), Retriever(index, shared=0.8, own_tokens=400)
    assert shared.retrieve(OXYGEN[0], budget_tokens=790) == plain.retrieve(OXYGEN[0], budget_tokens=790)
    assert shared.retrieve(OXYGEN[0], budget_tokens=1000).shared_tokens


def test_a_pipeline_shares_where_it_keeps_what_it_reads(index, tiny_model, tokenizer):
    from stripedrag.rag.context_cache import ContextCache

    def share(cache):
        return Pipeline(index, tiny_model, tokenizer, model_name="tiny", contexts=cache).retriever.shared

    assert share(ContextCache(tiny_model)) == SHARED
    assert share(ContextCache(tiny_model, memory_bytes=0)) == share(None) == 0
    stand_in = Pipeline(
        LlamaIndexSearch(None, tokenizer=tokenizer),
        tiny_model,
        tokenizer,
        model_name="tiny",
        contexts=ContextCache(tiny_model),
    )
    assert stand_in.retriever.shared == 0


def test_what_cannot_be_shared_is_refused(index):
    for share in (-0.1, 1.0):
        with pytest.raises(UsageError, match=f"shared is {share}; it is a share of the budget from 0 to below 1"):
            Retriever(index, shared=share)
    with pytest.raises(UsageError, match="a LlamaIndexSearch gives no whole documents to share"):
        Retriever(LlamaIndexSearch(None), shared=0.5)
