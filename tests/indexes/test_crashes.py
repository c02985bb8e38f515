"""An `add` that dies on the way leaves the index as it was, whatever killed it: a signal, an error, a full disk."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from stripedrag.errors import StoreError
from stripedrag.indexes import Document, Index

CONFTEST = Path(__file__).with_name("conftest.py")
VICTIM = """
import runpy, sys, time
from stripedrag.indexes import Document, Index, sqlite

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
sqlite.MERGE_CACHE_KIB = 160  # SQLite writes to the file before the commit, as for a large add
seen = []

def trace(sql):
    seen.append(sql)
    if sql == moment and "BEGIN IMMEDIATE" in seen:  # the snapshots before it are read only
        wait_for_the_end()

database.set_trace_callback(trace)
index.add([Document("cats", "", "replaced")] + [Document(f"d{n}", "", f"text {n} " * 9) for n in range(1500)])
"""


@pytest.mark.parametrize("moment", ["embedding", "BEGIN IMMEDIATE", "COMMIT"])
def test_a_kill_in_the_middle_of_add_leaves_the_index_as_it_was(
    index: Index, pets: list[Document], make_embedder: type, contents: Callable, moment: str
) -> None:
    index.add(pets)
    before = contents(index)
    index.close()
    command = [sys.executable, "-c", VICTIM, str(CONFTEST), moment, str(index.path)]
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


# Commits one generation of 60 documents after another, and deletes and compacts on the way, until it is killed. What it
# says was committed before it says so; the files of vectors come into being and go, too.
WRITER = """
import runpy, sys
from stripedrag.indexes import Document, Index, vectors

vectors.SMALL = 100
index = Index.open(sys.argv[2], embedder=runpy.run_path(sys.argv[1])["HashingEmbedder"]())
generation = int(sys.argv[3])
while True:
    generation += 1
    index.add(Document(f"d{n}", f"generation {generation}", f"number {n} of {generation}. " * 9) for n in range(60))
    print("added", generation, flush=True)
    if generation % 3 == 0:
        index.delete(["d7"])
        print("deleted", generation, flush=True)
    if generation % 5 == 0:
        index.compact()
"""


def test_an_index_that_is_killed_again_and_again_holds_what_was_committed(index: Index, make_embedder: type) -> None:
    index.close()
    moments, generation = random.Random(0), 0
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(CONFTEST), str(index.path), str(generation)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            told = [writer.stdout.readline()]
            time.sleep(moments.uniform(0, 0.4))
            writer.send_signal(signal.SIGKILL)
            told += writer.stdout.readlines()
        assert writer.returncode == -signal.SIGKILL
        kind, last = told[-1].split()
        with Index.open(index.path, embedder=make_embedder()) as reopened:
            assert reopened.verify().faults == ()
            (title,) = {reopened.document(doc_id).title for doc_id in reopened.document_ids()}
            generation = int(title.split()[1])
            assert generation in (int(last), int(last) + 1)  # the next may have been committed and not yet told
            if generation == int(last) and kind == "deleted":
                assert reopened.document_count == 59
            found = reopened.search(f"number 5 of {generation}", k=1000)
            assert len(found) == len(reopened)
            assert f"of {generation}." in found[0].chunk.text


FULL = """
import resource, runpy, signal, sys
from stripedrag.errors import StoreError
from stripedrag.indexes import Document, Index

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
index = Index.open(sys.argv[2], embedder=runpy.run_path(sys.argv[1])["HashingEmbedder"]())
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    index.add([Document("cats", "", "replaced"), *(Document(f"d{n}", "", f"text {n} " * 20) for n in range(1500))])
except StoreError as error:
    print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert index.search("the cat", k=1)[0].chunk.text == "The cat sat on the mat."
"""


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_disk_that_is_full_is_told_and_leaves_the_index_as_it_was(
    index: Index, pets: list[Document], make_embedder: type, contents: Callable, share: float
) -> None:
    """A limit on the size of a file refuses writes as a full disk does, wherever in the work it is reached."""
    index.add(pets)
    before, empty = contents(index), (index.path / "index.sqlite").stat().st_size
    index.close()
    room = int(empty + share * 2_000_000)
    command = [sys.executable, "-c", FULL, str(CONFTEST), str(index.path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = r"index 'wiki' is as it was: disk I/O error\. .*wiki has [\d,]+ MB free, and .*, where .* has more\.$"
    assert re.match(told, done.stdout), done
    with Index.open(index.path, embedder=make_embedder()) as reopened:
        assert contents(reopened) == before
        assert reopened.verify().faults == ()
        assert reopened.add([Document("after", "", "the disk was full")]).added == 1


def test_a_small_disk_that_is_full_is_told_and_leaves_the_index_as_it_was(
    tmp_path: Path, pets: list[Document], make_embedder: type, contents: Callable
) -> None:
    """A file system of 1 MB, where the process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with Index.create(disk / "wiki", embedder=make_embedder()) as index:
            index.add(pets)
            before = contents(index)
            with pytest.raises(
                StoreError, match=r"^index 'wiki' is as it was: database or disk is full\. .*wiki has [01] MB"
            ):
                index.add(Document(f"d{n}", "", f"text {n} " * 20) for n in range(1500))
            assert contents(index) == before
        with Index.open(disk / "wiki", embedder=make_embedder()) as reopened:
            assert contents(reopened) == before
            assert reopened.verify().faults == ()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Adds whole generations of documents; a reader that sees two of them at once has seen a part of an add.
READER = """
import runpy, sys
from stripedrag.indexes import Index

index = Index.open(sys.argv[2], embedder=runpy.run_path(sys.argv[1])["HashingEmbedder"]())
print("ready", flush=True)
seen = set()
while len(seen) < 4:
    found = index.search("generation of numbers", k=1000)
    generations = {scored.chunk.text.split()[1] for scored in found}
    assert len(found) == 40 and len(generations) == 1, (len(found), generations)
    seen |= generations
"""


def test_two_readers_and_a_writer_at_once(index: Index) -> None:
    def add(generation: int) -> None:
        index.add(Document(f"d{n}", "", f"generation {generation} of number {n}") for n in range(40))

    add(0)
    command = [sys.executable, "-c", READER, str(CONFTEST), str(index.place)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    generation, deadline = 0, time.monotonic() + 120
    while any(reader.poll() is None for reader in readers) and time.monotonic() < deadline:
        generation += 1
        add(generation)
    for reader in readers:
        reader.stdout.close()
        assert reader.wait(10) == 0
