"""What becomes a document, what is told as skipped, and what is refused."""

import io
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import docx
import pypdf
import pytest
from docx.document import Document as Word
from pypdf.errors import DependencyError

from stripedrag.errors import CorpusError
from stripedrag.indexes import Document, Skipped, read_documents

KINDS = ".docx, .htm, .html, .jsonl, .markdown, .md, .pdf, .txt"
W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
TYPES = b"""<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Default Extension="xml" ContentType="application/x"/><Default Extension="jpeg" ContentType="image/jpeg"/></Types>"""
FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"
IMAGE = b"q 9 0 0 9 0 0 cm BI /W 1 /H 1 /BPC 8 /CS /G ID \x00 EI Q"


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(path: Path) -> tuple[list[Document], list[Skipped]]:
    skipped: list[Skipped] = []
    return list(read_documents(path, skipped=skipped)), skipped


def refusal(path: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        read(path)
    return str(caught.value)


def draw(text: str) -> bytes:
    """What a page of a PDF says to draw a line of Latin-1 text."""
    return b"BT /F1 12 Tf 9 99 Td (%b) Tj ET" % text.encode("latin-1")


def pdf(*pages: bytes, info: bytes = b"", font: bytes = FONT) -> bytes:
    """A PDF of these content streams, written by hand so that the tests need no other program's idea of one."""
    kids = range(5, 5 + 2 * len(pages), 2)
    objects = [b"<</Type/Catalog/Pages 2 0 R>>"]
    objects += [b"<</Type/Pages/Count %d/Kids[%b]>>" % (len(pages), b" ".join(b"%d 0 R" % kid for kid in kids))]
    objects += [b"<<%b>>" % info, font]
    for kid, page in zip(kids, pages, strict=True):
        fonts = b"/Resources<</Font<</F1 4 0 R>>>>"
        objects += [b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]%b/Contents %d 0 R>>" % (fonts, kid + 1)]
        objects += [b"<</Length %d>>stream\n%b\nendstream" % (len(page), page)]
    file, xref = b"%PDF-1.4\n", b"0000000000 65535 f \n"
    for number, content in enumerate(objects, start=1):
        xref += b"%010d 00000 n \n" % len(file)
        file += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    size = len(objects) + 1
    trailer = b"trailer\n<</Size %d/Root 1 0 R/Info 3 0 R>>\nstartxref\n%d\n%%%%EOF" % (size, len(file))
    return file + b"xref\n0 %d\n%b" % (size, xref) + trailer


def encrypted(password: str) -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf(draw("Only for some."), info=b"/Title(Secret)")))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def saved(word: Word) -> bytes:
    file = io.BytesIO()
    word.save(file)
    return file.getvalue()


