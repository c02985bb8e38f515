"""Where an index may be created, and which indexes are refused on opening."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from stripedrag.errors import IndexMismatchError, SetupError, UsageError
from stripedrag.indexes import Document, Index

BROKEN = ["{", "[]"]


def rewrite_manifest(path: Path, change: Callable[[dict], object]) -> None:
    database = sqlite3.connect(path / "index.sqlite")
    manifest = json.loads(database.execute("SELECT json FROM manifest").fetchone()[0])
    changed = change(manifest)
    with database:
        database.execute("UPDATE manifest SET json = ?", (changed if changed in BROKEN else json.dumps(manifest),))
    database.close()


@pytest.fixture
def closed(index: Index) -> Path:
    index.close()
    return index.path


def test_the_manifest_names_the_makers(index: Index) -> None:
    assert index.manifest.model_dump(exclude={"created_by"}) == {
        "schema_version": 2,
        "embedder": {"name": "hashing", "sha256": "a" * 64, "dimension": 256},
        "chunker": "tiles-1",
        "passage_tokens": 64,
        "chunk_tokens": 64,
    }
    assert index.manifest.created_by.startswith("stripedrag ")


def test_an_index_is_created_in_a_missing_folder_or_an_empty_one(tmp_path: Path, make_embedder: type) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "not" / "yet"):
        Index.create(path, embedder=make_embedder()).close()
        Index.open(path, embedder=make_embedder()).close()


@pytest.mark.parametrize("left", [b"", None])
def test_a_create_that_was_killed_is_no_index_and_can_be_done_again(
    tmp_path: Path, make_embedder: type, left: bytes | None
) -> None:
    if left is not None:
        (tmp_path / "index.sqlite").write_bytes(left)
        with pytest.raises(
            UsageError, match=r"is no index: it has no file index\.sqlite, or an empty one\. Create one"
        ):
            Index.open(tmp_path, embedder=make_embedder())
    Index.create(tmp_path, embedder=make_embedder()).close()
    Index.open(tmp_path, embedder=make_embedder()).close()


def test_creating_over_an_index_is_refused_and_leaves_it(index: Index, make_embedder: type) -> None:
    index.add([Document("a", "", "a")])
    with pytest.raises(
        UsageError, match=r"wiki holds an index already\. Open it with Index\.open, or choose another path\.$"
    ):
        Index.create(index.path, embedder=make_embedder())
    assert index.document_ids() == ["a"]


def test_creating_among_other_files_is_refused_and_leaves_them(tmp_path: Path, make_embedder: type) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    message = r"the folder is not empty \(it holds 'thesis\.txt'\)\. Choose an empty or a new one\.$"
    with pytest.raises(UsageError, match=message):
        Index.create(tmp_path, embedder=make_embedder())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match=r"thesis\.txt: a file is there\. Choose another path\.$"):
        Index.create(tmp_path / "thesis.txt", embedder=make_embedder())


def test_creating_over_a_file_of_our_name_is_refused_and_leaves_it(tmp_path: Path, make_embedder: type) -> None:
    (tmp_path / "index.sqlite").write_text("my notes on indexes\n" * 100)
    with pytest.raises(UsageError, match=r"cannot create an index in .*: index\.sqlite is no index .*not a database"):
        Index.create(tmp_path, embedder=make_embedder())
    assert (tmp_path / "index.sqlite").read_text().startswith("my notes")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"passage_tokens": 65}, r"^passage_tokens is 65; hashing reads 64 wordpieces\. Lower it\.$"),
        ({"chunk_tokens": 65}, r"^chunk_tokens is 65; a passage has 64 wordpieces\. Lower it\.$"),
        ({"chunk_tokens": 31}, r"^chunk_tokens is 31; it must be at least 32\. Raise it\.$"),
        ({"passage_tokens": 0}, r"^chunk_tokens is 0; it must be at least 32\. Raise it\.$"),
    ],
)
def test_chunks_that_do_not_fit_are_refused_before_anything_is_made(
    tmp_path: Path, make_embedder: type, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Index.create(tmp_path / "i", embedder=make_embedder(), **sizes)
    assert not (tmp_path / "i").exists()


def test_opening_where_nothing_is_is_refused_and_makes_nothing(tmp_path: Path, make_embedder: type) -> None:
    with pytest.raises(
        UsageError,
        match=r"^no index at .*/i: there is no such folder\. `stripedrag index` or Index\.create makes one\.$",
    ):
        Index.open(tmp_path / "i", embedder=make_embedder())
    assert not (tmp_path / "i").exists()
    with pytest.raises(
        UsageError,
        match=r" is no index: it has no file index\.sqlite, or an empty one\. Create one in an empty folder\.$",
    ):
        Index.open(tmp_path, embedder=make_embedder())


@pytest.mark.parametrize("place", ["", "a\0b", "x" * 300])
def test_a_place_that_can_be_none_is_refused(
    tmp_path: Path, make_embedder: type, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for look in (Index.create, Index.open):
        with pytest.raises(
            UsageError, match=r"is no place for an index: |cannot (create|look into) .*File name too long"
        ):
            look(place, embedder=make_embedder())
    assert list(tmp_path.iterdir()) == []


def test_opening_what_is_no_database_is_refused(tmp_path: Path, make_embedder: type) -> None:
    (tmp_path / "index.sqlite").write_text("my notes on indexes\n" * 100)
    with pytest.raises(
        UsageError, match=r"cannot open .* as an index: index\.sqlite is no index .*not a database.*Check"
    ):
        Index.open(tmp_path, embedder=make_embedder())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"name": "e5-base", "dimension": 768},
            r"^index 'wiki' was built with 'hashing'; the embedder is 'e5-base'\. Rebuild it, or open it with embedder "
            r"'hashing'\.$",
        ),
        (
            {"sha256": "b" * 64},
            r"^index 'wiki' was built with 'hashing' of sha256 aaaaaaaaaaaa…; the weights here have bbbbbbbbbbbb…\. "
            r"Rebuild it, or install the weights it was built with\.$",
        ),
        (
            {"dimension": 768},
            r"^index 'wiki' has vectors of 256 numbers; those of 'hashing' have 768\. Rebuild it, or open it with an ",
        ),
    ],
)
def test_another_embedder_is_refused(closed: Path, make_embedder: type, other: dict, message: str) -> None:
    with pytest.raises(IndexMismatchError, match=message):
        Index.open(closed, embedder=make_embedder(**other))


@pytest.mark.weights
def test_an_index_asks_for_the_embedder_that_made_it(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SetupError, match=r"^the embedder 'hashing' is no folder and cannot be had from the model hub"):
        Index.open(closed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            # A later version may have any fields: its number is told, not its fields.
            lambda manifest: manifest.update(schema_version=3, lexical={"fts": 5}),
            r"^index 'wiki' has schema version 3; this stripedrag reads version 2\. "
            r"Upgrade stripedrag, or rebuild it\.$",
        ),
        (
            lambda manifest: manifest.update(schema_version=1),
            r"^index 'wiki' has schema version 1; this stripedrag reads version 2\. Rebuild it\.$",
        ),
        (
            lambda manifest: manifest.update(chunker="sliding-9"),
            r"^index 'wiki' was cut by chunker 'sliding-9'; this stripedrag cuts by 'tiles-1'\. Rebuild it\.$",
        ),
    ],
)
def test_another_schema_or_chunker_is_refused(
    closed: Path, make_embedder: type, change: Callable, message: str
) -> None:
    rewrite_manifest(closed, change)
    with pytest.raises(IndexMismatchError, match=message):
        Index.open(closed, embedder=make_embedder())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda manifest: manifest.update(chnk_tokens=3), "chnk_tokens: Extra inputs are not permitted"),
        (lambda manifest: manifest["embedder"].pop("sha256"), "embedder.sha256: Field required"),
        (lambda manifest: manifest.pop("schema_version"), "schema_version"),
        (lambda manifest: manifest.update(schema_version="1"), "schema_version is '1'"),
        (lambda _: BROKEN[0], "Expecting property name"),
        (lambda _: BROKEN[1], "list indices"),
    ],
)
def test_a_broken_manifest_is_refused(closed: Path, make_embedder: type, change: Callable, problem: str) -> None:
    rewrite_manifest(closed, change)
    with pytest.raises(UsageError) as caught:
        Index.open(closed, embedder=make_embedder())
    assert str(caught.value).startswith("index 'wiki' has a broken manifest (")
    assert problem in str(caught.value)
    assert str(caught.value).endswith("). Rebuild it.")


def test_an_index_without_its_manifest_is_refused(closed: Path, make_embedder: type) -> None:
    database = sqlite3.connect(closed / "index.sqlite")
    with database:
        database.execute("DELETE FROM manifest")
    database.close()
    with pytest.raises(UsageError, match="index 'wiki' has a broken manifest"):
        Index.open(closed, embedder=make_embedder())
