"""Published models from the hub: what is read of them and no more, and as the hub's hashes say."""

import hashlib
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from stripedrag.errors import SetupError, UsageError, said
from stripedrag.model.baselines import BASELINES, find, hub_id, revision
from stripedrag.model.smollm2 import PREPARED

# of the client that the hub's library uses: httpx, or what came after it
_HTTPError = cast("type[Exception]", HfHubHTTPError.__mro__[1])
_READ = (  # never pickles, nor code
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    "model.safetensors.index.json",
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.*", "tokenizer.model"),
    *("LICENSE*", "README.md"),
)


def fetch(name: str, tell: Callable[[str], None] = lambda what: None) -> Path:
    """The folder in the hub's cache with the files of a model, a name in `BASELINES` or a hub id.

    A file that is there already is not fetched again; one whose line was cut goes on from where it ended, but after a
    kill it begins anew. Every file is held against the hash that the hub has of it. `tell` hears what happens.

    Raises `SetupError` where the hub cannot be reached, does not give the model, or has no safetensors of it, where the
    disk has not the room, and for a file with another hash, which is removed; `UsageError` for what is no hub id.
    """
    if name in PREPARED:
        raise UsageError(f"{name} does not come from the hub; `stripedrag setup` prepares it")
    repository, wanted = hub_id(name), revision(name)
    try:
        info = HfApi().model_info(repository, revision=wanted, files_metadata=True)
        files = [file for file in info.siblings or () if any(fnmatch(file.rfilename, kind) for kind in _READ)]
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            raise SetupError(f"{repository} has no safetensors, and pickled weights are not read; have it converted")
        _refuse_full(repository, files)
        size, place = sum(file.size or 0 for file in files), f"{repository} at {wanted}" if wanted else repository
        tell(f"fetching {place}, {size / 1e9:.1f} GB, {_licence(name, info)}")
        names = [file.rfilename for file in files]
        folder = Path(snapshot_download(repository, revision=wanted, allow_patterns=names))
    except HFValidationError as error:
        raise UsageError(f"no model {name!r}: it is not one of {', '.join(BASELINES)}, and no hub id") from error
    except GatedRepoError as error:
        raise SetupError(
            f"{repository} is gated: accept its terms on its page of the hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise SetupError(f"the hub has no {repository}, or none for you; log in with `hf auth login`") from error
    except (_HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of the hub's own transport, hf_xet
        raise SetupError(
            f"the hub did not give {repository} ({said(error)}). Where there is a network, run "
            f"`stripedrag fetch {name}` again; files that are whole are not fetched anew"
        ) from error
    if folder.name != info.sha:
        raise SetupError(f"{repository} was changed on the hub meanwhile; run `stripedrag fetch {name}` again")
    for file in files:
        tell(f"checking {file.rfilename}")
        _refuse_other(folder / file.rfilename, file, name)
    return folder


def _licence(name: str, info: Any) -> str:
    if baseline := find(name):
        return f"licence {baseline.licence}"
    named = getattr(info.card_data, "license", None)
    return f"licence {named}" if named else "of a licence that its card does not name"


def _refuse_full(repository: str, files: list[Any]) -> None:
    """Raises where the disk has no room for those of the files that are not there."""
    place = Path(HF_HUB_CACHE)
    blobs = place / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    missing = [file for file in files if not (blobs / (file.lfs.sha256 if file.lfs else file.blob_id)).exists()]
    needed = sum(file.size or 0 for file in missing)
    while not place.exists():
        place = place.parent
    if needed > (free := shutil.disk_usage(place).free):
        raise SetupError(
            f"{repository} takes {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} free; make room, or let "
            "HF_HOME name another place"
        )


def _refuse_other(path: Path, file: Any, name: str) -> None:
    """Raises where a file has not the sha256, or if it is small the git hash, that the hub has of it."""
    with path.open("rb") as opened:
        if file.lfs:
            wanted, got = file.lfs.sha256, hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            data = opened.read()
            wanted, got = file.blob_id, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if wanted != got:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise SetupError(
            f"{path.name} has the hash {got[:12]}, on the hub it has {wanted[:12]}; it is removed. Run "
            f"`stripedrag fetch {name}` again"
        )
