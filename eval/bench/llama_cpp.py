"""SmolLM2 as a user of llama.cpp runs it: the GGUF as it is published, and 8 bits a weight requantised from that.

By the low-level functions of llama-cpp-python, so that nothing but llama.cpp takes time: prompts in batches of 2,048,
flash attention, keys and values in float16, each row's apart, which are its own choices or its faster ones.
"""

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

from stripedrag.errors import StoreError
from stripedrag.weights import SMOLLM2, cache_dir, fetch

BATCH_TOKENS = 2048
_CELLS = 256  # of which a row's part of the cache has a whole number


def built_for() -> str:
    """The version, and the instruction sets that the library was built for."""
    return f"{lib.__version__}: {lib.llama_print_system_info().decode()}"


@lib.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    del level, text, data


def published() -> Path:
    """The GGUF as it is published."""
    return fetch(SMOLLM2)


def requantised() -> Path:
    """The same with 8 bits a weight (Q8_0), made once.

    Raises `StoreError` where llama.cpp does not make it.
    """
    target = cache_dir() / "bench" / f"{published().stem.partition('.')[0]}.Q8_0.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        options = lib.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_Q8_0, True
        lib.llama_log_set(_silent, ctypes.c_void_p(0))
        failed = lib.llama_model_quantize(os.fsencode(published()), os.fsencode(scratch), ctypes.byref(options))
        if failed:
            scratch.unlink(missing_ok=True)
            raise StoreError(f"llama.cpp could not requantise {published()} (it says {failed})")
        scratch.replace(target)
    return target


class LlamaCpp:
    """A GGUF, read by so many threads."""

    def __init__(self, path: Path, threads: int) -> None:
        lib.llama_log_set(_silent, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        if not self._model:
            raise StoreError(f"llama.cpp does not load {path}")
        self._threads = threads
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        heads = lib.llama_model_n_head(self._model), lib.llama_model_n_head_kv(self._model)
        width = lib.llama_model_n_embd(self._model) // heads[0]
        self.token_bytes = 2 * 2 * lib.llama_model_n_layer(self._model) * heads[1] * width  # keys and values, float16
        self.weight_bytes = int(lib.llama_model_size(self._model))

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, tell: Callable[[float], None]
    ) -> list[list[int]]:
        """Read all prompts, which are of one length, then write `new_tokens` greedily after each, side by side: these.
        `tell` hears the time when there is a context to read in, when all first tokens are there, and when all are.

        Raises `StoreError` where llama.cpp refuses.
        """
        rows, length = len(prompts), len(prompts[0])
        options = lib.llama_context_default_params()
        options.n_ctx = rows * -(-(length + new_tokens) // _CELLS) * _CELLS
        options.n_batch, options.n_seq_max = BATCH_TOKENS, rows
        options.n_threads = options.n_threads_batch = self._threads
        options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = lib.llama_init_from_model(self._model, options)
        if not context:
            raise StoreError(f"llama.cpp has no context of {options.n_ctx} tokens")
        batch = lib.llama_batch_init(BATCH_TOKENS, 0, 1)
        try:
            written: list[list[int]] = []
            tell(time.perf_counter())
            for row, prompt in enumerate(prompts):
                for start in range(0, length, BATCH_TOKENS):
                    part = prompt[start : start + BATCH_TOKENS]
                    self._decode(context, batch, [(token, start + i, row) for i, token in enumerate(part)])
                written.append([self._likeliest(context, -1)])
            tell(time.perf_counter())
            for made in range(new_tokens - 1):
                lasts = [(tokens[-1], length + made, row) for row, tokens in enumerate(written)]
                self._decode(context, batch, lasts, all_=True)
                for row, tokens in enumerate(written):
                    tokens.append(self._likeliest(context, row))
            tell(time.perf_counter())
            return written
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)

    def _decode(self, context: Any, batch: Any, entries: Sequence[tuple[int, int, int]], *, all_: bool = False) -> None:
        batch.n_tokens = len(entries)
        for i, (token, place, row) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = all_ or i == len(entries) - 1
        if failed := lib.llama_decode(context, batch):
            raise StoreError(f"llama.cpp could not read {len(entries)} tokens (it says {failed})")

    def _likeliest(self, context: Any, place: int) -> int:
        logits = lib.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())
