"""The room's door."""

import subprocess
import sys

import pytest

import stripedrag.indexes as room


def test_importing_the_room_and_the_index_loads_nothing_heavy() -> None:
    program = (
        "import sys, stripedrag.indexes; from stripedrag.indexes import Index, read_documents\n"
        "print({'torch', 'faiss', 'sentence_transformers', 'transformers', 'bs4'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_every_public_name_is_there() -> None:
    assert room.__all__ == sorted(room.__all__)
    assert all(getattr(room, name) is not None for name in room.__all__)


def test_a_misspelt_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'stripedrag\.indexes' has no attribute 'Indx'$"):
        room.Indx  # noqa: B018
