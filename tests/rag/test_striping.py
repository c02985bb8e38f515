"""Training reads questions as the pipeline asks them, and files of texts and questions are told apart."""

import json
import os

import pytest

from stripedrag.errors import CorpusError, UsageError
from stripedrag.rag import Span
from stripedrag.rag.prompt import PromptFormat
from stripedrag.rag.striping import framing, read_corpus

TEXT = {"id": "1", "text": "Rivers flow."}
ASKED = {"id": "1", "passage": "Rivers flow.", "question": "What do rivers do?", "answers": ["flow"]}


@pytest.mark.parametrize("has_template", [True, False])
def test_a_question_in_training_has_the_ids_of_the_pipelines_prompt(tokenizer, tiny_folder, has_template):
    if not has_template:
        tokenizer = type(tokenizer).from_pretrained(tiny_folder)
        tokenizer.chat_template = None
    made = framing(tokenizer, "tiny")
    passage, question = made.passage("Water", " Rivers flow. "), made.question("What do rivers do? ")
    trained = [*made.head, *made.encode(passage), *made.encode(question), *made.reply]
    span = Span("doc", "Water", 0, 14, " Rivers flow. ", 1.0)
    assert trained == PromptFormat(tokenizer).ids("What do rivers do? ", [span])
    assert made.turn[0] == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(tokenizer, tiny_folder):
    bare = type(tokenizer).from_pretrained(tiny_folder)
    bare.chat_template = bare.eos_token = None
    with pytest.raises(UsageError, match="of 'bare' has neither a chat template nor an end token to teach"):
        framing(bare, "bare")


@pytest.fixture
def write(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def test_texts_and_questions_are_told_apart_by_their_keys(write):
    files = [write("a.jsonl", TEXT), write("b.jsonl", ASKED)]
    others = [write("c.jsonl", ASKED | {"passage": "Lakes lie."}), write("d.jsonl", TEXT | {"text": "Lakes lie."})]
    corpus = read_corpus(files, others)
    for texts, asked, text in (
        (corpus.texts, corpus.asked, "Rivers flow."),
        (corpus.held_texts, corpus.held_asked, "Lakes lie."),
    ):
        assert [one.text for one in texts] == [one.passage for one in asked] == [text]
        assert [one.taught for one in asked] == ["flow"]
    with pytest.raises(
        CorpusError, match=r"1 held-out texts and passages are also among those to train on, the first 'Rivers flow\.'"
    ):
        read_corpus(files, [*others, write("e.jsonl", TEXT)])
    for seen in (
        write("f.jsonl", ASKED | {"passage": "Lakes lie."}),
        write("g.jsonl", TEXT | {"text": "Lakes  lie.\n"}),
    ):
        with pytest.raises(CorpusError, match="1 held-out texts and passages are also among"):
            read_corpus([*files, seen], others)


def test_a_corpus_that_lacks_something_is_refused(write):
    texts, asked = write("a.jsonl", TEXT), write("b.jsonl", ASKED)
    with pytest.raises(CorpusError, match="striping needs texts to train on and others to measure on"):
        read_corpus([texts, asked], [asked])
    with pytest.raises(CorpusError, match="striping needs questions to train on and others to measure on"):
        read_corpus([texts], [texts, asked])
    with pytest.raises(CorpusError, match=r"empty\.jsonl is empty"):
        read_corpus([write("empty.jsonl")], [])
    with pytest.raises(CorpusError, match=r"c\.jsonl, line 1 is no Text: text: Field required"):
        read_corpus([write("c.jsonl", {"id": "1"})], [])
    with pytest.raises(CorpusError, match=r"d\.jsonl, line 1 is no Asked: question: Input should be a valid string"):
        read_corpus([write("d.jsonl", ASKED | {"question": None})], [])
    os.mkfifo(texts.with_name("pipe"))
    with pytest.raises(CorpusError, match="pipe is no file that can be read again; write it to one"):
        read_corpus([texts.with_name("pipe")], [])


def test_a_file_may_begin_with_a_byte_order_mark(write):
    texts, asked = write("a.jsonl", TEXT), write("b.jsonl", ASKED)
    texts.write_bytes(b"\xef\xbb\xbf" + texts.read_bytes())
    others = [write("c.jsonl", ASKED | {"passage": "Lakes lie."}), write("d.jsonl", TEXT | {"text": "Lakes lie."})]
    assert [one.text for one in read_corpus([texts, asked], others).texts] == ["Rivers flow."]
