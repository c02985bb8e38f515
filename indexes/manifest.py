"""What an index was made with, and the refusal to read it with anything else.

Vectors of two embedders look alike and mean nothing to each other, so every open compares name, sha256 and dimension.
"""

import json
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from stripedrag.errors import IndexMismatchError, UsageError, faults

if TYPE_CHECKING:
    from stripedrag.indexes.embedding import Embedder

SCHEMA_VERSION = 2


class EmbedderRecord(BaseModel):
    """The embedder that made an index's vectors; `sha256` is of its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    dimension: int


class Manifest(BaseModel):
    """One index's makers. `created_by` is for people only: it is never compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    embedder: EmbedderRecord
    chunker: str
    passage_tokens: int
    chunk_tokens: int
    created_by: str


def parse(text: str, *, index: str) -> Manifest:
    """The manifest of index `index` from its JSON.

    Compares the schema version before anything else, so that an index of a later version is told from a broken one.
    Raises `IndexMismatchError` for another schema and `UsageError` for what is no manifest.
    """
    try:
        fields = json.loads(text)
        version = fields["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"index {index!r} has a broken manifest ({error!r}). Rebuild it.") from error
    if type(version) is not int:
        raise UsageError(f"index {index!r} has a broken manifest (schema_version is {version!r}). Rebuild it.")
    if version != SCHEMA_VERSION:
        mend = "Upgrade stripedrag, or rebuild it" if version > SCHEMA_VERSION else "Rebuild it"
        raise IndexMismatchError(
            f"index {index!r} has schema version {version}; this stripedrag reads version {SCHEMA_VERSION}. {mend}."
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"index {index!r} has a broken manifest ({faults(error)}). Rebuild it.") from error


def refuse_mismatch(manifest: Manifest, embedder: "Embedder", chunker: str, *, index: str) -> None:
    """Raises `IndexMismatchError` where the embedder or the chunker at hand is not the one that made the index."""
    built = manifest.embedder
    if built.name != embedder.name:  # the dimension last: to tell it a model may have to be loaded
        raise IndexMismatchError(
            f"index {index!r} was built with {built.name!r}; the embedder is {embedder.name!r}. Rebuild it, or open it "
            f"with embedder {built.name!r}."
        )
    if built.sha256 != embedder.sha256:
        raise IndexMismatchError(
            f"index {index!r} was built with {built.name!r} of sha256 {built.sha256[:12]}…; the weights here have "
            f"{embedder.sha256[:12]}…. Rebuild it, or install the weights it was built with."
        )
    if built.dimension != embedder.dimension:
        raise IndexMismatchError(
            f"index {index!r} has vectors of {built.dimension} numbers; those of {embedder.name!r} have "
            f"{embedder.dimension}. Rebuild it, or open it with an embedder of {built.dimension}."
        )
    if manifest.chunker != chunker:
        raise IndexMismatchError(
            f"index {index!r} was cut by chunker {manifest.chunker!r}; this stripedrag cuts by {chunker!r}. Rebuild it."
        )
