"""The loss of every token of a text, summed between boundaries, in bounded memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from stripedrag.errors import UsageError
from stripedrag.eval.schema import Losses
from stripedrag.model.cache import new_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEGMENT_TOKENS = 512  # the logits of so many tokens are held at once


def prefix_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What stands before a text's first token: BOS, or EOS where there is none. Raises `UsageError` for neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UsageError("the tokenizer has neither a BOS nor an EOS token, so nothing can stand for an empty context")


@torch.no_grad()
def losses(
    model: "PreTrainedModel",
    ids: Sequence[int],
    starts: Sequence[int],
    boundaries: Sequence[int],
    *,
    head: Sequence[int],
) -> Losses:
    """Nats (natural log) of tokens `ids`, each predicted from all before it, summed by where in the text it starts.

    `starts` are the tokens' first characters, `boundaries` ascend to the text's length. `head` (at least one token,
    such as BOS) comes before the first and is not predicted.
    """
    cache = new_cache(model.config)
    whole = torch.tensor([[*head, *ids]], device=model.device)
    each = []
    for first in range(0, whole.shape[1] - 1, SEGMENT_TOKENS):
        last = min(first + SEGMENT_TOKENS, whole.shape[1] - 1)
        logits = model(input_ids=whole[:, first:last], past_key_values=cache, use_cache=True).logits[0].float()
        targets = whole[0, first + 1 : last + 1]
        each.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double())
    nats = torch.cat(each)[len(head) - 1 :].tolist()
    sums, counts, stretch = [0.0] * len(boundaries), [0] * len(boundaries), 0
    for start, loss in zip(starts, nats, strict=True):
        while start >= boundaries[stretch]:
            stretch += 1
        sums[stretch] += loss
        counts[stretch] += 1
    return Losses(nats=tuple(sums), tokens=tuple(counts))
