"""Ingest fanned out over Ray: documents are cut and embedded by the workers of a cluster, the index is written here.

    index.add(documents, prepare=RayWorkers(8))

Contract: the same index as without it (a vector differs by what it shares a batch with). Each document counts once,
whatever workers are killed: Ray does their work again, what comes back is put in order and checked for what is missing
or comes twice, and only the merge at the end changes the index.
Limits: documents are read here, up to `DOCUMENTS_AT_ONCE` and some more than `CHARS_AT_ONCE` held at a time. A copy of
the embedder goes to each worker; all-MiniLM-L6-v2 is then taken from the worker's own machine (`stripedrag setup`), and
has to be the same. Workers take a core each and no GPU; where none is free, Ray waits.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from stripedrag import errors
from stripedrag.errors import IndexMismatchError, SetupError, StoreError, StripedragError, UsageError
from stripedrag.indexes.documents import Chunk, Document
from stripedrag.indexes.preparing import Changed, Cutter, Prepared, Progress, completed, prepare

if TYPE_CHECKING:
    import pyarrow

    from stripedrag.indexes.embedding import Embedder

DOCUMENTS_AT_ONCE = 16_384
CHARS_AT_ONCE = 64_000_000
DOCUMENTS_A_TASK = 64


class RayWorkers:
    """A `stripedrag.indexes.preparing.Prepare` by up to `workers` actors, on Ray Data.

    Uses the cluster that Ray is connected to, that RAY_ADDRESS names, or that runs on this machine; where there is
    none, starts one here and ends it. Raises `UsageError` for `workers` below 1, `SetupError` without the extra
    `stripedrag[ray]`, and, as it works, `StoreError` where Ray gives up.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UsageError(f"workers is {workers}; it is at least 1")
        _require_ray()
        self.workers = workers

    def __call__(
        self, changed: Iterable[Changed], cutter: Cutter, embedder: "Embedder", progress: Progress | None = None
    ) -> Iterator[Prepared]:
        """See `Prepare`. Raises what cutting and embedding raise on a worker."""
        with ExitStack() as stack:
            for number, window in enumerate(_windows(changed)):
                if not number:  # nothing new: no cluster
                    stack.enter_context(_cluster())
                yield from self._window(window, cutter, embedder, progress)

    def _window(
        self, window: list[Changed], cutter: Cutter, embedder: "Embedder", progress: Progress | None
    ) -> Iterator[Prepared]:
        from ray import data

        sent = [
            {"number": number, "id": d.id, "title": d.title, "text": d.text, "known": list(known)}
            for number, (d, known) in enumerate(window)
        ]
        blocks = min(len(sent), max(2 * self.workers, len(sent) // DOCUMENTS_A_TASK))
        dataset = data.from_items(sent, override_num_blocks=blocks).map_batches(
            _Worker,
            fn_constructor_args=(cutter, embedder, embedder.sha256),
            batch_format="pyarrow",
            batch_size=DOCUMENTS_A_TASK,
            concurrency=(1, self.workers),
            num_cpus=1,
            zero_copy_batch=True,
        )
        with _told():
            tables = dataset.iter_batches(batch_format="pyarrow", batch_size=None)
            rows = (row for table in tables for row in table.to_pylist())
            for document, row in _in_order(rows, window):
                prepared = list(_rebuilt(document, row, embedder.dimension))
                if progress is not None:
                    progress(sum(one.is_new for one in prepared))
                yield from prepared


def _in_order(rows: Iterable[dict[str, Any]], window: Sequence[Changed]) -> Iterator[tuple[Changed, dict[str, Any]]]:
    """Each document of a window with the row of its number. Raises what a row says, and `StoreError` for a row that
    comes twice or not at all."""
    waiting: dict[int, dict[str, Any]] = {}  # what came before documents that stand before it
    done = 0
    for row in rows:
        if row["error"] is not None:
            raise getattr(errors, row["error"])(row["message"])
        if row["number"] < done or row["number"] in waiting:
            raise StoreError(f"Ray gave document {window[row['number']].document.id!r} twice. Add again.")
        waiting[row["number"]] = row
        while done in waiting:
            yield window[done], waiting.pop(done)
            done += 1
    if done < len(window):
        raise StoreError(f"Ray lost document {window[done].document.id!r}. Add again.")


class _Worker:
    """An actor: cuts and embeds a table of documents."""

    def __init__(self, cutter: Cutter, embedder: "Embedder", sha256: str) -> None:
        self._cutter, self._embedder, self._sha256 = cutter, embedder, sha256

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """A row for each document; or one with an error of ours, which Ray would wrap in pages of its own."""
        import pyarrow as pa

        try:
            rows = self._prepared(table.to_pylist())
        except StripedragError as error:
            ours = next(kind for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind)
            rows = [{"error": ours.__name__, "message": str(error)}]
        lengths = pa.list_(pa.list_(pa.int64()))
        columns = {"number": pa.int64(), "passages": lengths, "vectors": pa.binary(), "error": pa.string()}
        return pa.Table.from_pylist(rows, schema=pa.schema(columns | {"message": pa.string()}))

    def _prepared(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """By document the lengths of its chunks, passage by passage, and the vectors of the new passages."""
        if self._embedder.sha256 != self._sha256:
            raise IndexMismatchError(
                f"a worker's {self._embedder.name} has weights of sha256 {self._embedder.sha256[:12]}…; the index is "
                f"made with {self._sha256[:12]}…. Put the same weights on every machine."
            )
        elsewhere = np.zeros(self._embedder.dimension, dtype=np.float32)  # stands for a vector that is known there
        documents = [
            Changed(Document(row["id"], row["title"], row["text"]), dict.fromkeys(row["known"], elsewhere))
            for row in rows
        ]
        made = []
        prepared = prepare(documents, self._cutter, self._embedder)
        for row, (_, of_one) in zip(rows, groupby(prepared, key=lambda one: one.chunks[0].doc_id), strict=True):
            whole = list(of_one)
            new = [one.vector.astype("<f4") for one in whole if one.is_new and one.vector is not None]
            made.append(
                {
                    "number": row["number"],
                    "passages": [[len(chunk.text) for chunk in one.chunks] for one in whole],
                    "vectors": b"".join(vector.tobytes() for vector in new),
                }
            )
        return made


def _windows(changed: Iterable[Changed]) -> Iterator[list[Changed]]:
    """Documents in their order, as many together as are held at a time."""
    window: list[Changed] = []
    chars = 0
    for one in changed:
        window.append(one)
        chars += len(one.document.text)
        if len(window) == DOCUMENTS_AT_ONCE or chars >= CHARS_AT_ONCE:
            yield window
            window, chars = [], 0
    if window:
        yield window


def _rebuilt(changed: Changed, row: dict[str, Any], dimension: int) -> Iterator[Prepared]:
    """A document's passages from the lengths of their chunks and the vectors of the new ones."""
    document, known = changed
    vectors = iter(np.frombuffer(row["vectors"], dtype="<f4").astype(np.float32).reshape(-1, dimension))
    start = 0
    for lengths in row["passages"]:
        ends = list(accumulate(lengths, initial=start))
        chunks = [Chunk.at(document.id, first, document.text[first:end]) for first, end in pairwise(ends)]
        text, start = document.text[start : ends[-1]], ends[-1]
        yield completed(chunks, text, known.get(text), vectors)


def _require_ray() -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise SetupError(f"Ray is not here: {error}. Run pip install 'stripedrag[ray]'.") from error


@contextmanager
def _cluster() -> Iterator[None]:
    """A connection to Ray: the one there is, or one for as long as this lasts."""
    import ray
    from ray import data

    with ExitStack() as stack:
        if not ray.is_initialized():
            if "RAY_USAGE_STATS_ENABLED" not in os.environ:
                os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
                stack.callback(os.environ.pop, "RAY_USAGE_STATS_ENABLED")
            with _told():
                ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=True)
            stack.callback(ray.shutdown)
        context = data.DataContext.get_current()
        stack.callback(setattr, context, "enable_progress_bars", context.enable_progress_bars)
        context.enable_progress_bars = False
        yield


@contextmanager
def _told() -> Iterator[None]:
    """What Ray gives up on, as a `StoreError`."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ConnectionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__  # the last: traces stand before it
        raise StoreError(f"the index is as it was: Ray gave up ({reason}). Look into Ray's own logs.") from error
