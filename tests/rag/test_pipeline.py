"""One question: within its tokens, with citations that point at the quoted text, and errors before any work."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripedrag.errors import BudgetError, SetupError, StoreError, UsageError
from stripedrag.model import memory
from stripedrag.model.generation import Sampling
from stripedrag.rag import Answer, Pipeline, Span
from stripedrag.rag.answer import cite
from stripedrag.rag.completion import Completion
from stripedrag.rag.context_cache import ContextCache
from stripedrag.rag.context_files import ContextFiles
from stripedrag.rag.prompt_template import PromptTemplate, default_template


@settings(max_examples=12)
@given(context_tokens=st.integers(256, 4096), answer_tokens=st.integers(1, 24))
def test_prompt_and_answer_stay_within_the_context(pipeline, context_tokens, answer_tokens):
    answer = pipeline.ask("Who discovered oxygen?", context_tokens, answer_tokens=answer_tokens)
    usage = answer.usage
    assert usage.prompt_tokens + answer_tokens <= context_tokens
    assert usage.answer_tokens <= answer_tokens
    assert usage.prompt_tokens == usage.passage_tokens + pipeline.prompt.overhead_tokens("Who discovered oxygen?")
    assert answer.context.budget_tokens == context_tokens - answer_tokens - (usage.prompt_tokens - usage.passage_tokens)
    assert usage.prompt_tokens == len(pipeline.prompt.ids(answer.question, answer.context.spans))
    over = [one for one in answer.context.dropped if one.reason == "budget"]
    if over:  # what room is left is less than the next chunk needs, alone
        text = pipeline.index.document(over[0].doc_id).text[over[0].start : over[0].end]
        alone = len(pipeline.prompt.encode(pipeline.prompt.render(Span(over[0].doc_id, over[0].doc_id, 0, 0, text, 0))))
        assert context_tokens - answer_tokens - usage.prompt_tokens <= alone


@pytest.mark.weights
def test_the_default_model_answers_from_the_documents(default_pipeline):
    answer = default_pipeline.ask("When was the Warsaw Uprising?", 1024)
    assert "1944" in answer.text
    assert answer.finish == "stop"
    assert any(span.doc_id == "Warsaw.txt" for span in answer.context.spans)
    assert answer.citations
    for citation in answer.citations:
        text = default_pipeline.index.document(citation.doc_id).text
        assert text[citation.start : citation.end] == citation.quote
    assert answer.timings.retrieval_s > 0
    assert answer.timings.prefill_s > 0
    assert answer.timings.decode_s > 0
    assert answer.cache_bytes > 0
    assert Answer.model_validate_json(answer.model_dump_json()) == answer


def test_a_stream_gives_the_text_of_the_answer(pipeline):
    stream = pipeline.stream("oxygen", 512, answer_tokens=12)
    with pytest.raises(RuntimeError, match="iterate the stream to its end first"):
        _ = stream.answer
    text = "".join(stream)
    assert stream.answer.text == text.strip() == pipeline.ask("oxygen", 512, answer_tokens=12).text


@pytest.fixture
def keeping(index, tiny_model, tokenizer):
    """A pipeline that keeps what it read."""
    return Pipeline(index, tiny_model, tokenizer, model_name="tiny", contexts=ContextCache(tiny_model))


@pytest.mark.parametrize("kind", ["pipeline", "keeping"])
def test_many_questions_share_a_context_and_get_the_answers_that_each_gets_from_it(request, kind):
    pipeline = request.getfixturevalue(kind)
    questions = ["oxygen", "When was the Warsaw Uprising?", "Who was Genghis Khan?"]
    together = pipeline.ask_many(questions, 900, answer_tokens=6)
    context = pipeline.context_for(questions, 900, answer_tokens=6)
    assert {"Oxygen.txt", "Warsaw.txt", "Genghis Khan.txt"} <= {span.doc_id for span in context.spans}
    assert [a.question for a in together] == questions and all(a.context == context for a in together)
    for answer in together:
        alone = pipeline.ask(answer.question, 900, answer_tokens=6, context=context)
        assert (alone.text, alone.finish, alone.citations) == (answer.text, answer.finish, answer.citations)
        assert alone.usage.prompt_tokens == answer.usage.prompt_tokens <= 900 - 6
    assert pipeline.ask_many([]) == []
    with pytest.raises(UsageError, match="there is no question to retrieve for"):
        pipeline.context_for([])


def test_a_second_question_on_a_context_reads_the_question_alone(keeping):
    context = keeping.context_for("oxygen", 900)
    first, second = (
        keeping.ask(question, context=context, answer_tokens=4) for question in ("Who?", "When and where?")
    )
    assert first.usage.reused_tokens == 0
    assert second.usage.prompt_tokens - second.usage.reused_tokens == len(
        keeping.prompt.question_ids("When and where?")
    )


def test_documents_are_read_whole_in_their_order_and_warmed_before_they_are_asked(keeping, index):
    context = keeping.context_of(["Oxygen.txt"], 800)
    (span,) = context.spans
    assert index.document("Oxygen.txt").text.startswith(span.text) and span.start == 0
    assert context.dropped and context.tokens <= context.budget_tokens
    context = keeping.context_of(["Oxygen.txt"])
    assert context.spans[0].text == index.document("Oxygen.txt").text and not context.dropped
    heard = []
    warmed = keeping.warm(context, progress=lambda read, of: heard.append((read, of)))
    assert (warmed.reused_tokens, heard[-1]) == (0, (warmed.tokens, warmed.tokens)) and warmed.cache_bytes > 0
    assert keeping.ask("Who?", context=context).usage.reused_tokens == warmed.tokens
    assert keeping.warm(keeping.context_of(["Oxygen.txt", "Warsaw.txt"])).reused_tokens == warmed.tokens
    assert keeping.warm(context).reused_tokens == warmed.tokens


def test_what_cannot_be_warmed_or_given_is_named(pipeline, keeping, index, tiny_model, tokenizer, tmp_path):
    context = keeping.context_of(["Oxygen.txt"])
    with pytest.raises(UsageError, match="tiny keeps nothing that it has read: the pipeline has no context cache"):
        pipeline.warm(context)
    for doc_ids in ("Oxygen.txt", []):
        with pytest.raises(UsageError, match="it is a list of one document or more"):
            pipeline.context_of(doc_ids)
    with pytest.raises(UsageError, match="Radon"):
        pipeline.context_of(["Radon.txt"])
    with pytest.raises(BudgetError, match=r"the context has \d+ tokens; of 900 the question and the template take \d+"):
        pipeline.ask("Who?", 900, context=context)
    with pytest.raises(UsageError, match="doc_ids narrows what is retrieved, and the context is given; leave one out"):
        pipeline.ask("Who?", context=context, doc_ids=["Warsaw.txt"])
    with pytest.raises(UsageError, match="the question ' ' is blank"):
        pipeline.ask_many(["Who?", " "], context=context)
    with pytest.raises(UsageError, match="cache_bytes is -1; it is 0"):
        Pipeline.open(index, cache_bytes=-1)
    for contexts, message in (
        (ContextCache(tiny_model, memory_bytes=0), "tiny keeps nothing that it has read: the pipeline has no context"),
        (
            ContextCache(tiny_model, memory_bytes=0, files=ContextFiles(tmp_path, saves=False)),
            "or one of 0 bytes and no files that save",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            Pipeline(index, tiny_model, tokenizer, model_name="tiny", contexts=contexts).warm(context)
    little = Pipeline(
        index, tiny_model, tokenizer, model_name="tiny", contexts=ContextCache(tiny_model, memory_bytes=10**5)
    )
    with pytest.raises(StoreError, match=r"\d+ of its \d+ tokens are kept: there is room for 100000 bytes; open the"):
        little.warm(context)
    small = ContextCache(tiny_model, files=ContextFiles(tmp_path, disk_bytes=1000))
    saving = Pipeline(index, tiny_model, tokenizer, model_name="tiny", contexts=small)
    with pytest.raises(
        StoreError, match=r"could not be saved in .*: it has more than the 1000 bytes that may be taken"
    ):
        saving.warm(context)


def test_a_question_may_be_narrowed_to_documents(pipeline):
    answer = pipeline.ask("oxygen", 600, answer_tokens=4, doc_ids=["Warsaw.txt"])
    assert {span.doc_id for span in answer.context.spans} == {"Warsaw.txt"}


def test_an_interrupted_question_leaves_the_pipeline_whole(keeping, interrupt):
    context = keeping.context_of(["Oxygen.txt"], 3000)
    expected = keeping.ask("Who?", context=context, answer_tokens=6)
    keeping.contexts.clear()
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        keeping.ask("Who?", context=context, answer_tokens=6)
    stream = iter(keeping.stream("Who?", context=context, answer_tokens=6))
    next(stream)
    del stream  # the reader left in the middle of an answer
    again = keeping.ask("Who?", context=context, answer_tokens=6)
    assert again.text == expected.text and again.usage.reused_tokens > 0


def test_a_pipeline_closes_only_the_index_that_it_opened(index, index_path, tiny_folder):
    with Pipeline.open(index, model=tiny_folder):
        pass
    assert index.document_count
    with Pipeline.open(index_path, model=tiny_folder) as pipeline:
        opened = pipeline.index
    with pytest.raises(UsageError, match="closed"):
        _ = opened.document_count


def test_a_question_that_is_no_unicode_text_is_named(pipeline):
    with pytest.raises(UsageError, match=r"has U\+DCFF, which is no character; decode it as UTF-8 first"):
        pipeline.ask("why\udcff?")


def test_one_question_is_not_many(pipeline):
    with pytest.raises(UsageError, match=r"questions is the string 'why\?'; it is a list of questions"):
        pipeline.ask_many("why?")


def test_the_defaults_are_those_of_the_rooms_below():
    from stripedrag.model.loading import DEFAULT_MODEL
    from stripedrag.rag import defaults

    assert defaults.MODEL == DEFAULT_MODEL


def test_sampling_repeats_with_its_seed(pipeline):
    def ask(seed):
        sampling = Sampling(temperature=1.5, top_p=0.9, seed=seed)
        return pipeline.ask("oxygen", 400, answer_tokens=10, sampling=sampling).text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(context_tokens=5000), "context_tokens is 5000; tiny has a window of 4096. Lower it"),
        (
            dict(context_tokens=100),
            r"question and template take \d+ of them and the answer's reserve 128, which leaves",
        ),
        (dict(context_tokens=400, answer_tokens=0), "answer_tokens is 0; an answer has at least 1"),
        (dict(context_tokens=190), "leaves .* for passages, and the best chunk alone has more; raise it"),
    ],
)
def test_a_request_that_cannot_fit_fails_with_the_numbers(pipeline, arguments, message):
    with pytest.raises(BudgetError, match=message):
        pipeline.ask("Who discovered oxygen?", **arguments)


def test_auto_takes_the_window_or_what_memory_allows_and_says_which(pipeline, keeping, monkeypatch):
    answer = pipeline.ask("Who discovered oxygen?", "auto", answer_tokens=4)
    assert (answer.usage.context_tokens, answer.usage.limited_by) == (4096, "window")
    assert pipeline.ask("Who discovered oxygen?", 900, answer_tokens=4).usage.limited_by == "asked"

    def free(tokens):
        enough = memory.context_bytes(keeping.model, tokens, kept_bytes=2**31) / 0.8
        monkeypatch.setattr(memory, "free_bytes", lambda device: round(enough) + 1)

    free(1500)
    answer = keeping.ask("Who discovered oxygen?", "auto", answer_tokens=4)
    assert answer.usage.limited_by == "memory"
    assert 1499 <= answer.usage.context_tokens <= 1500
    assert 1500 - 96 * 1.5 < answer.usage.prompt_tokens + 4 <= 1500
    assert keeping.context_of(["Oxygen.txt"], "auto").budget_tokens < 1500
    less = memory.context_bytes(keeping.model, 4000, kept_bytes=2**31)
    monkeypatch.setattr(memory, "free_bytes", lambda device: less)
    with pytest.raises(
        BudgetError, match=r"for 4096 tokens of context tiny takes up to 0\.\d GB .*; 0\.\d GB are free"
    ):
        keeping.ask("Who discovered oxygen?", 4096)
    free(0)
    with pytest.raises(BudgetError, match="the free memory takes 0 tokens of context; question and template take"):
        keeping.ask("Who discovered oxygen?", "auto")
    with pytest.raises(UsageError, match="context_tokens is 'most'; it is a number of tokens, or 'auto'"):
        keeping.ask("Who discovered oxygen?", "most")


def test_what_is_kept_is_not_charged_twice(keeping, monkeypatch):
    """Free memory falls by what a context cache takes, and what is read already needs none."""
    whole = memory.context_bytes(keeping.model, 2000, kept_bytes=2**31)
    monkeypatch.setattr(memory, "free_bytes", lambda device: whole - keeping.contexts.held_bytes)
    context = keeping.context_of(["Oxygen.txt", "Warsaw.txt"], 2000, answer_tokens=8)
    keeping.warm(context)
    for tokens, by in ((None, "window"), ("auto", "memory"), (2000, "asked")):
        answer = keeping.ask("Who?", tokens, context=context, answer_tokens=8)
        assert answer.usage.reused_tokens >= context.tokens
        assert answer.usage.limited_by == by
    with pytest.raises(BudgetError, match="Lower context_tokens, pass 'auto', or open the pipeline with a smaller"):
        keeping.context_of(["Oxygen.txt"], 4096)


def test_what_replies_take_that_are_decoded_together_is_charged(keeping, monkeypatch):
    context = keeping.context_of(["Oxygen.txt"], 1000, answer_tokens=8)
    questions = ["Who discovered oxygen?"] * 5
    enough = memory.context_bytes(keeping.model, 2000, kept_bytes=2**31)
    each = 20 + keeping.prompt.overhead_tokens(questions[0])
    enough += 4 * memory.row_bytes(keeping.model, each)
    monkeypatch.setattr(memory, "free_bytes", lambda device: enough)
    assert len(keeping.ask_many(questions, context=context, answer_tokens=8)) == 5
    assert len(keeping.ask_many(questions, 2000, answer_tokens=20)) == 5
    for arguments in (dict(context=context), dict(context_tokens=2000)):
        with pytest.raises(BudgetError, match=r"GB of them for replies decoded together: ask fewer questions\)"):
            keeping.ask_many(questions, answer_tokens=900, **arguments)
    assert len(keeping.ask_many(questions[:1], 2000, answer_tokens=30)) == 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: enough / 0.8)
    limits = [keeping._limits(replies, each).of("auto") for replies in (5, 3, 1)]
    assert [limit.by for limit in limits] == ["memory"] * 3
    assert 1990 < limits[0].tokens <= 2000 and limits[0].tokens < limits[1].tokens < limits[2].tokens
    with pytest.raises(BudgetError, match="Free some memory, lower answer_tokens, or ask fewer questions at once"):
        keeping.ask_many(questions, "auto", answer_tokens=900)


def test_a_context_that_another_tokenizer_counted_is_counted_again(pipeline):
    context = pipeline.context_of(["Oxygen.txt"], 1000, answer_tokens=8)
    wrong = dataclasses.replace(context, tokens=context.tokens // 2)
    assert pipeline.ask("Who?", 1000, context=wrong, answer_tokens=8).usage.passage_tokens == context.tokens
    with pytest.raises(BudgetError, match=f"the context has {context.tokens} tokens; of 600"):
        pipeline.ask("Who?", 600, context=wrong, answer_tokens=8)


def test_the_answer_holds_the_prompt_that_was_read(pipeline, tokenizer):
    answer = pipeline.ask("Who discovered oxygen?", 700, answer_tokens=4)
    passages = "".join(f"{span.title}\n{span.text.strip()}\n\n" for span in answer.context.spans)
    message = [{"role": "user", "content": f"{passages}Question: Who discovered oxygen?"}]
    assert answer.prompt == tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert answer.prompt_template_sha256 == default_template().sha256


def test_a_prompt_file_replaces_the_words_around_passages_and_question(index, tiny_model, tokenizer, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'begin = "Read {this}.\\n"\npassage = "[{title}] {text}\\n"\nquestion = "Asked: {question} {{!}}"\nreply = ":"'
    )
    template = PromptTemplate.read(file)
    pipeline = Pipeline(index, tiny_model, tokenizer, model_name="tiny", prompt=template)
    answer = pipeline.ask("Who discovered oxygen?", 500, answer_tokens=4)
    passages = "".join(f"[{span.title}] {span.text.strip()}\n" for span in answer.context.spans)
    assert f"Read {{this}}.\n{passages}Asked: Who discovered oxygen? {{!}}" in answer.prompt
    assert answer.prompt_template_sha256 == template.sha256 != default_template().sha256
    assert answer.usage.prompt_tokens + 4 <= 500
    together = pipeline.ask_many(["Who discovered oxygen?", "When?"], 500, answer_tokens=4)
    assert [f"Asked: {one.question} {{!}}" in one.prompt for one in together] == [True, True]


@pytest.mark.parametrize(
    "text,message",
    [
        (None, "the prompt file .* cannot be read: No such file or directory"),
        ("passage", "the prompt file .* is no TOML: "),
        ('passage = "{text}"', "has a wrong 'question': Field required"),
        ('passage = "{title}"\nquestion = "{question}"', r"has a wrong 'passage': it lacks \{text\}"),
        (
            'passage = "{text} {name}"\nquestion = "{question}"',
            r"wrong 'passage': it has \{name\}, and \{text\} and \{title\} alone can be filled in; write braces twice",
        ),
        ('passage = "{text}"\nquestion = "{question"', "wrong 'question': "),
        (
            'passage = "{text:.20}"\nquestion = "{question}"',
            r"wrong 'passage': it formats \{text\}; texts are filled in",
        ),
        ('passage = "{text}"\nquestion = "{question!r}"', r"wrong 'question': it formats \{question\}"),
        ('passage = "{text}"\nquestion = "{question}"\nanswer = "x"', "wrong 'answer': Extra inputs"),
    ],
)
def test_a_file_that_is_no_prompt_is_told(text, message, index, tmp_path):
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=message):
        Pipeline.open(index, prompt=file)


def test_stop_strings_end_answers_alone_and_together(pipeline):
    questions = ["Who discovered oxygen?", "Who was Genghis Khan?"]
    context = pipeline.context_for(questions, 900, answer_tokens=24)
    options = dict(context=context, answer_tokens=24, sampling=Sampling(temperature=1.0, seed=3))
    plain = [answer.text for answer in pipeline.ask_many(questions, **options)]
    stop = [plain[0][4:8]]
    for answer, text in zip(pipeline.ask_many(questions, **options, stop=stop), plain, strict=True):
        assert answer.text == text.partition(stop[0])[0].strip()
        assert pipeline.ask(answer.question, **options, stop=stop).text == answer.text
    with pytest.raises(UsageError, match="stop holds an empty string"):
        pipeline.ask("Who?", stop=[""])
    with pytest.raises(UsageError, match=r"stop is the string 'x'; it is a list of strings. Write \['x'\]"):
        pipeline.ask_many(["Who?"], stop="x")


def test_reading_is_told_as_it_goes_on(pipeline, keeping):
    for asked in (pipeline, keeping):
        heard = []
        stream = asked.stream(
            "Who discovered oxygen?", 3000, answer_tokens=2, progress=lambda *told, heard=heard: heard.append(told)
        )
        assert heard == []
        list(stream)
        assert heard[-1] == (stream.answer.usage.prompt_tokens,) * 2
        assert heard == sorted(heard) and len(heard) > 1


def test_sampling_out_of_range_is_named():
    with pytest.raises(UsageError, match="temperature is -1; it is 0"):
        Sampling(temperature=-1)
    with pytest.raises(UsageError, match="temperature is nan"):
        Sampling(temperature=float("nan"))
    with pytest.raises(UsageError, match="seed is -1; it lies from 0 to"):
        Sampling(seed=-1)
    with pytest.raises(UsageError, match="top_p is 0; it lies above 0"):
        Sampling(top_p=0)


def test_an_unknown_model_is_named_with_the_known_ones(index):
    with pytest.raises(UsageError, match=r"no model 'stripedhyena': it is not one of stripedhyena-smol-135m, smollm2"):
        Pipeline.open(index, model="stripedhyena")


def test_a_folder_without_a_config_is_no_model(index, tmp_path):
    with pytest.raises(UsageError, match=r"has no config.json, so it is not a model folder"):
        Pipeline.open(index, model=tmp_path)


def test_a_folder_without_a_tokenizer_is_named(index, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer"):
        Pipeline.open(index, model=tmp_path)


def test_a_broken_model_folder_is_named(index, tiny_folder, tmp_path):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UsageError, match=r"the model folder .*broken cannot be read"):
        Pipeline.open(index, model=tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UsageError, match=r"cannot be read: .*unheard-of"):
        Pipeline.open(index, model=tmp_path / "broken")


def test_weights_that_are_missing_name_setup(index, tmp_path, monkeypatch):
    monkeypatch.setenv("STRIPEDRAG_CACHE", str(tmp_path))
    with pytest.raises(SetupError, match=r"not prepared on this machine .* Run `stripedrag setup`"):
        Pipeline.open(index)


def test_citations_are_the_sentences_that_hold_the_answer():
    text = "Oxygen was found in 1774. Joseph Priestley published it first! Scheele found it in 1773.\nOther words here"
    spans = [Span("doc", "t", 100, 100 + len(text), text, 1.0)]
    (citation,) = cite("Joseph Priestley", "Who published it first?", spans)
    assert citation.quote == "Joseph Priestley published it first!"
    assert text[citation.start - 100 : citation.end - 100] == citation.quote
    both = cite("Priestley and Scheele", "Who found and published it?", spans)
    assert [c.quote for c in both] == ["Joseph Priestley published it first!", "Scheele found it in 1773."]


@pytest.mark.parametrize("answer", ["", "the of", "Lavoisier named something else entirely"])
def test_an_answer_that_no_sentence_holds_has_no_citation(answer):
    text = "Oxygen was found in 1774."
    assert cite(answer, "When was oxygen found?", [Span("doc", "t", 0, len(text), text, 1.0)]) == ()


def test_a_sentence_about_something_else_is_not_cited_for_holding_the_same_word():
    text = "The plague lasted three years."
    assert cite("three", "How many astronauts died?", [Span("doc", "Black Death", 0, len(text), text, 1.0)]) == ()
    assert cite("three", "How long was the black death?", [Span("doc", "Black Death", 0, len(text), text, 1.0)])


def test_a_reply_is_told_without_the_space_that_it_begins_with(tiny_model, tokenizer, monkeypatch):
    said = tokenizer(" Two words", add_special_tokens=False).input_ids
    monkeypatch.setattr("stripedrag.rag.completion.decode", lambda *_, **__: iter(said))
    prompt = tokenizer("Oxygen is", add_special_tokens=False).input_ids
    raw = Completion(tiny_model, tokenizer, prompt, max_new_tokens=24)
    reply = Completion(tiny_model, tokenizer, prompt, max_new_tokens=24, is_reply=True)
    assert "".join(raw) == raw.text == " Two words"
    assert "".join(reply) == reply.text == "Two words" and reply.token_ids == said


def test_a_stop_string_ends_the_text_before_it(tiny_model, tokenizer):
    prompt = tokenizer("Oxygen is", add_special_tokens=False).input_ids
    free = Completion(tiny_model, tokenizer, prompt, max_new_tokens=24)
    pieces = list(free)
    assert "".join(pieces) == free.text == tokenizer.decode(free.token_ids)
    assert free.finish == "length"
    assert len(free.token_ids) == 24
    stop = free.text[8:13]
    stopped = Completion(tiny_model, tokenizer, prompt, max_new_tokens=24, stop=[stop, "\0never"])
    pieces = list(stopped)
    assert "".join(pieces) == stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish == "stop"
    assert len(stopped.token_ids) < 24
