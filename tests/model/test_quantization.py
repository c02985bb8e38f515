"""Models with weights of 8 and 4 bits, through transformers' own loading and saving."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stripedrag.errors import CheckpointError, StoreError, UsageError
from stripedrag.kernels import quantized
from stripedrag.kernels.quantized import QuantizedWeight, dequantize
from stripedrag.model import StripedHyenaForCausalLM, modeling
from stripedrag.model.baselines import known_as
from stripedrag.model.loading import load_model, save_quantized
from stripedrag.model.quantization import QuantizationConfig, QuantizedLinear
from stripedrag.model.smollm2 import STRIPED

BITS = quantized.BITS


def load(folder, bits=None, dtype=torch.float32):
    kind = {} if bits is None else {"quantization_config": QuantizationConfig(bits)}
    return StripedHyenaForCausalLM.from_pretrained(folder, dtype=dtype, **kind).eval()


def stored(module):
    return QuantizedWeight(module.weight, module.scale, module.offset, module.in_features)


@pytest.mark.parametrize("bits", BITS)
def test_linear_layers_are_quantized_and_nothing_else(golden, tmp_path, bits):
    folder = golden.write(tmp_path / golden.name)
    plain, small = load(folder), load(folder, bits)
    modules = dict(small.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(modules[name], QuantizedLinear)
            expected = quantized.quantize(module.weight, bits)
            for got, wanted in zip(stored(modules[name])[:3], expected[:3], strict=True):
                assert (got is None and wanted is None) or torch.equal(got, wanted)
            assert module.bias is None or torch.equal(module.bias, modules[name].bias)
    parameters = dict(small.named_parameters())
    kept = [name for name, tensor in plain.named_parameters() if tensor.ndim != 2 or "embedding" in name]
    assert any("poles" in name for name in kept)
    for name in kept:
        assert torch.equal(plain.get_parameter(name), parameters[name]), name


@pytest.mark.parametrize("bits", BITS)
def test_it_computes_what_its_weights_stand_for(golden, tmp_path, bits):
    folder = golden.write(tmp_path / golden.name)
    small, same = load(folder, bits), load(folder)
    for name, module in small.named_modules():
        if isinstance(module, QuantizedLinear):
            same.get_submodule(name).weight = nn.Parameter(dequantize(stored(module), torch.float32))
    with torch.no_grad():
        one, other = small(golden.ids).logits, same(golden.ids).logits
        step, same_step = (m.generate(golden.ids[:1], max_new_tokens=6, do_sample=False) for m in (small, same))
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    assert torch.equal(step, same_step)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_alike(golden, tmp_path, bits, dtype):
    small = load(golden.write(tmp_path / "plain"), bits, dtype)
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=dtype).eval()
    with torch.no_grad():
        assert torch.equal(small(golden.ids).logits, again(golden.ids).logits)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"] == {"bits": bits, "quant_method": "stripedrag"}
    assert sum(p.nbytes for p in again.parameters()) == sum(p.nbytes for p in small.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_a_cast_of_the_whole_model_casts_no_stored_number(golden, tmp_path, bits):
    small = load(golden.write(tmp_path / "plain"), bits)
    before = {name: stored(m) for name, m in small.named_modules() if isinstance(m, QuantizedLinear)}
    small.to(torch.bfloat16)
    assert small.dtype == torch.bfloat16
    for name, weight in before.items():
        after = stored(small.get_submodule(name))
        assert all(a is b or torch.equal(a, b) for a, b in zip(weight[:3], after[:3], strict=True))
    with torch.no_grad():
        assert small(golden.ids).logits.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_a_transformer_is_quantized_too_also_where_its_output_is_tied(tmp_path, bits):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    ids = torch.arange(20).unsqueeze(0)
    kind = QuantizationConfig(bits)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", quantization_config=kind, dtype=torch.float32)
    assert isinstance(small.lm_head, QuantizedLinear)
    expected = quantized.quantize(small.model.embed_tokens.weight, bits)
    assert torch.equal(small.lm_head.weight, expected.weight)
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(small(ids).logits, again(ids).logits)


TINY = dict(vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
KINDS = {
    "mistral": TINY | dict(num_key_value_heads=2),
    "qwen2": TINY | dict(num_key_value_heads=2),
    "qwen3": TINY | dict(num_key_value_heads=2, head_dim=8),
    "lfm2": TINY | dict(num_key_value_heads=2, layer_types=["conv", "full_attention"]),
}
OTHERS = {
    "mixtral": TINY | dict(num_key_value_heads=2, num_local_experts=2),
    "gpt2": dict(vocab_size=70, n_embd=32, n_layer=2, n_head=4),
    "mamba2": dict(vocab_size=70, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8),
}


def written(kind, settings, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_that_only_call_their_linear_layers_compute_with_small_ones(tmp_path, kind):
    folder = written(kind, KINDS[kind], tmp_path / kind)
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantizationConfig(8), dtype=torch.float32)
    same = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {name: module for name, module in small.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == sum(isinstance(module, nn.Linear) for module in same.modules())
    for name, module in layers.items():
        same.get_submodule(name).weight = nn.Parameter(dequantize(stored(module), torch.float32))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = small(ids).logits, same(ids).logits
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused(tmp_path, kind):
    folder = written(kind, OTHERS[kind], tmp_path / kind)
    with pytest.raises(UsageError, match=f"of 4 bits are for models of the kinds .*; this is a {kind}. Load it as it"):
        load_model(folder, quantize="int4")


@pytest.mark.parametrize("bits", BITS)
def test_a_folder_that_does_not_say_how_it_was_made_small_is_not_read_as_plain(tmp_path, bits):
    folder = written("llama", TINY, tmp_path / "llama")
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantizationConfig(bits))
    small.save_pretrained(tmp_path / "small")
    alone = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", alone, str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and "mismatch" in done.stderr, "transformers alone does not know the method"
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"misshapen tensors: .*down_proj\.weight"):
        load_model(tmp_path / "small")


@pytest.mark.parametrize(
    "stated,message",
    [
        ("int8", "has the quantization_config 'int8'; it is an object"),
        ({"quant_method": "gptq", "bits": 4}, "cannot be read: "),
        ({"quant_method": "stripedrag", "bits": 5}, "bits is 5; weights are quantized to 8 or 4"),
        ({"quant_method": "stripedrag", "group": 5}, "cannot be read: .*group"),
    ],
)
def test_a_config_of_another_quantization_is_told(sh_tiny, tmp_path, stated, message):
    folder = sh_tiny.write(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        load_model(folder)


def test_weights_that_are_no_numbers_are_refused(sh_tiny, tmp_path):
    for bits in BITS:
        for bad in (torch.nan, torch.inf):
            weights = {k: v.clone() for k, v in sh_tiny.weights.items()}
            weights["blocks.0.mlp.l1.weight"][3, 5] = bad
            with pytest.raises(
                CheckpointError, match=r"infinite or no numbers in .*blocks\.0\.mlp\.l1\.(scale|offset)"
            ):
                load(sh_tiny.write(tmp_path / f"{bits}{bad}", weights=weights), bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_misshapen_weight_is_named_before_and_after_it_is_small(sh_tiny, tmp_path, bits):
    name = "blocks.0.mlp.l1.weight"
    cut = {k: v[:, :-3].contiguous() if k == name else v for k, v in sh_tiny.weights.items()}
    with pytest.raises(CheckpointError, match=rf"misshapen tensors: .*{name} \(.*\) for \("):
        load(sh_tiny.write(tmp_path / "cut", weights=cut), bits)
    load(sh_tiny.write(tmp_path / "whole"), bits).save_pretrained(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    tensors[f"backbone.{name}"] = tensors[f"backbone.{name}"][:-1].contiguous()
    save_file(tensors, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"misshapen tensors: .*{name}"):
        load(tmp_path / "small")


@pytest.mark.parametrize("bits", BITS)
def test_stored_numbers_take_no_gradient(sh_tiny, tmp_path, bits):
    load(sh_tiny.write(tmp_path / "plain"), bits).save_pretrained(tmp_path / "small")
    for model in (load(tmp_path / "plain", bits), load(tmp_path / "small")):
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert layers and not any(t.requires_grad for layer in layers for t in stored(layer)[:3] if t is not None)
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert model.get_input_embeddings().weight.grad is not None


def test_a_folder_is_known_wherever_the_model_is(sh_tiny, tmp_path):
    load(sh_tiny.write(tmp_path / "plain"), 8).save_pretrained(tmp_path / "small")
    program = (
        "import sys, stripedrag.model; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(model.backbone.unembed).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "small")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "QuantizedLinear", done.stderr


def test_weights_of_another_library_are_not_looked_at():
    class Foreign(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(func)

    plain, foreign = torch.tensor([1.0, torch.nan]), torch.tensor([1.0]).as_subclass(Foreign)
    assert not modeling._is_finite(plain) and not modeling._is_finite(nn.Parameter(plain))
    assert modeling._is_finite(foreign)


def test_a_quantized_output_is_not_resized_by_half(sh_tiny, tmp_path):
    model = load(sh_tiny.write(tmp_path), 8)
    with pytest.raises(UsageError, match="the output layer is quantized and cannot be resized; resize the model that"):
        model.resize_token_embeddings(model.config.vocab_size + 1)
    assert len(model.resize_token_embeddings().weight) == model.config.vocab_size  # a question


def test_other_bits_are_refused():
    with pytest.raises(UsageError, match="bits is 3; weights are quantized to 8 or 4"):
        QuantizationConfig(3)
    with pytest.raises(TypeError, match="bit"):
        QuantizationConfig(bit=4)
    with pytest.raises(UsageError, match="quantize is 'int2'; weights can be int8 or int4"):
        load_model(STRIPED, quantize="int2")
    with pytest.raises(UsageError, match=r"quantize is \['int8'\]; weights can be int8 or int4"):
        load_model(STRIPED, quantize=["int8"])


def test_a_model_is_written_small_and_read_as_any_other(tmp_path):
    size = save_quantized(STRIPED, tmp_path / "small", "int8")
    model, tokenizer = load_model(tmp_path / "small", dtype=torch.bfloat16)
    whole, _ = load_model(STRIPED, quantize="int8", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "small" / "model.safetensors").values()} == {
        torch.int8, torch.bfloat16, torch.float32,
    }, "what is no linear layer is written as the checkpoint has it, whatever this machine is fast in"  # fmt: skip
    assert known_as(model, "elsewhere") == known_as(whole, STRIPED) == STRIPED
    assert size == sum(p.nbytes for p in model.parameters())
    ids = tokenizer("The capital of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    with pytest.raises(UsageError, match="is there already; name a folder that is not"):
        save_quantized(STRIPED, tmp_path / "small", "int8")
    with pytest.raises(UsageError, match="are quantized already; load it without int4"):
        load_model(tmp_path / "small", quantize="int4")
    with pytest.raises(UsageError, match="no model 'no/such': it is not one of"):
        save_quantized("no/such", tmp_path / "other", "int8")
    with pytest.raises(UsageError, match=r"dtype is float32; weights are torch\.float32"):
        load_model(tmp_path / "small", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_what_a_killed_run_left_is_removed_and_what_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / ".small.part").mkdir()
    (tmp_path / ".small.part" / "model.safetensors").write_text("half")
    save_quantized(STRIPED, tmp_path / "small", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"could not write .*file/small \(.*\)\. Free space there or name another"):
        save_quantized(STRIPED, tmp_path / "file" / "small", "int8")

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(StripedHyenaForCausalLM, "save_pretrained", full)
    with pytest.raises(StoreError, match=r"could not write .*other \(No space left on device"):
        save_quantized(STRIPED, tmp_path / "other", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "small"]
