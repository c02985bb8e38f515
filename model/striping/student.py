"""The network that learns: a StripedHyena whose Hyena layers begin as their attention layers' averages over time.

What is trained stands in float32; what is frozen stands in the dtype of the products. A frozen linear layer learns a
low-rank difference (LoRA, Hu et al. 2021), which `changes.striped_model` adds to its weights.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from stripedrag.model.layers import HyenaFilter, StripedHyenaBlock
from stripedrag.model.modeling import StripedHyenaForCausalLM
from stripedrag.model.striping.families import striped_config, striped_tensors

FASTEST_TOKENS, SLOWEST_TOKENS = 1.5, 1000.0  # time constants at the start, log-spaced
LORA_SCALE = 2.0


class StablePoles(nn.Module):
    """Poles |λ| (cos θ, sin θ) with |λ| = exp(-exp(a)), from an unbounded (a, θ) in the last axis. |λ| < 1, but for a
    below -17, where float32 rounds it to 1.

    A step of a changes a time constant by the same factor at any length of memory.
    """

    def forward(self, free: Tensor) -> Tensor:
        """(G, N, 1, 2) poles (re, im) for (a, θ)."""
        log_rate, angle = free.unbind(-1)
        radius = torch.exp(-torch.exp(log_rate))
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)

    def right_inverse(self, poles: Tensor) -> Tensor:
        """(a, θ) of poles; those of radius 0 or 1 are taken as the nearest that float32 tells apart."""
        re, im = poles.unbind(-1)
        radius = torch.hypot(re, im).clamp(1e-6, 1 - 1e-7)
        return torch.stack([torch.log(-torch.log(radius)), torch.atan2(im, re)], dim=-1)


class LoRALinear(nn.Module):
    """A frozen linear layer and a difference of low rank: W x + (alpha / r) B A x, with alpha / r = `LORA_SCALE`."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        down = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=math.sqrt(5))
        self.down = nn.Parameter(down.to(linear.weight.device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) for x (…, in)."""
        y: Tensor = self.linear(x)
        inner = F.linear(x, self.down)
        up = (self.up * LORA_SCALE).T
        added = torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), up.to(y.dtype))  # no pass of its own for the sum
        return added.view(y.shape)


def stripe_layers(
    teacher: PreTrainedModel, hyena_layers: list[int], *, modes: int, taps: int, generator: torch.Generator
) -> StripedHyenaForCausalLM:
    """A StripedHyena in the teacher's dtype, its tensors shared with the teacher's where the layer stays as it is.

    Each of `hyena_layers` begins as `begin_as` says. Raises `CheckpointError` for a teacher that cannot be striped.
    """
    transformer = teacher.state_dict()
    config = striped_config(teacher.config, transformer.keys(), hyena_layers, modes=modes, taps=taps)
    with torch.device("meta"):
        student = StripedHyenaForCausalLM(config)
    student.backbone.load_state_dict(striped_tensors(transformer, config), strict=False, assign=True)
    student.tie_weights()
    for i in hyena_layers:
        block = blocks(student)[i]
        source = f"model.layers.{i}."
        block.pre_norm.scale = nn.Parameter(transformer[source + "input_layernorm.weight"].clone())
        for part in (block.projections, block.filter, block.out_filter_dense):
            part.to_empty(device=teacher.device)
        begin_as(
            block,
            value=transformer[source + "self_attn.v_proj.weight"],
            value_bias=transformer.get(source + "self_attn.v_proj.bias"),
            out=transformer[source + "self_attn.o_proj.weight"],
            out_bias=transformer.get(source + "self_attn.o_proj.bias"),
            group=config.proj_groups,
            head_dim=config.head_dim,
            generator=generator,
        )
    return student


@torch.no_grad()
def begin_as(
    block: StripedHyenaBlock,
    *,
    value: Tensor,
    value_bias: Tensor | None,
    out: Tensor,
    out_bias: Tensor | None,
    group: int,
    head_dim: int,
    generator: torch.Generator,
) -> None:
    """Make a Hyena block an average over the recent past of the values that its attention layer took.

    Values and output are the attention's (`value` (kv heads · head width, H), each head repeated for its `group`); both
    gates are near one; the FIR is the identity; time constants are log-spaced, and each mode's response sums to 1/N.
    Half of the modes turn a little: at an angle of exactly 0 its gradient, and that of the imaginary residue, vanish.
    """
    width = out.shape[0]

    def repeated(tensor: Tensor) -> Tensor:
        heads = tensor.view(-1, head_dim, *tensor.shape[1:])
        return heads.repeat_interleave(group, dim=0).reshape(width, *tensor.shape[1:])

    gates = torch.randn(2 * width, width, generator=generator) * 0.02
    block.projections.weight.copy_(torch.cat([gates.to(value.device), repeated(value).float()]))
    block.projections.bias.fill_(1.0)
    block.projections.bias[2 * width :] = 0 if value_bias is None else repeated(value_bias)
    block.out_filter_dense.weight.copy_(out)
    block.out_filter_dense.bias.copy_(torch.zeros(width) if out_bias is None else out_bias)
    layer: HyenaFilter = block.filter
    systems, modes = layer.poles.shape[:2]
    tokens = torch.logspace(math.log10(FASTEST_TOKENS), math.log10(SLOWEST_TOKENS), modes)
    radius = torch.exp(-1 / tokens).expand(systems, modes)
    turn = torch.randn(systems, modes, generator=generator) * 0.3 / tokens
    turn[:, ::2] = 0
    layer.poles.copy_(torch.stack([radius * turn.cos(), radius * turn.sin()], dim=-1).unsqueeze(2))
    layer.residues.zero_()
    layer.residues[:, :, 0, 0] = (1 - radius) / modes
    layer.short_filter_weight.zero_()
    layer.short_filter_weight[:, 0, -1] = 1
    layer.short_filter_bias.zero_()
    layer.D.zero_()


def make_trainable(model: StripedHyenaForCausalLM, *, rank: int) -> None:
    """Freeze `model` but for its Hyena layers and norms, which become float32, and give other linear layers LoRA.

    The embedding, which the unembedding shares, stays as it is. `rank` 0 leaves the other layers frozen. What is
    trained is a copy, whatever its dtype was: a norm may be the teacher's own.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in blocks(model):
        wide: list[nn.Module] = [block.pre_norm, block.post_norm]
        if not block.is_attention:
            wide += [block.projections, block.filter, block.out_filter_dense]
        for module in wide:
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.float32, copy=True)
                parameter.requires_grad_(True)
        if not block.is_attention:
            parametrize.register_parametrization(block.filter, "poles", StablePoles())
        for parent, name in frozen_linears(block) if rank else ():
            setattr(parent, name, LoRALinear(getattr(parent, name), rank))
    norm = model.backbone.norm
    norm.scale.data = norm.scale.data.to(torch.float32, copy=True)
    norm.scale.requires_grad_(True)


def blocks(model: StripedHyenaForCausalLM) -> list[StripedHyenaBlock]:
    """The model's blocks."""
    return list(cast(Any, model.backbone.blocks))


def frozen_linears(block: StripedHyenaBlock) -> Iterator[tuple[nn.Module, str]]:
    """The linear layers of a block that striping keeps, as (parent, name)."""
    yield from ((block.mlp, name) for name in ("l1", "l2", "l3"))
    if block.is_attention:
        yield from ((block.inner_mha_cls, name) for name in ("Wqkv", "out_proj"))
