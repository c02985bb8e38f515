"""What an index promises its users: create, open, add, delete and search."""

import math
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stripedrag.errors import CorpusError, StoreError, UsageError
from stripedrag.indexes import AddReport, Document, Index, MiniLMEmbedder, read_documents, sqlite
from stripedrag.rag.retriever import Retriever


def ids(index: Index, query: str, k: int = 100) -> list[str]:
    return [scored.chunk.doc_id for scored in index.search(query, k=k)]


@pytest.mark.weights
def test_a_question_finds_the_document_that_answers_it(tmp_path: Path, minilm: MiniLMEmbedder) -> None:
    texts = {
        "curie": "Marie Curie discovered polonium and radium, and won two Nobel prizes.",
        "bread": "Sourdough rises slowly because its wild yeast works at room temperature.",
        "paris": "The Eiffel Tower was finished in 1889 and is 330 metres tall.",
        "sleep": "Adults who sleep less than six hours have trouble remembering new facts.",
    }
    (tmp_path / "corpus").mkdir()
    for name, text in texts.items():
        (tmp_path / "corpus" / f"{name}.txt").write_text(text)
    with Index.create(tmp_path / "wiki") as index:
        index.add(read_documents(tmp_path / "corpus"))
    with Index.open(tmp_path / "wiki", embedder=minilm) as index:
        assert ids(index, "Which chemical elements did a famous woman scientist find?")[0] == "curie.txt"
        assert ids(index, "How high is the landmark in France's capital?")[0] == "paris.txt"
        assert ids(index, "why does dough take so long")[0] == "bread.txt"
        best = index.search(texts["sleep"], k=1)[0]
        assert best.chunk.text == texts["sleep"] and best.score > 0.99


@pytest.mark.weights
def test_the_real_embedder_takes_every_chunk_that_the_chunker_makes(tmp_path: Path, minilm: MiniLMEmbedder) -> None:
    letters = random.Random(0)
    nasty = "".join(
        letters.choice(["é", "你好", "😀", " ", "\n\n", ". ", "\x01", "[SEP]", "antidisestablish"]) for _ in range(900)
    )
    with Index.create(tmp_path / "wiki", embedder=minilm) as index:
        report = index.add([Document("nasty", "", nasty)])
        assert index.document("nasty").text == nasty
        assert len(index.search("?", k=1000)) == len(index) > report.passages > 3


def test_documents_come_back_as_they_were_added(index: Index, pets: list[Document]) -> None:
    odd = Document("näme/\U0001f600", "", " \r\n\u2028 e\u0301\0 nul [SEP] 😀 \n", {"pi": 3.5, "many": 10**30})
    assert index.add([*pets, odd]) == AddReport(added=4, updated=0, unchanged=0, passages=len(index))
    assert [index.document(document.id) for document in [*pets, odd]] == [*pets, odd]
    assert index.document_ids() == sorted(["cats", "dogs", "long", odd.id])
    assert index.document_count == 4


