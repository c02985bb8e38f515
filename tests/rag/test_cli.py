"""The command line: one JSON object on stdout, everything else on stderr, 2 for the caller's mistakes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from commands import called

from stripedrag.errors import UsageError
from stripedrag.indexes.documents import Document
from stripedrag.indexes.index import Index
from stripedrag.rag.cli_index import _made
from stripedrag.rag.terminal import print_json
from stripedrag.weights import cache_dir

SCRIPT = Path(sys.executable).with_name("stripedrag")


def test_help_imports_nothing_heavy():
    shown = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown == called("--help").stdout
    program = (
        "import sys, stripedrag.eval.cli; print({'torch', 'transformers', 'faiss', 'llama_index'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


@pytest.mark.parametrize(
    "command",
    ["setup", "index", "delete", "compact", "verify", "quantize", "ask", "warm", "retrieve", "doctor", "bench"],
)
def test_every_command_has_help(command):
    result = called(command, "--help")
    assert result.returncode == 0
    assert "Usage: stripedrag" in result.stdout


def test_index_then_ask_then_retrieve(tmp_path, articles, tiny_folder):
    corpus, index = tmp_path / "corpus", tmp_path / "index"
    corpus.mkdir()
    (corpus / "oxygen.txt").write_text((articles / "Oxygen.txt").read_text())
    (corpus / "blank.txt").write_text(" \n")
    lines = [{"id": "w", "title": "Warsaw", "text": "Warsaw is the capital of Poland."}]
    (corpus / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))

    result = called("index", corpus, "--to", index, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["added"], report["documents"]) == (2, 2)
    assert "blank.txt" in report["skipped"][0]["path"]
    assert "skipped" in result.stderr

    refused = called("index", corpus, "--to", index, "--chunk-tokens", 128)
    assert refused.returncode == 2
    assert "is an index of 64 wordpieces a chunk and keeps them" in " ".join(refused.stderr.split())
    again = called("index", corpus, "--to", index)
    assert "(0 added, 0 updated, 2 unchanged)" in again.stdout

    result = called(
        "ask", index, "What is the capital of Poland?", "--model", tiny_folder, "--context-tokens", 600, "--json"
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["usage"]["prompt_tokens"] <= 600
    assert any(span["doc_id"] == "w" for span in answer["context"]["spans"])

    shown = called("ask", index, "What is the capital of Poland?", "--model", tiny_folder, "--answer-tokens", 8)
    assert shown.returncode == 0, shown.stderr
    for word in ("passages", "tokens", "seconds", "retrieval", "prefill", "decoding"):
        assert word in shown.stdout

    prompt = tmp_path / "mine.toml"
    prompt.write_text('passage = "{text} "\nquestion = "Q: {question}"')
    options = ("--model", tiny_folder, "--answer-tokens", 8, "--prompt-file", prompt, "--context-tokens", "auto")
    options = (*options, "--temperature", 1, "--seed", 3)
    whole = json.loads(called("ask", index, "What is the capital of Poland?", *options, "--json").stdout)
    assert "Q: What is the capital of Poland?" in whole["prompt"]
    assert (whole["usage"]["context_tokens"], whole["usage"]["limited_by"]) == (4096, "window")
    ended = called("ask", index, "What is the capital of Poland?", *options, "--stop", whole["text"][3:6])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(whole["text"][:3].strip())
    assert whole["text"] not in ended.stdout and "of 4096 (the window)" in ended.stdout

    refused = called("ask", index, "What is the capital of Poland?", "--model", tiny_folder, "--refuse-above", "1e-9")
    assert refused.returncode == 0, refused.stderr
    assert refused.stdout.startswith("not in the documents\n\n  (by the model: the passages below lack the answer")
    assert "[1]" not in refused.stdout

    small = tmp_path / "small"
    made = called("quantize", tiny_folder, "--to", small, "--as", "int4", "--json")
    assert made.returncode == 0, made.stderr
    assert (
        0 <= sum(file.stat().st_size for file in small.glob("*.safetensors")) - json.loads(made.stdout)["bytes"] < 2e4
    )
    assert json.loads((small / "config.json").read_text())["quantization_config"]["bits"] == 4
    ask = "ask", index, "What is the capital of Poland?", "--answer-tokens", 8, "--json"
    texts = [
        json.loads(called(*ask, *options).stdout)["text"]
        for options in (("--model", small), ("--model", tiny_folder, "--quantize", "int4"))
    ]
    assert texts[0] == texts[1]
    for wrong, message in (
        (("quantize", tiny_folder, "--to", small), "is there already; name a folder that is not"),
        ((*ask, "--model", small, "--quantize", "int8"), "are quantized already; load it without int8"),
        ((*ask, "--model", tiny_folder, "--quantize", "int2"), "quantize is 'int2'; weights can be int8 or int4"),
    ):
        refused = called(*wrong)
        assert refused.returncode == 2 and message in refused.stderr

    result = called("retrieve", index, "capital of Poland", "--budget-tokens", 100, "--json")
    context = json.loads(result.stdout)
    assert context["spans"][0]["text"] == "Warsaw is the capital of Poland."
    assert context["tokens"] <= 100
    assert "1 spans" in called("retrieve", index, "capital of Poland", "--budget-tokens", 10).stdout


def test_a_document_that_was_warmed_is_not_read_again(index_path, tiny_folder, tmp_path):
    (tmp_path / "carriers").symlink_to(cache_dir() / "carriers")
    here = {"env": {"STRIPEDRAG_CACHE": str(tmp_path)}}
    common = ("--model", tiny_folder, "--context", "Oxygen.txt", "--context-tokens", 800, "--json")
    cold = called("ask", index_path, "Who found it?", *common, **here)
    assert cold.returncode == 0, cold.stderr
    assert not (tmp_path / "contexts").exists(), "asking writes nothing"
    warmed = called("warm", index_path, *common, **here)
    assert warmed.returncode == 0, warmed.stderr
    warm = called("ask", index_path, "Who found it?", *common, **here)
    before, after, read = (json.loads(result.stdout) for result in (cold, warm, warmed))
    assert (before["usage"]["reused_tokens"], after["usage"]["reused_tokens"]) == (0, read["tokens"])
    assert before["text"] == after["text"] and before["context"] == after["context"] and read["dropped"] > 0
    shown = called("warm", index_path, *common[:-1], **here)
    assert f"{read['tokens']:,} tokens of 1 documents" in shown.stdout and str(tmp_path / "contexts") in shown.stdout
    long = "Who found it? " * 60
    asked = called("ask", index_path, long, *common, "--answer-tokens", 4, **here)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["context"]["dropped"]
    refused = called("warm", index_path, "--model", tiny_folder, **here)
    assert refused.returncode == 2 and "no --context: name one document" in refused.stderr
    refused = called("warm", index_path, "--model", tiny_folder, "--context", "Radon", **here)
    assert refused.returncode == 2 and "Radon" in refused.stderr


@pytest.mark.weights
def test_an_answer_is_written_as_it_comes_with_its_footnotes_and_ctrl_c_ends_it(tmp_path, corpus):
    index = tmp_path / "index"
    assert called("index", corpus, "--to", index).returncode == 0
    question = ("ask", index, "When was the Warsaw Uprising?", "--context-tokens", 700)
    answered = called(*question)
    text, _, notes = answered.stdout.partition("\n\n")
    assert "1944" in text and text.endswith(" [1]")
    assert notes.startswith("  [1] Warsaw.txt ")
    assert "reading: " in answered.stderr

    program = [SCRIPT, *map(str, question[:-1]), "4000", "--temperature", "2", "--answer-tokens", "3000"]
    default = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    program = [sys.executable, "-c", default, *program]  # what a shell runs in the background does not hear it
    asking = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert asking.stdout.read(1), "a piece came"
    asking.send_signal(signal.SIGINT)
    out, told = asking.communicate(timeout=60)
    assert asking.returncode == 130
    assert "Traceback" not in out + told
    assert called(*question).stdout.partition("\n\n")[0] == text


def test_an_index_is_looked_after(tmp_path):
    lines = [
        {"id": name, "title": "", "text": f"The lighthouse of {name} was built in {year}.", "year": year}
        for name, year in (("veyrac", 1862), ("orlat", 1901), ("dunmore", 1990))
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    index = tmp_path / "index"
    assert called("index", tmp_path / "l.jsonl", "--to", index).returncode == 0

    found = called("retrieve", index, "Which lighthouse?", "--where", '{"year": {"$gte": 1900}}', "--json")
    assert {span["doc_id"] for span in json.loads(found.stdout)["spans"]} == {"orlat", "dunmore"}
    for where, told in (("year", "--where is 'year', which is no JSON"), ("[1]", "it must be a JSON object")):
        refused = called("retrieve", index, "Which?", "--where", where)
        assert refused.returncode == 2 and told in " ".join(refused.stderr.split())

    missing = called("delete", index, "veyrac", "atlantis")
    assert missing.returncode == 2 and "nothing was deleted" in missing.stderr
    assert json.loads(called("delete", index, "veyrac", "--json").stdout) == {"deleted": 1, "documents": 2}
    assert {"bytes_before", "bytes_after"} == json.loads(called("compact", index, "--json").stdout).keys()
    sound = called("verify", index)
    assert sound.returncode == 0 and "2 documents, 2 passages, 2 chunks" in sound.stdout

    database = sqlite3.connect(index / "index.sqlite")
    with database:
        database.execute("UPDATE documents SET title = 'another'")
    database.close()
    faulty = called("verify", index)
    assert faulty.returncode == 1
    assert "document 'orlat' is not what was added" in faulty.stdout and "has faults" in faulty.stderr


def test_doctor_reports_one_object():
    report = json.loads(called("doctor", "--json").stdout)
    assert report["kernel backends on cpu"]["torch"] == "runs"
    assert {"machine", "weights", "packages"} <= report.keys()
    assert list(report["baselines"]) == ["at hand"]
    assert "fast dtype" in called("doctor").stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("ask", "nowhere", "why?"), "nowhere"),
        (("retrieve", "nowhere", "why?"), "nowhere"),
        (("index", "nowhere", "--to", "x"), "No such file or directory"),
        (
            ("bench", "nothing"),
            "no bench 'nothing'; there is attention, context, decode, embed, filter, generate, layer, load, loss, "
            "memory, prefill, quantize",
        ),
        (("bench", "generate", "--repeats", "0"), "repeats is 0; it is at least 1"),
        (("index", sys.executable, "--to", f"{__file__}/x"), "cannot read"),
        (("index", __file__, "--to", "x", "--chunk-tokens", "300"), "chunk_tokens is 300; a passage has 254"),
        (("index", __file__, "--to", "x", "--embedder", "x" * 300), "cannot be looked up: File name too long"),
        (("index", __file__, "--to", ""), "'' is no place for an index: it is empty. Give the path of a folder."),
        (("index", __file__, "--to", "x", "--embedder", ""), "the embedder's name is empty; give a folder, an id"),
        (("retrieve", "x" * 300, "why?"), "File name too long. Check the path and its permissions."),
        (("ask",), "Missing argument"),
        (("frobnicate",), "No such command"),
        (("ask", "x", "y", "--policy", "best"), "'best' is not one of"),
        (
            ("ask", "x", "y", "--context-tokens", "10k"),
            "--context-tokens is '10k'; it is a number of tokens, or 'auto'",
        ),
    ],
)
def test_a_callers_mistake_is_one_message_on_stderr_and_exit_code_2(arguments, message, tmp_path):
    result = called(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "where,message",
    [
        ('{"year": 1, "year": 2}', "--where is '{\"year\": 1, \"year\": 2}', which is no JSON ('year' comes twice)"),
        ("[" * 50_000, "which is no JSON (maximum recursion depth exceeded"),
        ("[1]", "--where is '[1]'; it must be a JSON object."),
    ],
)
def test_a_filter_that_is_none_is_told(where, message, index_path):
    result = called("retrieve", index_path, "why?", "--where", where)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert message in " ".join(result.stderr.split())


def test_an_index_whose_creation_was_killed_is_made(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.sqlite").touch()
    (tmp_path / "a.txt").write_text("The ferry sails at nine.")
    assert called("index", tmp_path / "a.txt", "--to", tmp_path / "index").returncode == 0


def test_a_budget_of_any_size_is_one(index_path):
    assert called("retrieve", index_path, "why?", "--budget-tokens", "1" + "0" * 400).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_told(index_path):
    with Path("/dev/full").open("w") as full:
        command = [SCRIPT, "retrieve", index_path, "why?"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "error: what the command prints cannot be written: no space is left there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_that_is_not_utf8_is_printed_as_json(capsys):
    print_json({"path": "caf\udce9"})
    assert json.loads(capsys.readouterr().out.encode()) == {"path": "caf\udce9"}


def test_a_document_does_not_command_the_terminal(tmp_path):
    with Index.create(tmp_path / "i") as index:
        index.add([Document("a\x1b[2J", "", "Cats\x1b]0;owned\x07 sleep\r\nall\tday \x9b31m long.")])
    done = called("retrieve", tmp_path / "i", "cats")
    assert done.returncode == 0
    assert "Cats ]0;owned  sleep \nall\tday  31m long." in done.stdout
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(done.stdout)


def test_an_index_that_appears_while_the_documents_are_read_is_added_to(tmp_path):
    Index.create(tmp_path / "i").close()
    with _made(str(tmp_path / "i"), None, None) as made:
        assert made.document_count == 0
    with pytest.raises(
        UsageError, match="is an index of 64 wordpieces a chunk and keeps them; leave --chunk-tokens out"
    ):
        _made(str(tmp_path / "i"), None, 40)
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="the folder is not empty"):
        _made(str(tmp_path / "j"), None, None)


def test_questions_of_the_command_line_are_checked_before_the_model_is_loaded(index_path):
    result = called("ask", index_path, "why?", "--temperature", "-1")
    assert result.returncode == 2
    assert result.stderr.strip().endswith("error: temperature is -1.0; it is 0 (greedy) or more")


def test_weights_that_are_missing_name_the_command_that_gets_them(index_path, tmp_path):
    result = called("ask", index_path, "why?", env=os.environ | {"STRIPEDRAG_CACHE": str(tmp_path)})
    assert result.returncode == 2
    assert "Run `stripedrag setup`" in result.stderr
