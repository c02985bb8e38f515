"""End-to-end training: a student reads windows and learns its teacher's distribution on text, and answers."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping.data import ANSWER, TEXT, Windows
from stripedrag.model.striping.loss import Targets, divergence
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.recipe import Stage
from stripedrag.model.striping.teacher import Teacher, predicted, unembedding

MICRO_TOKENS = 4096  # activations of so many tokens live at once


def take_step(
    student: StripedHyenaForCausalLM, teacher: Teacher, stage: Stage, windows: Windows, processes: Processes
) -> dict[str, float]:
    """Leave in the student the gradient of the mean loss over a step's windows; returns that loss.

    Of several processes each computes it for its share of the windows; the mean over the processes is the whole's.
    """
    positions = int(predicted(windows).sum()) / processes.count
    total = torch.zeros(())
    for part in _micro(processes.share(windows)):
        wanted = teacher.targets(part, answer_weight=stage.answer_weight, text_labels=stage.text_labels)
        loss = _loss(student, part, wanted)
        (loss / max(positions, 1)).backward()
        total += loss.detach().cpu()
    return {"loss": float(total) / max(positions, 1)}


@torch.no_grad()
def measure(model: PreTrainedModel, teacher: Teacher, windows: Windows) -> dict[str, float]:
    """On held-out windows: `kl` from the teacher on text, `nats` a token of text, `answer_nats` a token of answers, and
    `exact`, the share of answers of which every token is the likeliest after those before it: greedy decoding gives
    exactly these.
    """
    weight = unembedding(model)
    sums = dict.fromkeys(("kl", "nats", "answer_nats", "exact"), 0.0)
    counts = {TEXT: 0, ANSWER: 0, "answers": 0}
    for part in _micro(windows):
        hidden = _hidden(model, part)
        targets = teacher.targets(part, answer_weight=1.0)
        labels = part.ids[:, 1:][predicted(part)].long()
        kinds = part.kinds[:, 1:][predicted(part)]
        for kind in (TEXT, ANSWER):
            of_kind = kinds == kind
            if not of_kind.any():
                continue
            counts[kind] += int(of_kind.sum())
            nats = float(divergence(hidden[of_kind], weight, _labels(labels[of_kind])))
            sums["nats" if kind == TEXT else "answer_nats"] += nats
            if kind == TEXT:
                said = Targets(*(t[of_kind] for t in targets))
                sums["kl"] += float(divergence(hidden[of_kind], weight, said))
            else:
                right = _likeliest(hidden[of_kind], weight) == labels[of_kind].to(hidden.device)
                answer = _answer_numbers(part)[of_kind]
                missed = torch.bincount(answer, weights=(~right.cpu()).double())
                sums["exact"] += int((missed == 0).sum())
                counts["answers"] += len(missed)
    measured = {"kl": sums["kl"] / counts[TEXT], "nats": sums["nats"] / counts[TEXT]} if counts[TEXT] else {}
    if counts[ANSWER]:
        measured |= {"answer_nats": sums["answer_nats"] / counts[ANSWER], "exact": sums["exact"] / counts["answers"]}
    return measured


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


def _likeliest(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([(rows.to(weight.dtype) @ weight.T).argmax(-1) for rows in hidden.split(128)])


def _answer_numbers(windows: Windows) -> Tensor:
    """For each predicted position, the number from 0 of the answer that its next token is in or comes after."""
    is_answer = windows.kinds == ANSWER
    begins = is_answer.clone()
    begins[:, 1:] &= ~is_answer[:, :-1]
    number = (begins.flatten().cumsum(0) - 1).view(begins.shape)
    return number[:, 1:][predicted(windows)]


def _labels(ids: Tensor) -> Targets:
    return Targets(ids.unsqueeze(1), torch.ones(len(ids), 1), torch.ones(len(ids)))


def _micro(windows: Windows) -> Iterator[Windows]:
    rows = max(1, MICRO_TOKENS // windows.ids.shape[1])
    for ids, kinds in zip(windows.ids.split(rows), windows.kinds.split(rows), strict=True):
        yield Windows(ids, kinds)
