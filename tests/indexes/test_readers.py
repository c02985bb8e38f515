"""What becomes a document, what is told as skipped, and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stripedrag.errors import CorpusError
from stripedrag.indexes import Document, Skipped, read_documents


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
        "a/y.jsonl": '{"id": "line", "text": "y"}\n{"id": "no", "text": " "}',
    }
    hidden = {".git/x.txt": "x", "a/.x.txt": "x"}
    bad = {"blank.txt": " \n", "image.png": b"\x89PNG", "latin.txt": b"caf\xe9", "nul.txt": "a\0b", "none": "x"}
    write(tmp_path, {**files, **hidden, **bad})
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    documents, skipped = read(tmp_path)
    assert [document.id for document in documents] == ["a.txt", "line", "a/z.md", "b.txt"]
    kinds = ".htm, .html, .jsonl, .markdown, .md, .txt"
    assert {(str(s.path.relative_to(tmp_path)), s.reason) for s in skipped} == {
        ("a/y.jsonl", "document 'no' holds only white space"),
        ("blank.txt", "document 'blank.txt' holds only white space"),
        ("dangling.txt", "it is no regular file. Put a file in its place."),
        ("image.png", f"its type '.png' is not one of {kinds}. Convert it to one of them."),
        ("latin.txt", "it is not UTF-8 text (byte 0xe9 at offset 3). Convert it to UTF-8."),
        ("none", f"its type '' is not one of {kinds}. Convert it to one of them."),
        ("nul.txt", "it is not text (a NUL byte at character 1). Leave it out."),
        ("pipe.txt", "it is no regular file. Put a file in its place."),
    }


def test_what_is_skipped_is_warned_of_where_nobody_collects_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.pdf": "b"})
    with pytest.warns(UserWarning, match=r"skipped .*b\.pdf: its type '\.pdf' is not one of"):
        assert len(list(read_documents(tmp_path))) == 1


def test_a_missing_path_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"cannot read .*/nowhere: there is no such file or folder\. Check the path\.$"
    ):
        read_documents(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pdf", b"%PDF", "its type '.pdf' is not one of .htm, .html, .jsonl, .markdown, .md, .txt. Convert it"),
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
        f"Give it a .htm, .html, .jsonl, .markdown, .md, .txt file with text in it."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        path = write(tmp_path, {name: "a"}) / name
        path.chmod(0)
        assert refusal(path) == f"cannot read {path}: Permission denied. Mend its permissions."


def test_a_file_that_fails_to_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    write(tmp_path, {"a.txt": "a", "b.jsonl": "{}"})
    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(Path, "open", fail)
    for name in ("a.txt", "b.jsonl"):
        assert refusal(tmp_path / name) == f"cannot read {tmp_path / name}: Input/output error. Mend its permissions."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root, r"^[^;]* holds no document\. Give it a \.htm, "),
        (
            lambda root: write(root, {"a.pdf": "x"}),
            r"holds no document; the first of 1 skipped: .*a\.pdf, its type '\.pdf'",
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
    assert skipped[0].reason == "its name 'caf\\udce9.txt' has characters that cannot be printed. Rename it."


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
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, {"c.jsonl": b'{"id": "x", "text": "fine"}\n' + line}) / "c.jsonl"
    assert refusal(path).startswith(f"{path}:2: {message}")
    assert refusal(tmp_path).startswith(f"{path}:2: {message}")  # in a folder too: half of a corpus is no corpus
