"""What striping changed, as tensors that are small beside the model: enough, with the transformer, to have it again.

Names are those of a StripedHyena's backbone. A tensor of that name stands in place of the transformer's; a pair
`<layer>.down` (r, in) and `<layer>.up` (out, r) is added to `<layer>.weight` as `LORA_SCALE` up · down.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stripedrag.errors import CheckpointError
from stripedrag.model.config import StripedHyenaConfig
from stripedrag.model.layers import HyenaFilter
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping.families import striped_tensors
from stripedrag.model.striping.student import LORA_SCALE

TRANSFORMER = "transformer"  # in the metadata of a file of changes: `transformer_digest` of what was changed


@torch.no_grad()
def changes(student: StripedHyenaForCausalLM) -> dict[str, Tensor]:
    """The trained tensors of a student: poles and residues in float32, all others in the student's own dtype."""
    dtype = student.get_input_embeddings().weight.dtype
    found: dict[str, Tensor] = {}
    for prefix, module in student.backbone.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and "parametrizations" not in prefix:
                kept = parameter.dtype if isinstance(module, HyenaFilter) and name == "residues" else dtype
                found[f"{prefix}.{name}"] = parameter.detach().to(kept).clone()
        if isinstance(module, HyenaFilter):
            found[f"{prefix}.poles"] = module.poles.detach().clone()
    return found


def striped_model(
    transformer: Mapping[str, Tensor], config: StripedHyenaConfig, changed: Mapping[str, Tensor]
) -> StripedHyenaForCausalLM:
    """The StripedHyena of a transformer's tensors and what striping changed, in the dtype of the transformer.

    Raises `CheckpointError` where the changes are of another network.
    """
    tensors = striped_tensors(transformer, config)
    adapted = {name.rpartition(".")[0] for name in changed if name.endswith((".down", ".up"))}
    for layer in sorted(adapted):
        weight, down, up = tensors.get(f"{layer}.weight"), changed.get(f"{layer}.down"), changed.get(f"{layer}.up")
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (weight, down, up)]
        if (
            weight is None
            or down is None
            or up is None
            or (*weight.shape, *down.shape)
            != (
                *(up.shape[0], down.shape[1]),
                *(up.shape[1], weight.shape[1]),
            )
        ):
            raise CheckpointError(
                f"the low-rank difference of {layer!r} does not fit: the weight is {shapes[0]}, down {shapes[1]} and "
                f"up {shapes[2]}; give the changes of a model of these sizes"
            )
        tensors[f"{layer}.weight"] = (weight.float() + LORA_SCALE * up.float() @ down.float()).to(weight.dtype)
    tensors |= {name: tensor for name, tensor in changed.items() if name.rpartition(".")[0] not in adapted}
    with torch.device("meta"):
        model = StripedHyenaForCausalLM(config)
    _refuse_others(model.backbone.state_dict(), tensors)
    model.backbone.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.to(transformer["model.embed_tokens.weight"].dtype).eval()
    return model


@torch.no_grad()
def take_up(student: StripedHyenaForCausalLM, changed: Mapping[str, Tensor]) -> None:
    """Give a student, as `make_trainable` leaves it, what `changes` found in another one.

    Raises `CheckpointError` where the changes are of another network.
    """
    _refuse_others(changes(student), changed)
    for name, tensor in changed.items():
        prefix, _, leaf = name.rpartition(".")
        module = student.backbone.get_submodule(prefix)
        if leaf == "poles":
            module.poles = tensor.to(module.poles.device)  # by way of their free parameters
        else:
            module.get_parameter(leaf).copy_(tensor)


def _refuse_others(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: tensor.shape for name, tensor in own.items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(name for name, _ in wanted.items() ^ given.items()):
        raise CheckpointError(
            f"the changes are of another network: {wrong[0]} is {_shape(given, wrong[0])}, and the model's "
            f"{_shape(wanted, wrong[0])}"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} holds values that are no numbers; give changes that are whole")
        if name.endswith(".poles") and (radius := tensor.square().sum(-1).max().sqrt()) > 1 + 1e-6:
            raise CheckpointError(
                f"{name} has a pole of |λ| = {radius:g}; a stable one is at most 1. Give changes that are whole."
            )


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "missing"
