"""What a striped model can do beside its teacher, on held-out windows of every length that it was trained on."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from stripedrag.model.striping.data import Windows
from stripedrag.model.striping.distillation import is_text, measure, said_of_text, scored

_FIRST_EDGE = 512  # stretches of positions begin at 0, here, and at every doubling


class Measured(BaseModel):
    """A model on windows of a length, with so many tokens of text and so many answers: see `distillation.measure`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_tokens: int
    answers: int
    kl: float | None = None
    nats: float | None = None
    answer_nats: float | None = None
    exact: float | None = None


class Stretch(BaseModel):
    """Nats a token of text at positions from `start` to before `end`, by model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int
    end: int
    tokens: int
    nats: dict[str, float]


class Evaluation(BaseModel):
    """`lengths`: by window length and model. `stretches`: how text is predicted the further on it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: dict[int, dict[str, Measured]]
    stretches: tuple[Stretch, ...]


def evaluate(
    models: Mapping[str, PreTrainedModel], teacher: PreTrainedModel, windows: Mapping[int, Windows]
) -> Evaluation:
    """Measure each model on each length's windows, beside its teacher, and by position on the longest."""
    lengths: dict[int, dict[str, Measured]] = {}
    for length, some in windows.items():
        counts, said = _counts(some), said_of_text(teacher, some)
        lengths[length] = {
            name: Measured.model_validate(counts | measure(model, some, said)) for name, model in models.items()
        }
    return Evaluation(lengths=lengths, stretches=_stretches(models, windows[max(windows)]))


def _counts(windows: Windows) -> dict[str, int]:
    texts = windows.at(is_text(windows))
    return {"text_tokens": texts.ids[:, 1:].numel(), "answers": windows.answers}


def _stretches(models: Mapping[str, PreTrainedModel], windows: Windows) -> tuple[Stretch, ...]:
    texts = windows.at(is_text(windows))
    if not len(texts.ids):
        return ()
    nats = {name: torch.cat([s.nats for s in scored(model, texts)]) for name, model in models.items()}
    width = texts.ids.shape[1] - 1
    edges = [0]
    while edges[-1] < width:
        edges.append(min(max(2 * edges[-1], _FIRST_EDGE), width))
    return tuple(
        Stretch(
            start=start,
            end=end,
            tokens=len(texts.ids) * (end - start),
            nats={name: float(some.view(-1, width)[:, start:end].mean()) for name, some in nats.items()},
        )
        for start, end in pairwise(edges)
    )
