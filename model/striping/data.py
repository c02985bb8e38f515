"""Training windows: token ids of one length, and for every token what is known of it.

A window of questions is a conversation in the form in which a model is asked later: passages and a first question, its
answer, then further questions on the same passages.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

UNKNOWN, TEXT, ANSWER = 0, 1, 2  # kinds of a token: no loss, the teacher's distribution, a label; and what is none,
PADDING = 3  # at the end of a window
REFUSAL = "not in the documents"


class Text(BaseModel):
    """A document to read. Other keys of its line are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    title: str = ""
    text: str = Field(pattern=r"\S")


class Asked(BaseModel):
    """A question on a passage, and its answers, the first of which is taught; none where the passage does not say."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    source: str = ""
    title: str = ""
    passage: str = Field(pattern=r"\S")
    question: str = Field(pattern=r"\S")
    answers: tuple[str, ...] = ()
    unanswerable: bool = False

    @model_validator(mode="after")
    def _has_an_answer_or_says_so(self) -> "Asked":
        if not self.unanswerable and not (self.answers and self.answers[0].strip()):
            raise ValueError("it has no answer, or a blank first one; give one, or say unanswerable: true")
        if self.unanswerable and self.answers:
            raise ValueError("it is unanswerable and has answers; take either out")
        return self

    @property
    def taught(self) -> str:
        """The answer that a model is to give."""
        return REFUSAL if self.unanswerable else self.answers[0].strip()


@dataclass(frozen=True)
class Corpus:
    """Texts and questions to train on, and others to measure on."""

    texts: Sequence[Text]
    asked: Sequence[Asked]
    held_texts: Sequence[Text]
    held_asked: Sequence[Asked]

    def fingerprint(self) -> str:
        """The sha256 of all its lines."""
        digest = hashlib.sha256()
        for part in (self.texts, self.asked, self.held_texts, self.held_asked):
            for line in part:
                digest.update(line.model_dump_json().encode() + b"\n")
            digest.update(b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Framing:
    """The form of a conversation in ids: `head` before the first passage, `reply` between a question and its answer,
    `turn` from the end of an answer, which its first id marks, to the next question.
    """

    head: Sequence[int]
    reply: Sequence[int]
    turn: Sequence[int]
    encode: Callable[[str], list[int]]
    passage: Callable[[str, str], str]  # (title, text) → a passage as a model reads it
    question: Callable[[str], str]

    def fingerprint(self) -> bytes:
        """What tells framings apart, for the most part: all their fixed ids, and how a few words are encoded."""
        probe = self.encode(self.passage("A title", "Some words, 12 of them.") + self.question("How many?"))
        return repr([*map(list, (self.head, self.reply, self.turn)), probe, _answer(self, "12")]).encode()


def _answer(framing: Framing, answer: str) -> list[int]:
    """An answer's ids. After a space its words are the tokens that they are in a passage: copied, and not spelt."""
    return framing.encode(f" {answer}")


class Windows(NamedTuple):
    """`ids` (W, L) int32, and `kinds` (W, L) uint8 of each token: `UNKNOWN`, `TEXT`, `ANSWER` or `PADDING`."""

    ids: Tensor
    kinds: Tensor

    @property
    def answers(self) -> int:
        """How many answers the windows hold."""
        is_answer = self.kinds == ANSWER
        return int((is_answer[:, 1:] & ~is_answer[:, :-1]).sum())

    def are_whole(self, shape: tuple[int, int], vocabulary: int) -> bool:
        """Whether they have this shape, ids of a vocabulary, and kinds that there are."""
        return (
            (self.ids.shape, self.ids.dtype) == (shape, torch.int32)
            and (self.kinds.shape, self.kinds.dtype) == (shape, torch.uint8)
            and bool(((self.ids >= 0) & (self.ids < vocabulary) & (self.kinds <= PADDING)).all())
        )

    def at(self, which: slice | Tensor | list[int]) -> "Windows":
        """Some of the windows."""
        return Windows(self.ids[which], self.kinds[which])


class Piece(NamedTuple):
    """Ids that follow one another, all of a kind."""

    ids: Sequence[int]
    kind: int


def pack(windows: Iterable[list[Piece]], length: int, limit: int) -> Windows:
    """At most `limit` windows as tensors, shorter ones filled up with id 0 of kind `PADDING`."""
    rows, kinds = [], []
    for pieces in islice(windows, limit):
        row = [i for piece in pieces for i in piece.ids]
        kind = [piece.kind for piece in pieces for _ in piece.ids]
        assert len(row) <= length, (len(row), length)
        rows.append(row + [0] * (length - len(row)))
        kinds.append(kind + [PADDING] * (length - len(row)))
    return Windows(
        torch.tensor(rows, dtype=torch.int32).view(-1, length), torch.tensor(kinds, dtype=torch.uint8).view(-1, length)
    )


def text_windows(texts: Iterable[Text], framing: Framing, length: int) -> Iterator[list[Piece]]:
    """Documents one after another, cut into windows of `length`; a window begins where the last one ended."""
    pending: list[int] = []
    for document in texts:
        pending += framing.encode(framing.passage(document.title, document.text))
        while len(pending) >= length:
            yield [Piece(pending[:1], UNKNOWN), Piece(pending[1:length], TEXT)]
            del pending[:length]


