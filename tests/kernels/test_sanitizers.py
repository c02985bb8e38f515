"""The CPU kernels touch no byte that is not theirs, on shapes that fill no vector, under the compiler's sanitizers."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "kernels" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
LEVELS = ("v2", "v3", "v4") if platform.machine() == "x86_64" else ("native",)


def runs(level):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {"v3": "avx2" in flags, "v4": "avx512vl" in flags}.get(level, True)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("level", LEVELS)
def test_odd_shapes_stay_within_their_arrays(level, tmp_path):
    if not runs(level):
        pytest.skip(f"this processor does not run x86-64-{level}")
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
