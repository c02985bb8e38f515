"""What keeping a read context is worth: the second question, many questions, and the bytes beside a transformer's."""

import tempfile
import time
from pathlib import Path
from typing import Any

from stripedrag.eval.bench.report import Report, machine, medians
from stripedrag.indexes.index import Index
from stripedrag.indexes.readers import read_documents
from stripedrag.model.smollm2 import BASELINE, STRIPED
from stripedrag.rag.context_cache import ContextCache
from stripedrag.rag.context_files import ContextFiles
from stripedrag.rag.packing import Context
from stripedrag.rag.pipeline import Pipeline

CONTEXT_TOKENS = 8192
ANSWER_TOKENS = 32
MANY = 50
ALONE = 3  # of the many that are asked alone in a repetition; all would take minutes each
CORPUS = Path(__file__).parents[1] / "data" / "xquad"


def run(repeats: int) -> Report:
    """Seconds to the first token of a first and a second question over one context, in memory and from disk; of many
    questions together and each alone; the share of an answer's time outside the models; bytes of a context's files.
    """
    with tempfile.TemporaryDirectory() as folder, Index.create(Path(folder) / "index") as index:
        index.add(read_documents(CORPUS))
        pipeline = Pipeline.open(index)
        context = pipeline.context_of(index.document_ids(), CONTEXT_TOKENS, answer_tokens=ANSWER_TOKENS)
        files = ContextFiles(Path(folder) / "contexts")
        rows = [_round(pipeline, context, files, number) for number in range(repeats + 1)]
        many = _questions(context, MANY)
        figures: dict[str, Any] = {
            "bench": "context",
            "machine": machine(),
            "repeats": repeats,
            "context_tokens": CONTEXT_TOKENS,
            "questions": len(many),
            "asked_alone": ALONE,
            "seconds": {key: [row[key] for row in rows[1:]] for key in rows[0]},  # the first round does not count
            "file_bytes": files.size_bytes(),
            "transformer_file_bytes": _bytes_of(BASELINE, index, context, Path(folder) / "other"),
        }
    return Report(figures, _table(figures))


def _round(pipeline: Pipeline, context: Context, files: ContextFiles, number: int) -> dict[str, float]:
    """One of each, in turn."""
    questions = _questions(context, MANY)
    one, other = questions[2 * number % MANY], questions[(2 * number + 1) % MANY]
    pipeline.contexts = ContextCache(pipeline.model, files=files if number == 0 else None)
    seconds = {"first": _first_token_s(pipeline, context, one), "second": _first_token_s(pipeline, context, other)}
    pipeline.contexts = ContextCache(pipeline.model, files=files)
    seconds["from_disk"] = _first_token_s(pipeline, context, other)

    pipeline.contexts = ContextCache(pipeline.model)
    start = time.perf_counter()
    pipeline.ask_many(questions, context=context, answer_tokens=ANSWER_TOKENS)
    seconds["together"] = time.perf_counter() - start
    pipeline.contexts = None
    start = time.perf_counter()
    for question in (2 * questions)[number % MANY :][:ALONE]:
        pipeline.ask(question, context=context, answer_tokens=ANSWER_TOKENS)
    seconds["alone"] = (time.perf_counter() - start) / ALONE * len(questions)

    start = time.perf_counter()
    answer = pipeline.ask(one, CONTEXT_TOKENS, answer_tokens=ANSWER_TOKENS)
    seconds["answer"] = time.perf_counter() - start
    start = time.perf_counter()
    pipeline.index.embedder.embed_query(one)  # type: ignore[attr-defined]
    encoder = time.perf_counter() - start
    seconds["outside_models"] = seconds["answer"] - answer.timings.prefill_s - answer.timings.decode_s - encoder
    return seconds


def _first_token_s(pipeline: Pipeline, context: Context, question: str) -> float:
    start = time.perf_counter()
    next(iter(pipeline.stream(question, context=context, answer_tokens=ANSWER_TOKENS)))
    return time.perf_counter() - start


def _questions(context: Context, number: int) -> list[str]:
    """Questions of several lengths on what the context says; their answers are not looked at."""
    titles = [span.title for span in context.spans]
    forms = ("What is said of {0}?", "When did {0} begin, and where?", "Who is named in the article on {0}, and why?")
    return [f"{forms[n % len(forms)].format(titles[n % len(titles)])} ({n})" for n in range(number)]


def _bytes_of(name: str, index: Index, context: Context, folder: Path) -> int:
    files = ContextFiles(folder)
    with Pipeline.open(index, model=name, context_files=files) as pipeline:
        pipeline.warm(context)
    return files.size_bytes()


def _table(figures: dict[str, Any]) -> str:
    here, seconds = figures["machine"], medians(figures["seconds"])
    many = figures["questions"]

    def times(slow: str, fast: str) -> str:
        return f"{seconds[slow] / seconds[fast]:>6.1f}x"

    striped, transformer = figures["file_bytes"], figures["transformer_file_bytes"]
    lines = [
        f"{here['processor']}, {here['threads']} threads, {here['default_dtype']}, "
        f"torch {here['torch']}, {here['commit']}",
        f"{STRIPED}, a context of {figures['context_tokens']} tokens",
        "",
        f"to the first token, first question     {seconds['first']:>9.2f} s",
        f"  second question, in memory           {seconds['second']:>9.2f} s  {times('first', 'second')}",
        f"  second question, from disk           {seconds['from_disk']:>9.2f} s  {times('first', 'from_disk')}",
        f"{many} questions together                {seconds['together']:>9.1f} s",
        f"  each alone, nothing kept             {seconds['alone']:>9.1f} s  {times('alone', 'together')}"
        f"  ({figures['asked_alone']} in a repetition, times {many}/{figures['asked_alone']})",
        f"an answer, retrieval and all           {seconds['answer']:>9.2f} s",
        f"  outside model and encoder            {seconds['outside_models']:>9.2f} s"
        f"  {seconds['outside_models'] / seconds['answer']:>6.1%}",
        f"files of the context                   {striped / 1e6:>9.1f} MB",
        f"  of {BASELINE:<28}{transformer / 1e6:>14.1f} MB  {striped / transformer:>6.2f}",
        "",
        f"Medians of {figures['repeats']}, in turn.",
    ]
    return "\n".join(lines)
