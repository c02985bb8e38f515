"""How a search ranks: by words, by meaning, by both; what filters let through; what it returns."""

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stripedrag.errors import UsageError
from stripedrag.indexes import Document, Index, fusion, search
from stripedrag.indexes.fusion import FLOOR, MEANING, combined
from stripedrag.indexes.lexical import DECAY, K1, REACH, TITLE, words


def ids(index: Index, query: str, **options: object) -> list[str]:
    return [scored.chunk.doc_id for scored in index.search(query, k=100, **options)]


@pytest.fixture
def small_chunks(tmp_path: Path, make_embedder: type) -> Index:
    """Passages of 64 wordpieces, chunks of 32."""
    with Index.create(tmp_path / "small", embedder=make_embedder(), chunk_tokens=32) as index:
        yield index


def test_lexical_scores_are_those_of_the_formula(small_chunks: Index) -> None:
    texts = {
        "a": "zebra " + "x " * 29 + ". " + "y " * 30 + ". " + "zebra " * 5 + "w " * 25 + ". " + "v " * 30 + ".",
        "b": "nothing here " * 40,
        "c": "quagga " + "q " * 20,
    }
    small_chunks.add([Document(name, "Zebra crossing" if name == "b" else "", text) for name, text in texts.items()])
    chunks = {name: small_chunks.chunks(name) for name in texts}
    n = len(small_chunks)
    holds = {name: ["zebra" in chunk.text for chunk in chunks[name]] for name in texts}
    holding = sum(map(sum, holds.values()))
    idf = math.log(1 + (n - holding + 0.5) / (holding + 0.5))
    expected = {}
    for name in texts:
        for at, chunk in enumerate(chunks[name]):
            near = sum(math.exp(-abs(at - other) / DECAY) for other, held in enumerate(holds[name]) if held)
            near += TITLE * (name == "b")
            expected[chunk.id] = idf * near * (K1 + 1) / (near + K1)
    found = {scored.chunk.id: scored.score for scored in small_chunks.search("zebras", k=100, method="lexical")}
    assert found == pytest.approx({chunk: score for chunk, score in expected.items() if score})
    assert len(chunks["a"]) > 2 and not any(chunk.startswith("c#") for chunk in found)


def test_a_word_is_felt_as_far_as_its_reach_and_not_in_another_document(small_chunks: Index) -> None:
    filler = "".join(f"word{n} and so on it goes. " for n in range(400))
    small_chunks.add([Document("a", "", filler), Document("b", "", f"zebra. {filler}"), Document("c", "", filler)])
    found = small_chunks.search("zebra", k=100, method="lexical")
    assert [scored.chunk for scored in found] == small_chunks.chunks("b")[: REACH + 1]
    assert [scored.score for scored in found] == sorted((scored.score for scored in found), reverse=True)


def test_a_word_is_found_by_its_stem_and_without_its_accents_or_marks(index: Index) -> None:
    index.add([Document("a", "", "The café was connected."), Document("b", "", "Nothing."), Document("c", "", "xyz")])
    for query in ("CAFE", "cafés!", "connection", 'what "connects" (it)?', "cafe OR", "connecting*", "NEAR(x) connect"):
        assert ids(index, query, method="lexical") == ["a"], query
    assert ids(index, "bananas", method="lexical") == []


def test_words_that_are_held_by_the_same_chunks_each_count(index: Index) -> None:
    cakes, curie = Document("a", "", "A bakery sells radium cakes."), Document("b", "", "Marie Curie was a physicist.")
    index.add([cakes, curie])
    (best, other) = index.search("Marie Curie, curies radium", k=5, method="lexical")
    assert (best.chunk.doc_id, best.score) == ("b", pytest.approx(2 * other.score))


def test_the_order_of_a_query_does_not_matter(index: Index) -> None:
    index.add([Document("a", "", "alpha beta."), Document("b", "beta", "alpha gamma."), Document("c", "", "others")])
    rankings = [index.search(" ".join(order), k=5) for order in permutations(("alpha", "beta", "gamma", "others"))]
    assert all(ranking == rankings[0] for ranking in rankings)


def test_the_words_of_a_query_are_letters_and_digits() -> None:
    assert words("What's C++'s “x_1”-Naïve re\u0301sume\u0301 x_1 WHAT?") == [
        "What",
        "s",
        "C",
        "x",
        "1",
        "Naïve",
        "résumé",
        "WHAT",
    ]


