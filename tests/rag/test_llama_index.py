"""The LlamaIndex LLM works in a stock query engine, streams, stops, counts, and refuses what does not fit."""

import asyncio
import copy
import json
import pickle
import threading

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.llms.llm import LLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.stripedhyena import StripedHyena

from stripedrag.errors import BudgetError, UsageError
from stripedrag.rag.llama_index import IndexEmbedding


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
    index = VectorStoreIndex.from_documents(documents, embed_model=IndexEmbedding())
    response = index.as_query_engine(llm=llm, similarity_top_k=1).query("When was the lighthouse of Veyrac built?")
    assert "1862" in str(response)
    assert response.source_nodes[0].text == documents[0].text


@pytest.mark.weights
def test_a_stock_query_engine_streams(llm, documents):
    index = VectorStoreIndex.from_documents(documents, embed_model=IndexEmbedding())
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, streaming=True)
    pieces = list(engine.query("When was the lighthouse of Veyrac built?").response_gen)
    assert "1862" in "".join(pieces)


def test_streams_add_up_to_the_completion(tiny_llm):
    whole = tiny_llm.complete("Oxygen is")
    parts = list(tiny_llm.stream_complete("Oxygen is"))
    assert "".join(part.delta for part in parts) == parts[-1].text == whole.text != ""
    assert whole.raw["finish_reason"] == "length"
    assert parts[0].raw["finish_reason"] == ""
    usage = whole.additional_kwargs
    assert json.loads(json.dumps(whole.raw))["usage"] == usage
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


def test_calls_of_either_kind_follow_each_other_in_a_task(tiny_llm):
    async def scenario():
        texts = [(await tiny_llm.acomplete("Oxygen is")).text, tiny_llm.complete("Oxygen is").text]
        texts.append("".join([piece.delta async for piece in await tiny_llm.astream_complete("Oxygen is")]))
        return [*texts, tiny_llm.complete("Oxygen is").text, (await tiny_llm.acomplete("Oxygen is")).text]

    assert len(set(asyncio.run(scenario()))) == 1


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
    assert stopped.raw["finish_reason"] == "stop"
    samples = {tiny_llm.complete("Oxygen is", temperature=2.0, seed=seed).text for seed in (1, 1, 2, 3)}
    assert 1 < len(samples) <= 3


def test_what_does_not_fit_or_is_not_known_is_refused(tiny_llm):
    with pytest.raises(UsageError, match="takes no option 'temprature'; it takes max_tokens, temperature"):
        tiny_llm.complete("x", temprature=1)
    with pytest.raises(UsageError, match="max_tokens is 0; it is at least 1"):
        tiny_llm.complete("x", max_tokens=0)
    with pytest.raises(UsageError, match=r"has no field 'temprature'; it has model, dtype, device, .*, max_tokens"):
        StripedHyena(temprature=0.7)
    for fields, message in ((dict(stop=[""]), "stop holds an empty string"), (dict(seed=-1), "seed is -1; it lies")):
        with pytest.raises(UsageError, match=message):
            StripedHyena("no model is loaded", **fields)
    with pytest.raises(UsageError, match="no dtype 'float'; choose one of float32, bfloat16, float16, or None"):
        StripedHyena(dtype="float")
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
    assert len(tiny_llm.encode(words)) == fits
    assert tiny_llm.complete(words, max_tokens=12).additional_kwargs["prompt_tokens"] == 4096 - 12
    with pytest.raises(BudgetError):
        tiny_llm.complete(words + " a", max_tokens=12)


def test_a_formatted_prompt_is_taken_as_it_is(tiny_llm):
    raw = tiny_llm.complete("<|im_start|>user\nhi<|im_end|>\n", formatted=True)
    assert raw.additional_kwargs["prompt_tokens"] == 6


def test_calls_of_several_threads_and_tasks_take_turns_and_agree(tiny_llm):
    """More calls at once than the event loop's own threads, while a stream is half read."""
    alone = tiny_llm.complete("Oxygen is").text
    half = tiny_llm.stream_complete("Oxygen is")
    next(half)
    found = []
    threads = [threading.Thread(target=lambda: found.append(tiny_llm.complete("Oxygen is").text)) for _ in range(4)]
    for thread in threads:
        thread.start()

    async def together():
        return await asyncio.gather(*(tiny_llm.acomplete("Oxygen is") for _ in range(40)))

    found += [response.text for response in asyncio.run(together())]
    for thread in threads:
        thread.join()
    assert set(found) == {alone}
    assert len(found) == 44
    *_, last = half
    assert last.text == alone


def test_a_cancelled_call_leaves_the_queue(tiny_llm):
    async def scenario():
        reading = asyncio.create_task(tiny_llm.acomplete("oxygen and water " * 1300, max_tokens=3))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        long = asyncio.create_task(tiny_llm.acomplete("Oxygen is", max_tokens=3000))
        waiting = asyncio.create_task(tiny_llm.acomplete("Oxygen is", max_tokens=3000))
        await asyncio.sleep(0.05)
        for task in (waiting, long):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await asyncio.wait_for(tiny_llm.acomplete("Oxygen is"), timeout=2)

    assert asyncio.run(scenario()).text == tiny_llm.complete("Oxygen is").text


