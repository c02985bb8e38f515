"""The file of vectors: derived, mapped, and made anew whenever it does not match the store."""

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stripedrag.files import locked
from stripedrag.indexes import Document, Index, vectors

FLAT, SQ8, IVF = "flat", "sq8", "ivf"
KINDS = {FLAT: (10**9, 10**9), SQ8: (0, 10**9), IVF: (0, 0)}


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "SMALL", 100)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, number in zip(("FLAT_UP_TO", "SQ8_UP_TO"), KINDS[request.param], strict=True):
        monkeypatch.setattr(vectors, name, number)
    return request.param


def numbered(numbers: range) -> Iterator[Document]:
    return (Document(f"d{n:04}", "", f"number {n} and {n % 7} and {n % 11}", {"n": n}) for n in numbers)


def files(index: Index) -> list[Path]:
    return sorted(index.path.glob("vectors-*"))


def dense(index: Index, query: str, **options: object) -> dict[str, float]:
    found = index.search(query, method="dense", **{"k": 10_000, **options})
    return {scored.chunk.doc_id: scored.score for scored in found}


def exact(index: Index, query: str) -> dict[str, float]:
    embedder = index.embedder
    texts = [index.document(doc_id).text for doc_id in index.document_ids()]
    cosines = embedder.embed(texts) @ embedder.embed_query(query)
    return dict(zip(index.document_ids(), cosines.tolist(), strict=True))


def test_every_kind_of_file_finds_everything(index: Index, kind: str, make_embedder: type) -> None:
    index.add(numbered(range(600)))
    (file,) = files(index)
    expected = exact(index, "number 5 and 3")
    for _ in range(2):
        assert dense(index, "number 5 and 3") == pytest.approx(expected, abs=1e-6 if kind == FLAT else 0.01)
        index.close()
        index = Index.open(index.path, embedder=make_embedder())  # which reads the file
        assert files(index) == [file]
    index.close()


def test_rows_that_are_newer_or_gone_are_right_without_a_new_file(index: Index, kind: str) -> None:
    index.add(numbered(range(600)))
    before = files(index)
    index.delete(f"d{n:04}" for n in range(40))
    index.add([*numbered(range(600, 630)), Document("d0100", "", "replaced by other words")])
    assert files(index) == before
    assert dense(index, "replaced by 7") == pytest.approx(exact(index, "replaced by 7"), abs=0.01)


def test_a_file_that_is_mostly_out_of_date_is_made_anew(index: Index, kind: str) -> None:
    index.add(numbered(range(300)))
    first = files(index)
    index.add(numbered(range(300, 600)))
    second = files(index)
    assert len(second) == 1 and second != first
    index.delete(f"d{n:04}" for n in range(200))
    assert dense(index, "number") == pytest.approx(exact(index, "number"), abs=0.01)
    assert len(files(index)) == 1 and files(index) != second
    assert index.verify().faults == ()


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1000]),
        lambda file: file.write_bytes(b"x" * file.stat().st_size),
        lambda file: file.rename(file.with_name("vectors-0.faiss")),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_made_anew(index: Index, make_embedder: type, harm: object) -> None:
    index.add(numbered(range(600)))
    expected = dense(index, "number 5")
    index.close()
    harm(files(index)[0])
    with Index.open(index.path, embedder=make_embedder()) as reopened:
        assert dense(reopened, "number 5") == expected
        assert len(files(reopened)) == 1
        assert reopened.verify().faults == ()


def test_a_store_that_was_restored_from_a_copy_never_uses_a_later_file(index: Index, make_embedder: type) -> None:
    index.add(numbered(range(300)))
    copy = (index.path / "index.sqlite").read_bytes()
    index.add(Document(f"d{n:04}", "", f"other words {n}") for n in range(600))
    index.close()
    (index.path / "index.sqlite").write_bytes(copy)  # its rows have the numbers of others in the later file
    with Index.open(index.path, embedder=make_embedder()) as restored:
        assert dense(restored, "number 5") == pytest.approx(exact(restored, "number 5"), abs=1e-6)
        restored.add(Document(f"e{n:04}", "", f"third words {n}") for n in range(300))
        assert dense(restored, "third 5") == pytest.approx(exact(restored, "third 5"), abs=1e-6)