def test_every_chunk_points_at_its_text(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    texts = {document.id: document.text for document in pets}
    found = index.search("seven words", k=100)
    assert len(found) == len(index) > 5
    for scored in found:
        assert scored.chunk.text == texts[scored.chunk.doc_id][scored.chunk.start : scored.chunk.end]
    assert "".join(chunk.text for chunk in index.chunks("long")) == texts["long"]


def test_dense_search_ranks_by_the_cosine(index: Index, pets: list[Document], embedder: object) -> None:
    index.add(pets)
    found = index.search("the cat sat", k=3, method="dense")
    assert [scored.rank for scored in found] == [1, 2, 3]
    assert found[0].chunk.doc_id == "cats"
    query = embedder.embed(["the cat sat"])[0]
    for scored in found:
        titled = f"{index.document(scored.chunk.doc_id).title}\n{scored.chunk.text}"
        assert math.isclose(scored.score, float(query @ embedder.embed([titled])[0]), abs_tol=1e-6)
    assert sorted(found, key=lambda scored: -scored.score) == found


def test_ties_are_broken_by_document_and_start(index: Index) -> None:
    twice = "the same words\n\n" + "x " * 60 + "\n\nthe same words\n\n" + "x " * 60
    names = [f"d{n:02}" for n in range(40)]
    random.Random(1).shuffle(names)
    index.add([Document(name, "", "the same words") for name in names])
    index.add([Document("a", "", twice)])
    for method in ("dense", "lexical", "hybrid"):
        found = [s.chunk.doc_id for s in index.search("the same words", k=100, method=method) if s.chunk.doc_id != "a"]
        assert found == sorted(names)
    assert [s.chunk.start for s in index.search("y", k=100) if s.chunk.doc_id == "a"] == [
        c.start for c in index.chunks("a")
    ]


def test_a_k_larger_than_the_index_returns_all(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    assert len(index.search("cheese", k=10**9)) == len(index)


def test_an_unchanged_document_costs_no_embedding(index: Index, pets: list[Document], embedder: object) -> None:
    index.add(pets)
    embedder.embedded.clear()
    changed = Document("cats", "Cats", "The cat sat on the hat.")
    new = Document("new", "", "Something new.")
    assert index.add([pets[1], changed, new, pets[2]]) == AddReport(added=1, updated=1, unchanged=2, passages=2)
    assert sorted(embedder.embedded) == ["Cats\nThe cat sat on the hat.", "Something new."]
    assert index.add(pets[1:]) == AddReport(added=0, updated=0, unchanged=2, passages=0)


@pytest.mark.parametrize(
    "changed", [Document("d", "u", "t", {"a": 1}), Document("d", "t", "t", {"a": 2}), Document("d", "t", "u", {"a": 1})]
)
def test_a_change_of_title_text_or_metadata_replaces_the_document(index: Index, changed: Document) -> None:
    index.add([Document("d", "t", "t", {"a": 1})])
    assert index.add([changed]).updated == 1
    assert index.document("d") == changed
    assert len(index) == 1


def test_a_search_sees_what_was_added_replaced_and_deleted(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    assert ids(index, "homework")[0] == "dogs"
    index.add([Document("dogs", "Dogs", "Nothing but bones."), Document("pupils", "", "homework again")])
    assert ids(index, "homework")[0] == "pupils"
    assert ids(index, "bones")[0] == "dogs"
    assert index.delete(["pupils", "cats", "cats"]) == 2
    assert set(ids(index, "homework")) == {"dogs", "long"}


def test_a_search_sees_what_another_process_committed(index: Index, pets: list[Document], make_embedder: type) -> None:
    index.add(pets)
    assert ids(index, "homework", 1) == ["dogs"]
    with Index.open(index.place, embedder=make_embedder()) as other:
        other.delete(["dogs"])
        other.add([Document("new", "", "homework")])
        assert ids(index, "homework", 1) == ids(other, "homework", 1) == ["new"]


def test_a_long_add_locks_nobody_out(index: Index, pets: list[Document], make_embedder: type) -> None:
    with Index.open(index.place, embedder=make_embedder()) as other:

        def documents() -> Iterator[Document]:
            for n in range(600):
                yield Document(f"d{n}", "", f"text {n}")
            other.add(pets)
            assert other.document_count == len(pets)

        index.add(documents())
        assert other.document_count == len(pets) + 600


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.dictionaries(st.sampled_from("abcde"), st.sampled_from("uvwxyz"), min_size=1)),
        max_size=8,
    )
)
def test_an_index_holds_what_was_added_less_what_was_deleted(
    tmp_path_factory: pytest.TempPathFactory, make_embedder: type, steps: list[tuple[bool, dict[str, str]]]
) -> None:
    expected: dict[str, str] = {}
    folder = tmp_path_factory.mktemp("index")
    with Index.create(folder, embedder=make_embedder()) as index:
        for adds, texts in steps:
            if adds:
                index.add([Document(name, "", text) for name, text in texts.items()])
                expected |= texts
            elif gone := set(texts) & set(expected):
                index.delete(gone)
                expected = {name: text for name, text in expected.items() if name not in gone}
            found = index.search("u", k=100) if expected else []
            assert {scored.chunk.doc_id: scored.chunk.text for scored in found} == expected
        with Index.open(folder, embedder=make_embedder()) as reopened:
            assert (reopened.search("u", k=100) if expected else []) == found if steps else True


