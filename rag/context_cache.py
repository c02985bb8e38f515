"""Beginnings of prompts that a model has read, kept so that no prompt that begins alike reads them again.

A tree of blocks of tokens: a block holds the keys and values of its tokens and the Hyena states after its last one, so
a prompt can go on from the end of any block whose way from the root is its own beginning. A block's name is a hash of
that way, in memory and on disk. Knows ids only. Blocks are forgotten by least use, ends before beginnings.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stripedrag.model.cache import LEAST_BLOCK_TOKENS, block, extend, new_cache, refuses_blocks
from stripedrag.model.generation import prefill
from stripedrag.model.identity import fingerprint
from stripedrag.model.memory import state_bytes, token_bytes
from stripedrag.rag.context_files import ContextFiles

MEMORY_BYTES = 2 * 2**30
BLOCK_TOKENS = 1024  # at most: what is read again where two prompts part is less than a block
_OWN_BLOCK_TOKENS = 8192  # at most, of what is a prompt's own: a block's end costs half a hundredth of a prompt's time
_OWN_SHARE = 8  # of the memory such a block takes no more than one part in so many
_SCHEMA = 1  # of what a block holds, part of every name


class Reading(NamedTuple):
    """What follows from reading a prompt: logits (1, V) of the next token, the cache, the caller's own, and how many of
    the prompt's tokens were known.
    """

    logits: Tensor
    cache: DynamicCache
    reused_tokens: int


@dataclass(slots=True)
class _Block:
    parent: str
    tokens: int
    tensors: Mapping[str, Tensor]
    used: int  # the reading that used it last

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class ContextCache:
    """The beginnings that one model has read: in memory, on its device, and in `files` where they are given.

    No more than `memory_bytes` is taken, beside the cache of the prompt that is being read. `refuses` says why a model
    keeps no beginnings, one with a sliding window: everything is read anew then. Not safe for two threads at once.
    """

    def __init__(
        self, model: PreTrainedModel, *, memory_bytes: int = MEMORY_BYTES, files: ContextFiles | None = None
    ) -> None:
        self._model = model
        self.memory_bytes = memory_bytes
        self.refuses = refuses_blocks(new_cache(model.config))
        self.files = None if self.refuses else files
        self._blocks: dict[str, _Block] = {}
        self._children: dict[str, dict[str, int]] = {}  # of a block: their names, with how many tokens they have
        self._turn = 0
        self._root = _name(f"{_SCHEMA} {fingerprint(model)}", ()) if self.files else ""

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks in memory."""
        return sum(held.nbytes for held in self._blocks.values())

    @property
    def keeps(self) -> bool:
        """Whether anything that is read is kept."""
        return not self.refuses and bool(self.memory_bytes or (self.files and self.files.saves))

    def clear(self) -> None:
        """Forget what is in memory."""
        self._blocks.clear()
        self._children.clear()

    def known_tokens(self, ids: Sequence[int], *, in_memory: bool = True) -> int:
        """How many tokens of the beginning of `ids` are known, by the names of blocks alone: none is loaded or used.
        Without `in_memory` those on disk count alone.
        """
        return sum(tokens for _, tokens in self._way(ids, in_memory=in_memory))

    def read(
        self,
        ids: Sequence[int],
        marks: Sequence[int] = (),
        *,
        own_from: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Reading:
        """Read a prompt from its longest known beginning on, and keep its beginning up to the last of `marks`.

        `marks` are places, in rising order, where other prompts may part from this one; before `own_from` (None: the
        end) they may part anywhere. An interruption loses no block that was whole. `progress` hears how many of how
        many tokens are read.
        """
        within = len(ids) - 1  # the last token is read for its logits
        marks = [mark for mark in marks if mark <= within]
        cache, known, at = self._begin(ids[:within], marks, progress, len(ids), own_from)
        return Reading(prefill(self._model, self._tensor(ids[at:]), cache, progress=progress), cache, known)

    def read_beginning(
        self, ids: Sequence[int], marks: Sequence[int], *, progress: Callable[[int, int], None] | None = None
    ) -> tuple[DynamicCache, int]:
        """Read what several prompts begin with, as `read` does, and keep all of it: the cache after it, the caller's
        own, and how many tokens were known. `progress` hears how many of how many tokens are read.
        """
        marks = [*(mark for mark in marks if mark < len(ids)), len(ids)]
        cache, known, at = self._begin(ids, marks, progress, len(ids))
        if at < len(ids):
            prefill(self._model, self._tensor(ids[at:]), cache, progress=progress)
        return cache, known

    def _begin(
        self,
        ids: Sequence[int],
        marks: Sequence[int],
        progress: Callable[[int, int], None] | None,
        whole: int,
        own_from: int | None = None,
    ) -> tuple[DynamicCache, int, int]:
        """A cache of the beginning of `ids`, how much of it was known, and where it ends: at the last mark, or further
        where more was known, and before it where nothing can be kept.
        """
        self._turn += 1
        parent, known, way = self._root, 0, self._way(ids)
        cache = new_cache(self._model.config, expected_tokens=whole)
        for name, tokens in way:
            tensors = self._recall(parent, name, tokens)
            if tensors is None:  # a file that went away or is damaged
                break
            extend(cache, tensors)
            parent, known = name, known + tokens
        at = known
        heard = None if progress is None else lambda read, _: progress(read, whole)
        for end in _cuts(known, marks, own_from, self._own_block_tokens()) if self.keeps else ():
            prefill(self._model, self._tensor(ids[at:end]), cache, progress=heard)
            name = _name(parent, ids[at:end])
            self._make_room((end - at) * token_bytes(self._model) + state_bytes(self._model))  # before it is copied
            self._keep(parent, name, end - at, block(cache, at))
            parent, at = name, end
        return cache, known, at

    def _own_block_tokens(self) -> int:
        fitting = self.memory_bytes // (_OWN_SHARE * max(1, token_bytes(self._model)))
        return max(BLOCK_TOKENS, min(_OWN_BLOCK_TOKENS, fitting))

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._model.device)

    def _way(self, ids: Sequence[int], *, in_memory: bool = True) -> list[tuple[str, int]]:
        """Names and tokens of the blocks from the root that hold the most of `ids`."""
        held = self._children if in_memory else {}
        filed = self.files.children() if self.files else {}
        longest, best = 0, list[tuple[str, int]]()
        open_ends = [(self._root, 0, best)]
        while open_ends:
            parent, at, way = open_ends.pop()
            if at > longest:
                longest, best = at, way
            children = held.get(parent, {}) | filed.get(parent, {})
            for tokens in {tokens for tokens in children.values() if at + tokens <= len(ids)}:
                name = _name(parent, ids[at : at + tokens])
                if name in children:
                    open_ends.append((name, at + tokens, [*way, (name, tokens)]))
        return best

    def _recall(self, parent: str, name: str, tokens: int) -> Mapping[str, Tensor] | None:
        """What a block holds, from memory or from its file."""
        if name in self._blocks:
            self._blocks[name].used = self._turn
            if self.files:
                self.files.save(parent, name, tokens, self._blocks[name].tensors)
            return self._blocks[name].tensors
        loaded = self.files.load(parent, name, tokens) if self.files else None
        if loaded is None:
            return None
        tensors = {key: tensor.to(self._model.device) for key, tensor in loaded.items()}
        self._hold(parent, name, tokens, tensors)
        return tensors

    def _keep(self, parent: str, name: str, tokens: int, tensors: Mapping[str, Tensor]) -> None:
        if self.files:
            self.files.save(parent, name, tokens, tensors)
        self._hold(parent, name, tokens, tensors)

    def _hold(self, parent: str, name: str, tokens: int, tensors: Mapping[str, Tensor]) -> None:
        """Take a block into memory where there is room for it beside those that this reading uses."""
        new = _Block(parent, tokens, tensors, self._turn)
        if parent not in (self._root, *self._blocks) and not self.files:
            return  # nothing leads to it
        self._make_room(new.nbytes)
        if self.held_bytes + new.nbytes <= self.memory_bytes:
            self._blocks[name] = new
            self._children.setdefault(parent, {})[name] = tokens

    def _make_room(self, needed_bytes: int) -> None:
        for old in self._forgettable(needed_bytes):
            del self._children[self._blocks.pop(old).parent][old]

    def _forgettable(self, needed_bytes: int) -> list[str]:
        """The blocks that are given up for one of so many bytes, ends before what leads to them; none where all that
        may be given up are not enough.
        """
        room, gone = self.memory_bytes - self.held_bytes, list[str]()
        left = {name: len(self._children.get(name, ())) for name in self._blocks}
        old = [name for name, held in self._blocks.items() if held.used < self._turn]
        while room < needed_bytes:
            ends = [name for name in old if left[name] == 0 and name not in gone]
            if not ends:
                return []
            oldest = min(ends, key=lambda name: self._blocks[name].used)
            gone.append(oldest)
            room += self._blocks[oldest].nbytes
            parent = self._blocks[oldest].parent
            if parent in left:
                left[parent] -= 1
        return gone


def _cuts(at: int, marks: Sequence[int], own_from: int | None, own_tokens: int) -> Iterator[int]:
    """Where blocks end, from `at` on: at the marks that are far enough from the mark before, so close that no block is
    too long (from `own_from` on `own_tokens`), and at the last mark.
    """
    for mark in marks:
        while (left := mark - at) > (most := BLOCK_TOKENS if own_from is None or at < own_from else own_tokens):
            at += most if left - most >= LEAST_BLOCK_TOKENS else left // 2
            yield at
        if mark - at >= LEAST_BLOCK_TOKENS or (mark == marks[-1] and mark > at):
            at = mark
            yield at


def _name(parent: str, ids: Sequence[int]) -> str:
    return hashlib.sha256(parent.encode() + np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:32]
