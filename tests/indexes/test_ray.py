"""Ingest over Ray gives the index that it gives without, whatever happens to a worker; run by `make test-all`."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from stripedrag.errors import IndexMismatchError, UsageError
from stripedrag.indexes import Document, Index, MiniLMEmbedder, ray_workers
from stripedrag.indexes.ray_workers import RayWorkers

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'stripedrag[ray]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers on this machine, to which a test's own embedder comes whole: they cannot import it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__.replace("test_ray", "conftest")])
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def documents(numbers: range) -> list[Document]:
    return [
        Document(f"d{n:04}", f"Title {n % 9}", f"Number {n} is here. " + f"Word{n % 17} and word{n % 5}. " * (n % 60))
        for n in numbers
    ]


def same(one: Index, other: Index) -> bool:
    assert one.document_ids() == other.document_ids()
    for doc_id in one.document_ids():
        assert one.document(doc_id) == other.document(doc_id)
        assert one.chunks(doc_id) == other.chunks(doc_id)
        ours, theirs = (index._store.passage_vectors(doc_id) for index in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[text], theirs[text]) for text in ours)
    return one.search("word3 number 7", k=500) == other.search("word3 number 7", k=500)


def test_the_index_is_the_same(tmp_path: Path, make_embedder: type) -> None:
    told: list[int] = []
    blank = Document("blank", "", "a" + " " * 5000 + "b")
    changed = [*documents(range(50, 150)), Document("d0003", "Title 3", "All of it is new."), blank]
    with (
        Index.create(tmp_path / "here", embedder=make_embedder()) as here,
        Index.create(tmp_path / "there", embedder=make_embedder()) as there,
    ):
        for batch in (documents(range(100)), changed):
            report = here.add(batch)
            assert there.add(batch, prepare=RayWorkers(2), progress=told.append) == report
        assert same(here, there)
        assert sum(told) > report.passages > 0
        assert there.add(changed, prepare=RayWorkers(2)).unchanged == len(changed)


def test_documents_that_are_sent_in_several_windows_come_back_in_their_order(
    tmp_path: Path, make_embedder: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "DOCUMENTS_AT_ONCE", 40)
    with (
        Index.create(tmp_path / "here", embedder=make_embedder()) as here,
        Index.create(tmp_path / "there", embedder=make_embedder()) as there,
    ):
        assert there.add(documents(range(100)), prepare=RayWorkers(2)) == here.add(documents(range(100)))
        assert same(here, there)


def test_of_a_changed_document_only_the_new_passages_are_embedded(tmp_path: Path, make_embedder: type) -> None:
    text = "".join(f"Sentence number {n} has exactly seven words. " for n in range(60))
    with Index.create(tmp_path / "there", embedder=make_embedder()) as there:
        first = there.add([Document("d", "T", text)], prepare=RayWorkers(2))
        second = there.add([Document("d", "T", text + "One more sentence at the end.")], prepare=RayWorkers(2))
    assert first.passages > 3
    assert second.passages == 1


def test_a_killed_worker_costs_a_retry_and_no_document(tmp_path: Path, make_embedder: type) -> None:
    marker = tmp_path / "killed"

    class Victim(make_embedder):  # type: ignore[misc]
        def embed(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> np.ndarray:
            vectors = super().embed(texts, progress=progress)
            if any("Number 100 " in text for text in texts):
                try:
                    marker.touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            return vectors

    batch = documents(range(300))
    with (
        Index.create(tmp_path / "here", embedder=make_embedder()) as here,
        Index.create(tmp_path / "there", embedder=Victim()) as there,
    ):
        report = here.add(batch)
        assert there.add(batch, prepare=RayWorkers(2)) == report
        assert marker.exists()
        assert same(here, there)


def test_an_error_on_a_worker_is_told_and_leaves_the_index_as_it_was(tmp_path: Path, make_embedder: type) -> None:
    class Broken(make_embedder):  # type: ignore[misc]
        def embed(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> np.ndarray:
            return super().embed(texts, progress=progress) * 2

    class Other(make_embedder):  # type: ignore[misc]
        def __reduce__(self) -> tuple[object, ...]:
            return make_embedder, (), {"sha256": "b" * 64}

    for embedder, error, message in (
        (Broken(), UsageError, "Normalise them in its embed method"),
        (Other(), IndexMismatchError, "Put the same weights on every machine"),
    ):
        with Index.create(tmp_path / message[:3], embedder=embedder) as index:
            with pytest.raises(error, match=message):
                index.add(documents(range(20)), prepare=RayWorkers(2))
            assert index.document_count == 0


@pytest.mark.weights
def test_minilm_is_found_on_the_worker(tmp_path: Path) -> None:
    batch = documents(range(40))
    with Index.create(tmp_path / "there", embedder=MiniLMEmbedder()) as there:
        there.add(batch, prepare=RayWorkers(2))
        assert there.search("Number 17 is here", k=1)[0].chunk.doc_id == "d0017"


@pytest.mark.weights
def test_the_command_starts_workers_and_ends_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The lighthouse of Veyrac was built in 1862.")
    script = [Path(sys.executable).with_name("stripedrag"), "index", "a.txt", "--to", "index", "--workers"]
    done = subprocess.run([*script, "2"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "index: 1 documents, 1 chunks (1 added, 0 updated, 0 unchanged)\n"
