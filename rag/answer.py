"""What an answer consists of, and which characters of the context support it."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from stripedrag.rag.packing import Context, Span

SCHEMA_VERSION = 3
_MAX_CITATIONS = 3
_MIN_SUPPORT = 0.5  # the share of an answer's words that its best sentence must hold to be cited
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s|$)|(?=\n)|\Z)", re.DOTALL)
_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(
    "a an and are as at be by did do does for from had has have he her his how in is it its of on or she that the "
    "their they this to was were what when where which who whom whose why will with".split()
)


LimitedBy = Literal["asked", "window", "memory"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Citation(_Record):
    """A passage that supports the answer: `quote` stands at [start, end) in the document's text."""

    doc_id: str
    start: int
    end: int
    quote: str


class Usage(_Record):
    """Tokens by the model's tokenizer. `context_tokens` is what prompt and answer together were allowed, by the caller,
    the model's window or the free memory; `reused_tokens` of the prompt were read for an earlier question.
    """

    prompt_tokens: int
    reused_tokens: int
    passage_tokens: int
    answer_tokens: int
    context_tokens: int
    limited_by: LimitedBy


class Timings(_Record):
    """Wall seconds of each stage, loading of models excluded. Of what questions did together each has its share."""

    retrieval_s: float
    prefill_s: float
    decode_s: float


class Warmed(_Record):
    """What `Pipeline.warm` read: tokens of the context, how many of them were known, and bytes of its cache."""

    tokens: int
    reused_tokens: int
    seconds: float
    cache_bytes: int


class Answer(_Record):
    """An answer, what it rests on, and what it cost.

    `prompt` is what the model read, chat template and all, as its tokenizer writes it; `prompt_template_sha256` is that
    of the words around passages and question. `found` is False where the answer is that the documents hold none, and
    there are no citations then. `finish` says whether the model ended or the limit did.
    """

    schema_version: int = SCHEMA_VERSION
    question: str
    text: str
    found: bool
    citations: tuple[Citation, ...]
    context: Context
    model: str
    prompt: str
    prompt_template_sha256: str
    finish: Literal["stop", "length"]
    usage: Usage
    timings: Timings
    cache_bytes: int


def cite(answer: str, question: str, spans: Sequence[Span]) -> tuple[Citation, ...]:
    """The sentences of `spans` that hold the answer's words, best first; none where no sentence holds half of them.

    A sentence counts by the answer's words that it holds and that no sentence before it did; the question's words
    break ties, then the order of the spans. It must hold one of the question's words too, or its passage's title must:
    "three" stands in many sentences that have nothing to do with what was asked. Words are compared without case;
    function words are left out.
    """
    wanted, asked = _words(answer), _words(question)
    candidates = []
    for span in spans:
        about = asked & _words(span.title)
        for citation in _sentences(span):
            words = _words(citation.quote)
            if about or words & asked:
                candidates.append((citation, words))
    chosen: list[Citation] = []
    missing = wanted
    while candidates and missing and len(chosen) < _MAX_CITATIONS:
        best, words = max(candidates, key=lambda c: (len(c[1] & missing), len(c[1] & asked)))
        support = len(words & missing)
        if support == 0 or (not chosen and support < _MIN_SUPPORT * len(wanted)):
            break
        chosen.append(best)
        missing = missing - words
    return tuple(chosen)


def _sentences(span: Span) -> Iterator[Citation]:
    for match in _SENTENCE.finditer(span.text):
        start, end = span.start + match.start(), span.start + match.end()
        yield Citation(doc_id=span.doc_id, start=start, end=end, quote=match.group())


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower())) - _STOP_WORDS
