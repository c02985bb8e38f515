"""The house stands: rooms import only what is below them, and its folders stay out of everyone's way."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "model", "indexes", "rag", "eval")
ALLOWED = {
    "kernels": set(),
    "indexes": set(),
    "model": {"kernels"},
    "rag": {"model", "indexes", "kernels"},  # kernels: doctor names its backends
    "eval": {"rag", "model", "indexes", "kernels"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports across folders are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_the_rooms_below_them(room):
    files = [path for path in (ROOT / room).rglob("*.py") if "llama_index_plugin" not in path.parts]
    assert files
    for path in files:
        used = {name.split(".")[1] for name in imported(path) if name.startswith("stripedrag.")} & set(ROOMS)
        assert used - {room} <= ALLOWED[room], f"{path} imports {used - {room} - ALLOWED[room]}"


def test_only_the_modules_for_llama_index_import_it():
    users = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "llama_index_plugin" not in path.parts
        if any(name.split(".")[0] == "llama_index" for name in imported(path))
    }
    assert users == {
        f"rag/llama_index/{name}.py" for name in ("embedding", "fill", "llm", "retriever", "search", "store")
    }


def test_no_folder_of_ours_can_be_imported_by_its_bare_name(tmp_path):
    """`kernels` is a package that transformers imports; a folder of ours must never stand in for it."""
    program = f"import importlib.util as u; print([n for n in {ROOMS} if u.find_spec(n)])"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True).strip() == "[]"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.util.find_spec("stripedrag.kernels.ops") is not None


def test_the_face_imports_nothing_heavy_and_has_its_public_names():
    program = (
        "import sys, stripedrag; heavy = {'torch', 'transformers', 'faiss'} & set(sys.modules); "
        "assert not heavy, heavy; assert all(hasattr(stripedrag, n) for n in stripedrag.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_product_reads_nothing_outside_the_repository():
    for path in [*(p for room in ROOMS for p in (ROOT / room).rglob("*.py")), *(ROOT / "src").rglob("*.py")]:
        assert "../" not in path.read_text(), path


@pytest.mark.slow
def test_the_wheel_carries_every_room_and_works_without_the_checkout(tmp_path):
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*run, "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("stripedrag-*.whl")
    subprocess.run([*run, "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=300)
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "  # of `-e .`
        "import stripedrag, pathlib; from stripedrag.model import smollm2; from stripedrag.kernels import ops; "
        "assert pathlib.Path(stripedrag.__file__).is_relative_to(pathlib.Path.cwd() / 'site'), stripedrag.__file__; "
        "assert pathlib.Path(ops.__file__).is_relative_to(pathlib.Path.cwd() / 'site'), ops.__file__; "
        "print(smollm2.prepared_dir(smollm2.STRIPED).name)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    name = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True)
    assert name.startswith("stripedhyena-smol-135m-")
    assert list((tmp_path / "site" / "stripedrag" / "eval" / "data" / "xquad").glob("*.txt"))
    assert not (tmp_path / "site" / "stripedrag" / "tests").exists()
    assert not list((tmp_path / "site").rglob("*.cpp"))
