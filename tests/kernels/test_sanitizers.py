"""The CPU kernels touch no byte that is not theirs, on shapes that fill no vector, under the compiler's sanitizers."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "kernels" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
# what this processor runs, the one that it would choose first: each takes most of a minute to compile
LEVELS = (*(["v4"] if "avx512vl" in FLAGS else []), *(["v3"] if "avx2" in FLAGS else []), "v2")
if platform.machine() != "x86_64":
    LEVELS = ("native",)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=[pytest.mark.slow] if at else []) for at, level in enumerate(LEVELS)]
)
def test_odd_shapes_stay_within_their_arrays(level, tmp_path):
    target = [] if level == "native" else [f"-march=x86-64-{level}"]
    program = tmp_path / "sanitize"
    source = Path(__file__).with_name("sanitize.cpp")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    options = ["-std=c++17", "-O0", "-g1", "-fopenmp", *target, *sanitizers, f"-DSTRIPEDRAG_ISA={level}", f"-I{NATIVE}"]
    subprocess.run([COMPILER, *options, str(source), "-o", str(program)], check=True, timeout=600)
    # The leak checker needs ptrace, which containers refuse.
    run = subprocess.run(
        [str(program)],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
