"""Layer by layer: every new Hyena layer learns alone what its attention layer makes of the same inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stripedrag.model.layers import StripedHyenaBlock
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping.data import PADDING, Windows
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.student import blocks


def mixer(block: StripedHyenaBlock, x: Tensor) -> Tensor:
    """A Hyena block's sublayer on normed states x (B, L, H), from the beginning of the sequence."""
    mixed: Tensor = block.out_filter_dense(block.filter(block.projections(x), None, None)[0])
    return mixed


def take_step(
    student: StripedHyenaForCausalLM, teacher: PreTrainedModel, windows: Windows, processes: Processes
) -> dict[str, float]:
    """Leave in each Hyena layer the gradient of its own loss; returns their mean.

    A layer's loss is its squared difference from the attention's output over that output's square, both summed over the
    tokens of all windows. Each of several processes takes its share of them; their mean is the whole's.
    """
    losses: list[Tensor] = []
    part = processes.share(windows)

    def learn(i: int, x: Tensor, wanted: Tensor) -> None:
        block = blocks(student)[i]
        whole = processes.mean(_of_tokens(wanted, part).square().sum())
        with torch.enable_grad(), _autocast(x):
            loss = _of_tokens(mixer(block, x).float() - wanted.float(), part).square().sum() / whole
        loss.backward()
        losses.append(loss.detach())

    _watch(student, teacher, part, learn)
    return {"loss": float(torch.stack(losses).mean())}


@torch.no_grad()
def fit_scales(student: StripedHyenaForCausalLM, teacher: PreTrainedModel, windows: Windows) -> None:
    """Scale each Hyena layer's output to the least-squares fit of its attention layer's.

    As a layer begins it averages about the right values over a wrong stretch; without this it can be worse than zero.
    """

    def fit(i: int, x: Tensor, wanted: Tensor) -> None:
        block = blocks(student)[i]
        with _autocast(x):
            got = mixer(block, x)
        bias = block.out_filter_dense.bias.float()
        got, wanted = (_of_tokens(tensor.float() - bias, windows) for tensor in (got, wanted))
        block.out_filter_dense.weight.mul_((got * wanted).sum() / got.square().sum().clamp(min=1e-12))

    _watch(student, teacher, windows, fit)


@torch.no_grad()
def measure(student: StripedHyenaForCausalLM, teacher: PreTrainedModel, windows: Windows) -> dict[str, float]:
    """On held-out windows: each Hyena layer's relative error, `error_<layer>`, and their mean, `error`."""
    errors: dict[str, float] = {}

    def compare(i: int, x: Tensor, wanted: Tensor) -> None:
        with _autocast(x):
            off = _of_tokens(mixer(blocks(student)[i], x).float() - wanted.float(), windows).square().sum()
        errors[f"error_{i}"] = float(off / _of_tokens(wanted, windows).square().sum())

    _watch(student, teacher, windows, compare)
    return {"error": sum(errors.values()) / len(errors)} | errors


def _of_tokens(states: Tensor, windows: Windows) -> Tensor:
    """The states (B, L, H) of windows where they are no padding, (R, H) float32."""
    return states[(windows.kinds != PADDING).to(states.device)].float()


@torch.no_grad()
def _watch(student: StripedHyenaForCausalLM, teacher: PreTrainedModel, windows: Windows, see: Any) -> None:
    """Let the teacher read; `see(layer, normed input, attention's output)` for each layer that is to be Hyena."""
    layers = [i for i, block in enumerate(blocks(student)) if not block.is_attention]
    with _hooks(teacher, layers, see):
        teacher.base_model(windows.ids.long().to(teacher.device), use_cache=False)


@contextmanager
def _hooks(teacher: PreTrainedModel, layers: list[int], see: Any) -> Iterator[None]:
    def watch(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
            see(i, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0])

        return teacher.base_model.layers[i].self_attn.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(i) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16)
