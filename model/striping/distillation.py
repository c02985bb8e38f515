"""End-to-end training: a student reads windows and learns its teacher's distribution on text, and answers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping.data import ANSWER, TEXT, Windows
from stripedrag.model.striping.loss import ROWS, Targets, divergence
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.recipe import Stage
from stripedrag.model.striping.teacher import Teacher, predicted, unembedding

MICRO_TOKENS = 4096  # activations of so many tokens, or of one window, live at once


def take_step(
    student: StripedHyenaForCausalLM, teacher: Teacher, stage: Stage, windows: Windows, processes: Processes
) -> dict[str, float]:
    """Leave in the student the gradient of a step's loss by the tokens of its windows; returns that loss.

    All tokens of the windows are counted, also those that nothing is learnt from: a token that counts weighs the same
    in every step. Of several processes each computes it for its share of the windows; the mean over the processes is
    the whole's.
    """
    tokens = windows.ids.numel() / processes.count
    total = torch.zeros(())
    for part in _micro(processes.share(windows)):
        wanted = teacher.targets(part, answer_weight=stage.answer_weight, text_labels=stage.text_labels)
        loss = _loss(student, part, wanted)
        (loss / tokens).backward()
        total += loss.detach().cpu()
    return {"loss": float(total) / tokens}


class Scored(NamedTuple):
    """What a model made of R predicted tokens: the `hidden` states (R, H) before them, their `kinds`, the `nats` of
    each, and whether it was the likeliest, `is_top`. `windows` are those that they are of.
    """

    windows: Windows
    hidden: Tensor
    kinds: Tensor
    nats: Tensor
    is_top: Tensor


@torch.no_grad()
def scored(model: PreTrainedModel, windows: Windows) -> Iterator[Scored]:
    """The predicted tokens of windows, a few thousand at a time."""
    weight = unembedding(model)
    for part in _micro(windows):
        hidden = _hidden(model, part)
        labels = part.ids[:, 1:][predicted(part)].long().to(hidden.device)
        nats, is_top = [], []
        for states, wanted in zip(hidden.split(ROWS), labels.split(ROWS), strict=True):
            logits = (states.to(weight.dtype) @ weight.T).float()
            nats.append(F.cross_entropy(logits, wanted, reduction="none"))
            is_top.append(logits.argmax(-1) == wanted)
        yield Scored(part, hidden, part.kinds[:, 1:][predicted(part)], torch.cat(nats).cpu(), torch.cat(is_top).cpu())


class Said(NamedTuple):
    """What a teacher says of windows of text: the states (R, H) before the tokens that are predicted, and the `weight`
    (V, H) that makes logits of them."""

    states: Tensor
    weight: Tensor


@torch.no_grad()
def said_of_text(teacher: PreTrainedModel, windows: Windows) -> Said:
    """What a teacher says of those of the windows that are text throughout."""
    weight = unembedding(teacher)
    states = [_hidden(teacher, part) for part in _micro(windows.at(is_text(windows)))]
    return Said(torch.cat([weight.new_empty(0, weight.shape[1]), *states]), weight)


def is_text(windows: Windows) -> Tensor:
    """(W,) bool: the windows that are text throughout; a passage that is asked about is another kind of text."""
    return (windows.kinds[:, 1:] == TEXT).all(1)


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Windows, said: Said) -> dict[str, float]:
    """On held-out windows: nats a token of those that are text, `nats`, and the KL divergence of the model from what is
    `said` of them, over the whole vocabulary, `kl`; nats a token of answers, `answer_nats`, and `exact`, the share of
    answers of which every token is the likeliest after those before it: greedy decoding gives exactly these.
    """
    kl = 0.0
    nats: dict[int, list[Tensor]] = {TEXT: [], ANSWER: []}
    exact: list[Tensor] = []
    unread = said.states
    for part in scored(model, windows):
        of_text = is_text(part.windows).repeat_interleave(predicted(part.windows).sum(1))
        of_answers = part.kinds == ANSWER
        nats[TEXT].append(part.nats[of_text])
        nats[ANSWER].append(part.nats[of_answers])
        count = int(of_text.sum())
        kl += _divergence(
            part.hidden[of_text.to(part.hidden.device)], unembedding(model), Said(unread[:count], said.weight)
        )
        unread = unread[count:]
        if of_answers.any():
            answer = _answer_numbers(part.windows)[of_answers]
            exact.append(torch.bincount(answer, weights=(~part.is_top[of_answers]).double()) == 0)
    measured: dict[str, float] = {}
    if len(text := torch.cat(nats[TEXT])):
        measured |= {"kl": kl / len(text), "nats": float(text.mean())}
    if len(answers := torch.cat(nats[ANSWER])):
        measured |= {"answer_nats": float(answers.mean()), "exact": float(torch.cat(exact).double().mean())}
    return measured


def _divergence(hidden: Tensor, weight: Tensor, said: Said) -> float:
    """Σ KL(teacher ‖ model) over positions, in nats."""
    total = 0.0
    for ours, theirs in zip(hidden.split(ROWS), said.states.split(ROWS), strict=True):
        p, q = (
            (states.to(matrix.dtype) @ matrix.T).float().log_softmax(-1)
            for states, matrix in ((theirs, said.weight), (ours, weight))
        )
        total += float((p.exp() * (p - q)).sum())
    return total


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


def _answer_numbers(windows: Windows) -> Tensor:
    """For each predicted position, the number from 0 of the answer that its next token is in or comes after."""
    is_answer = windows.kinds == ANSWER
    begins = is_answer.clone()
    begins[:, 1:] &= ~is_answer[:, :-1]
    number = (begins.flatten().cumsum(0) - 1).view(begins.shape)
    return number[:, 1:][predicted(windows)]


def _micro(windows: Windows) -> Iterator[Windows]:
    rows = max(1, MICRO_TOKENS // windows.ids.shape[1])
    for start in range(0, len(windows.ids), rows):
        yield windows.at(slice(start, start + rows))
