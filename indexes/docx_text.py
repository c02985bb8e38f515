"""The text of a Word document (.docx), without its form.

Contract: paragraphs are parted by an empty line, table rows by a line end and cells by a tab, in the order of the
document. Inserted text that waits for review is part of it, deleted text is not.
Limits: headers, footers, notes, comments, text boxes and equations are not read, nor the numbers that Word counts.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stripedrag.errors import CorpusError

if TYPE_CHECKING:
    from docx.document import Document as Word
    from docx.oxml.document import CT_Body
    from docx.oxml.table import CT_Tc

# An archive of one MB may unpack to a thousand; an empty paragraph, 6 bytes of XML, costs 260 bytes and 13 µs to read.
MAX_XML_BYTES = 64_000_000
MAX_UNPACKED_BYTES = 512_000_000  # with the pictures, which python-docx reads too
_OLE_MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED = 0x1  # the bit of a ZIP entry's flags
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the format allows no other
# What stands between a container and its paragraphs, rows or runs. python-docx looks for children only.
_WRAPPERS = ("bdo", "customXml", "dir", "fldSimple", "ins", "moveTo", "sdt", "sdtContent", "smartTag")
# What zipfile, lxml (its errors of syntax are Python's) and python-docx raised on damaged files when fuzzed.
_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


def titles_and_text(docx: bytes) -> tuple[list[str], str]:
    """What may be its title, the best first: the properties', the first heading's; and the text, which may be empty.

    Raises `CorpusError` with a reason for a file that is damaged, encrypted, too large or something else.
    """
    from docx.exceptions import PythonDocxError
    from docx.oxml.exceptions import XmlchemyError

    _refuse_archive(docx)
    try:
        word = _opened(docx)
        return [word.core_properties.title, _first_heading(word)], "\n\n".join(_blocks(word.element.body))
    except (*_FAULTS, PythonDocxError, XmlchemyError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"it is damaged or no Word document ({told}). Save it as .docx anew.") from error


def _refuse_archive(docx: bytes) -> None:
    if docx.startswith(_OLE_MAGIC):
        raise CorpusError("it has a password, or it is a .doc under another name. Save it as .docx without a password.")
    try:
        with zipfile.ZipFile(io.BytesIO(docx)) as archive:
            parts = archive.infolist()
    except _FAULTS as error:
        raise CorpusError(f"it is no ZIP archive, as a .docx is ({error}). Save it as .docx anew.") from error
    if any(part.flag_bits & _ENCRYPTED for part in parts):
        raise CorpusError("its ZIP archive has a password. Save it as .docx without a password.")
    if others := {part.compress_type for part in parts}.difference(_METHODS):
        raise CorpusError(f"its ZIP archive is packed by method {min(others)}, not deflated. Save it as .docx anew.")
    # zipfile reads no more of a part than is declared here.
    xml = sum(part.file_size for part in parts if part.filename.endswith((".xml", ".rels")))
    if xml > MAX_XML_BYTES:
        raise CorpusError(f"its XML unpacks to {xml:,} bytes; the limit is {MAX_XML_BYTES:,}. Split it.")
    unpacked = sum(part.file_size for part in parts)
    if unpacked > MAX_UNPACKED_BYTES:
        limit = f"{MAX_UNPACKED_BYTES:,}"
        raise CorpusError(f"it unpacks to {unpacked:,} bytes; the limit is {limit}. Make its pictures smaller.")


def _opened(docx: bytes) -> "Word":
    """The document with every wrapper replaced by what it holds."""
    from docx.oxml.ns import qn
    from docx.package import Package
    from docx.parts.document import DocumentPart

    part = Package.open(io.BytesIO(docx)).main_document_part
    if not isinstance(part, DocumentPart):
        raise ValueError(f"its main part is {part.content_type}")
    word: Word = part.document
    for wrapper in list(word.element.body.iter(*(qn(f"w:{name}") for name in _WRAPPERS))):
        for child in list(wrapper):
            wrapper.addprevious(child)
        wrapper.getparent().remove(wrapper)
    return word


def _first_heading(word: "Word") -> str:
    names = [(style.style_id, style.name or "") for style in word.styles]
    styles = {style for style, name in names if name == "Title" or name.startswith("Heading")}
    body: CT_Body = word.element.body
    return next((heading.text for heading in body.p_lst if heading.style in styles and heading.text.strip()), "")


def _blocks(container: "CT_Body | CT_Tc") -> Iterator[str]:
    """The text of each paragraph and table that has one.

    The elements, and not the `Table` and `_Row` that stand for them: those repeat a merged cell wherever it reaches,
    and recurse once for each of its rows.
    """
    from docx.oxml.text.paragraph import CT_P

    for block in container.inner_content_elements:
        if isinstance(block, CT_P):
            text = block.text
        else:
            cells = [["\n".join(_blocks(cell)) for cell in row.tc_lst] for row in block.tr_lst]
            text = "\n".join("\t".join(row) for row in cells if any(row))
        if text.strip():
            yield text
