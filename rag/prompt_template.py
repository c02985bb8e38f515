"""The words around passages and question: a TOML file, `prompt.toml` by default, that a user can replace.

Knows neither tokens nor chat templates: `stripedrag.rag.prompt` puts the pieces into those.
"""

import hashlib
import tomllib
from functools import cache
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from stripedrag.errors import UsageError

if TYPE_CHECKING:
    from stripedrag.rag.packing import Span


def _holding(*names: str, optional: tuple[str, ...] = ()) -> AfterValidator:
    """A check that a text has each of `names` in braces, may have `optional` ones, and no others."""

    def check(text: str) -> str:
        fields = [
            (name, spec or conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None
        ]
        found = [name for name, _ in fields]
        if formatted := [name for name, form in fields if form]:
            raise ValueError(
                f"it formats {{{formatted[0]}}}; texts are filled in as they are. Leave out what follows it"
            )
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"it lacks {{{missing[0]}}}")
        if strange := [name for name in found if name not in (*names, *optional)]:
            known = " and ".join(f"{{{name}}}" for name in (*names, *optional))
            raise ValueError(f"it has {{{strange[0]}}}, and {known} alone can be filled in; write braces twice")
        return text

    return AfterValidator(check)


class PromptTemplate(BaseModel):
    """The pieces of a prompt, see `prompt.toml`. Texts that are filled in are taken as they are, braces and all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: str = ""
    passage: Annotated[str, _holding("text", optional=("title",))]
    question: Annotated[str, _holding("question")]
    reply: str = ""

    @classmethod
    def read(cls, file: str | Path) -> Self:
        """The template of a file. Raises `UsageError` where it cannot be read or is none, naming what is wrong."""
        try:
            return cls.model_validate(tomllib.loads(Path(file).read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise UsageError(f"the prompt file {str(file)!r} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            raise UsageError(f"the prompt file {str(file)!r} has a wrong {where!r}: {what}") from error
        except ValueError as error:  # of TOML, and of UTF-8
            raise UsageError(f"the prompt file {str(file)!r} is no TOML: {error}") from error

    @property
    def sha256(self) -> str:
        """Hexadecimal sha256 of what the template says; a comment in its file changes nothing."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def passage_text(self, title: str, text: str) -> str:
        """A passage as a model reads it."""
        return self.passage.format(title=title, text=text.strip())

    def render(self, span: "Span") -> str:
        """A span as a model reads it."""
        return self.passage_text(span.title, span.text)

    def question_text(self, question: str) -> str:
        """A question as a model reads it."""
        return self.question.format(question=question.strip())


@cache
def default_template() -> PromptTemplate:
    """The one of `prompt.toml` beside this file."""
    return PromptTemplate.read(Path(__file__).with_name("prompt.toml"))
