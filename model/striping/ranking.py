"""Which attention layers may go: what skipping each costs in the text's distribution and in recall from the context.

Either alone misleads: the layers that find an answer in the context hardly matter to the text's perplexity.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from stripedrag.errors import UsageError
from stripedrag.model.striping.data import Windows
from stripedrag.model.striping.distillation import measure, said_of_text


class LayerCost(BaseModel):
    """What skipping a layer's attention costs on training data: nats a token of KL on text, and of answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    kl: float
    answer_nats: float


def rank_layers(teacher: PreTrainedModel, windows: Windows, progress: Callable[[int, int], None]) -> list[LayerCost]:
    """The cost of every layer, in the layers' order; `progress` hears of each."""
    layers = teacher.base_model.layers
    said = said_of_text(teacher, windows)
    whole = measure(teacher, windows, said)
    costs = []
    for i, layer in enumerate(layers):
        with _without(layer.self_attn):
            got = measure(teacher, windows, said)
        costs.append(LayerCost(layer=i, kl=got["kl"], answer_nats=got["answer_nats"] - whole["answer_nats"]))
        progress(i + 1, len(layers))
    return costs


def choose(costs: Sequence[LayerCost], count: int) -> list[int]:
    """The `count` layers that cost least, both costs in units of their median over the layers.

    Raises `UsageError` for more layers than the model can spare: a StripedHyena keeps at least one of attention.
    """
    if not 1 <= count < len(costs):
        raise UsageError(f"{count} Hyena layers of {len(costs)}; choose 1 to {len(costs) - 1}")
    kl = _median([cost.kl for cost in costs])
    answers = _median([max(cost.answer_nats, 0.0) for cost in costs])
    ranked = sorted(costs, key=lambda cost: (cost.kl / kl + max(cost.answer_nats, 0.0) / answers, cost.layer))
    return sorted(cost.layer for cost in ranked[:count])


def _median(values: Sequence[float]) -> float:
    return max(float(torch.tensor(values).median()), 1e-6)


@contextmanager
def _without(attention: nn.Module) -> Iterator[None]:
    def skip(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.zeros_like(output[0]), *output[1:]

    handle = attention.register_forward_hook(skip)
    try:
        yield
    finally:
        handle.remove()