def test_a_word_that_the_store_splits_finds_nothing_and_breaks_nothing(index: Index) -> None:
    """New Tai Lue: SQLite takes its vowels for marks."""
    index.add([Document("a", "", "the cat sat"), Document("b", "", "nothing")])
    assert ids(index, "\u198f\u19b5\u199f cat", method="lexical") == ["a"]


@pytest.mark.parametrize("unit", ["chunk", "passage"])
def test_a_smaller_k_gives_the_head_of_a_deep_ranking_too(
    small_chunks: Index, pets: list[Document], unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "FLOOR", 5)
    monkeypatch.setattr(search, "FLOOR", 5)
    small_chunks.add(pets)
    everything = small_chunks.search("seven words of homework", k=100, unit=unit)
    for k in range(1, 6):
        assert small_chunks.search("seven words of homework", k=k, unit=unit) == everything[:k]
    scores = [scored.score for scored in everything]
    assert scores == sorted(scores, reverse=True) and len(everything) > 5


def test_words_in_nearly_every_chunk_are_left_out(index: Index) -> None:
    index.add(Document(f"d{n:04}", "", f"the {'rare' if n == 7 else 'usual'} thing number{n}") for n in range(1100))
    assert ids(index, "the rare thing", method="lexical") == ["d0007"]
    assert ids(index, "the usual thing", method="lexical") == []
    assert len(index.search("the usual thing", k=1100)) == 1100  # by meaning


def test_a_score_is_of_both_meaning_and_words(index: Index, pets: list[Document]) -> None:
    index.add(pets)
    dense, lexical = (index.search("the homework dog", k=100, method=method) for method in ("dense", "lexical"))
    best, worst = dense[0].score, dense[-1].score
    expected = {scored.chunk.id: MEANING * (scored.score - worst) / (best - worst) for scored in dense}
    for scored in lexical:
        expected[scored.chunk.id] += (1 - MEANING) * scored.score / lexical[0].score
    both = index.search("the homework dog", k=100)
    assert {scored.chunk.id: scored.score for scored in both} == pytest.approx(expected, abs=1e-6)
    assert both[0].chunk.doc_id == "dogs" and both[0].score == pytest.approx(1)


@given(
    st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=20),
    st.lists(st.floats(0, 50, width=16), min_size=20, max_size=20),
    st.randoms(),
)
def test_a_combined_score_is_one_at_most_and_more_words_or_meaning_never_lower_it(cosines, lexical, random) -> None:
    near = np.array(random.sample(range(20), len(cosines)))
    cosines = np.array(sorted(cosines, reverse=True), dtype=np.float32)
    words = np.array(lexical, dtype=np.float32)
    scores = combined(near, cosines, words)
    assert scores.max() <= 1 + 1e-6
    assert set(np.flatnonzero(scores > -np.inf)) == set(near) | set(np.flatnonzero(words))
    assert np.all(np.diff(combined(near, cosines, np.zeros_like(words))[near]) <= 0)
    worded = np.argsort(words)[np.count_nonzero(words == 0) :]
    assert np.all(np.diff(combined(near[:0], cosines[:0], words)[worded]) >= 0)


def test_a_cosine_below_the_floor_counts_as_an_unknown_one_where_there_are_words() -> None:
    near = np.arange(FLOOR + 2)
    cosines = np.linspace(0.9, 0.1, len(near), dtype=np.float32)
    words = np.zeros(FLOOR + 3, dtype=np.float32)
    words[[0, -2, -1]] = 4, 2, 2  # the best by both; below the floor; not near at all
    scores = combined(near, cosines, words)
    assert scores[0] == 1 and scores[-2] == scores[-1] == pytest.approx((1 - MEANING) / 2)
    assert scores[FLOOR] < scores[FLOOR - 1] == 0  # without words the cosine alone tells


def test_cosines_that_hardly_differ_hardly_tell_apart() -> None:
    scores = combined(np.arange(3), np.float32([0.35, 0.3499, 0.3498]), np.float32([0, 0, 5]))
    assert scores == pytest.approx([MEANING, MEANING, 1], abs=0.002)
    assert combined(np.arange(1), np.float32([0.2]), np.float32([3])) == [1]


