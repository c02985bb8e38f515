"""What the commands write on a terminal: results on stdout, everything else on stderr, nothing that commands it."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from stripedrag.rag.answer import Answer
    from stripedrag.rag.packing import Context

err = Console(stderr=True, highlight=False)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends


def harmless(text: str) -> str:
    """What a document or a file's name says, with a space for each character that would command the terminal."""
    return _CONTROL.sub(" ", text)


def left_out(context: "Context") -> str:
    """How many chunks a context leaves out, and why."""
    repeats = sum(dropped.reason == "repeat" for dropped in context.dropped)
    return f"{len(context.dropped) - repeats} chunks did not fit, {repeats} repeat others"


def print_answer(answer: "Answer") -> None:
    """What comes after an answer's text."""
    usage, timings = answer.usage, answer.timings
    if not answer.text:
        typer.echo("(the model gave no text)", nl=False)
    marks = "".join(f" [{number}]" for number in range(1, len(answer.citations) + 1))
    typer.echo(f"{marks}\n")
    for number, citation in enumerate(answer.citations, start=1):
        quote = " ".join(citation.quote.split())
        typer.echo(harmless(f"  [{number}] {citation.doc_id} {citation.start}:{citation.end}  “{quote}”"))
    if not answer.found:
        typer.echo("  (by the model: the passages below lack the answer; ask for more with --context-tokens)")
    elif not answer.citations:
        typer.echo("  (no sentence holds words of both the question and this answer: check it against the passages)")
    typer.echo("\npassages, as the model read them")
    for span in answer.context.spans:
        opening = " ".join(span.text.split())
        shown = opening if len(opening) <= 72 else opening[:71] + "…"
        typer.echo(harmless(f"  {span.doc_id} {span.start}:{span.end}  {span.score:.3f}  {shown}"))
    reused = f", {usage.reused_tokens} read before" if usage.reused_tokens else ""
    limit = {"asked": "", "window": " (the window)", "memory": " (the free memory)"}[usage.limited_by]
    prefill_rate = (usage.prompt_tokens - usage.reused_tokens) / timings.prefill_s
    decode_rate = usage.answer_tokens / timings.decode_s if timings.decode_s else 0.0  # a refusal is not decoded
    typer.echo(
        f"\ntokens   {usage.prompt_tokens} prompt ({usage.passage_tokens} in passages{reused}) + "
        f"{usage.answer_tokens} answer of {usage.context_tokens}{limit}; {left_out(answer.context)}\n"
        f"seconds  {timings.retrieval_s:.2f} retrieval, {timings.prefill_s:.2f} prefill ({prefill_rate:.0f} tokens/s), "
        f"{timings.decode_s:.2f} decoding ({decode_rate:.1f} tokens/s)\n"
        f"cache    {answer.cache_bytes / 1e6:.1f} MB    model {answer.model}    "
        f"{'the answer was cut at its limit' if answer.finish == 'length' else 'the model ended its answer'}"
    )


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    text = re.sub(
        r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False, indent=2)
    )
    typer.echo(text.encode(errors="backslashreplace").decode())  # of a path whose name is not UTF-8


@contextmanager
def spinner(message: str) -> Iterator[Any]:
    """Tell on stderr what takes time: a spinner on a terminal, plain lines elsewhere."""
    if not err.is_terminal:
        yield lambda text: err.print(text, markup=False)
        return
    with err.status(message) as status:
        yield status.update


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of what a command says; a long conversion keeps its bar.

    Warnings are told in a line, without the code that warns.
    """
    warnings.showwarning = _tell
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _tell(message: Warning | str, *_: object, **__: object) -> None:
    err.print(f"warning: {message}", markup=False, soft_wrap=True)
