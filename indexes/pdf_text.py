"""The text that the pages of a PDF draw, without their pictures.

Contract: pages are parted by a form feed, so the page of an offset is one more than the form feeds before it; a page
whose text cannot be had keeps its empty place and is told. What comes out can be written as UTF-8.
Limits: a page's text comes in the order in which the file draws it, with the line ends of the page; forms, comments and
attached files are not part of it. A picture of text is no text.
"""

import io
import logging
from typing import TYPE_CHECKING

from stripedrag.errors import CorpusError

if TYPE_CHECKING:
    import pypdf

_NOWHERE = logging.NullHandler()
_MAX_TOLD_CHARS = 80  # pypdf quotes the bytes around a fault


def title_text_and_gaps(pdf: bytes) -> tuple[str, str, list[str]]:
    """The title in the metadata ("" where there is none), the text, and what pages it lacks and why.

    Raises `CorpusError` with a reason where not one page has text.
    """
    from pypdf.errors import DependencyError

    # pypdf logs what it mends, and Python prints to stderr what no handler takes. Handlers of the program still get it.
    logging.getLogger("pypdf").addHandler(_NOWHERE)
    try:
        reader = _opened(pdf)
        pages, damaged, pictures = _pages(reader)
        title = _title(reader)
    except DependencyError as error:
        raise CorpusError(
            f"it needs what is not on this machine ({error}). Install that, or make the PDF anew without encryption."
        ) from error
    gaps = [f"page {number} is damaged ({fault}). Make the PDF anew." for number, fault in damaged.items()]
    if not any(pages) and gaps:
        raise CorpusError(f"none of its pages can be read: {gaps[0]}")
    if not any(pages):
        raise CorpusError("its pages hold no text: it may be scanned. Run OCR over it first.")
    if pictures:
        where = f"on {len(pictures)} of {len(pages)} pages, first on page {pictures[0]}"
        gaps.append(f"a picture and no text {where}: it may be scanned. Run OCR over it first.")
    return title, "\f".join(pages), gaps


def _opened(pdf: bytes) -> "pypdf.PdfReader":
    import pypdf

    try:
        reader = pypdf.PdfReader(io.BytesIO(pdf))
        closed = reader.is_encrypted and not reader.decrypt("")  # a file that only its owner may change opens with ""
        if not closed:
            len(reader.pages)  # walks the tree of pages, which may be damaged too
    except _faults() as error:
        raise CorpusError(f"it is damaged or no PDF ({_told(error)}). Make the PDF anew.") from error
    if closed:
        raise CorpusError("it is encrypted and opens only with a password. Save it without one.")
    return reader


def _pages(reader: "pypdf.PdfReader") -> tuple[list[str], dict[int, str], list[int]]:
    """The text of every page, the faults of the damaged ones by number, and the numbers of those with only pictures."""
    texts: list[str] = []
    damaged: dict[int, str] = {}
    pictures: list[int] = []
    for number, page in enumerate(reader.pages, start=1):
        text = ""
        try:
            text = _characters(page.extract_text()).replace("\f", " ").strip()
            if not text and len(page.images):
                pictures.append(number)
        except _faults() as error:
            damaged[number] = _told(error)
        texts.append(text)
    return texts, damaged, pictures


def _title(reader: "pypdf.PdfReader") -> str:
    try:
        title = reader.metadata.title if reader.metadata else None
    except _faults():
        return ""  # a file whose pages can be read needs no title
    return _characters(title) if isinstance(title, str) else ""  # a damaged one may be any object of PDF


def _characters(string: str) -> str:
    """The string with what fonts and metadata call characters and are none put right: surrogates and NUL."""
    return string.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "")


def _told(error: Exception) -> str:
    """The error on one short line."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= _MAX_TOLD_CHARS else f"{message[: _MAX_TOLD_CHARS - 1]}…"


def _faults() -> tuple[type[Exception], ...]:
    """What pypdf raises on a damaged file: not only its own errors, as 40,000 mangled files showed."""
    from pypdf.errors import DeprecationError, PyPdfError

    return (
        PyPdfError,
        DeprecationError,  # is no PyPdfError
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RecursionError,
        TypeError,
        ValueError,
    )