def test_reopening_finds_the_same(index: Index, pets: list[Document], make_embedder: type, contents: Callable) -> None:
    index.add(pets)
    index.delete(["cats"])
    before = contents(index)
    index.close()
    with Index.open(str(index.place), embedder=make_embedder()) as reopened:
        assert contents(reopened) == before


def test_an_index_at_rest_is_one_file_that_opens_from_a_read_only_disk(
    index: Index,
    pets: list[Document],
    make_embedder: type,
    contents: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index.add(pets)
    before = contents(index)
    index.close()
    connected = sqlite._connected  # root may write what has no permission for it: what would be written is refused here
    monkeypatch.setattr(sqlite, "_connected", lambda path, mode, doing: connected(path, mode="ro", doing=doing))
    assert [entry.name for entry in index.path.iterdir()] == ["index.sqlite"]
    (index.path / "index.sqlite").chmod(0o444)
    index.path.chmod(0o555)
    try:
        with Index.open(index.path, embedder=make_embedder()) as reopened:
            assert contents(reopened) == before
            with pytest.raises(StoreError, match=r"attempt to write a readonly database\. Mend the permissions of "):
                reopened.delete(["cats"])
    finally:
        index.path.chmod(0o755)


def test_chunks_of_white_space_rebuild_the_document_and_are_never_found(index: Index, embedder: object) -> None:
    document = Document("gap", "", "before" + " " * 2000 + "after")
    assert index.add([document]).passages < len(index)
    assert index.document("gap") == document
    assert [scored.chunk.text.strip() for scored in index.search("after", k=100)] == ["after", "before"]
    assert all(text.strip() for text in embedder.embedded)


def test_a_stretch_of_white_space_alone_can_fill_a_batch(index: Index) -> None:
    document = Document("gap", "", "a" + " " * 600_000 + "b")
    index.add([document])
    assert index.document("gap") == document


def test_progress_counts_every_embedded_passage(index: Index, pets: list[Document]) -> None:
    done: list[int] = []
    report = index.add((Document(f"d{n}", "", f"text {n}") for n in range(1200)), progress=done.append)
    assert sum(done) == report.passages == 1200
    assert len(done) > 2  # in batches, so that a long add holds few passages at a time


def test_threads_may_share_an_index(tmp_path: Path, pets: list[Document], make_embedder: type) -> None:
    index = Index.create(tmp_path / "shared", embedder=make_embedder(dimension=4096))
    index.add(pets)
    wrong: list[object] = []

    def work(n: int) -> None:
        for turn in range(5):
            index.add([Document(f"t{n}-{turn}", "", f"words of n{n}t{turn}")])
            found = ids(index, f"words of n{n}t{turn}", 1)
            if found != [f"t{n}-{turn}"]:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert index.document_count == len(pets) + 20
    index.close()


def test_an_empty_index_is_true(index: Index) -> None:
    assert index and len(index) == 0


def test_chunk_tokens_is_kept(tmp_path: Path, pets: list[Document], make_embedder: type) -> None:
    with Index.create(tmp_path / "i", embedder=make_embedder(), chunk_tokens=32) as index:
        index.add(pets)
        size = len(index)
    with Index.open(tmp_path / "i", embedder=make_embedder()) as index:
        index.add([Document("again", pets[2].title, pets[2].text)])
        assert len(index.chunks("again")) == len(index.chunks("long"))
        assert index.manifest.chunk_tokens == 32
        assert len(index) > size


def test_names_with_odd_characters_are_only_names(tmp_path: Path, make_embedder: type) -> None:
    injection = "x'); DROP TABLE documents; --"
    with Index.create(tmp_path / "a b?#%41 ü", embedder=make_embedder()) as index:
        index.add([Document(injection, "", injection)])
        assert ids(index, injection) == [injection]
        index.delete([injection])
    assert (tmp_path / "a b?#%41 ü" / "index.sqlite").is_file()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], r"^the corpus is empty: there is no document to add\. Give at least one\.$"),
        ([Document("", "T", "x")], r"^a document has an empty id \(its title is 'T'\)\. Give it one\.$"),
        ([Document("a", "", " \n")], r"^document 'a' holds only white space\. Leave it out\.$"),
        (
            [Document("a", "", "x"), Document("a", "", "y")],
            r"^document 'a' comes twice in one add\. Make the ids unique\.$",
        ),
        (
            [Document("a", "", "x\ud800")],
            r"^document 'a' has U\+D800 at character 1 in its text, which is no character\. ",
        ),
        ([Document("a", "\udfff", "x")], r"^document 'a' has U\+DFFF at character 0 in its title"),
        (
            [Document("a", "", "x", {"tags": ["b"]})],
            r"^document 'a' has metadata 'tags' of type list; values are str, int, float, bool or None\. Convert it",
        ),
        ([Document("a", "", "x", {"n": math.inf})], r"^document 'a' has metadata 'n' of inf, which is no number"),
        ([Document("a\0", "", "x")], r"^document 'a\\x00' has a NUL character in its id\. Leave it out of the id\.$"),
    ],
)
def test_what_cannot_be_added_is_refused_and_changes_nothing(
    index: Index, pets: list[Document], contents: Callable, documents: list[Document], message: str
) -> None:
    index.add(pets)
    before = contents(index)
    with pytest.raises(CorpusError, match=message):
        index.add([Document("new", "", "new"), *documents] if documents else [])
    assert contents(index) == before


