"""Striping as it is asked for: files of texts and questions, which the model reads in the form in which it is asked."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from stripedrag.errors import CorpusError, UsageError
from stripedrag.jsonl import read_lines
from stripedrag.model.baselines import template_options
from stripedrag.model.striping.data import Asked, Corpus, Framing, Text
from stripedrag.rag.prompt import ChatFormat
from stripedrag.rag.prompt_template import default_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def framing(tokenizer: "PreTrainedTokenizerBase", name: str) -> Framing:
    """The pipeline's way to ask the model `name`, as ids. Raises `UsageError` for a tokenizer without an end token."""
    chat, words = ChatFormat(tokenizer, template_options(name)), default_template()
    if chat.has_template:
        head, reply, turn, _ = chat.template_ids(["user", "assistant", "user"])
    elif tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {name!r} has neither a chat template nor an end token to teach")
    else:
        head, reply = chat.first_ids, chat.inner_ids(words.reply)
        turn = [tokenizer.eos_token_id, *chat.inner_ids("\n\n")]
    head = [*head, *chat.inner_ids(words.begin)]
    return Framing(head, reply, turn, encode=chat.inner_ids, passage=words.passage_text, question=words.question_text)


def read_corpus(data: Iterable[Path], held_out: Iterable[Path]) -> Corpus:
    """Files of texts and of questions, told apart by the first line's keys; `held_out` are those to measure on.

    Raises `CorpusError` for a file that cannot be read, where texts or questions to measure on are lacking, and for
    what stands on both sides as a whole text or passage.
    """
    texts, asked = _read(data)
    held_texts, held_asked = _read(held_out)
    if not texts or not held_texts:
        raise CorpusError("striping needs texts to train on and others to measure on; give files whose lines have text")
    if not asked or not held_asked:
        raise CorpusError(
            "striping needs questions to train on and others to measure on; give files whose lines have passage, "
            "question and answers"
        )
    if seen := sorted(_read_in(texts, asked) & _read_in(held_texts, held_asked)):
        raise CorpusError(
            f"{len(seen)} held-out texts and passages are also among those to train on, the first {seen[0][:60]!r}; "
            "leave them out of either"
        )
    return Corpus(texts, asked, held_texts, held_asked)


def _read_in(texts: Iterable[Text], asked: Iterable[Asked]) -> set[str]:
    """What a model reads, whatever the spaces."""
    return {" ".join(text.split()) for text in (*(one.text for one in texts), *(one.passage for one in asked))}


class Record(BaseModel):
    """A line of either kind."""

    model_config = ConfigDict(extra="ignore")

    question: Any = None


def _read(files: Iterable[Path]) -> tuple[list[Text], list[Asked]]:
    texts: list[Text] = []
    asked: list[Asked] = []
    for path in files:
        if path.exists() and not path.is_file():
            raise CorpusError(f"{path} is no file that can be read again; write it to one")
        first = next(iter(read_lines(path, Record)), None)
        if first is None:
            raise CorpusError(f"{path} is empty")
        if "question" in first.model_fields_set:
            asked += read_lines(path, Asked)
        else:
            texts += read_lines(path, Text)
    return texts, asked
