"""The errors that stripedrag raises on purpose. Each message names the bad value, the limit and the mend.

StripedragError
├── UsageError (ValueError)      the caller can mend it; the command line exits with 2
│   ├── CorpusError              a document, a file or a folder that cannot be indexed
│   ├── IndexMismatchError       an index made by another embedder, chunker or schema
│   ├── BudgetError              a request that cannot fit into the model's window
│   ├── CheckpointError          a config or a set of tensors that is not a StripedHyena's
│   └── SetupError               a model or an extra that this machine lacks, or has in a form that cannot be used
├── StoreError (RuntimeError)    an index that cannot be read or written just now: a full disk, another writer
└── BackendError (RuntimeError)  a kernel backend that was asked for by name and cannot run
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def faults(error: "ValidationError") -> str:
    """What pydantic says, each fault with its place."""
    faults = (
        (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in error.errors()
    )
    return "; ".join(f"{place}: {what}" if place else what for place, what in faults)


def said(error: Exception) -> str:
    """What an error of another library says, in one line and without its full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class StripedragError(Exception):
    """Root of every error of this package."""


class UsageError(StripedragError, ValueError):
    """A caller's mistake."""


class CorpusError(UsageError):
    """A document, a file or a folder that cannot be indexed."""


class IndexMismatchError(UsageError):
    """An index that was made by another embedder, chunker or schema than the one in use."""


class BudgetError(UsageError):
    """A request that cannot fit into the model's window."""


class CheckpointError(UsageError):
    """A config or a set of tensors that is not a StripedHyena's."""


class SetupError(UsageError):
    """A model or an extra that this machine lacks, or has in a form that cannot be used."""


class StoreError(StripedragError, RuntimeError):
    """An index that cannot be read or written just now; what it held before is still there."""


class BackendError(StripedragError, RuntimeError):
    """A kernel backend that was asked for by name and cannot run here."""
