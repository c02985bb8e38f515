"""Reads documents from a file or a folder: .txt, .md, .html, .pdf, .docx and .jsonl.

Contract: the same path gives the same documents in the same order, and no text is left out silently: what a folder
holds beside documents, a line of a .jsonl that is none and a page of a .pdf that cannot be read are told as `Skipped`.
Text is UTF-8; its line ends are kept, a byte order mark is not part of it. A document's id is its path from the root
that was given (with `/`), or the `id` of its line in a .jsonl, whose further keys become metadata where their values
are scalars.
Limits: files and folders whose names start with a dot, and linked folders, are not part of a corpus. A file is read
as a whole, a .jsonl line by line. What of a .pdf or a .docx is its text is said in `pdf_text` and `docx_text`.
"""

import json
import math
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stripedrag.errors import CorpusError
from stripedrag.indexes import docx_text, html_text, pdf_text
from stripedrag.indexes.documents import Document, Scalar


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file, or a document, a line or pages of it, that was left out, and why."""

    path: Path
    reason: str


Reader = Callable[[Path, str], Iterator[Document | Skipped]]


class _UnreadableError(CorpusError):
    """A file that is no document: an error where it was named, told as skipped where a folder holds it."""


class _BadLineError(CorpusError):
    """A line of a .jsonl that is no document: told as skipped."""


def read_documents(path: str | Path, *, skipped: list[Skipped] | None = None) -> Iterator[Document]:
    """The documents of a file or of a folder and those below it, sorted by path.

    What is left out is appended to `skipped` as reading goes on; where that is None, it is told by `warnings`. Raises
    `CorpusError` at once for a missing path, and on the way for a file named here that cannot be read, an id that comes
    twice, and a path without a single document.
    """
    root = Path(path)
    try:
        root.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = getattr(error, "strerror", None) or str(error)
        raise CorpusError(f"cannot read {str(root)!r}: {reason}. Check the path.") from error
    if root.is_dir():
        files = [(file, file.relative_to(root).as_posix()) for file in _files_below(root)]
    else:
        files = [(root, root.name)]
    return _documents(root, files, skipped)


def _documents(root: Path, files: list[tuple[Path, str]], skipped: list[Skipped] | None) -> Iterator[Document]:
    origin: dict[str, Path] = {}
    left_out: list[Skipped] = []

    def skip(path: Path, reason: str) -> None:
        left_out.append(Skipped(path, reason))
        if skipped is None:
            warnings.warn(f"skipped {path}: {reason}", stacklevel=3)
        else:
            skipped.append(left_out[-1])

    for file, name in files:
        try:
            for document in _reader(file, name)(file, name):
                if isinstance(document, Skipped):
                    skip(document.path, document.reason)
                    continue
                if not document.text.strip():
                    skip(file, f"document {document.id!r} holds only white space")
                    continue
                if document.id in origin:
                    raise CorpusError(
                        f"two documents have the id {document.id!r} (in {origin[document.id]} and in {file}). "
                        f"Make the ids unique."
                    )
                origin[document.id] = file
                yield document
        except _UnreadableError as error:
            if file == root:
                raise CorpusError(f"cannot read {file}: {error}") from error
            skip(file, str(error))
    if not origin:
        first = f"{left_out[0].path}, {left_out[0].reason.removesuffix('.')}" if left_out else ""
        told = f"; the first of {len(left_out)} skipped: {first}" if left_out else ""
        raise CorpusError(f"{root} holds no document{told}. Give it a {_KINDS} file with text in it.")


def _files_below(root: Path) -> list[Path]:
    files = []
    for folder, names_of_folders, names in os.walk(root, onerror=_refuse_folder):
        names_of_folders[:] = [name for name in names_of_folders if not name.startswith(".")]
        linked = [name for name in names_of_folders if Path(folder, name).is_symlink()]  # are told, and not entered
        files += [Path(folder, name) for name in (*names, *linked) if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _refuse_folder(error: OSError) -> None:
    raise CorpusError(f"cannot read the folder {error.filename}: {error.strerror}. Mend its permissions.") from error


def _reader(file: Path, name: str) -> Reader:
    if not name.isprintable():  # bytes that are not UTF-8 come as lone surrogates, which cannot be an id
        raise _UnreadableError(f"its path {name!r} has characters that cannot be printed. Rename it.")
    if file.is_symlink() and file.is_dir():
        raise _UnreadableError("it is a link to a folder. Index that folder, too, or copy it here.")
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise _UnreadableError(f"its type {file.suffix!r} is not one of {_KINDS}. Convert it to one of them.")
    try:
        is_file = file.is_file()
    except OSError as error:  # a folder that may be listed and not entered
        raise _UnreadableError(f"{error.strerror}. Mend its permissions.") from error
    if not is_file:  # a link to nothing, or a pipe that would block for ever
        raise _UnreadableError("it is no regular file. Put a file in its place.")
    return reader


def _read_txt(file: Path, name: str) -> Iterator[Document]:
    yield Document(id=name, title=file.stem, text=_decoded(file))


def _read_markdown(file: Path, name: str) -> Iterator[Document]:
    text = _decoded(file)
    yield Document(id=name, title=_first_heading(text) or file.stem, text=text)


def _read_html(file: Path, name: str) -> Iterator[Document]:
    from bs4.exceptions import ParserRejectedMarkup

    try:
        title, text = html_text.title_and_text(_decoded(file))
    except ParserRejectedMarkup as error:
        raise _UnreadableError("its HTML has a declaration `<![…]>` that cannot be parsed. Remove it.") from error
    yield Document(id=name, title=title or file.stem, text=text)


def _read_pdf(file: Path, name: str) -> Iterator[Document | Skipped]:
    pdf = _contents(file)
    try:
        title, text, gaps = pdf_text.title_text_and_gaps(pdf)
    except CorpusError as error:
        raise _UnreadableError(str(error)) from error
    yield from (Skipped(file, gap) for gap in gaps)
    yield Document(id=name, title=_sensible(title) or file.stem, text=text)


def _read_docx(file: Path, name: str) -> Iterator[Document]:
    docx = _contents(file)
    try:
        titles, text = docx_text.titles_and_text(docx)
    except CorpusError as error:
        raise _UnreadableError(str(error)) from error
    yield Document(id=name, title=next(filter(None, map(_sensible, titles)), file.stem), text=text)


def _read_jsonl(file: Path, name: str) -> Iterator[Document | Skipped]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document_or_skipped(line, file, number)
    except OSError as error:
        raise _UnreadableError(f"{error.strerror}. Mend its permissions.") from error


def _document_or_skipped(line: bytes, file: Path, number: int) -> Document | Skipped:
    try:
        return _document_of_line(line)
    except _BadLineError as error:
        return Skipped(file, f"line {number}: {error}")


def _document_of_line(line: bytes) -> Document:
    try:
        fields = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(fields, ensure_ascii=False).encode()  # raises for an escape like \ud800, which is no character
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not one JSON object in UTF-8 ({error}). Mend or remove the line.") from error
    if not isinstance(fields, dict):
        raise _BadLineError(f"the line is a JSON {type(fields).__name__}; it must be an object. Mend the line.")
    strings = {"id": fields.pop("id", None), "text": fields.pop("text", None), "title": fields.pop("title", None)}
    strings["title"] = strings["id"] if strings["title"] is None else strings["title"]
    for key, value in strings.items():
        if not isinstance(value, str) or (key == "id" and not value):
            wanted = "a string that is not empty" if key == "id" else "a string"
            raise _BadLineError(f"{key!r} is {reprlib.repr(value)}; it must be {wanted}. Mend the line.")
        if key == "id" and "\0" in value:
            raise _BadLineError("'id' has a NUL character. Mend the line.")
    metadata: dict[str, Scalar] = {
        key: value for key, value in fields.items() if isinstance(value, str | int | float | bool | None)
    }
    return Document(**strings, metadata=metadata)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is beyond the largest number of 64 bits")
    return value


def _decoded(file: Path) -> str:
    """The file's text; raises where it is not text. Line ends stay as they are, so offsets are those of the file."""
    try:
        text = _contents(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnreadableError(
            f"it is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}). "
            f"Convert it to UTF-8."
        ) from error
    if "\0" in text:
        raise _UnreadableError(f"it is not text (a NUL byte at character {text.index(chr(0))}). Leave it out.")
    return text


def _contents(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _UnreadableError(f"{error.strerror}. Mend its permissions.") from error


def _sensible(title: str) -> str:
    """The title on one line, or "" where it is only what a program put there: the file's name, or a word for none."""
    line = " ".join(_CONTROLS.sub(" ", title).split())
    return "" if _NO_TITLE.fullmatch(line) else line


def _first_heading(markdown: str) -> str:
    """The text of the first `# heading` outside a code fence, or ""."""
    fenced = False
    for line in markdown.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and (found := re.match(r" {0,3}#{1,6}[ \t](.*)", line)):
            heading = found[1].strip()
            bare = heading.rstrip("#")  # closing marks stand after a space; those of "C#" do not
            heading = bare.rstrip() if not bare or bare[-1] in " \t" else heading
            if heading:
                return heading
    return ""


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NO_TITLE = re.compile(
    r"\W*|.*\.(dvi|docx?|indd|odt|pages|pdf|pptx?|ps|qxd|rtf|tex|txt|xlsx?)|microsoft \w+ - .*"
    r"|(untitled|word document|powerpoint presentation|(document|presentation|slide)\W*\d*)[\W\d]*",
    re.IGNORECASE,
)

# Another kind of file is one function and one line here.
READERS: dict[str, Reader] = {
    ".docx": _read_docx,
    ".htm": _read_html,
    ".html": _read_html,
    ".jsonl": _read_jsonl,
    ".markdown": _read_markdown,
    ".md": _read_markdown,
    ".pdf": _read_pdf,
    ".txt": _read_txt,
}
_KINDS = ", ".join(READERS)