def test_an_id_that_is_stored_and_comes_twice_is_refused_too(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    with pytest.raises(CorpusError, match="'cats' comes twice"):
        index.add([pets[0], pets[0]])


def test_deleting_what_is_not_there_is_refused_and_deletes_nothing(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    with pytest.raises(
        UsageError, match=r"^index 'wiki' has no document 'horses'; nothing was deleted\. Drop the id\.$"
    ):
        index.delete(["cats", "horses"])
    assert index.document_count == 3
    with pytest.raises(
        UsageError, match=r"^doc_ids is the string 'cats'; it must be a list of ids\. Write \['cats'\]\.$"
    ):
        index.delete("cats")


def test_asking_for_a_document_that_is_not_there_is_refused(index: Index) -> None:
    for ask in (index.document, index.chunks):
        with pytest.raises(UsageError, match=r"^index 'wiki' has no document 'horses'\. Add it first\.$"):
            ask("horses")


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        ("cat", 0, r"^k is 0; a search returns at least 1 chunk\. Raise it\.$"),
        (" \n", 1, r"^the query ' \\n' is blank\. Ask something\.$"),
        ("\ud800", 1, r"^the query has U\+D800 at character 0, which is no character\. Decode it as UTF-8 first\.$"),
        ("cat " * 65, 1, r"^the query is too long for hashing$"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    index: Index, pets: list[Document], query: str, k: int, message: str
) -> None:
    index.add(pets)
    with pytest.raises(UsageError, match=message):
        index.search(query, k=k)


def test_searching_an_empty_index_is_refused(index: Index, pets: list[Document]) -> None:
    message = r"^index 'wiki' holds no document to search\. Add some first\.$"
    with pytest.raises(CorpusError, match=message):
        index.search("cat", k=1)
    index.add(pets)
    index.search("cat", k=1)
    index.delete(index.document_ids())
    with pytest.raises(CorpusError, match=message):
        index.search("cat", k=1)


def test_a_closed_index_says_so(index: Index) -> None:
    index.close()
    index.close()
    with pytest.raises(UsageError, match=r"^index 'wiki' is closed\. Open it again with Index\.open\.$"):
        index.search("cat", k=1)


@pytest.mark.parametrize(
    ("mend", "message"),
    [
        (
            lambda v: v[:, :5],
            r"^embedder 'hashing' gave vectors of shape \(1, 5\); an index needs \(1, 256\)\. Mend its embed",
        ),
        (lambda v: 2 * v, r"^embedder 'hashing' gave a vector of norm 2; an index needs unit vectors\. Normalise them"),
        (lambda v: v * np.nan, r"^embedder 'hashing' gave a vector of norm nan; an index needs unit vectors\."),
    ],
)
def test_an_embedder_that_gives_no_unit_vectors_is_refused(
    tmp_path: Path, make_embedder: type, mend: Callable, message: str
) -> None:
    class Broken(make_embedder):
        def embed(self, texts: Sequence[str], *, progress: object = None) -> np.ndarray:
            return mend(super().embed(texts))

    with Index.create(tmp_path / "i", embedder=Broken()) as index:
        with pytest.raises(UsageError, match=message):
            index.add([Document("a", "", "a")])
        assert index.document_count == 0


def test_a_second_writer_is_told_that_the_index_is_locked(index: Index, pets: list[Document]) -> None:
    with sqlite3.connect(index.path / "index.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        index._store._database.execute("PRAGMA busy_timeout = 10")
        message = (
            r"^index 'wiki' is as it was: database is locked\. Another process has held it for 600 s\. Wait for its end"
        )
        with pytest.raises(StoreError, match=message):
            index.add(pets)
        other.execute("ROLLBACK")
    other.close()
    assert index.add(pets).added == 3


def test_an_add_in_the_documents_of_an_add_is_refused_and_neither_is_done(index: Index, pets: list[Document]) -> None:
    def documents() -> Iterator[Document]:
        yield pets[0]
        index.add([pets[1]])

    with pytest.raises(UsageError, match=r"^the documents of an add come from another add to the same Index\. Open it"):
        index.add(documents())
    assert index.document_count == 0
    assert index.add(pets).added == 3


def test_readers_go_on_while_a_large_write_is_not_written_out(
    index: Index, pets: list[Document], make_embedder: type
) -> None:
    index.add(pets)
    with Index.open(index.path, embedder=make_embedder()) as reader:
        reader._store.execute("PRAGMA busy_timeout = 10")
        with index._store._write():
            index._store.execute(
                "INSERT INTO main.vector_file SELECT hex(randomblob(1000)), 0, '', 0, 0 FROM "
                "(WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n LIMIT 8000) SELECT i FROM n)"
            )  # 16 MB, many times what SQLite keeps in memory by default
            assert reader.document_count == 3
            index._store.execute("DELETE FROM main.vector_file")


def test_an_index_that_another_process_holds_is_told_as_locked_when_it_is_opened(
    index: Index, pets: list[Document], make_embedder: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(pets)
    monkeypatch.setattr("stripedrag.indexes.sqlite.TIMEOUT_S", 0.01)
    with closing(sqlite3.connect(index.path / "index.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"as an index: another process has held it for 0 s\. Wait for its end"):
            Index.open(index.path, embedder=make_embedder())


def test_a_document_that_goes_while_a_search_is_read_has_no_title(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    found = index.search("cat", k=2)
    index.delete(["cats"])
    spans = Retriever(index).fill(found, budget_tokens=1000).spans
    assert {span.doc_id: span.title for span in spans}["cats"] == ""


def test_an_add_whose_search_cannot_be_refreshed_is_done_all_the_same(
    index: Index, pets: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked() -> None:
        raise StoreError("another process")

    monkeypatch.setattr(index._searcher, "refresh", locked)
    assert index.add(pets).added == 3
    assert index.document_count == 3
