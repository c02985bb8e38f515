"""The default model is what it says: SmolLM2 with distilled Hyena layers, prepared once, loaded by name."""

import json

import pytest
import torch

from stripedrag.errors import SetupError
from stripedrag.hardware import fast_dtype
from stripedrag.kernels import cpu
from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM, smollm2
from stripedrag.model.loading import default_dtype, load_model
from stripedrag.model.striping import families

TEXT = (
    "Oxygen was discovered independently by Carl Wilhelm Scheele, in Uppsala, in 1773 or earlier, and Joseph "
    "Priestley in Wiltshire, in 1774, but Priestley is often given priority because his work was published first. "
    "The name oxygen was coined in 1777 by Antoine Lavoisier, whose experiments with oxygen helped to discredit the "
    "then-popular phlogiston theory of combustion and corrosion."
)
pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def striped():
    return load_model(smollm2.STRIPED, dtype=torch.float32)


@pytest.fixture(scope="module")
def baseline():
    return load_model(smollm2.BASELINE, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids(striped):
    return striped[1](TEXT, return_tensors="pt").input_ids


def test_a_striped_model_with_every_attention_layer_kept_is_the_transformer(baseline, ids):
    model, _ = baseline
    fields = json.loads((smollm2.WEIGHTS / f"{smollm2.STRIPED}.json").read_text())
    fields |= {"attn_layer_idxs": list(range(30)), "hyena_layer_idxs": []}
    config = StripedHyenaConfig(**fields)
    with torch.device("meta"):
        same = StripedHyenaForCausalLM(config)
    tensors = families.striped_tensors(model.state_dict(), config)
    same.backbone.load_state_dict(tensors, strict=True, assign=True)
    with torch.no_grad():
        difference = (same.eval()(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max()
    assert difference < 2e-4  # logits of scale 20


def test_the_hyena_layers_are_those_in_the_package_and_the_rest_is_smollm2(striped, baseline):
    from safetensors.torch import load_file

    own = load_file(smollm2.WEIGHTS / f"{smollm2.STRIPED}.safetensors")
    adapted = {name.removesuffix(".down") + ".weight" for name in own if name.endswith(".down")}
    expected = families.striped_tensors(baseline[0].state_dict(), striped[0].config)
    expected |= {name: tensor for name, tensor in own.items() if not name.endswith((".down", ".up"))}
    actual = striped[0].backbone.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        stored = tensor if name.endswith(("poles", "residues")) else tensor.bfloat16()
        assert torch.equal(actual[name].double(), stored.double()) == (name not in adapted), name
    assert all(".mlp." in name or ".inner_mha_cls." in name for name in adapted)
    assert sum(".filter.poles" in name for name in own) == len(striped[0].config.hyena_layer_idxs) == 15


def test_distillation_kept_it_close_to_the_transformer(striped, baseline, ids):
    with torch.no_grad():
        student = striped[0](ids, use_cache=False).logits.log_softmax(-1)
        teacher = baseline[0](ids, use_cache=False).logits.log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert divergence < 0.5, "its 15 layers left out would give 1.8"


def test_bfloat16_changes_its_predictions_little(striped, ids):
    half, _ = load_model(smollm2.STRIPED, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = striped[0](ids, use_cache=False).logits.log_softmax(-1)
        rounded = half(ids, use_cache=False).logits.float().log_softmax(-1)
    assert (exact.exp() * (exact - rounded)).sum(-1).mean() < 0.01


def test_digits_are_tokens_of_their_own_and_the_template_is_smollm2s(striped):
    tokenizer = striped[1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1773,").input_ids) == ["in", "Ġ", "1", "7", "7", "3", ","]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == striped[0].config.max_position_embeddings == 8192
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template


def test_preparing_again_does_nothing(monkeypatch):
    told = []
    assert smollm2.prepare(told.append)[smollm2.STRIPED] == smollm2.prepared_dir(smollm2.STRIPED)
    assert told == []


def test_a_model_folder_that_cannot_be_written_is_named(striped, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(SetupError, match=r"could not write .*model: .*\. Free space there or set STRIPEDRAG_CACHE"):
        smollm2._save(striped[0], striped[1], occupied / "model")


@pytest.mark.skipif(cpu.instruction_set() not in ("v3", "v4"), reason="no kernels that serve bfloat16")
def test_a_striped_model_is_read_in_bfloat16_where_kernels_serve_it(monkeypatch):
    monkeypatch.setattr(cpu, "_LACKS_BFLOAT16", True)
    assert default_dtype(torch.device("cpu")) is torch.bfloat16
    assert default_dtype(torch.device("cpu"), is_striped=False) is fast_dtype()
    monkeypatch.setattr(cpu, "_LACKS_BFLOAT16", False)
    assert default_dtype(torch.device("cpu")) is fast_dtype()
