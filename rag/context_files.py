"""Blocks of read contexts as files in a folder, for several processes: safetensors, verified, forgotten by least use.

A file's name says which block it is, after which other it comes, and how many tokens it has: `BLOCK.PARENT.TOKENS`.
Its metadata has a sha256 of its name and tensors. A file is there whole or not at all; one that is damaged is told, and
removed by whoever saves.
"""

import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stripedrag.files import written_whole
from stripedrag.model.identity import tensors_sha256

DISK_BYTES = 8 * 2**30
_FILE = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{32})\.([0-9]+)\.safetensors")
_ABANDONED_S = 3600  # a file that was being written so long ago is of a process that was killed


class ContextFiles:
    """The blocks in a folder, which is made with the first of them, and of which no more than `disk_bytes` is taken.

    Without `saves` nothing is written. `fault` is why saving ended, None while it goes on.
    """

    def __init__(self, folder: Path, *, disk_bytes: int = DISK_BYTES, saves: bool = True) -> None:
        self.folder, self.disk_bytes, self.saves = folder, disk_bytes, saves
        self.fault: OSError | None = None
        self._left_out: set[str] = set()  # blocks that had no room

    def children(self) -> dict[str, dict[str, int]]:
        """Of each block, and of each model's root: the names of the blocks that come after it, with their tokens."""
        found: dict[str, dict[str, int]] = {}
        for match, _ in self._entries():
            name, parent, tokens = match.groups()
            found.setdefault(parent, {})[name] = int(tokens)
        return found

    def load(self, parent: str, name: str, tokens: int) -> dict[str, Tensor] | None:
        """The tensors of a block; None where its file went away or is damaged, of which a warning tells."""
        path = self._path(parent, name, tokens)
        try:
            with safe_open(path, framework="pt") as file:
                # copies: what is verified is what is used, whatever happens to the file
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
                saved = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except OSError as error:  # too many open files, say, or those of another user
            warnings.warn(f"{path} cannot be read ({error.strerror or error}); its tokens are read anew", stacklevel=2)
            return None
        except SafetensorError as error:
            self._damaged(path, str(error))
            return None
        if saved != tensors_sha256(tensors, path.name):
            self._damaged(path, "its name and tensors have not the sha256 that was saved with it")
            return None
        self.touch(parent, name, tokens)
        return tensors

    def save(self, parent: str, name: str, tokens: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a block that is not there yet, and remove the least used for it. A block that has no room is not
        written; where the disk refuses, a warning says so and no other is written.
        """
        if not self.saves or self.fault:
            return
        path = self._path(parent, name, tokens)
        if path.is_file():
            self.touch(parent, name, tokens)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            size_bytes = sum(tensor.nbytes for tensor in tensors.values())
            if parent in self._left_out or not self._make_room(size_bytes, after=parent):
                self._left_out.add(name)  # nothing leads to those after it
            else:
                self._left_out.discard(name)
                on_cpu = {key: tensor.cpu() for key, tensor in tensors.items()}
                with written_whole(path, by_many=True) as scratch:
                    save_file(on_cpu, scratch, metadata={"sha256": tensors_sha256(on_cpu, path.name)})
        except SafetensorError as error:  # of what safetensors writes itself
            self._give_up(OSError(str(error)))
        except OSError as error:
            self._give_up(error)

    def touch(self, parent: str, name: str, tokens: int) -> None:
        """Tell that a block was used just now."""
        if self.saves:
            with suppress(OSError):  # another process removed it, or owns it
                os.utime(self._path(parent, name, tokens))

    def size_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(entry.st_size for _, entry in self._entries())

    def _path(self, parent: str, name: str, tokens: int) -> Path:
        return self.folder / f"{name}.{parent}.{tokens}.safetensors"

    def _entries(self) -> Iterator[tuple[re.Match[str], os.stat_result]]:
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if match := _FILE.fullmatch(entry.name):
                        try:
                            yield match, entry.stat()
                        except FileNotFoundError:
                            continue
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return  # nothing is found there; whoever saves is told

    def _make_room(self, needed_bytes: int, *, after: str) -> bool:
        """Whether a block of so many bytes, which comes after another, has room, once the least used that none comes
        after are removed.
        """
        for left in self.folder.glob(".*.part"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    left.unlink()
        files = {match[1]: (match, entry) for match, entry in self._entries()}
        taken = sum(entry.st_size for _, entry in files.values())
        while taken + needed_bytes > self.disk_bytes:
            parents = {after, *(match[2] for match, _ in files.values())}
            ends = [name for name in files if name not in parents]
            if not ends:
                return False
            oldest = min(ends, key=lambda name: files[name][1].st_mtime_ns)
            match, entry = files.pop(oldest)
            (self.folder / match.string).unlink(missing_ok=True)
            taken -= entry.st_size
        return True

    def _damaged(self, path: Path, why: str) -> None:
        mend = "remove it"
        if self.saves:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                mend = "it is removed"
        warnings.warn(f"{path} is damaged ({why}) and its tokens are read anew; {mend}", stacklevel=2)

    def _give_up(self, error: OSError) -> None:
        self.fault = error
        warnings.warn(
            f"contexts are no longer saved in {self.folder}: {error.strerror or error}. Free space there, or give "
            "another folder.",
            stacklevel=2,
        )
