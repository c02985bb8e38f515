"""Prefill in segments and decode token by token, for a model of any kind: one place that times, streams and stops.

Knows ids only. transformers' own `generate` works on the same models; this loop is what a pipeline needs beside it: the
prompt fed in pieces of bounded memory, tokens handed out as they come, and no thread whose exception can get lost.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from stripedrag.errors import UsageError
from stripedrag.model.cache import expect
from stripedrag.model.modeling import refuse_foreign_ids, refuse_over_window
from stripedrag.model.shared import fork, join

SEGMENT_TOKENS = 2048  # activations of so many tokens live at once


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else from the top-p mass at that temperature.

    Raises `UsageError` for a temperature below 0 or a top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}; it is 0 (greedy) or more")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; it lies from 0 to {2**63 - 1}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it lies above 0 and goes up to 1")


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: DynamicCache,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The logits (B, V) after input_ids (B, L), which follow whatever `cache` holds; the cache takes them in.

    `progress` hears how many tokens the cache holds, and how many it will. Raises `UsageError` for a StripedHyena whose
    window is smaller, `ValueError` for ids that the model's vocabulary lacks, before any is read.
    """
    begun, length = cache.get_seq_length(), input_ids.shape[1]
    refuse_over_window(model.config, begun + length)
    refuse_foreign_ids(input_ids, model.get_input_embeddings().num_embeddings)
    expect(cache, begun + length)
    for number, segment in enumerate(input_ids.split(SEGMENT_TOKENS, dim=1), start=1):
        logits = model(input_ids=segment, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if progress:
            progress(begun + min(number * SEGMENT_TOKENS, length), begun + length)
    last: Tensor = logits[:, -1]
    return last


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    logits: Tensor,
    cache: DynamicCache,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
) -> Iterator[int]:
    """Tokens that continue a prefill of one sequence, as they come; ends before a stop id or after `max_new_tokens`."""
    choose = _Chooser(sampling, logits.device)
    for made in range(max_new_tokens):
        token = choose(logits)
        if token in stop_ids:
            return
        yield token
        if made + 1 < max_new_tokens:
            ids = torch.tensor([[token]], device=logits.device)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


@torch.no_grad()
def decode_together(
    model: PreTrainedModel,
    cache: DynamicCache,
    rests: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    begins: Callable[[int, Tensor], bool] = lambda row, logits: True,
    ends: Callable[[int, int], bool] = lambda row, token: False,
) -> list[list[int]]:
    """The tokens that continue each of several prompts, which begin with what `cache` holds and go on with `rests`.

    As `decode` of each alone, but for the rounding of products of another shape: one step of the model takes all that
    have not ended. `cache` stays as it is. Each rest has a token or more. `begins` hears each row and the logits (1, V)
    of its first token, and says whether it gets any; `ends` the row of each token and the token, and says whether it is
    the row's last. For a StripedHyena.
    """
    alike: dict[int, list[int]] = {}
    for row, rest in enumerate(rests):
        alike.setdefault(len(rest), []).append(row)
    forks, firsts = [], []
    going: list[int] = []
    for length, rows in alike.items():  # of one length: nothing is padded
        some = max(1, SEGMENT_TOKENS // length)
        for at in range(0, len(rows), some):
            part = rows[at : at + some]
            forks.append(fork(cache, len(part)))
            ids = torch.tensor([list(rests[row]) for row in part], device=model.device)
            firsts.append(prefill(model, ids, forks[-1]))
            going += part
    together, logits = join(forks), torch.cat(firsts)
    del forks, firsts
    begun = cache.get_seq_length()
    made: list[list[int]] = [[] for _ in rests]
    choosers = [_Chooser(sampling, logits.device) for _ in rests]

    def take(row: int, token: int) -> bool:
        """Add a token to a row, and say whether others may follow."""
        made[row].append(token)
        return not ends(row, token) and len(made[row]) < max_new_tokens

    def keep(on: list[int]) -> None:
        nonlocal going
        if len(on) < len(going):
            together.reorder_cache(torch.tensor(on, device=logits.device))
        going = [going[i] for i in on]

    on = [i for i, row in enumerate(going) if begins(row, logits[i : i + 1])]
    if not on:
        return made
    keep(on)
    logits = logits[on]
    while going:
        chosen = [choosers[row](logits[i : i + 1]) for i, row in enumerate(going)]
        on = [i for i, token in enumerate(chosen) if token not in stop_ids and take(going[i], token)]
        if not on:
            break
        keep(on)
        positions = [[begun + len(rests[row]) + len(made[row]) - 1] for row in going]
        logits = model(
            input_ids=torch.tensor([[made[row][-1]] for row in going], device=logits.device),
            position_ids=torch.tensor(positions, device=logits.device),
            past_key_values=together,
            use_cache=True,
        ).logits[:, -1]
    return made


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end an answer, by the model's generation config, or by its config where that names none.

    A published generation_config.json may name none, which transformers takes at its word; a StripedHyena's is filled
    while it is loaded.
    """
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


class _Chooser:
    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._greedy = sampling.temperature == 0
        if self._greedy:
            return
        self._warp = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        if self._greedy:
            return int(logits[0].argmax())
        probabilities = self._warp(None, logits.float()).softmax(-1)
        return int(torch.multinomial(probabilities[0], 1, generator=self._generator))
