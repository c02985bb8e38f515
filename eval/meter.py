"""What a clock, the memory meter and the energy counter say of one piece of work; and its end if it takes too long."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from stripedrag.errors import StoreError

_CLEAR, _STATUS, _MEMINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")
_ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class OutOfTimeError(Exception):
    """The work took longer than it may."""


class Meter:
    """Measures the block of `running`; the work itself tells `prefill_s` and `decode_s`.

    `peak_bytes` is how far the process's resident memory rose above what it was before (on a CUDA device: the most that
    torch held there, weights included), `joules` the processor package's counter (which runs over now and then: a
    negative difference is None). Both are None where the system does not tell. Memory that was freed before and is used
    again is no rise, unless `trim` gives it back first.
    """

    def __init__(self, *, trim: bool = False) -> None:
        self._trim = trim
        self.prefill_s: float | None = None
        self.decode_s: float | None = None
        self.total_s = 0.0
        self.peak_bytes: int | None = None
        self.joules: float | None = None

    @contextmanager
    def running(self, timeout_s: float) -> Iterator[None]:
        """Measure, and raise `OutOfTimeError` in the block after `timeout_s` (in the main thread of a Unix process)."""
        if self._trim:
            _trim_heap()
        if (device := _cuda()) is not None:
            device.reset_peak_memory_stats()
        before, energy = reset_peak(), _energy()
        started = time.perf_counter()
        try:
            with _alarm(timeout_s):
                yield
        finally:
            self.total_s = time.perf_counter() - started
            after = _energy()
            if energy is not None and after is not None and after >= energy:
                self.joules = (after - energy) / 1e6
            if before is not None:
                self.peak_bytes = max(0, peak_resident_bytes() - before)
            if device is not None:
                self.peak_bytes = int(device.max_memory_allocated())

    def told_peak_bytes(self) -> int:
        """`peak_bytes`. Raises `StoreError` where the system does not tell."""
        if self.peak_bytes is None:
            raise StoreError("this system does not tell how much memory a process took (no /proc/self/clear_refs)")
        return self.peak_bytes


def reset_peak() -> int | None:
    """The process's resident bytes now, from where on their peak counts anew; None where nothing tells."""
    if not os.access(_CLEAR, os.W_OK):
        return None
    _CLEAR.write_text("5")
    return _proc_bytes(_STATUS, "VmRSS")


def peak_resident_bytes() -> int:
    """The most bytes that were resident since `reset_peak`."""
    return _proc_bytes(_STATUS, "VmHWM")


def resident_bytes() -> dict[str, int]:
    """Bytes of this process in memory: its "own", and those of "mapped" files, which the system may drop; {} where
    nothing tells."""
    kinds = {"own": "RssAnon", "mapped": "RssFile"}
    return {kind: _proc_bytes(_STATUS, field) for kind, field in kinds.items()} if _STATUS.exists() else {}


@contextmanager
def bounded_memory(more_bytes: int | None = None) -> Iterator[None]:
    """Let an allocation fail in the block that the machine has no memory for, instead of having the process killed.

    The process may take `more_bytes` beyond what it has (None: what is available now), by RLIMIT_DATA of Linux. Where
    the system has no such limit, or a lower one is set, nothing is changed.
    """
    if not _MEMINFO.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if more_bytes is None:
        more_bytes = _proc_bytes(_MEMINFO, "MemAvailable")
    limit = _proc_bytes(_STATUS, "VmData") + more_bytes
    ends = [end for end in (soft, hard) if end != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *ends]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _proc_bytes(file: Path, field: str) -> int:
    """A line of /proc in bytes."""
    return 1024 * next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(field))


def _cuda() -> Any:
    """torch.cuda, where it is in use."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _trim_heap() -> None:
    """Give freed memory back to the system, where the C library can (glibc's malloc_trim)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _energy() -> int | None:
    return int(_ENERGY.read_text()) if os.access(_ENERGY, os.R_OK) else None


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise OutOfTimeError(f"no result after {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
