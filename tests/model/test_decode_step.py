"""One token through all blocks in one native call: the numbers of the blocks one by one, where nothing is passed by."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hyena_inputs import CPU
from stripedrag.kernels import cpu
from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM, decode_step, modeling
from stripedrag.model.cache import new_cache
from stripedrag.model.layers import Linear, StripedHyenaBlock
from stripedrag.model.quantization import QuantizationConfig

pytestmark = pytest.mark.skipif(cpu.refuses(CPU) is not None, reason=str(cpu.refuses(CPU)))
TOKENS, READ = 24, 15
BASE = {
    "vocab_size": 61,
    "hidden_size": 96,
    "num_layers": 4,
    "attn_layer_idxs": [1, 3],
    "num_attention_heads": 6,
    "proj_groups": 3,
    "max_seqlen": 512,
    "state_size": 4,
    "inner_mlp_size": 80,
}


@pytest.fixture
def make(tmp_path):
    def made(dtype=torch.float32, bits=None, **changes):
        torch.manual_seed(0)
        model = StripedHyenaForCausalLM(StripedHyenaConfig(**BASE | changes))
        for parameter in model.parameters():  # what is made as ones and zeros would hide a mistake
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if bits is None:
            return model.to(dtype).eval()
        model.save_pretrained(tmp_path)
        return StripedHyenaForCausalLM.from_pretrained(
            tmp_path, dtype=dtype, quantization_config=QuantizationConfig(bits)
        ).eval()

    return made


@pytest.fixture
def steps(monkeypatch):
    """How many native steps were made."""
    made, run = [], decode_step.native.Blocks.step

    def counted(self, *arguments):
        y = run(self, *arguments)
        made.append(y is not None)
        return y

    monkeypatch.setattr(decode_step.native.Blocks, "step", counted)
    return made


def ids(batch):
    return torch.randint(61, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def decoded(model, batch=1, cache=None):
    """Logits of tokens that come one by one after a prompt, and the cache after them."""
    cache = new_cache(model.config) if cache is None else cache
    tokens = ids(batch)
    model(input_ids=tokens[:, :READ], past_key_values=cache, use_cache=True)
    one_by_one = [
        model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(READ, TOKENS)
    ]
    return torch.cat(one_by_one, dim=1), cache


def held(cache):
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            yield from (layer.conv_states[0], layer.recurrent_states[0])
        else:
            yield from (layer.keys, layer.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"column_split_hyena": False, "qkv_proj_bias": True, "mha_out_proj_bias": True},
        {"hyena_filter_groups": 24, "state_size": 3, "short_filter_length": 4, "proj_groups": 1},
    ],
)
def test_it_gives_what_the_blocks_give_one_by_one(make, steps, monkeypatch, dtype, bits, batch, changes):
    model = make(dtype, bits, **changes)
    got, cache = decoded(model, batch)
    assert steps == [True] * (TOKENS - READ)
    monkeypatch.setattr(modeling, "step_at_once", lambda *arguments: None)
    expected, other = decoded(model, batch)
    assert len(steps) == TOKENS - READ
    tolerance = 0 if dtype is torch.bfloat16 else 1e-5  # products and sums of float32 may fuse
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    for one, another in zip(held(cache), held(other), strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [{"mlp_activation": "gelu"}, {"use_flash_rmsnorm": False}, {"state_size": 17}, {"short_filter_length": 9}],
)
def test_what_the_kernels_lack_runs_block_by_block(make, steps, changes):
    decoded(make(**changes))
    assert steps == []


def test_more_rows_than_the_kernels_take_run_block_by_block(make, steps):
    decoded(make(), batch=9)
    assert steps == []


def test_whoever_watches_a_module_is_heard(make, steps):
    model, heard = make(), []
    expected, _ = decoded(model)
    steps.clear()
    hook = model.backbone.blocks[2].mlp.l1.register_forward_hook(lambda *arguments: heard.append(1))
    watched, _ = decoded(model)
    assert steps == [] and len(heard) == 1 + TOKENS - READ
    torch.testing.assert_close(watched, expected, rtol=0, atol=1e-5)
    hook.remove()
    decoded(model)
    assert steps == [True] * (TOKENS - READ)
    hook = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        steps.clear()
        decoded(model)
        assert steps == []
    finally:
        hook.remove()


def test_hidden_states_are_those_of_every_block_and_only_then_heard(make, steps):
    model = make()
    _, cache = decoded(model)
    steps.clear()
    with torch.no_grad():
        outputs = model(input_ids=ids(1)[:, :1], past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_layers + 1
    assert steps == []
    decoded(model)
    assert steps == [True] * (TOKENS - READ)


def _moved(model):
    weight = model.backbone.blocks[0].mlp.l2.weight
    weight.data = weight.data * 2  # other memory


def _written(model):
    model.backbone.blocks[0].mlp.l2.weight.data.mul_(2)


def _replaced(model):
    mlp = model.backbone.blocks[0].mlp
    mlp.l2.weight = nn.Parameter(mlp.l2.weight.detach() * 2)


def _another_module(model):
    old = model.backbone.blocks[0].mlp.l2
    new = type(old)(old.in_features, old.out_features, bias=False)
    new.weight.data.copy_(2 * old.weight)
    model.backbone.blocks[0].mlp.l2 = new


def _of_another_kind(model):
    old = model.backbone.blocks[0].mlp.l2

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = old

        def forward(self, x):
            return 2 * self.base(x)

    model.backbone.blocks[0].mlp.l2 = Doubled()


def _another_forward(model):
    module = model.backbone.blocks[0].mlp.l2
    plain = module.forward
    module.forward = lambda x: 2 * plain(x)


def _transposed(model):
    weight = model.backbone.blocks[0].out_filter_dense.weight
    weight.data = weight.data.t()


def _fewer(model):
    mlp = model.backbone.blocks[2].mlp
    for module in (mlp.l1, mlp.l2):
        module.weight.data = module.weight.data[:16]  # at the same address
    mlp.l3.weight.data = mlp.l3.weight.data[:, :16]


def _wider(model):
    model.double().float()


def _other_blocks(model):
    other = copy.deepcopy(model.backbone.blocks)
    for parameter in other.parameters():
        parameter.data *= 1.1
    model.backbone.blocks = other


def _another_order(model):
    blocks = model.backbone.blocks
    blocks[1], blocks[3] = blocks[3], blocks[1]
    blocks[0], blocks[2] = blocks[2], blocks[0]


def _another_eps(model):
    for block in model.backbone.blocks:
        block.pre_norm.eps = block.post_norm.eps = 1.0


def _another_activation(model):
    model.backbone.blocks[1].mlp.activation = "gelu"


def _another_class(model):
    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.backbone.blocks[0].mlp.l2.__class__ = Doubled


def _no_parameter(model):
    module = model.backbone.blocks[0].mlp.l2
    weight = module.weight.detach()
    del module.weight
    module.weight = weight
    with torch.no_grad():
        model(input_ids=ids(1)[:, :1], past_key_values=decoded(model)[1], use_cache=True)
    module.weight = 2 * weight


def _one_bias_for_all(model):
    model.backbone.blocks[0].out_filter_dense.bias.data = torch.ones(1)


def _half_a_skip(model):
    model.backbone.blocks[0].filter.D.data = model.backbone.blocks[0].filter.D.data.half()


CHANGES = [
    _moved,
    _written,
    _replaced,
    _another_module,
    _of_another_kind,
    _another_forward,
    _transposed,
    _fewer,
    _wider,
    _other_blocks,
    _another_order,
    _another_eps,
    _another_activation,
    _another_class,
    _no_parameter,
    _one_bias_for_all,
    _half_a_skip,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_in_between_runs_as_it_is(make, monkeypatch, change):
    model = make()
    _, cache = decoded(model)
    change(model)
    token = ids(1)[:, :1]
    with torch.no_grad():
        one, other = copy.deepcopy(cache), copy.deepcopy(cache)
        got = model(input_ids=token, past_key_values=one, use_cache=True).logits
        monkeypatch.setattr(modeling, "step_at_once", lambda *arguments: None)
        expected = model(input_ids=token, past_key_values=other, use_cache=True).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def _of_width(width):
    def change(model):
        heads = {"num_attention_heads": width // 16, "proj_groups": width // 32}
        config = StripedHyenaConfig(**BASE | {"hidden_size": width, **heads})
        model.backbone.blocks[3] = StripedHyenaBlock(config, 3).eval()

    return change


def _with_up_of(width):
    def change(model):
        model.backbone.blocks[0].mlp.l2.weight.data = torch.randn(width, 96)

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_with_up_of(16), "they go in pairs"),
        (_with_up_of(400_000), "they go in pairs"),
        (_of_width(192), "they are"),
        (_of_width(64), "they are"),
    ],
)
def test_weights_that_do_not_fit_together_get_the_blocks_error(make, change, error):
    model = make()
    _, cache = decoded(model)
    change(model)
    with torch.no_grad(), pytest.raises(ValueError, match=error):
        model(input_ids=ids(1)[:, :1], past_key_values=cache, use_cache=True)


def test_a_cache_that_does_more_is_given_every_token(make, steps):
    given = []

    class Counting(DynamicCache):
        def update(self, *arguments, **options):
            given.append(arguments[0].shape[2])
            return super().update(*arguments, **options)

    model = make()
    decoded(model, cache=Counting(config=model.config))
    assert given == [READ, READ] + [1, 1] * (TOKENS - READ)
    assert steps == []


def test_rows_may_stand_at_positions_of_their_own(make, steps, monkeypatch):
    model = make()
    _, cache = decoded(model, batch=3)
    other, steps[:] = copy.deepcopy(cache), []
    arguments = {"input_ids": ids(3)[:, :1], "position_ids": torch.tensor([[20], [7], [3]]), "use_cache": True}
    with torch.no_grad():
        got = model(past_key_values=cache, **arguments).logits
        assert steps == [True]
        monkeypatch.setattr(modeling, "step_at_once", lambda *arguments: None)
        expected = model(past_key_values=other, **arguments).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}])
def test_generate_makes_the_same_tokens(make, steps, monkeypatch, options):
    model = make(eos_token_id=None)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, **options}
    torch.manual_seed(1)
    with torch.inference_mode():
        got = model.generate(ids(2), **settings)
    assert steps and all(steps)
    monkeypatch.setattr(modeling, "step_at_once", lambda *arguments: None)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids(2), **settings), got)


def test_a_cache_that_was_cut_goes_on(make, steps, monkeypatch):
    model = make(num_layers=2, attn_layer_idxs=[0, 1])
    _, cache = decoded(model)
    cache.crop(-5)
    other, steps[:] = copy.deepcopy(cache), []
    arguments = {"input_ids": ids(1)[:, :1], "use_cache": True}
    with torch.no_grad():
        got = model(past_key_values=cache, **arguments).logits
        assert steps == [True] and cache.get_seq_length() == TOKENS - 4
        monkeypatch.setattr(modeling, "step_at_once", lambda *arguments: None)
        torch.testing.assert_close(got, model(past_key_values=other, **arguments).logits, rtol=0, atol=1e-5)


def test_a_prompt_is_compiled_after_a_step(make):
    model = make()
    decoded(model)
    assert model.backbone.decode_step is not None
    with torch.no_grad():
        whole = model(input_ids=ids(1)).logits
        compiled = torch.compile(model, backend="eager")(input_ids=ids(1), use_cache=False).logits
    torch.testing.assert_close(compiled, whole, rtol=0, atol=1e-4)


def test_a_model_of_its_first_blocks_decodes(make, steps):
    model = make()
    model.backbone.blocks = model.backbone.blocks[:3]
    decoded(model)
    assert steps == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_step(make, steps, how):
    model = make()
    expected, _ = decoded(model)
    other = how(model)
    assert other.backbone.decode_step is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    steps.clear()
    got, _ = decoded(other)
    assert steps == [True] * (TOKENS - READ)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_gradient_a_mask_and_autocast_are_left_to_the_blocks(make, steps):
    model = make()
    _, cache = decoded(model)
    steps.clear()
    token = ids(1)[:, :1]
    masked = torch.ones(1, TOKENS + 1, dtype=torch.long)
    masked[0, 0] = 0
    with torch.no_grad():
        model(input_ids=token, past_key_values=copy.deepcopy(cache), attention_mask=masked, use_cache=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not cpu.takes_token(torch.zeros(1, 1, 96))
    assert not cpu.takes_token(torch.zeros(1, 1, 96))
    assert steps == []


def test_a_cache_that_does_not_fit_changes_nothing(make, steps):
    model = make()
    _, cache = decoded(model)
    layer = cache.layers[1]
    layer.keys, layer.values = layer.keys.double(), layer.values.double()
    before = [tensor.clone() for tensor in held(cache)]
    x = torch.randn(1, 1, 96)
    with torch.no_grad():
        angles = model.backbone._rotary(torch.tensor([[TOKENS]]), x.dtype)
        assert decode_step.step_at_once(model.backbone, x, angles, cache) is None
    assert steps[-1] is False
    for one, another in zip(held(cache), before, strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize(
    "change", ["keys replaced", "keys moved", "state replaced", "one layer shorter", "begun anew", "layer replaced"]
)
def test_a_cache_that_was_changed_in_between_is_read_as_it_is(make, steps, monkeypatch, change):
    model = make()
    _, cache = decoded(model)
    hyena, attention = cache.layers[0], cache.layers[1]
    if change == "keys replaced":
        attention.keys = attention.keys.roll(1, dims=-1)
    elif change == "keys moved":
        attention._keys.data = attention._keys.data.roll(1, dims=-1)
    elif change == "state replaced":
        hyena.recurrent_states[0] = hyena.recurrent_states[0].roll(1, dims=1)
    elif change == "one layer shorter":
        attention.crop(-2)
    elif change == "begun anew":
        hyena.reset()
    else:
        cache.layers[1] = copy.deepcopy(attention)
        cache.layers[1].values.neg_()
    other, steps[:] = copy.deepcopy(cache), []
    arguments = {"input_ids": ids(1)[:, :1], "use_cache": True}
    with torch.no_grad():
        got = model(past_key_values=cache, **arguments).logits
        assert steps == ([] if change == "begun anew" else [True])
        monkeypatch.setattr(modeling, "step_at_once", lambda *arguments: None)
        torch.testing.assert_close(got, model(past_key_values=other, **arguments).logits, rtol=0, atol=1e-5)


def test_two_caches_are_told_apart(make, steps):
    model = make()
    expected, _ = decoded(model)
    caches = [new_cache(model.config) for _ in range(2)]
    tokens = ids(1)
    steps.clear()
    with torch.no_grad():
        for cache in caches:
            model(input_ids=tokens[:, :READ], past_key_values=cache, use_cache=True)
        for i in range(READ, TOKENS):
            for cache in caches:
                got = model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                torch.testing.assert_close(got, expected[:, i - READ : i - READ + 1], rtol=0, atol=0)
    assert steps == [True] * 2 * (TOKENS - READ)


def test_a_step_keeps_nothing_of_a_cache(make, steps):
    model = make()
    _, cache = decoded(model)
    layer = cache.layers[1]
    keys, state = weakref.ref(layer._keys), weakref.ref(cache.layers[0].recurrent_states[0])
    layer.keys = layer.keys.clone()
    assert keys() is None  # before the next step
    del cache, layer
    gc.collect()
    assert state() is None and model.backbone.decode_step is not None


def test_positions_one_by_one_have_the_angles_that_they_have_together(make):
    model = make(rotary_emb_yarn_factor=4.0).backbone
    x = torch.zeros(1, 1, 96)
    cos, sin = model._rotary(torch.arange(200).unsqueeze(0), x.dtype)
    for position in (1, 63, 64, 65, 130, 3):
        one = model._rotary_of_step(position, x)
        assert torch.equal(one[0], cos[:, :, position : position + 1])
        assert torch.equal(one[1], sin[:, :, position : position + 1])
    model.config.rotary_emb_base = 77.0
    assert not torch.equal(model._rotary_of_step(3, x)[0], cos[:, :, 3:4])
    assert model._rotary_of_step(3, x.bfloat16())[0].dtype == torch.bfloat16
