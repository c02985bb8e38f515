"""What questions about one document can share: the document that a question is about, whole, and its nearest.

A function of the index, that document and a budget in steps alone, so that questions about it, whenever they come,
begin their contexts with the same spans, which a context cache then reads once; a budget that differs by a question's
length falls into another step for few of them. Knows nothing of prompts or caches.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stripedrag.errors import UsageError
from stripedrag.indexes.documents import Scored

if TYPE_CHECKING:
    from stripedrag.indexes.documents import Chunk
    from stripedrag.indexes.filters import Where
    from stripedrag.indexes.index import Index

_VOTES = 12  # best chunks that say what a question is about, the nth by 1 / n
# Of the votes for one document; below, evidence that is elsewhere would be left out (docs/LOG.md).
_AGREEMENT = 0.7
_QUERY_CHUNKS = 3  # of a document's beginning, by which its nearest are found, where an embedder reads so many
_STEP_TOKENS = 256  # budgets differ a little by the question's length, and what is shared must not


def beginning(
    index: "Index",
    found: Sequence[Scored],
    *,
    budget_tokens: int,
    where: "Where | None" = None,
    doc_ids: Iterable[str] | None = None,
) -> tuple[list[Scored], int]:
    """Chunks to begin with, in reading order and more than fit, and the budget for them, at most `budget_tokens`; none
    where what was found speaks of several documents.

    `found` is what a search gave, best first. Of a document longer than the budget it is the stretch that holds its
    best chunk, from one of the places on where such stretches begin.
    """
    budget = budget_tokens // _STEP_TOKENS * _STEP_TOKENS
    if not found or budget <= 0:
        return [], 0
    votes: dict[str, float] = {}
    for place, scored in enumerate(found[:_VOTES], start=1):
        votes[scored.chunk.doc_id] = votes.get(scored.chunk.doc_id, 0.0) + 1 / place
    best = max(votes, key=lambda doc_id: votes[doc_id])
    if votes[best] < _AGREEMENT * sum(votes.values()):
        return [], 0
    chunks = _chunks(index, best)
    if not chunks:
        return [], 0
    length = max(1, budget // index.chunk_tokens)
    best_chunk = next(scored.chunk for scored in found if scored.chunk.doc_id == best)
    first = next((place for place, chunk in enumerate(chunks) if chunk == best_chunk), 0)  # 0: replaced meanwhile
    start = min(first // length * length, max(0, len(chunks) - length))
    stretch = chunks[start:][: 2 * length]
    whole = max(1, index.embedder.max_tokens // index.chunk_tokens)
    query = "".join(chunk.text for chunk in stretch[: min(_QUERY_CHUNKS, whole)])
    near: list[str] = []
    if len(stretch) < 2 * length and query.strip():
        for scored in index.search(query, k=4 * length, where=where, doc_ids=doc_ids):
            if scored.chunk.doc_id not in (best, *near):
                near.append(scored.chunk.doc_id)
    for doc_id in near:
        if len(stretch) >= 2 * length:
            break
        stretch += _chunks(index, doc_id)
    return [Scored(chunk, 0.0, rank) for rank, chunk in enumerate(stretch, start=1)], budget


def _chunks(index: "Index", doc_id: str) -> "list[Chunk]":
    """The chunks of a document; none where another process took it out after it was found."""
    try:
        return index.chunks(doc_id)
    except UsageError:
        return []