@pytest.mark.parametrize("unit", ["chunk", "passage"])
def test_a_smaller_k_gives_the_head_of_the_same_ranking(small_chunks: Index, pets: list[Document], unit: str) -> None:
    small_chunks.add(pets)
    everything = small_chunks.search("seven words of homework", k=100, unit=unit)
    for k in range(1, len(everything)):
        assert small_chunks.search("seven words of homework", k=k, unit=unit) == everything[:k]


def test_passages_are_ranked_by_their_best_chunk(small_chunks: Index, pets: list[Document]) -> None:
    small_chunks.add(pets)
    chunks = small_chunks.search("sentence number 40", k=100)
    passages = small_chunks.search("sentence number 40", k=100, unit="passage")
    assert [scored.rank for scored in passages] == list(range(1, len(passages) + 1))
    assert sum(len(scored.chunk.text) for scored in passages) == sum(len(document.text) for document in pets)
    left = [(scored.chunk.doc_id, scored.chunk.start, scored.chunk.end, scored.score) for scored in passages]
    for scored in chunks:  # the first chunk of each passage comes in the passages' order, with its score
        inside = [p for p in left if p[0] == scored.chunk.doc_id and p[1] <= scored.chunk.start < p[2]]
        if inside:
            assert inside[0] == left[0] and inside[0][3] == scored.score
            left.remove(inside[0])
    assert left == []
    for scored in passages:
        document = small_chunks.document(scored.chunk.doc_id)
        assert scored.chunk.text == document.text[scored.chunk.start : scored.chunk.end]


@pytest.fixture
def dated(index: Index) -> Index:
    metadata: dict[str, dict] = {
        "old": {"year": 1950, "kind": "book", "good": True},
        "new": {"year": 2020, "kind": "book", "none": None},
        "half": {"year": 1999.5, "kind": "news", "good": False},
        "odd": {"year": "unknown"},
        "bare": {},
    }
    index.add(Document(name, "", f"the word {name}", fields) for name, fields in metadata.items())
    return index


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, {"old", "new", "half", "odd", "bare"}),
        ({"year": 1950}, {"old"}),
        ({"year": 1950.0}, {"old"}),
        ({"year": "1950"}, set()),
        ({"kind": "book", "year": {"$gt": 1950}}, {"new"}),
        ({"year": {"$gte": 1950, "$lt": 2000}}, {"old", "half"}),
        ({"year": {"$lte": 1950}}, {"old"}),
        ({"year": {"$gt": "a"}}, {"odd"}),
        ({"year": ["unknown", 2020]}, {"new", "odd"}),
        ({"year": []}, set()),
        ({"year": {"$nin": ["unknown", 2020]}}, {"old", "half", "bare"}),
        ({"kind": {"$ne": "book"}}, {"half", "odd", "bare"}),
        ({"kind": {"$in": ("news",)}}, {"half"}),
        ({"year": [*range(1000, 3000)]}, {"old", "new"}),
        ({"year": [2020, None]}, {"new"}),
        ({"none": ["x", None]}, {"new"}),
        ({"good": [1, "book"]}, {"old"}),
        ({"year": {"$gt": 10**20}}, set()),
        ({"year": {"$lt": 10**20}}, {"old", "new", "half"}),
        ({"good": True}, {"old"}),
        ({"none": None}, {"new"}),
        ({"absent": 1}, set()),
        ({"'; DROP TABLE documents; --": 1}, set()),
    ],
)
def test_filters_by_metadata(dated: Index, where: dict, expected: set[str]) -> None:
    for method in ("hybrid", "dense", "lexical"):
        assert set(ids(dated, "the word", where=where, method=method)) == expected


