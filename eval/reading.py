"""How a language model reads a question: the product's prompt, its window, and what is cut where a task allows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stripedrag.eval.places import holds
from stripedrag.eval.resources import span_of
from stripedrag.eval.schema import Overflow, Passage, Question

if TYPE_CHECKING:
    from stripedrag.rag.prompt import PromptFormat


class DoesNotFitError(Exception):
    """A prompt that is longer than the window, under a policy that cuts nothing."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids of a prompt, its passages, how many tokens of them were cut, and whether their evidence survived that."""

    ids: list[int]
    passages: tuple[Passage, ...]
    cut_tokens: int
    gold_survived: bool | None


def read(
    prompt: "PromptFormat", question: Question, *, answer_tokens: int, window_tokens: int, overflow: Overflow
) -> Prompt:
    """The prompt for a question, within the window less the answer's reserve.

    Cuts whole tokens of the passages, from where `overflow` says, the least that will do. Raises `DoesNotFitError`
    with the numbers where `overflow` is "refuse", or where it does not fit without any passage either.
    """
    passages, cut = question.passages, 0
    ids = prompt.ids(question.asked, [span_of(passage) for passage in passages])
    while (excess := len(ids) + answer_tokens - window_tokens) > 0:
        if overflow == "refuse" or not passages:
            raise DoesNotFitError(
                f"{len(ids)} tokens of prompt and {answer_tokens} of answer; the window has {window_tokens}"
            )
        # Tokens next to a cut can join otherwise than before, so a second round may have a few left to cut.
        kept = _cut(prompt, passages, excess, overflow)
        cut += _tokens(prompt, passages) - _tokens(prompt, kept)
        passages = kept
        ids = prompt.ids(question.asked, [span_of(passage) for passage in passages])
    survived = holds(passages, question.evidence) if question.evidence_in_context else None
    return Prompt(ids, passages, cut, survived)


def _tokens(prompt: "PromptFormat", passages: Sequence[Passage]) -> int:
    return sum(len(prompt.encode(passage.text)) for passage in passages)


def _cut(prompt: "PromptFormat", passages: Sequence[Passage], excess: int, overflow: Overflow) -> tuple[Passage, ...]:
    """The passages without `excess` tokens (or all of them, if they have fewer), taken from where `overflow` says."""
    offsets = [prompt.offsets(passage.text) for passage in passages]
    total = sum(map(len, offsets))
    excess = min(excess, total)
    first = {"cut-start": 0, "cut-end": total - excess}.get(overflow, (total - excess) // 2)
    kept: list[Passage] = []
    at = 0
    for passage, places in zip(passages, offsets, strict=True):
        # Of this passage's tokens [0, n), those before `first` and those from `first + excess` on are kept.
        head, tail = min(max(first - at, 0), len(places)), min(max(first + excess - at, 0), len(places))
        for begin, end in ((0, head), (tail, len(places))) if head < tail else ((0, len(places)),):
            if begin < end:
                kept.append(_part(passage, places[begin][0], places[end - 1][1]))
        at += len(places)
    return tuple(kept)


def _part(passage: Passage, start: int, end: int) -> Passage:
    return passage.model_copy(
        update={"start": passage.start + start, "end": passage.start + end, "text": passage.text[start:end]}
    )