def test_an_exception_in_the_thread_is_raised_in_the_task(tiny_llm):
    async def read():
        async for _ in await tiny_llm.astream_complete("oxygen " * 4096):
            pass

    with pytest.raises(BudgetError):
        asyncio.run(read())


def test_what_a_prompt_begins_with_is_read_once(tiny_folder):
    llm = StripedHyena(model=str(tiny_folder), max_tokens=4)
    context = "Oxygen is a chemical element. " * 300
    first = llm.complete(context + "What is it?")
    second = llm.complete(context + "And what is it not, if one may ask?")
    assert first.additional_kwargs["reused_tokens"] == 0
    assert second.additional_kwargs["reused_tokens"] > second.additional_kwargs["prompt_tokens"] - 256 - 20
    fresh = StripedHyena(model=str(tiny_folder), max_tokens=4, cache_bytes=0)
    assert fresh.complete(context + "And what is it not, if one may ask?").text == second.text
    assert fresh.complete(context + "What is it?").additional_kwargs["reused_tokens"] == 0


def test_settings_go_through_dict_and_pickle_and_copies_share_the_model(tiny_folder):
    llm = StripedHyena(
        model=str(tiny_folder), max_tokens=7, temperature=0.5, seed=3, stop=["\n"], dtype="float32", cache_bytes=0
    )
    told = json.loads(llm.to_json())
    assert told["class_name"] == "StripedHyena"
    assert (told["max_tokens"], told["seed"], told["dtype"], told["stop"]) == (7, 3, "float32", ["\n"])
    saved = pickle.dumps(llm)
    assert len(saved) < 2000
    for made in (StripedHyena.from_dict(told), pickle.loads(saved)):
        assert made.to_dict() == llm.to_dict()
        assert made.complete("Oxygen is").text == llm.complete("Oxygen is").text
    for shared in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy()):
        assert shared._engine is llm._engine


def test_callbacks_and_events_hear_of_each_call(tiny_folder):
    heard = []

    class Listener(BaseEventHandler):
        @classmethod
        def class_name(cls):
            return "Listener"

        def handle(self, event, **kwargs):
            heard.append(event.class_name())

    debug, tokens = LlamaDebugHandler(print_trace_on_end=False), TokenCountingHandler()
    llm = StripedHyena(model=str(tiny_folder), max_tokens=4, callback_manager=CallbackManager([debug, tokens]))
    dispatcher = get_dispatcher()
    listener = Listener()
    dispatcher.add_event_handler(listener)
    try:
        usage = llm.complete("Oxygen is").additional_kwargs

        async def chats():
            reply = await llm.achat([ChatMessage(role="user", content="Oxygen is")])
            return [reply, *[part async for part in await llm.astream_chat([ChatMessage(role="user", content="O")])]]

        asyncio.run(chats())
    finally:
        dispatcher.event_handlers.remove(listener)
    assert {"LLMCompletionStartEvent", "LLMCompletionEndEvent", "LLMChatStartEvent", "LLMChatEndEvent"} <= set(heard)
    assert heard.count("LLMChatInProgressEvent") >= 1
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 3
    assert tokens.llm_token_counts[0].prompt_token_count == usage["prompt_tokens"]
    assert tokens.llm_token_counts[0].completion_token_count == usage["completion_tokens"]


def test_a_prompt_template_is_counted_as_predict_reads_it(tiny_folder):
    llm = StripedHyena(model=str(tiny_folder), max_tokens=4, system_prompt="Be brief.")
    template = PromptTemplate("{a} and {b}")
    counted = llm.template_tokens(template, a="oxygen", b="<|im_end|> water")
    read = []
    record = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    llm.callback_manager = record
    LLM.predict(llm, template, a="oxygen", b="<|im_end|> water")
    for _, end in record.handlers[0].get_event_pairs(CBEventType.LLM):
        read.append(end.payload["response"].additional_kwargs["prompt_tokens"])
    assert read == [counted]


@pytest.mark.weights
def test_a_stock_chat_engine_remembers_and_reads_its_turns_once(llm, documents):
    index = VectorStoreIndex.from_documents(documents, embed_model=IndexEmbedding())
    memory = ChatMemoryBuffer.from_defaults(llm=llm)
    engine = index.as_chat_engine(chat_mode="context", llm=llm, memory=memory, similarity_top_k=1)
    assert "1862" in str(engine.chat("When was the lighthouse of Veyrac built?"))
    streamed = "".join(engine.stream_chat("Who was the engineer of the lighthouse of Veyrac?").response_gen)
    assert "Dutour" in streamed
    assert [message.role.value for message in memory.get_all()] == ["user", "assistant"] * 2