class Conversations:
    """Windows of questions over passages and, between these, documents that nothing is asked about.

    Each passage comes once in a round, but one of a source in `source_shares` with that chance. Half of the passages
    come with the eight that stand beside them in `asked`, and so look alike; the others come from anywhere.
    `unanswerable` is the share of questions in whose place one is asked whose passage is not there, as far as there is
    room. After each passage comes a document with a chance of `filler`, and so on. What is asked about a passage is
    left out where it does not fit into what is left of the window. `too_long` are the passages of which that was so
    of all that is asked, in an empty window.
    """

    def __init__(
        self,
        asked: Iterable[Asked],
        texts: Sequence[Text],
        framing: Framing,
        *,
        unanswerable: float = 0.1,
        filler: float = 0.0,
        answers_only: float = 0.0,
        source_shares: Mapping[str, float] | None = None,
    ) -> None:
        grouped: dict[tuple[str, str], list[Asked]] = {}
        for one in asked:
            grouped.setdefault((one.title, one.passage), []).append(one)
        self._passages = list(grouped.values())
        self._texts = [text for text in texts if len(text.text) <= _FILLER_CHARS]
        self.framing = framing
        self._unanswerable, self._filler, self._answers_only = unanswerable, filler, answers_only
        self._source_shares = dict(source_shares or {})
        self._strays = [one for ones in self._passages for one in ones if _stands_alone(one)]
        self.too_long: set[str] = set()

    def windows(self, length: int, rng: Random) -> Iterator[list[Piece]]:
        """Windows of at most `length` tokens, round after round; none where no passage fits into one."""
        fits = True
        while fits:
            queue, fits = self._arranged(rng), False
            while queue:
                window = self._window(queue, length, rng)
                fits |= bool(window)
                if window:
                    yield window

    def _share(self, ones: list[Asked]) -> float:
        return self._source_shares.get(ones[0].source, 1.0)

    def _arranged(self, rng: Random) -> list[list[Asked]]:
        there = [ones for ones in self._passages if self._share(ones) > 0]
        coming = [ones for ones in there if (share := self._share(ones)) == 1 or rng.random() < share] or there
        runs = [coming[i : i + _RUN] for i in range(0, len(coming), _RUN)]
        rng.shuffle(runs)
        scattered = [ones for run in runs[len(runs) // 2 :] for ones in run]
        rng.shuffle(scattered)
        runs = runs[: len(runs) // 2] + [scattered[i : i + _RUN] for i in range(0, len(scattered), _RUN)]
        rng.shuffle(runs)
        return [ones for run in runs for ones in run]

    def _window(self, queue: list[list[Asked]], length: int, rng: Random) -> list[Piece]:
        """The next window; takes its passages from the end of `queue`."""
        framing = self.framing
        room = length - len(framing.head) - len(framing.turn)
        passages: list[tuple[str, list[int]]] = []
        turns: list[list[Piece]] = []
        while (taken := self._next(queue, room)) is not None:
            ones, text, ids = taken
            passages.append((text, ids))
            room -= len(ids)
            for one in rng.sample(ones, min(len(ones), _QUESTIONS)):
                turn = self._turn(one, one.taught)
                if _size(turn) <= room:
                    turns.append(turn)
                    room -= _size(turn) + len(framing.turn) - 1
            while self._texts and rng.random() < self._filler:
                document = rng.choice(self._texts)
                text = framing.passage(document.title, document.text)
                ids = framing.encode(text)
                if len(ids) > room:
                    break
                passages.append((text, ids))
                room -= len(ids)
        if not passages:
            self.too_long.add(queue.pop()[0].passage)
            return []
        rng.shuffle(passages)
        rng.shuffle(turns)
        self._add_strays(turns, "\n".join(text for text, _ in passages), room, rng)
        pieces = [Piece(framing.head, UNKNOWN), *(Piece(ids, TEXT) for _, ids in passages)]
        for number, turn in enumerate(turns):
            pieces += [Piece(framing.turn[1:], UNKNOWN), *turn] if number else turn
        if self._answers_only and rng.random() < self._answers_only:
            return [Piece(ids, kind if kind == ANSWER else UNKNOWN) for ids, kind in pieces]
        return pieces

    def _next(self, queue: list[list[Asked]], room: int) -> tuple[list[Asked], str, list[int]] | None:
        """The next of the queue's coming passages that fits with a question, taken out of the queue, and its ids."""
        for place in range(len(queue) - 1, max(-1, len(queue) - 1 - _RUN), -1):
            ones = queue[place]
            text = self.framing.passage(ones[0].title, ones[0].passage)
            ids = self.framing.encode(text)
            if len(ids) + min(_size(self._turn(one, one.taught)) for one in ones) <= room:
                del queue[place]
                return ones, text, ids
        return None

    def _add_strays(self, turns: list[list[Piece]], there: str, room: int, rng: Random) -> None:
        """Put questions that the passages do not answer in the place of some turns, as long as there is room."""
        there = there.lower()
        for place, turn in enumerate(turns) if self._strays else ():
            if rng.random() >= self._unanswerable:
                continue
            stray = rng.choice(self._strays)
            if stray.passage.lower() in there or any(answer.lower() in there for answer in stray.answers):
                continue
            asked = self._turn(stray, REFUSAL)
            if (longer := _size(asked) - _size(turn)) <= room:
                turns[place] = asked
                room -= longer

    def _turn(self, asked: Asked, answer: str) -> list[Piece]:
        framing = self.framing
        return [
            Piece(framing.encode(framing.question(asked.question)), TEXT),
            Piece(framing.reply, UNKNOWN),
            Piece([*_answer(framing, answer), framing.turn[0]], ANSWER),
        ]


_RUN = 8  # passages that stay side by side
_FILLER_CHARS = 4_000  # longer documents do not stand between passages
_QUESTIONS = 12  # at most so many on a passage in one window


def _size(pieces: list[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _stands_alone(asked: Asked) -> bool:
    """Whether a question names what it is about, so that it makes sense where its passage is not."""
    names = sum(word[0].isupper() or word[0].isdigit() for word in asked.question.split()[1:])
    return names >= 1 and not asked.unanswerable and asked.answers[0].lower() not in {"yes", "no", "maybe"}
