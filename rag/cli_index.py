"""The commands that make an index and look after it: index, delete, compact, verify. See `stripedrag.rag.cli`."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO, TYPE_CHECKING, Annotated

import typer

from stripedrag.errors import StoreError, UsageError
from stripedrag.rag.cli import IndexPlace, Json, app
from stripedrag.rag.terminal import err, harmless, print_json, quiet_libraries

if TYPE_CHECKING:
    from stripedrag.indexes.documents import Document
    from stripedrag.indexes.embedding import Embedder
    from stripedrag.indexes.index import Index

_MOST_SHOWN = 20  # of what was left out


@app.command()
def index(
    path: Annotated[
        Path, typer.Argument(help="A file or a folder: txt, md, html, pdf, docx, jsonl.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option("--to", help="The index, a folder or postgresql://…: made where it is missing, else added to."),
    ],
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Wordpieces in a chunk of a new index, the unit that a search finds; 64.")
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(help="For a new index: a sentence-transformers model: folder, hub id or .onnx file; else MiniLM."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Embed on so many workers of a Ray cluster (stripedrag[ray]); here where it is left out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Index documents. What is in the index already and has not changed costs nothing."""
    quiet_libraries()
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from stripedrag.indexes.documents import Document
    from stripedrag.indexes.embedding import MiniLMEmbedder, embedder_named
    from stripedrag.indexes.index import Index, planned
    from stripedrag.indexes.preparing import prepare
    from stripedrag.indexes.ray_workers import RayWorkers
    from stripedrag.indexes.readers import Skipped, read_documents

    preparing = prepare if workers is None else RayWorkers(workers)
    chosen = None if embedder is None else embedder_named(embedder)
    skipped: list[Skipped] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        there = stack.enter_context(Index.open(to, embedder=chosen)) if Index.is_at(to) else None
        if there is not None:
            _refuse_other_chunks(there, chunk_tokens, to)
        else:  # before all is read
            planned(chosen or MiniLMEmbedder(), chunk_tokens=chunk_tokens)
        bar = stack.enter_context(Progress(*columns, console=err, transient=True))
        # All is read before anything is embedded: what is wrong with the files shows early, and the bar has a length.
        read = stack.enter_context(TemporaryFile("w+", encoding="utf-8"))
        task = bar.add_task("reading", total=None)
        found = read_documents(path, skipped=skipped)
        chars = _keep(found, read, lambda number: bar.update(task, description=f"reading ({number} documents)"))
        for left_out in skipped[:_MOST_SHOWN]:
            err.print(harmless(f"skipped {left_out.path}: {left_out.reason}"), markup=False, soft_wrap=True)
        if len(skipped) > _MOST_SHOWN:
            err.print(f"and {len(skipped) - _MOST_SHOWN} more; --json tells them all", markup=False)
        target = there or stack.enter_context(_made(to, chosen, chunk_tokens))
        bar.reset(task, total=chars, description="indexing")
        embedded = 0

        def documents() -> Iterator[Document]:
            for line in read:
                document = Document(**json.loads(line))
                yield document
                bar.advance(task, len(document.text))

        def count(passages: int) -> None:
            nonlocal embedded
            embedded += passages
            bar.update(task, description=f"indexing ({embedded} passages embedded)")

        report = target.add(documents(), progress=count, prepare=preparing)
        total_documents, total_chunks = target.document_count, len(target)
    if as_json:
        fields = dataclasses.asdict(report) | {"documents": total_documents, "total_chunks": total_chunks}
        fields["skipped"] = [{"path": str(s.path), "reason": s.reason} for s in skipped]
        print_json(fields)
    else:
        typer.echo(
            f"{_shown(to)}: {total_documents} documents, {total_chunks} chunks "
            f"({report.added} added, {report.updated} updated, {report.unchanged} unchanged)"
        )


def _made(place: str, embedder: "Embedder | None", chunk_tokens: int | None) -> "Index":
    """A new index, or that which another process has made there since this one began to read."""
    from stripedrag.indexes.index import Index

    try:
        return Index.create(place, embedder=embedder, chunk_tokens=chunk_tokens)
    except UsageError:
        if not Index.is_at(place):
            raise
    with ExitStack() as unless_well:
        made = unless_well.enter_context(Index.open(place, embedder=embedder))
        _refuse_other_chunks(made, chunk_tokens, place)
        unless_well.pop_all()
    return made


def _refuse_other_chunks(index: "Index", chunk_tokens: int | None, place: str) -> None:
    if chunk_tokens not in (None, index.chunk_tokens):
        raise UsageError(
            f"{_shown(place)} is an index of {index.chunk_tokens} wordpieces a chunk and keeps them; leave "
            "--chunk-tokens out"
        )


def _shown(place: str) -> str:
    """The place as it was written, without a password."""
    from stripedrag.indexes.postgres_server import Address, is_postgres

    return Address.parse(place).shown if is_postgres(place) else place


def _keep(documents: "Iterable[Document]", file: IO[str], tell: Callable[[int], None]) -> int:
    """Writes documents into `file`, one JSON object a line, and goes back to its beginning; returns their characters.

    `tell` hears how many there are so far. Raises `StoreError` where the disk is full.
    """
    chars = 0
    for number, document in enumerate(documents, start=1):
        with _written_here():
            file.write(json.dumps(dataclasses.asdict(document)) + "\n")
        chars += len(document.text)
        tell(number)
    with _written_here():
        file.seek(0)
    return chars


@contextmanager
def _written_here() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{gettempdir()}, where documents wait until all are read, takes no more: {error.strerror}. Free some, "
            f"or set TMPDIR to a folder that has more."
        ) from error


@app.command()
def delete(
    index: IndexPlace,
    doc_ids: Annotated[list[str], typer.Argument(help="The ids of documents.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Delete documents from an index: all of those named, or none where one is not there."""
    from stripedrag.indexes.index import Index

    with Index.open(index) as opened:
        deleted = opened.delete(doc_ids)
        left = opened.document_count
    if as_json:
        print_json({"deleted": deleted, "documents": left})
    else:
        typer.echo(f"{_shown(index)}: {deleted} documents deleted, {left} left; `stripedrag compact` frees their space")


@app.command()
def compact(index: IndexPlace, as_json: Json = False) -> None:
    """Give the space of deleted and replaced documents back to the disk."""
    from stripedrag.indexes.index import Index

    with Index.open(index) as opened:
        before = opened.size_bytes
        opened.compact()
        after = opened.size_bytes
    if as_json:
        print_json({"bytes_before": before, "bytes_after": after})
    else:
        typer.echo(f"{_shown(index)}: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now")


@app.command()
def verify(index: IndexPlace, as_json: Json = False) -> None:
    """Read an index whole and tell what is not as it was written; exits with 1 where something is not."""
    from rich.progress import Progress

    from stripedrag.indexes.index import Index

    with Index.open(index) as opened, Progress(console=err, transient=True) as bar:
        task = bar.add_task("reading", total=opened.document_count)
        report = opened.verify(progress=lambda documents: bar.advance(task, documents))
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        typer.echo(f"{_shown(index)}: {report.documents} documents, {report.passages} passages, {report.chunks} chunks")
        for told in (*report.faults, *(f"not read: {part}" for part in report.unread)):
            typer.echo(f"  {told}")
    if report.faults:
        raise StoreError(f"{_shown(index)} has faults. Index its documents anew, or take a copy that was kept.")