def repacked(word: bytes, **parts: bytes | None) -> bytes:
    """The .docx with parts changed (by their bare names), or left out where None."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(word)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = parts.get(Path(name).stem.strip("[]"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return file.getvalue()


def word_of(xml: str) -> bytes:
    """A .docx whose body is `xml`."""
    body = f'<w:document xmlns:w="{W}"><w:body>{xml}</w:body></w:document>'
    return repacked(saved(docx.Document()), document=body.encode())


def test_a_text_file_is_its_own_text(tmp_path: Path) -> None:
    write(tmp_path, {"note.txt": "\ufeff# not a heading\r\nünï 😀\n\n"})
    assert read(tmp_path / "note.txt")[0] == [Document("note.txt", "note", "# not a heading\r\nünï 😀\n\n")]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n\n## The *title* ##\n# Later\n", "The *title*"),
        ("```sh\n# a comment\n```\n# Real\n", "Real"),
        ("no heading, #tag\n#\n## ##\n", "page"),
        ("# Learning C#\n", "Learning C#"),
        ("#" + " #" * 100_000 + "x\n", "# " * 99_999 + "#x"),
    ],
)
def test_markdown_takes_its_title_from_the_first_heading(tmp_path: Path, text: str, title: str) -> None:
    write(tmp_path, {"page.md": text})
    assert read(tmp_path / "page.md")[0] == [Document("page.md", title, text)]


def test_html_gives_the_text_that_a_reader_sees(tmp_path: Path) -> None:
    page = """<!doctype html><html><head><title> The
      page </title><style>p {}</style></head><body><!-- no --><script>alert("x")</script>
      <h1>Head</h1><p>One <b>bold</b>
      word,<br>a line &amp; <i>more</i>.</p><ul><li>first<li>second</ul>
      <table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table><pre>if x:\n    <b>y</b>\n<i>z</i></pre>end
      </body></html>"""
    write(tmp_path, {"page.HTML": page})
    text = "Head\n\nOne bold word,\na line & more.\n\nfirst\nsecond\n\na\tb\nc\n\nif x:\n    y\nz\n\nend"
    assert read(tmp_path / "page.HTML")[0] == [Document("page.HTML", "The page", text)]


def test_html_without_a_title_takes_the_file_name(tmp_path: Path) -> None:
    write(tmp_path, {"page.htm": "just/words.html"})
    assert read(tmp_path / "page.htm")[0] == [Document("page.htm", "page", "just/words.html")]


def test_html_may_nest_deeper_than_python_recurses(tmp_path: Path) -> None:
    write(tmp_path, {"deep.html": "<div>" * 5000 + "core" + "</div>" * 5000})
    assert read(tmp_path / "deep.html")[0][0].text == "core"


def test_jsonl_gives_a_document_a_line_with_its_text_exactly_as_given(tmp_path: Path) -> None:
    lines = [
        {"id": "q/1", "title": "T", "text": "  a\r\n\u2028b \n", "year": 1999, "ok": False, "none": None, "list": [1]},
        {"id": "2", "text": "nul \0 and 😀"},
    ]
    write(tmp_path, {"c.jsonl": "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)})
    documents, skipped = read(tmp_path / "c.jsonl")
    assert documents == [
        Document("q/1", "T", "  a\r\n\u2028b \n", {"year": 1999, "ok": False, "none": None}),
        Document("2", "2", "nul \0 and 😀"),
    ]
    assert skipped == []


def test_a_folder_is_read_in_the_order_of_its_paths_and_tells_what_it_skips(tmp_path: Path) -> None:
    files = {
        "b.txt": "b",
        "a/z.md": "z",
        "a.txt": "a",
        "a/y.jsonl": '{"id": "line", "text": "y"}\n{"id": "no", "text": " "}\n\n{"id": 7}\n{"id": "last", "text": "y"}',
    }
    hidden = {".git/x.txt": "x", "a/.x.txt": "x"}
    bad = {"blank.txt": " \n", "image.png": b"\x89PNG", "latin.txt": b"caf\xe9", "nul.txt": "a\0b", "none": "x"}
    write(tmp_path, {**files, **hidden, **bad})
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe.txt")
    documents, skipped = read(tmp_path)
    assert [document.id for document in documents] == ["a.txt", "line", "last", "a/z.md", "b.txt"]
    assert {(str(s.path.relative_to(tmp_path)), s.reason) for s in skipped} == {
        ("a/y.jsonl", "document 'no' holds only white space"),
        ("a/y.jsonl", "line 4: 'id' is 7; it must be a string that is not empty. Mend the line."),
        ("blank.txt", "document 'blank.txt' holds only white space"),
        ("dangling.txt", "it is no regular file. Put a file in its place."),
        ("linked", "it is a link to a folder. Index that folder, too, or copy it here."),
        ("image.png", f"its type '.png' is not one of {KINDS}. Convert it to one of them."),
        ("latin.txt", "it is not UTF-8 text (byte 0xe9 at offset 3). Convert it to UTF-8."),
        ("none", f"its type '' is not one of {KINDS}. Convert it to one of them."),
        ("nul.txt", "it is not text (a NUL byte at character 1). Leave it out."),
        ("pipe.txt", "it is no regular file. Put a file in its place."),
    }


def test_what_is_skipped_is_warned_of_where_nobody_collects_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.png": "b"})
    with pytest.warns(UserWarning, match=r"skipped .*b\.png: its type '\.png' is not one of"):
        assert len(list(read_documents(tmp_path))) == 1


def test_a_missing_path_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"cannot read '.*/nowhere': No such file or directory\. Check the path\.$"):
        read_documents(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"\x89PNG", f"its type '.png' is not one of {KINDS}. Convert it"),
        ("a.txt", "ü".encode("utf-16"), "it is not UTF-8 text (byte 0xff at offset 0). Convert it to UTF-8."),
        ("a.html", b"<![x]>", "its HTML has a declaration `<![…]>` that cannot be parsed. Remove it."),
        ("a.md", b"a\0b", "it is not text (a NUL byte at character 1). Leave it out."),
    ],
)
def test_a_named_file_that_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = write(tmp_path, {name: content}) / name
    assert refusal(path).startswith(f"cannot read {path}: {reason}")


@pytest.mark.parametrize("name", ["a.txt", "a.html"])
def test_a_named_file_of_white_space_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {name: " \n\t"}) / name
    assert refusal(path) == (
        f"{path} holds no document; the first of 1 skipped: {path}, document {name!r} holds only white space. "
        f"Give it a {KINDS} file with text in it."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.pdf", "a.docx"):
        path = write(tmp_path, {name: "a"}) / name
        path.chmod(0)
        assert refusal(path) == f"cannot read {path}: Permission denied. Mend its permissions."


def test_a_file_that_fails_to_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    write(tmp_path, {"a.txt": "a", "b.jsonl": "{}", "c.pdf": "", "d.docx": ""})
    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(Path, "open", fail)
    for name in ("a.txt", "b.jsonl", "c.pdf", "d.docx"):
        assert refusal(tmp_path / name) == f"cannot read {tmp_path / name}: Input/output error. Mend its permissions."


def test_a_file_in_a_folder_that_cannot_be_entered_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a/b.txt": "b", "c.txt": "c"})
    is_file = Path.is_file

    def denied(path: Path) -> bool:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)
    documents, skipped = read(tmp_path)
    assert [document.id for document in documents] == ["c.txt"]
    assert [(left_out.path.name, left_out.reason) for left_out in skipped] == [
        ("b.txt", "Permission denied. Mend its permissions.")
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root, r"^[^;]* holds no document\. Give it a \.docx, \.htm, "),
        (
            lambda root: write(root, {"a.png": "x"}),
            r"holds no document; the first of 1 skipped: .*a\.png, its type '\.png'",
        ),
    ],
)
def test_a_folder_without_a_document_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read(make(tmp_path))


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: str) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", fail)
    assert refusal(tmp_path) == f"cannot read the folder {tmp_path}: Permission denied. Mend its permissions."


def test_a_file_whose_name_is_no_text_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a"})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("b")
    documents, skipped = read(tmp_path)
    assert [document.id for document in documents] == ["a.txt"]
    assert skipped[0].reason == "its path 'caf\\udce9.txt' has characters that cannot be printed. Rename it."
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    folder.mkdir()
    (folder / "c.txt").write_text("c")
    documents, skipped = read(tmp_path)
    assert [document.id for document in documents] == ["a.txt"]
    assert skipped[1].reason == "its path '\\udce9/c.txt' has characters that cannot be printed. Rename it."


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", ""])
def test_a_path_that_the_system_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError):
        list(read_documents(path))


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": '{"id": "b.txt", "text": "one"}', "b.txt": "two"})
    assert refusal(tmp_path) == (
        f"two documents have the id 'b.txt' (in {tmp_path / 'a.jsonl'} and in {tmp_path / 'b.txt'}). "
        f"Make the ids unique."
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not one JSON object in UTF-8 (Expecting property name"),
        (b'{"id": "a", "text": "\xe9"}', "not one JSON object in UTF-8 ('utf-8' codec can't decode byte 0xe9"),
        (b'{"id": "a", "text": "b", "score": NaN}', "not one JSON object in UTF-8 (NaN is no JSON number)"),
        (b'{"id": "a", "text": "b", "score": -1e999}', "not one JSON object in UTF-8 (-1e999 is beyond the largest"),
        (b'{"id": "a\\u0000", "text": "b"}', "'id' has a NUL character. Mend the line."),
        (b"[" * 100_000, "not one JSON object in UTF-8 (maximum recursion depth exceeded"),
        (b'{"id": "a", "text": "\\ud800"}', "not one JSON object in UTF-8 ('utf-8' codec can't encode character"),
        (b'["a"]', "the line is a JSON list; it must be an object. Mend the line."),
        (b'{"text": "b"}', "'id' is None; it must be a string that is not empty. Mend the line."),
        (b'{"id": "", "text": "b"}', "'id' is ''; it must be a string that is not empty. Mend the line."),
        (b'{"id": 7, "text": "b"}', "'id' is 7; it must be a string that is not empty. Mend the line."),
        (b'{"id": "a"}', "'text' is None; it must be a string. Mend the line."),
        (b'{"id": "a", "text": "b", "title": ["t"]}', "'title' is ['t']; it must be a string. Mend the line."),
    ],
)
def test_a_bad_line_is_told_by_its_number_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    lines = b'{"id": "x", "text": "fine"}\n' + line + b'\n\n{"id": "y", "text": "fine"}'
    path = write(tmp_path, {"c.jsonl": lines}) / "c.jsonl"
    for root in (path, tmp_path):
        documents, skipped = read(root)
        assert [document.id for document in documents] == ["x", "y"]
        assert [left_out.path for left_out in skipped] == [path]
        assert skipped[0].reason.startswith(f"line 2: {message}")


def test_a_file_of_bad_lines_only_is_refused_with_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, {"c.jsonl": '["a"]\n{}\n{"id": "a", "text": " "}'}) / "c.jsonl"
    reason = "line 1: the line is a JSON list; it must be an object. Mend the line."
    mend = f"Give it a {KINDS} file with text in it."
    assert refusal(path) == f"{path} holds no document; the first of 3 skipped: {path}, {reason} {mend}"


def test_a_pdf_is_the_text_of_its_pages_parted_by_form_feeds(tmp_path: Path) -> None:
    pages = [draw("caf\xe9 one"), b"", draw("two")]
    write(tmp_path, {"a.pdf": pdf(*pages, info=b"/Title(On  two\npages)")})
    assert read(tmp_path / "a.pdf") == ([Document("a.pdf", "On two pages", "caf\xe9 one\f\ftwo")], [])


@pytest.mark.parametrize(
    ("info", "title"),
    [
        (b"", "the file"),
        (b"/Title()", "the file"),
        (b"/Title(Microsoft Word - draft7.doc)", "the file"),
        (b"/Title(untitled)", "the file"),
        (b"/Title(scan_0001.PDF)", "the file"),
        (b"/Title(-- \\003 --)", "the file"),
        (b"/Title 7", "the file"),
        (b"/Title<</A 1>>", "the file"),
        (b"/Title 99 0 R", "the file"),
        (b"/Title(Untitled: a memoir)", "Untitled: a memoir"),
        (b"/Title<FEFF0043D83DDE000000>", "C\N{GRINNING FACE}"),
    ],
)
def test_a_pdf_takes_its_title_from_sensible_metadata(tmp_path: Path, info: bytes, title: str) -> None:
    write(tmp_path, {"the file.pdf": pdf(draw("text"), info=info)})
    assert read(tmp_path / "the file.pdf")[0] == [Document("the file.pdf", title, "text")]


def test_what_a_font_calls_half_a_character_does_not_reach_the_index(tmp_path: Path) -> None:
    cmap = b"3 beginbfchar <41> <D83DDE00> <42> <D83D> <43> <0000> endbfchar"  # a pair, half of one, and NUL
    font = FONT.replace(b">>", b"/ToUnicode 8 0 R>>")
    write(tmp_path, {"a.pdf": pdf(draw("A-B-C-d"), cmap, font=font)})  # the stream of the second page is object 8
    text = read(tmp_path / "a.pdf")[0][0].text
    assert text == "\N{GRINNING FACE}-\ufffd--d\f"


def test_pages_of_a_pdf_without_text_are_told_where_they_hold_a_picture(tmp_path: Path) -> None:
    write(tmp_path, {"a.pdf": pdf(draw("text"), IMAGE, b"", IMAGE)})
    documents, skipped = read(tmp_path / "a.pdf")
    assert documents == [Document("a.pdf", "a", "text\f\f\f")]
    reason = "a picture and no text on 2 of 4 pages, first on page 2: it may be scanned. Run OCR over it first."
    assert skipped == [Skipped(tmp_path / "a.pdf", reason)]


def test_a_damaged_page_of_a_pdf_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    write(tmp_path, {"a.pdf": pdf(draw("one"), b"BT ] ET" + b"x" * 999, draw("three"))})
    documents, skipped = read(tmp_path / "a.pdf")
    assert documents == [Document("a.pdf", "a", "one\f\fthree")]
    assert len(skipped) == 1
    assert re.fullmatch(r"page 2 is damaged \(Invalid Elementary Object .*\)\. Make the PDF anew\.", skipped[0].reason)
    assert len(skipped[0].reason) < 200


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is damaged or no PDF (Cannot read an empty file). Make the PDF anew."),
        (b"plain words", "it is damaged or no PDF (Stream has ended unexpectedly). Make the PDF anew."),
        (pdf(draw("text"))[:200], "it is damaged or no PDF ("),
        (pdf(b"BT ] ET"), "none of its pages can be read: page 1 is damaged (Invalid Elementary Object"),
        (pdf(), "its pages hold no text: it may be scanned. Run OCR over it first."),
        (pdf(b"", b""), "its pages hold no text: it may be scanned. Run OCR over it first."),
        (pdf(IMAGE), "its pages hold no text: it may be scanned. Run OCR over it first."),
        (encrypted("secret"), "it is encrypted and opens only with a password. Save it without one."),
    ],
)
def test_a_pdf_without_text_to_be_had_is_refused_or_told(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path, {"a.pdf": content, "b.txt": "b"}) / "a.pdf"
    assert refusal(path).startswith(f"cannot read {path}: {reason}")
    documents, skipped = read(tmp_path)
    assert [document.id for document in documents] == ["b.txt"]
    assert [left_out.path for left_out in skipped] == [path]
    assert skipped[0].reason.startswith(reason)


def test_a_pdf_that_only_its_owner_may_change_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"a.pdf": encrypted("")})
    assert read(tmp_path / "a.pdf")[0] == [Document("a.pdf", "Secret", "Only for some.")]


def test_a_pdf_that_needs_a_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf.PageObject, "extract_text", fail)
    path = write(tmp_path, {"a.pdf": pdf(draw("text"))}) / "a.pdf"
    assert refusal(path) == (
        f"cannot read {path}: it needs what is not on this machine (cryptography>=3.1 is required for AES algorithm). "
        f"Install that, or make the PDF anew without encryption."
    )


def test_what_mends_a_pdf_says_nothing_on_stderr(tmp_path: Path) -> None:
    file = write(tmp_path, {"a.pdf": pdf(draw("text")).replace(b"startxref\n", b"startxref\n1")}) / "a.pdf"
    program = (
        "import sys; from stripedrag.indexes import read_documents\n"
        f"print([document.text for document in read_documents({str(file)!r})])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("['text']\n", "")


def test_a_docx_is_its_paragraphs_and_tables_in_their_order(tmp_path: Path) -> None:
    word = docx.Document()
    word.core_properties.title = "Report"
    word.add_heading("Head")
    word.add_paragraph("One\tline,\nanother.").add_run(" Bold.").bold = True
    word.add_paragraph("  ")
    table = word.add_table(3, 3)
    for row, cells in zip(table.rows, ["abc", "def", "ghi"], strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    table.cell(0, 0).merge(table.cell(0, 1))
    table.cell(1, 0).merge(table.cell(2, 0))
    table.cell(2, 2).add_table(1, 2).rows[0].cells[1].text = "inner"
    word.add_paragraph("After", style="List Bullet")
    write(tmp_path, {"a.docx": saved(word)})
    text = "Head\n\nOne\tline,\nanother. Bold.\n\na\nb\tc\nd\ng\te\tf\n\th\ti\n\tinner\n\nAfter"
    assert read(tmp_path / "a.docx") == ([Document("a.docx", "Report", text)], [])


@pytest.mark.parametrize(
    ("title", "headings", "expected"),
    [
        ("A title", [("Heading 1", "Head")], "A title"),
        ("Word Document", [("Normal", "Lead"), ("Heading 2", " Sub \n head "), ("Heading 1", "Head")], "Sub head"),
        ("", [("Heading 1", " "), ("Title", "The title")], "The title"),
        ("old.docx", [("Normal", "Lead")], "a"),
    ],
)
def test_a_docx_takes_its_title_from_its_properties_or_its_first_heading(
    tmp_path: Path, title: str, headings: list[tuple[str, str]], expected: str
) -> None:
    word = docx.Document()
    word.core_properties.title = title
    for style, text in headings:
        word.add_paragraph(text, style=style)
    write(tmp_path, {"a.docx": saved(word)})
    assert read(tmp_path / "a.docx")[0][0].title == expected


def test_a_docx_without_properties_takes_its_file_name(tmp_path: Path) -> None:
    word = docx.Document()
    word.add_paragraph("text")
    relations = saved(word)
    with zipfile.ZipFile(io.BytesIO(relations)) as parts:
        bare = re.sub(rb"<Relationship [^>]*core-properties[^>]*>", b"", parts.read("_rels/.rels"))
    write(tmp_path, {"a.docx": repacked(relations, core=None, **{".rels": bare})})
    assert read(tmp_path / "a.docx")[0] == [Document("a.docx", "a", "text")]


def test_a_docx_gives_the_text_that_its_wrappers_hold_but_not_what_was_deleted(tmp_path: Path) -> None:
    def run(text: str) -> str:
        return f"<w:r><w:t>{text}</w:t></w:r>"

    control = f"<w:sdt><w:sdtPr/><w:sdtContent><w:p>{run('a control,')}</w:p></w:sdtContent></w:sdt>"
    deleted = "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
    inside = f"<w:ins><w:smartTag>{run('in')}</w:smartTag></w:ins>{deleted}<w:hyperlink>{run('serted')}</w:hyperlink>"
    field = f'<w:fldSimple w:instr="PAGE">{run(" 7")}</w:fldSimple>'
    row = f"<w:tbl><w:sdt><w:sdtContent><w:tr><w:tc>{control}</w:tc></w:tr></w:sdtContent></w:sdt></w:tbl>"
    write(tmp_path, {"a.docx": word_of(f"{control}<w:p>{inside}{field}</w:p>{row}")})
    assert read(tmp_path / "a.docx")[0][0].text == "a control,\n\ninserted 7\n\na control,"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is no ZIP archive, as a .docx is (File is not a zip file). Save it as .docx anew."),
        (saved(docx.Document())[:-99], "it is no ZIP archive, as a .docx is (File is not a zip file). Save it"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512),
            "it has a password, or it is a .doc under another name. Save it as .docx without a password.",
        ),
        (repacked(saved(docx.Document()), Content_Types=None), "it is damaged or no Word document ("),
        (repacked(saved(docx.Document()), document=b"<w:p>"), "it is damaged or no Word document (Namespace prefix w"),
        (repacked(saved(docx.Document()), document=b"<a/>"), "it is damaged or no Word document ("),
        (word_of("<w:p><w:pPr><w:pStyle/></w:pPr></w:p>"), "it is damaged or no Word document (required"),
        (
            repacked(saved(docx.Document()), Content_Types=TYPES),
            "it is damaged or no Word document (its main part is application/x). Save it as .docx anew.",
        ),
    ],
)
def test_a_docx_that_cannot_be_read_is_refused_or_told(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path, {"a.docx": content, "b.txt": "b"}) / "a.docx"
    assert refusal(path).startswith(f"cannot read {path}: {reason}")
    documents, skipped = read(tmp_path)
    assert [document.id for document in documents] == ["b.txt"]
    assert [left_out.path for left_out in skipped] == [path]
    assert skipped[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (8, 1, "its ZIP archive has a password. Save it as .docx without a password."),
        (10, 12, "its ZIP archive is packed by method 12, not deflated. Save it as .docx anew."),
    ],
)
def test_a_docx_whose_archive_is_of_another_kind_is_refused(
    tmp_path: Path, offset: int, value: int, reason: str
) -> None:
    content = bytearray(saved(docx.Document()))
    content[content.rindex(b"PK\x01\x02") + offset] = value  # in the last entry of the archive's directory
    path = write(tmp_path, {"a.docx": bytes(content)}) / "a.docx"
    assert refusal(path) == f"cannot read {path}: {reason}"


def test_a_docx_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    write(tmp_path, {"xml.docx": repacked(saved(docx.Document()), document=bytes(64_000_000))})
    write(tmp_path, {"all.docx": repacked(saved(docx.Document()), thumbnail=bytes(512_000_000))})
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1_000_000
    assert re.fullmatch(
        r"cannot read .*: its XML unpacks to 64,\d{3},\d{3} bytes; the limit is 64,000,000\. Split it\.",
        refusal(tmp_path / "xml.docx"),
    )
    assert re.fullmatch(
        r"cannot read .*: it unpacks to 512,\d{3},\d{3} bytes; the limit is 512,000,000\. Make its pictures smaller\.",
        refusal(tmp_path / "all.docx"),
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_mangled_file_brings_down_the_reading_of_a_folder(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    word = docx.Document()
    word.add_heading("Head")
    word.add_table(2, 2).rows[0].cells[0].text = "cell"
    with zipfile.ZipFile(io.BytesIO(saved(word))) as parts:
        document = parts.read("word/document.xml")

    def mangled(file: bytes) -> bytes:
        mangled = bytearray(file[: chance.choice([len(file), chance.randrange(1, len(file))])])
        for _ in range(chance.choice([1, 4, 16])):
            mangled[chance.randrange(len(mangled))] = chance.choice(b'\x00 0123456789<>[]()/"%-\xff')
        return bytes(mangled)

    write(tmp_path, {"good.txt": "good"})
    for number in range(20):
        write(tmp_path, {f"{number}.pdf": mangled(pdf(draw("one"), IMAGE, info=b"/Title(T)"))})
        write(tmp_path, {f"{number}.docx": mangled(saved(word))})
        write(tmp_path, {f"{number}-xml.docx": repacked(saved(word), document=mangled(document))})
    documents, skipped = read(tmp_path)
    assert "good.txt" in [document.id for document in documents]
    assert {left_out.path.name for left_out in skipped} | {document.id for document in documents} == {
        file.name for file in tmp_path.iterdir()
    }


def test_readers_load_their_libraries_only_where_they_need_them(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.jsonl": '{"id": "b", "text": "b"}'})
    program = (
        "import sys; from stripedrag.indexes import read_documents\n"
        f"list(read_documents({str(tmp_path)!r})); print({{'bs4', 'docx', 'lxml', 'pypdf'}} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
