"""The commands that make an index and look after it: index, delete, compact, verify. See `stripedrag.rag.cli`."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from stripedrag.errors import StoreError, UsageError
from stripedrag.rag.cli import IndexPath, Json, app, err, print_json, quiet_libraries

_MOST_SHOWN = 20  # of what was left out


@app.command()
def index(
    path: Annotated[
        Path, typer.Argument(help="A file or a folder: txt, md, html, pdf, docx, jsonl.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", help="The index: made where it is missing, else added to.")],
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Wordpieces in a chunk of a new index, the unit that a search finds; 64.")
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(help="For a new index: a sentence-transformers model, a folder or a hub id; MiniLM by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Index documents. What is in the index already and has not changed costs nothing."""
    quiet_libraries()
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from stripedrag.indexes.documents import Document
    from stripedrag.indexes.embedding import embedder_named
    from stripedrag.indexes.index import Index
    from stripedrag.indexes.readers import Skipped, read_documents
    from stripedrag.indexes.sqlite import FILE

    # Reading twice costs little beside embedding, finds every bad file before the work, and gives the bar its length.
    skipped: list[Skipped] = []
    chars = sum(len(document.text) for document in read_documents(path, skipped=skipped))
    for left_out in skipped[:_MOST_SHOWN]:
        err.print(f"skipped {left_out.path}: {left_out.reason}", markup=False, soft_wrap=True)
    if len(skipped) > _MOST_SHOWN:
        err.print(f"and {len(skipped) - _MOST_SHOWN} more; --json tells them all", markup=False)
    is_new = not (to / FILE).exists()
    chosen = None if embedder is None else embedder_named(embedder)
    make = partial(Index.create, chunk_tokens=chunk_tokens) if is_new else Index.open
    opened = make(to, embedder=chosen)
    kept = opened.manifest.chunk_tokens
    if chunk_tokens not in (None, kept):
        opened.close()
        raise UsageError(f"{to} is an index of {kept} wordpieces a chunk and keeps them; leave --chunk-tokens out")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with opened as target, Progress(*columns, console=err, transient=True) as bar:
        task, embedded = bar.add_task("indexing", total=chars), 0

        def documents() -> Iterator[Document]:
            for document in read_documents(path, skipped=[]):
                yield document
                bar.advance(task, len(document.text))

        def count(passages: int) -> None:
            nonlocal embedded
            embedded += passages
            bar.update(task, description=f"indexing ({embedded} passages embedded)")

        report = target.add(documents(), progress=count)
        total_documents, total_chunks = target.document_count, len(target)
    if as_json:
        fields = dataclasses.asdict(report) | {"documents": total_documents, "total_chunks": total_chunks}
        fields["skipped"] = [{"path": str(s.path), "reason": s.reason} for s in skipped]
        print_json(fields)
    else:
        typer.echo(
            f"{to}: {total_documents} documents, {total_chunks} chunks "
            f"({report.added} added, {report.updated} updated, {report.unchanged} unchanged)"
        )


@app.command()
def delete(
    index: IndexPath,
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
        typer.echo(f"{index}: {deleted} documents deleted, {left} left; `stripedrag compact` frees their space")


@app.command()
def compact(index: IndexPath, as_json: Json = False) -> None:
    """Give the space of deleted and replaced documents back to the disk."""
    from stripedrag.indexes.index import Index

    def size() -> int:
        return sum(file.stat().st_size for file in index.iterdir())

    with Index.open(index) as opened:
        before = size()
        opened.compact()
        after = size()
    if as_json:
        print_json({"bytes_before": before, "bytes_after": after})
    else:
        typer.echo(f"{index}: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now")


@app.command()
def verify(index: IndexPath, as_json: Json = False) -> None:
    """Read an index whole and tell what is not as it was written; exits with 1 where something is not."""
    from rich.progress import Progress

    from stripedrag.indexes.index import Index

    with Index.open(index) as opened, Progress(console=err, transient=True) as bar:
        task = bar.add_task("reading", total=opened.document_count)
        report = opened.verify(progress=lambda documents: bar.advance(task, documents))
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        typer.echo(f"{index}: {report.documents} documents, {report.passages} passages, {report.chunks} chunks")
        for fault in report.faults:
            typer.echo(f"  {fault}")
    if report.faults:
        raise StoreError(f"{index} has faults. Index its documents anew, or take a copy that was kept.")