def test_a_folder_that_cannot_be_written_is_searched_in_memory(
    index: Index, make_embedder: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(numbered(range(600)))
    expected = dense(index, "number 5")
    index.close()
    files(index)[0].unlink()

    def refused(*_: object) -> None:
        raise RuntimeError("could not open for writing")

    def read_only(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr("faiss.write_index", refused)
    monkeypatch.setattr(Path, "unlink", read_only)
    with Index.open(index.path, embedder=make_embedder()) as reopened:
        for _ in range(2):
            assert dense(reopened, "number 5") == expected
        assert files(reopened) == []


def test_while_another_process_builds_the_file_the_old_one_and_newer_rows_are_searched(index: Index) -> None:
    index.add(numbered(range(300)))
    before = files(index)
    with locked(index.path / "vectors.lock", wait=False) as has_turn:
        assert has_turn
        index.add(numbered(range(300, 600)))
        assert dense(index, "number 5") == pytest.approx(exact(index, "number 5"), abs=1e-6)
        assert files(index) == before
    index.delete(["d0000"])
    assert len(dense(index, "number 5")) == 599
    assert len(files(index)) == 1 and files(index) != before


def test_a_file_that_another_process_has_built_is_taken(
    index: Index, make_embedder: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(numbered(range(300)))
    with Index.open(index.path, embedder=make_embedder()) as other:
        assert len(dense(other, "number 5")) == 300
        index.add(numbered(range(300, 600)))
        (built,) = files(index)

        def refused(*_: object) -> None:
            raise AssertionError("built again")

        monkeypatch.setattr("faiss.write_index", refused)
        assert dense(other, "number 5") == pytest.approx(exact(index, "number 5"), abs=1e-6)
        assert other._searcher._vectors._file.name == built.name


def test_a_filter_returns_all_that_it_admits(index: Index, kind: str) -> None:
    index.add(numbered(range(1000)))
    for where, count in (({"n": {"$lt": 300}}, 300), ({"n": {"$lt": 3}}, 3), ({"n": 999}, 1), ({"n": -1}, 0)):
        found = dense(index, "number 998 and 4", where=where)
        assert len(found) == count
        every = exact(index, "number 998 and 4")
        assert found == pytest.approx({name: every[name] for name in found}, abs=0.01)


@pytest.mark.parametrize("k", [1, 10, 999, 1000, 1001])
def test_a_search_returns_as_many_as_asked(index: Index, kind: str, k: int) -> None:
    index.add(numbered(range(1000)))
    for method in ("dense", "hybrid"):
        assert len(index.search("number 5 and 4", k=k, method=method)) == min(k, 1000)


def test_small_indexes_have_no_file_and_forget_rows_that_are_gone(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_ROWS_KEPT", 10)
    for turn in range(9):
        index.add(Document(f"d{n}", "", f"turn {turn} number {n}") for n in range(50))
        assert dense(index, "turn 3") == pytest.approx(exact(index, "turn 3"), abs=1e-6)
        assert index._searcher._vectors._tail.ntotal <= 3 * 50 + 10
    assert files(index) == []


def test_another_process_s_file_is_taken_over(index: Index, make_embedder: type) -> None:
    index.add(numbered(range(50)))
    assert len(dense(index, "number")) == 50
    with Index.open(index.path, embedder=make_embedder()) as other:
        other.add(numbered(range(50, 600)))
        assert dense(index, "number 77") == dense(other, "number 77")
    assert index._searcher._vectors._tail.ntotal == 0  # all 600 come from the file
    assert np.isclose(dense(index, "number 77")["d0077"], exact(index, "number 77")["d0077"])