def test_filters_by_document(dated: Index) -> None:
    assert set(ids(dated, "the word", doc_ids=["old", "bare", "old"])) == {"old", "bare"}
    assert ids(dated, "the word", doc_ids=["old", "new"], where={"year": 2020}) == ["new"]
    assert ids(dated, "the word", doc_ids=[]) == []
    with pytest.raises(UsageError, match=r"^index 'wiki' has no document 'horses'\. Add it first\.$"):
        dated.search("the word", k=1, doc_ids=["old", "horses"])
    with pytest.raises(
        UsageError, match=r"^doc_ids is the string 'old'; it must be a list of ids\. Write \['old'\]\.$"
    ):
        dated.search("the word", k=1, doc_ids="old")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "year"}, r"^where is 'year'; it must map names of metadata to values\. Write \{'year': 1990\}\.$"),
        ({"where": {"year": {"gt": 1}}}, r"^where has 'gt' for 'year'; choose one of \$eq, \$gt, .*\$nin$"),
        (
            {"where": {"year": {"$gt": [1]}}},
            r"^where has \[1\] for 'year'; \$gt takes a string, a number, a bool or",
        ),
        (
            {"where": {"year": {"$in": 5}}},
            r"^where has 5 for 'year'; \$in takes a list of strings and numbers",
        ),
        ({"where": {"year": [{}]}}, r"^where has \[\{\}\] for 'year'; \$in takes a list"),
        ({"where": {"year": {}}}, r"^where has no condition for 'year'\. Leave the name out"),
        ({"where": {("a", "b"): 1}}, r"^where has the name \('a', 'b'\); names of metadata are strings"),
        ({"where": {"\ud800": 1}}, r"^where has U\+D800 at character 0 of "),
        ({"where": {"year": ["x", "\ud800"]}}, r"^where has U\+D800 at character 0 of "),
        ({"where": {f"n{n}": n for n in range(101)}}, r"^where has 101 names; the limit is 100\. Ask for fewer\.$"),
        ({"doc_ids": ["\ud800"]}, r"^index 'wiki' has no document '\\ud800'|^'\\ud800' has U\+D800 at character 0"),
        ({"where": {"year": {"$lt": float("inf")}}}, r"^where has inf for 'year'; numbers in an index are finite"),
        ({"where": {"year": [1, float("nan")]}}, r"^where has nan for 'year'; numbers in an index are finite"),
        ({"method": "bm25"}, r"^no method 'bm25'; choose one of hybrid, dense, lexical$"),
        ({"unit": "page"}, r"^no unit 'page'; choose one of chunk, passage$"),
    ],
)
def test_what_is_no_search_is_refused(dated: Index, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dated.search("the word", k=1, **options)


def test_as_many_names_as_a_filter_may_have_are_asked(dated: Index) -> None:
    operators = {"$ne": 1, "$nin": [2], "$eq": "x", "$in": ["x"], "$gt": "a", "$gte": "a", "$lt": "z", "$lte": "z"}
    assert dated.search("the word", k=1, where={f"n{n}": operators for n in range(100)}) == []


@pytest.mark.parametrize("query", ["İstanbul", "istanbul", "ISTANBUL", "I\u0307stanbul"])
def test_a_word_is_found_whose_lower_case_is_longer(index: Index, query: str) -> None:
    index.add([Document("a", "", "İstanbul is a city by the Bosphorus."), Document("b", "", "Oslo is one, too.")])
    assert ids(index, query, method="lexical") == ["a"]


def test_of_a_changed_document_only_the_new_passages_are_embedded(index: Index, embedder: object) -> None:
    paragraphs = [" ".join(f"w{p}x{n}" for n in range(40)) + ".\n\n" for p in range(20)]
    index.add([Document("d", "Title", "".join(paragraphs))])
    embedder.embedded.clear()
    paragraphs[12] = "Something else altogether.\n\n"
    report = index.add([Document("d", "Title", "".join(paragraphs))])
    assert (report.updated, report.passages) == (1, len(embedder.embedded))
    assert 0 < report.passages < 5
    assert index.document("d").text == "".join(paragraphs)
    best = index.search("something else altogether", k=1)[0]
    assert "Something else altogether." in best.chunk.text
    index.add([Document("d", "Another title", "".join(paragraphs))])  # which stands above all of them
    assert all(text.startswith("Another title\n") for text in embedder.embedded[report.passages :])
    assert len(embedder.embedded) - report.passages >= 19


def test_a_long_title_leaves_room_for_the_passage(index: Index, embedder: object) -> None:
    index.add([Document("d", "many words " * 50, "The text itself. " * 40)])
    titles = {text.split("\n")[0] for text in embedder.embedded}
    assert titles == {"many words " * 7 + "many"}
    assert index.document("d").title == "many words " * 50


def test_a_changed_metadata_costs_no_embedding(index: Index, embedder: object, contents: Callable) -> None:
    index.add([Document("d", "T", "Text.", {"year": 1})])
    embedder.embedded.clear()
    assert index.add([Document("d", "T", "Text.", {"year": 2})]).passages == 0
    assert embedder.embedded == []
    assert ids(index, "text", where={"year": 2}) == ["d"]
    assert ids(index, "text", where={"year": 1}) == []
