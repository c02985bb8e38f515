"""End-to-end training: a student reads windows and learns its teacher's distribution on text, and answers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping.data import ANSWER, TEXT, Windows
from stripedrag.model.striping.loss import Targets, divergence
from stripedrag.model.striping.recipe import Stage
from stripedrag.model.striping.teacher import Teacher, predicted, unembedding

MICRO_TOKENS = 4096  # activations of so many tokens live at once


def take_step(
    student: StripedHyenaForCausalLM, teacher: Teacher, stage: Stage, windows: Windows, *, rank: int = 0, ranks: int = 1
) -> dict[str, float]:
    """Leave in the student the gradient of the mean loss over a step's windows; returns that loss.

    Of several processes each takes every `ranks`-th window; gradients are then averaged between them, so that a share
    counts `ranks` times.
    """
    positions = int(predicted(windows).sum())
    total = torch.zeros(())
    for part in _micro(Windows(windows.ids[rank::ranks], windows.kinds[rank::ranks])):
        wanted = teacher.targets(part, answer_weight=stage.answer_weight, text_labels=stage.text_labels)
        loss = _loss(student, part, wanted)
        (loss * (ranks / max(positions, 1))).backward()
        total += loss.detach().cpu()
    clip_(student)
    return {"loss": float(total) / max(positions, 1)}


def clip_(student: nn.Module, norm: float = 1.0) -> None:
    """Scale the gradient down to a norm of at most `norm`."""
    nn.utils.clip_grad_norm_([p for p in student.parameters() if p.grad is not None], norm)


@torch.no_grad()
def measure(model: PreTrainedModel, teacher: Teacher, windows: Windows) -> dict[str, float]:
    """On held-out windows: `kl` from the teacher on text, `nats` a token of text and `answer_nats` of answers."""
    weight = unembedding(model)
    sums = {"kl": 0.0, "nats": 0.0, "answer_nats": 0.0}
    counts = {"text": 0, "answer": 0}
    for part in _micro(windows):
        hidden = _hidden(model, part)
        targets = teacher.targets(part, answer_weight=1.0)
        labels = part.ids[:, 1:][predicted(part)].long()
        kinds = part.kinds[:, 1:][predicted(part)]
        for kind, name in ((TEXT, "text"), (ANSWER, "answer")):
            of_kind = kinds == kind
            if not of_kind.any():
                continue
            counts[name] += int(of_kind.sum())
            said = Targets(*(t[of_kind] for t in targets))
            label = _labels(labels[of_kind])
            nats = float(divergence(hidden[of_kind], weight, label))
            if kind == TEXT:
                sums["kl"] += float(divergence(hidden[of_kind], weight, said))
                sums["nats"] += nats
            else:
                sums["answer_nats"] += nats
    text, answer = counts["text"], counts["answer"]
    measured = {"kl": sums["kl"] / text, "nats": sums["nats"] / text} if text else {}
    return measured | ({"answer_nats": sums["answer_nats"] / answer} if answer else {})


def _loss(student: StripedHyenaForCausalLM, windows: Windows, targets: Targets) -> Tensor:
    device = student.device
    hidden = _hidden(student, windows)
    return divergence(hidden, unembedding(student), Targets(*(t.to(device) for t in targets)))


def _hidden(model: PreTrainedModel, windows: Windows) -> Tensor:
    """The states (R, H) from which the predicted tokens of windows follow."""
    ids = windows.ids.long().to(model.device)
    weight = unembedding(model)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=weight.dtype == torch.bfloat16):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
    kept: Tensor = hidden[:, :-1][predicted(windows).to(ids.device)]
    return kept


def _labels(ids: Tensor) -> Targets:
    return Targets(ids.unsqueeze(1), torch.ones(len(ids), 1), torch.ones(len(ids)))


def _micro(windows: Windows) -> Iterator[Windows]:
    rows = max(1, MICRO_TOKENS // windows.ids.shape[1])
    for ids, kinds in zip(windows.ids.split(rows), windows.kinds.split(rows), strict=True):
        yield Windows(ids, kinds)
