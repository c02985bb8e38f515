"""An `add` that dies on the way leaves the index as it was, whatever killed it."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from stripedrag.indexes import Document, Index

VICTIM = """
import runpy, sys, time
from stripedrag.indexes import Document, Index

HashingEmbedder = runpy.run_path(sys.argv[1])["HashingEmbedder"]
moment, path = sys.argv[2:]

def wait_for_the_end():
    print("now", flush=True)
    time.sleep(60)

class Slow(HashingEmbedder):
    def embed(self, texts, *, progress=None):
        if moment == "embedding" and len(self.embedded) > 512:
            wait_for_the_end()
        return super().embed(texts, progress=progress)

index = Index.open(path, embedder=Slow())
database = index._store._database
database.execute("PRAGMA cache_size = 10")  # pages: SQLite writes to the file before the commit, as for a large add
database.set_trace_callback(lambda sql: wait_for_the_end() if sql == moment else None)
index.add([Document("cats", "", "replaced")] + [Document(f"d{n}", "", f"text {n} " * 9) for n in range(1500)])
"""


@pytest.mark.parametrize("moment", ["embedding", "BEGIN IMMEDIATE", "COMMIT"])
def test_a_kill_in_the_middle_of_add_leaves_the_index_as_it_was(
    index: Index, pets: list[Document], make_embedder: type, contents: Callable, moment: str
) -> None:
    index.add(pets)
    before = contents(index)
    index.close()
    conftest = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-c", VICTIM, str(conftest), moment, str(index.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout.readline() == "now\n"
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    if moment == "COMMIT":  # the file itself was written to; only the journal knows what it was
        assert (index.path / "index.sqlite").stat().st_size > 1_000_000
        assert (index.path / "index.sqlite-journal").stat().st_size > 0
    with Index.open(index.path, embedder=make_embedder()) as reopened:
        assert contents(reopened) == before
        assert reopened.add([Document("after", "", "the crash")]).added == 1


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_in_the_middle_of_add_leaves_the_index_as_it_was(
    tmp_path: Path, pets: list[Document], make_embedder: type, contents: Callable, kind: type[BaseException]
) -> None:
    class Failing(make_embedder):
        fails = False

        def embed(self, texts: Sequence[str], *, progress: object = None) -> np.ndarray:
            if self.fails and len(self.embedded) > 512:
                self.fails = False
                raise kind("half-way")
            return super().embed(texts, progress=progress)

    embedder = Failing()
    documents = [Document("cats", "", "replaced"), *(Document(f"d{n}", "", f"text {n}") for n in range(1500))]
    with Index.create(tmp_path / "wiki", embedder=embedder) as index:
        index.add(pets)
        before = contents(index)
        embedder.fails = True
        with pytest.raises(kind, match="half-way"):
            index.add(documents)
        assert len(embedder.embedded) > 512  # some were embedded and staged before
        assert contents(index) == before
        assert index.add(documents).added == 1500


def test_an_error_in_the_documents_leaves_the_index_as_it_was(
    index: Index, pets: list[Document], contents: Callable
) -> None:
    index.add(pets)
    before = contents(index)
    with pytest.raises(ZeroDivisionError):
        index.add(Document(f"d{n}", "", f"text {1 // (700 - n)}") for n in range(1500))
    assert contents(index) == before
