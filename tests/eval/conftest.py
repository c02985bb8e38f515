"""A tiny evaluation: our own data files, a tiny random StripedHyena in a folder, and a suite over both."""

import json

import pytest
from transformers import AutoTokenizer

from stripedrag.eval.suite import parse_suite
from stripedrag.model.smollm2 import STRIPED, prepared_dir
from tiny_striped import tiny_striped

STUBS = [{"kind": "stub", "name": name} for name in ("oracle", "empty", "echo", "chance")]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A haystack, a corpus with questions, long documents and judged queries, by the names of the tasks' fields."""
    folder = tmp_path_factory.mktemp("data")
    sentences = [f"On day {n} the crew of ship {n % 7} mended sails and counted barrels of water." for n in range(900)]
    chapters = [
        {"id": f"c{n}", "book": "author_the-log-book", "text": " ".join(sentences[n : n + 300])} for n in (0, 300, 600)
    ]
    documents, questions = [], []
    for n, (city, river, year) in enumerate(
        [("Arnsdorf", "Leda", 1811), ("Bellmere", "Tarn", 1822), ("Calverton", "Oste", 1833), ("Dunholm", "Isar", 1844)]
    ):
        text = f"{city} lies on the river {river}. Its bridge was opened in {year}. Trade grew slowly after that."
        documents.append({"id": f"d{n}", "title": city, "text": text, "source": "ours"})
        start = text.index(str(year))
        questions.append(
            {
                "id": f"q{n}",
                "question": f"When was the bridge of {city} opened?",
                "answers": [str(year)],
                "gold_spans": [{"doc_id": f"d{n}", "start": start, "end": start + 4}],
                "gold_passages": [{"doc_id": f"d{n}", "start": 0, "end": len(text)}],
                "split": "dev",
            }
        )
    others = [
        {"id": f"x{n}", "title": f"Note {n}", "text": f"Note {n} is about sheep, wool and markets."} for n in range(6)
    ]
    end = "In the end the lamp went out for good."
    story = "The keeper climbed the tower each night. " * 60 + end
    evidence = [{"start": len(story) - len(end), "end": len(story)}]
    ask = {"query": "How does it end?", "references": ["The lamp goes out."], "evidence": evidence}
    return {
        "haystack": write_lines(folder / "novels.jsonl", chapters),
        "corpus": write_lines(folder / "corpus.jsonl", documents + others),
        "questions": write_lines(folder / "questions.jsonl", questions),
        "documents": write_lines(
            folder / "documents.jsonl",
            [
                {
                    "id": f"s{n}",
                    "title": f"Story {n}",
                    "document": story,
                    "source": "ours",
                    "tasks": [{"id": f"s{n}-1", **ask}],
                }
                for n in range(2)
            ],
        ),
        "queries": write_lines(
            folder / "queries.jsonl",
            [{"id": f"k{n}", "query": q["question"], "qrels": {f"d{n}": 1}} for n, q in enumerate(questions)],
        ),
    }


@pytest.fixture(scope="session")
def tasks(files):
    """One declaration of every kind of task, and of every variant."""
    hay = {"haystack": files["haystack"]}
    corpus = {"corpus": files["corpus"], "questions": files["questions"]}
    planted = {**hay, "lengths": [384], "samples": 1}
    needle = {"kind": "needle", **planted}
    return [
        {**needle, "name": "needle", "lengths": [256, 384], "depths": [0.0, 0.5, 1.0], "samples": 2},
        *({**needle, "name": v, "variant": v, "depths": [0.5]} for v in ("multi-key", "multi-value", "multi-query")),
        {"kind": "no_overlap", "name": "no-overlap", **planted, "depths": [0.5]},
        {"kind": "tracking", "name": "tracking", **planted},
        {"kind": "multi_hop", "name": "multi-hop", **planted},
        {"kind": "words", "name": "common", **planted},
        {"kind": "words", "name": "frequent", "variant": "frequent", **planted},
        {
            "kind": "rag",
            "name": "answers",
            **corpus,
            "samples": 4,
            "contexts": ["fill", "top-5", "top-20", "reranked-5", "oracle", "random", "none"],
            "budgets": [256, 512],
        },
        {"kind": "recall", "name": "recall", **hay, "lengths": [384, 448], "samples": 2, "facts": 3},
        {
            "kind": "shared_context",
            "name": "shared",
            **corpus,
            "samples": 4,
            "together": 1,
            "budgets": [256, 512],
        },
        {"kind": "unanswerable", "name": "unanswerable", **corpus, "samples": 2, "budget_tokens": 256},
        {
            "kind": "long_documents",
            "name": "long",
            "documents": files["documents"],
            "contexts": ["fill", "top-5", "reranked-5", "oracle", "head", "none"],
            "budgets": [360, 384],
            "samples": 2,
            "answer_tokens": 16,
        },
        {"kind": "retrieval", "name": "retrieval", **corpus, "samples": 4, "budgets": [64, 256], "tops": [1, 5]},
        {
            "kind": "judged_retrieval",
            "name": "judged",
            "corpus": files["corpus"],
            "queries": files["queries"],
            "split": None,
        },
        {"kind": "perplexity", "name": "perplexity", **hay, "positions": [64, 128, 256], "samples": 2},
        {"kind": "cost", "name": "cost", **hay, "lengths": [128, 256], "repeats": 1, "decode_tokens": 4},
    ]


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A random StripedHyena under the default model's tokenizer, saved as a model folder."""
    tokenizer = AutoTokenizer.from_pretrained(prepared_dir(STRIPED))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_striped(tokenizer, window_tokens=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def suite(tasks, tiny_model_folder):
    """Every task by every kind of system."""
    model = {"kind": "model", "name": "tiny", "model": str(tiny_model_folder), "dtype": "float32", "device": "cpu"}
    return parse_suite(
        {
            "name": "all",
            "title": "every task",
            "systems": [model, {"kind": "retriever", "name": "retriever"}, *STUBS],
            "tasks": tasks,
            "headline": [
                {"label": "F1", "task": "answers", "cell": {"context": "fill", "budget_tokens": 256}},
                {"label": "needle", "task": "needle", "cell": {"length_tokens": 256}},
            ],
            "families": [
                {
                    "name": "contexts",
                    "contrasts": [
                        {
                            "label": "fill or none",
                            "task": "answers",
                            "system": "oracle",
                            "cell": {"context": "fill", "budget_tokens": 256},
                            "against_cell": {"context": "none"},
                        },
                        {
                            "label": "oracle or chance",
                            "task": "answers",
                            "system": "oracle",
                            "against": "chance",
                            "cell": {"context": "fill", "budget_tokens": 256},
                        },
                    ],
                }
            ],
        },
        name="all",
    )
