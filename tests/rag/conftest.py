"""A small index of real articles, and a tiny random StripedHyena under the default model's real tokenizer."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stripedrag.indexes import Index, read_documents
from stripedrag.model.generation import prefill
from stripedrag.model.smollm2 import STRIPED, prepared_dir
from stripedrag.rag import Pipeline
from tiny_striped import tiny_striped

ARTICLES = ("Oxygen", "Warsaw", "1973 oil crisis", "Genghis Khan")


@pytest.fixture(scope="session")
def articles():
    return Path(__file__).parents[2] / "eval" / "data" / "xquad"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, articles):
    folder = tmp_path_factory.mktemp("corpus")
    for name in ARTICLES:
        (folder / f"{name}.txt").write_text((articles / f"{name}.txt").read_text())
    return folder


@pytest.fixture(scope="session")
def index_path(tmp_path_factory, corpus):
    """Many small chunks, so that budgets have something to choose from."""
    path = tmp_path_factory.mktemp("index") / "articles"
    with Index.create(path, chunk_tokens=96) as index:
        index.add(read_documents(corpus))
    return path


@pytest.fixture(scope="session")
def index(index_path):
    with Index.open(index_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(prepared_dir(STRIPED))


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    return tiny_striped(tokenizer, window_tokens=4096)


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(index, tiny_model, tokenizer):
    return Pipeline(index, tiny_model, tokenizer, model_name="tiny")


@pytest.fixture
def interrupt(monkeypatch):
    """Have the n-th reading of a context cache interrupted, as by Ctrl-C; the next ones go on."""

    def at(number):
        calls = []

        def interrupted(*arguments, **options):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return prefill(*arguments, **options)

        monkeypatch.setattr("stripedrag.rag.context_cache.prefill", interrupted)

    return at


@pytest.fixture(scope="session")
def default_pipeline(tmp_path_factory, corpus):
    """All that is shipped: default chunks, default model."""
    path = tmp_path_factory.mktemp("default") / "articles"
    with Index.create(path) as index:
        index.add(read_documents(corpus))
        yield Pipeline.open(index)
