"""`verify` finds what is not as it was written; `compact` gives space back and changes nothing else."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest

from stripedrag.errors import CorpusError, StoreError
from stripedrag.indexes import Document, Index, vectors


def harm(index: Index, *statements: str) -> None:
    database = sqlite3.connect(index.path / "index.sqlite", isolation_level=None)
    database.execute("PRAGMA foreign_keys = OFF")
    database.execute("PRAGMA recursive_triggers = OFF")
    for statement in statements:
        database.execute(statement)
    database.close()


def test_a_sound_index_has_no_faults(index: Index, pets: list[Document]) -> None:
    assert index.verify().faults == ()
    index.add([*pets, Document("gap", "", "before" + " " * 2000 + "after")])
    index.delete(["dogs"])
    seen: list[int] = []
    report = index.verify(progress=seen.append)
    assert (report.documents, report.chunks, report.faults) == (3, len(index), ())
    assert sum(seen) == 3


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE chunks SET text = 'The cat sat on the hat.' WHERE id = 1", "document 'cats' is not what was added"),
        ("UPDATE documents SET title = 'Dogs!' WHERE id = 'dogs'", "document 'dogs' is not what was added"),
        ("UPDATE chunks SET start = 5 WHERE id = 1", "the chunks of document 'cats' leave a gap or overlap"),
        ("DELETE FROM chunks WHERE id = 5", "the chunks of document 'long' leave a gap or overlap"),
        ("UPDATE passages SET vector = zeroblob(1024) WHERE id = 2", "the vector of passage 2 is no unit vector"),
        ("DELETE FROM passages WHERE id = 2", "row 2 of chunks refers to a row of passages that is missing"),
        ("INSERT INTO words (rowid, text) VALUES (99, 'ghost')", "the text index does not match the chunks"),
        ("INSERT INTO title_words (rowid, title) VALUES (99, 'ghost')", "the text index does not match the titles"),
        (
            "UPDATE documents SET metadata = '{bad' WHERE id = 'cats'",
            "document 'cats' cannot be read: Expecting property",
        ),
        (
            "UPDATE chunks SET text = x'ff' WHERE id = 1",
            "document 'cats' cannot be read: index 'wiki' is damaged: chunk",
        ),
        (
            "UPDATE chunks SET start = 'abc' WHERE id = 1",
            "document 'cats' cannot be read: index 'wiki' is damaged: chunk",
        ),
        (
            "UPDATE passages SET vector = x'0102' WHERE id = 1",
            "it cannot be read further: index 'wiki' is damaged: the",
        ),
        ("DROP TABLE chunks", "it cannot be read further: no such table: chunks"),
        ("DROP TABLE words", "the text index does not match the chunks: no such table: words"),
    ],
)
def test_verify_tells_what_is_not_as_it_was_written(
    index: Index, pets: list[Document], statement: str, fault: str
) -> None:
    index.add(pets)
    harm(index, statement)
    assert any(told.startswith(fault) for told in index.verify().faults), index.verify().faults


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE chunks SET text = x'ff'",
        "UPDATE chunks SET start = 'abc'",
        "UPDATE passages SET vector = x'0102'",
        "DELETE FROM documents",
        "DROP TABLE chunks",
    ],
)
def test_a_search_in_a_damaged_index_says_so(
    index: Index, pets: list[Document], make_embedder: type, statement: str
) -> None:
    index.add(pets)
    index.close()
    harm(index, statement)
    with (
        Index.open(index.path, embedder=make_embedder()) as damaged,
        pytest.raises((StoreError, CorpusError), match=r"damaged|no such table|holds no document"),
    ):
        damaged.search("cat", k=3)


def test_a_text_that_is_no_text_is_told_by_the_documents_too(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    harm(index, "UPDATE chunks SET text = CAST(x'ff41' AS TEXT)")
    with pytest.raises(StoreError, match=r"Could not decode to UTF-8 .* Run `stripedrag verify` on it"):
        index.document("cats")


def test_verify_lets_others_write_and_reads_what_it_can_of_an_index_that_is_read_only(
    index: Index, pets: list[Document]
) -> None:
    index.add(pets)

    def write(documents: int) -> None:
        with closing(sqlite3.connect(index.path / "index.sqlite", isolation_level=None, timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")

    report = index.verify(progress=write)
    assert (report.faults, report.unread) == ((), ())
    index._store.execute("PRAGMA query_only = ON")
    report = index.verify()
    assert report.faults == ()
    assert len(report.unread) == 1
    assert report.unread[0].startswith(
        "the text index: index 'wiki' is as it was: attempt to write a readonly database"
    )


def test_verify_tells_a_damaged_file_of_vectors(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "SMALL", 10)
    index.add(Document(f"d{n}", "", f"number {n}") for n in range(50))
    (file,) = index.path.glob("vectors-*")
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    assert index.verify().faults == (f"{file.name} is damaged; delete it, and the next search makes it anew",)
    file.unlink()
    assert index.verify().faults == ()


def test_compact_gives_space_back_and_changes_nothing_else(
    index: Index, pets: list[Document], contents: Callable, make_embedder: type
) -> None:
    index.add(pets)
    index.add(Document(f"d{n}", "", f"text {n} " * 30) for n in range(900))
    index.delete(f"d{n}" for n in range(900))
    before, size = contents(index), (index.path / "index.sqlite").stat().st_size
    index.compact()
    assert contents(index) == before
    assert (index.path / "index.sqlite").stat().st_size < size / 5
    index.close()
    with Index.open(index.path, embedder=make_embedder()) as reopened:
        assert contents(reopened) == before
        assert reopened.verify().faults == ()
        reopened.add([Document("new", "", "after the compaction")])
        assert reopened.search("compaction", k=1)[0].chunk.doc_id == "new"
