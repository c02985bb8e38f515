"""A stream of questions, document after document, each with a context of its own: what was read before, how soon
answers begin, and how good they are, with contexts that begin alike and are kept, against the same contexts read whole
and against contexts that share nothing.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track

from stripedrag.eval.bench.recall import CORPUS, CachingEmbedder, cached_index
from stripedrag.eval.bench.recall import QUESTIONS as ASKED
from stripedrag.eval.bench.report import Report, machine
from stripedrag.eval.data_formats import CorpusQuestion
from stripedrag.eval.metrics import token_f1
from stripedrag.eval.places import holds
from stripedrag.eval.tasks.corpus import stretches
from stripedrag.jsonl import read_lines
from stripedrag.model.smollm2 import STRIPED
from stripedrag.rag.defaults import SHARED
from stripedrag.rag.packing import Context
from stripedrag.rag.pipeline import Pipeline

CONTEXT_TOKENS = 8192
ANSWER_TOKENS = 32
QUESTIONS = 200
EVERY = 10  # of the questions is asked with nothing kept, too, and every other with a context that shares nothing


def run(repeats: int, corpus: Path = CORPUS, questions: Path = ASKED) -> Report:
    """Seconds to the first token of each question, kept and not, the share of prompt tokens that was read before, and
    the answers' F1 and the share of questions whose evidence is in the context, beside those of contexts that share
    nothing. A repetition is the whole stream, from nothing kept; answers are those of the first.
    """
    asked = _stream(questions)
    with cached_index(corpus, CachingEmbedder()) as index:
        kept = Pipeline.open(index)
        plain = Pipeline(index, kept.model, kept.tokenizer, model_name=STRIPED)
        alone = Pipeline(index, kept.model, kept.tokenizer, model_name=STRIPED)
        alone.retriever = kept.retriever  # the same contexts
        rows = [row for _ in range(repeats) for row in _pass(kept, alone, asked)]
        answers = [
            {"shared": row["f1"], "alone": _answer(plain, question)["f1"]}
            for row, question in zip(rows[: len(asked) : 2], _tracked(asked[::2]), strict=True)
        ]
        found = {
            name: [_found(pipeline.context_for(question.question, CONTEXT_TOKENS), question) for question in asked]
            for name, pipeline in (("shared", kept), ("alone", plain))
        }
    figures: dict[str, Any] = {
        "bench": "stream",
        "machine": machine(),
        "repeats": repeats,
        "context_tokens": CONTEXT_TOKENS,
        "shared": SHARED,
        "questions": [question.id for question in asked],
        "rows": rows,
        "answers_f1": answers,
        "evidence_in": found,
    }
    return Report(figures, _table(figures))


def _stream(questions: Path) -> list[CorpusQuestion]:
    """The questions of the split that is for choosing, document after document in the order of the file."""
    by_document: dict[str, list[CorpusQuestion]] = {}
    for question in read_lines(questions, CorpusQuestion):
        if question.split == "dev":
            by_document.setdefault(question.gold_spans[0].doc_id, []).append(question)
    return [question for group in by_document.values() for question in group][:QUESTIONS]


def _pass(kept: Pipeline, alone: Pipeline, asked: list[CorpusQuestion]) -> list[dict[str, float]]:
    assert kept.contexts is not None
    kept.contexts.clear()
    rows = []
    for place, question in enumerate(_tracked(asked)):
        row = _answer(kept, question)
        if place % EVERY == EVERY // 2:
            row["alone_s"] = _answer(alone, question)["first_s"]
        rows.append(row)
    return rows


def _tracked(asked: list[CorpusQuestion]) -> Iterable[CorpusQuestion]:
    return track(asked, "asking", console=Console(stderr=True))


def _answer(pipeline: Pipeline, question: CorpusQuestion) -> dict[str, float]:
    """Seconds from the question to the first piece of its answer, retrieval and all, and what it came to."""
    start = time.perf_counter()
    stream = pipeline.stream(question.question, CONTEXT_TOKENS, answer_tokens=ANSWER_TOKENS)
    pieces = iter(stream)
    next(pieces, None)
    seconds = time.perf_counter() - start
    for _ in pieces:
        pass
    usage = stream.answer.usage
    f1 = token_f1(stream.answer.text, question.answers)
    return {"first_s": seconds, "f1": f1, "reused_tokens": usage.reused_tokens, "prompt_tokens": usage.prompt_tokens}


def _found(context: Context, question: CorpusQuestion) -> bool:
    """Whether all evidence is in the context."""
    return holds(context.spans, stretches(question.gold_spans)) is True


def _table(figures: dict[str, Any]) -> str:
    here, rows = figures["machine"], figures["rows"]
    timed = [row for row in rows if "alone_s" in row]
    kept, same, alone = (
        fmean(row["first_s"] for row in rows),
        fmean(row["first_s"] for row in timed),
        fmean(row["alone_s"] for row in timed),
    )
    reused = sum(row["reused_tokens"] for row in rows) / sum(row["prompt_tokens"] for row in rows)
    recall = {name: fmean(found) for name, found in figures["evidence_in"].items()}
    f1 = {name: fmean(one[name] for one in figures["answers_f1"]) for name in ("shared", "alone")}
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['default_dtype']}, "
        f"torch {here['torch']}, {here['commit']}",
        f"{STRIPED}, {len(figures['questions'])} questions document after document",
        f"{figures['context_tokens']} tokens, of which up to {figures['shared']:.2f} are shared",
        "",
        f"prompt tokens that were read before    {reused:>8.1%}",
        f"to the first token, mean               {kept:>8.2f} s  {alone / kept:>6.2f}x",
        f"  of every {EVERY}th question              {same:>8.2f} s",
        f"  of the same with nothing kept        {alone:>8.2f} s  {alone / same:>6.2f}x",
        f"evidence in the context                {recall['shared']:>8.1%}",
        f"  in contexts that share nothing       {recall['alone']:>8.1%}",
        f"F1 of {len(figures['answers_f1'])} answers                    {f1['shared']:>8.3f}",
        f"  from contexts that share nothing     {f1['alone']:>8.3f}",
        "",
        f"Means of {figures['repeats']} passes; a question with nothing kept comes right after the same one kept. All",
        f"contexts are as long, so every {EVERY}th with nothing kept stands for all.",
    ]
    return "\n".join(lines)
