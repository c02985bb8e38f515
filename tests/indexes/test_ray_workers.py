"""What ingest over Ray does without a cluster: windows, the order of what comes back, and what is refused at once."""

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stripedrag.errors import CorpusError, SetupError, StoreError, UsageError
from stripedrag.eval.cli import app
from stripedrag.indexes import Document, ray_workers
from stripedrag.indexes.preparing import Changed

WINDOW = [Changed(Document(name, "", "x" * 10), {}) for name in "abcd"]


def row(number: int, **other: Any) -> dict[str, Any]:
    return {"number": number, "error": None} | other


def taken(*rows: dict[str, Any]) -> list[str]:
    return [one.document.id for one, _ in ray_workers._in_order(rows, WINDOW)]


def test_what_comes_back_is_put_in_order() -> None:
    assert taken(row(2), row(0), row(3), row(1)) == list("abcd")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1, 2, 3), "Ray gave document 'b' twice"),  # given on already
        ((0, 2, 2, 1, 3), "Ray gave document 'c' twice"),  # still waiting
        ((0, 1, 3), "Ray lost document 'c'"),
        ((), "Ray lost document 'a'"),
    ],
)
def test_what_comes_twice_or_not_at_all_is_told(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        taken(*map(row, numbers))


def test_an_error_that_comes_back_is_raised_as_its_own_kind() -> None:
    with pytest.raises(CorpusError, match="no text"):
        taken(row(0), row(1, error="CorpusError", message="no text"))


def test_a_window_is_bounded_by_documents_and_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes() -> list[int]:
        return [len(window) for window in ray_workers._windows(WINDOW)]

    assert sizes() == [4]
    monkeypatch.setattr(ray_workers, "CHARS_AT_ONCE", 11)
    assert sizes() == [2, 2]
    monkeypatch.setattr(ray_workers, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(ray_workers, "CHARS_AT_ONCE", 1000)
    assert sizes() == [3, 1]
    assert list(ray_workers._windows([])) == []


def test_no_worker_and_no_ray_are_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("The lighthouse of Veyrac was built in 1862.")
    command = ["index", str(tmp_path / "a.txt"), "--to", str(tmp_path / "index"), "--workers"]
    refused = CliRunner().invoke(app, [*command, "0"]).exception
    assert isinstance(refused, UsageError) and "workers is 0; it is at least 1" in str(refused)
    monkeypatch.setitem(sys.modules, "ray", None)
    missing = CliRunner().invoke(app, [*command, "2"]).exception
    assert isinstance(missing, SetupError) and "pip install 'stripedrag[ray]'" in str(missing)
    assert not (tmp_path / "index").exists()
