"""The LlamaIndex LLM works in a stock query engine, streams, stops, counts, and refuses what does not fit."""

import asyncio

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.stripedhyena import StripedHyena

from stripedrag.errors import BudgetError, UsageError
from stripedrag.indexes import MiniLMEmbedder

EMBEDDER = MiniLMEmbedder()


class LocalEmbedding(BaseEmbedding):
    def _get_query_embedding(self, query):
        return EMBEDDER.embed_query(query).tolist()

    def _get_text_embedding(self, text):
        return EMBEDDER.embed([text])[0].tolist()

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)


@pytest.fixture(scope="session")
def tiny_llm(tiny_folder):
    return StripedHyena(model=str(tiny_folder), max_tokens=12)


@pytest.fixture(scope="session")
def llm():
    return StripedHyena(max_tokens=48)


@pytest.fixture(scope="session")
def documents():
    return [
        Document(text="The lighthouse of Veyrac was built in 1862 by the engineer Amélie Dutour."),
        Document(text="Bread rises because yeast makes carbon dioxide."),
    ]


@pytest.mark.weights
def test_it_answers_in_a_stock_query_engine(llm, documents):
    index = VectorStoreIndex.from_documents(documents, embed_model=LocalEmbedding())
    response = index.as_query_engine(llm=llm, similarity_top_k=1).query("When was the lighthouse of Veyrac built?")
    assert "1862" in str(response)
    assert response.source_nodes[0].text == documents[0].text


@pytest.mark.weights
def test_a_stock_query_engine_streams(llm, documents):
    index = VectorStoreIndex.from_documents(documents, embed_model=LocalEmbedding())
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, streaming=True)
    pieces = list(engine.query("When was the lighthouse of Veyrac built?").response_gen)
    assert "1862" in "".join(pieces)


def test_streams_add_up_to_the_completion(tiny_llm):
    whole = tiny_llm.complete("Oxygen is")
    parts = list(tiny_llm.stream_complete("Oxygen is"))
    assert "".join(part.delta for part in parts) == parts[-1].text == whole.text != ""
    assert whole.raw == {"finish_reason": "length"}
    usage = whole.additional_kwargs
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_chat_and_complete_agree_on_one_user_message(tiny_llm):
    messages = [ChatMessage(role="user", content="Oxygen is")]
    assert tiny_llm.chat(messages).message.content == tiny_llm.complete("Oxygen is").text
    parts = list(tiny_llm.stream_chat(messages))
    assert parts[-1].message.content == "".join(part.delta for part in parts)
    assert tiny_llm.chat([ChatMessage(role="system", content="Be brief."), *messages]).message.content


def test_async_forms_agree_and_leave_the_event_loop_free(tiny_llm):
    messages = [ChatMessage(role="user", content="Oxygen is")]

    async def scenario():
        beats = 0

        async def heart():
            nonlocal beats
            while True:
                await asyncio.sleep(0.001)
                beats += 1

        beating = asyncio.create_task(heart())
        texts = [
            (await tiny_llm.acomplete("Oxygen is")).text,
            (await tiny_llm.achat(messages)).message.content,
            "".join([part.delta async for part in await tiny_llm.astream_complete("Oxygen is")]),
            "".join([part.delta async for part in await tiny_llm.astream_chat(messages)]),
        ]
        beating.cancel()
        return texts, beats

    async def together():
        return [r.text for r in await asyncio.gather(*(tiny_llm.acomplete("Oxygen is") for _ in range(6)))]

    texts, beats = asyncio.run(scenario())
    texts += asyncio.run(together())
    assert len(set(texts)) == 1
    assert beats > 3


def test_an_abandoned_stream_blocks_nobody(tiny_llm):
    stream = tiny_llm.stream_complete("Oxygen is")
    next(stream)
    assert tiny_llm.complete("Oxygen is").text


def test_a_cancelled_stream_is_cancelled_and_nothing_else(tiny_llm):
    async def scenario(delay):
        async def read():
            async for _ in await tiny_llm.astream_complete("Oxygen is", max_tokens=200):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(delay)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    for delay in (0.0, 0.01, 0.05):
        asyncio.run(scenario(delay))


def test_options_of_a_call_override_the_fields(tiny_llm):
    assert tiny_llm.complete("Oxygen is", max_tokens=3).additional_kwargs["completion_tokens"] == 3
    text = tiny_llm.complete("Oxygen is").text
    stopped = tiny_llm.complete("Oxygen is", stop=text[4:7])
    assert stopped.text == text[: text.index(text[4:7])]
    assert stopped.raw == {"finish_reason": "stop"}
    samples = {tiny_llm.complete("Oxygen is", temperature=2.0, seed=seed).text for seed in (1, 1, 2, 3)}
    assert 1 < len(samples) <= 3


def test_what_does_not_fit_or_is_not_known_is_refused(tiny_llm):
    with pytest.raises(UsageError, match="takes no option 'temprature'; it takes max_tokens, temperature"):
        tiny_llm.complete("x", temprature=1)
    with pytest.raises(UsageError, match="max_tokens is 0; it is at least 1"):
        tiny_llm.complete("x", max_tokens=0)
    with pytest.raises(UsageError, match="has no field 'temprature'; it has max_tokens"):
        StripedHyena(temprature=0.7)
    with pytest.raises(UsageError, match="stop holds an empty string"):
        tiny_llm.complete("x", stop="")
    with pytest.raises(UsageError, match="the prompt has no tokens"):
        tiny_llm.complete("", formatted=True)
    image = ChatMessage(role="user", blocks=[ImageBlock(image=b"png"), TextBlock(text="what is it?")])
    with pytest.raises(UsageError, match="a block of type 'image'; this model reads text only"):
        tiny_llm.chat([image])
    assert tiny_llm.complete("x", stop=None, max_tokens=None, temperature=None).text
    with pytest.raises(BudgetError, match=r"the prompt has \d+ tokens and max_tokens is 12; .* has a window of 4096"):
        tiny_llm.complete("oxygen " * 4096)
    with pytest.raises(BudgetError):
        asyncio.run(tiny_llm.acomplete("oxygen " * 4096))


def test_the_context_window_leaves_room_for_the_template(tiny_llm):
    fits = tiny_llm.metadata.context_window - 12
    words = " a" * fits
    assert len(tiny_llm._tokenizer.encode(words, add_special_tokens=False)) == fits
    assert tiny_llm.complete(words, max_tokens=12).additional_kwargs["prompt_tokens"] == 4096 - 12
    with pytest.raises(BudgetError):
        tiny_llm.complete(words + " a", max_tokens=12)


def test_a_formatted_prompt_is_taken_as_it_is(tiny_llm):
    raw = tiny_llm.complete("<|im_start|>user\nhi<|im_end|>\n", formatted=True)
    assert raw.additional_kwargs["prompt_tokens"] == 6
