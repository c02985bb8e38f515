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
    run("sanitize.cpp", level, [] if level == "native" else [f"-march=x86-64-{level}"], tmp_path)


@pytest.mark.skipif(COMPILER is None or "avx512_bf16" not in FLAGS, reason="no compiler, or no AVX-512 BF16")
def test_odd_shapes_in_bfloat16_stay_within_their_arrays(tmp_path):
    run("sanitize_bf16.cpp", "bf16", ["-march=x86-64-v4", "-mavx512bf16"], tmp_path)


def run(source, level, target, tmp_path):
    program = tmp_path / "sanitize"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    options = ["-std=c++17", "-O0", "-g1", "-fopenmp", *target, *sanitizers, f"-DSTRIPEDRAG_ISA={level}", f"-I{NATIVE}"]
    source = Path(__file__).with_name(source)
    subprocess.run([COMPILER, *options, str(source), "-o", str(program)], check=True, timeout=600)
    # The leak checker needs ptrace, which containers refuse.
    done = subprocess.run(
        [str(program)],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
