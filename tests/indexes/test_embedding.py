"""MiniLM as it runs on this machine, and any other model of sentence-transformers."""

import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stripedrag.errors import SetupError, UsageError
from stripedrag.indexes import Document, Index, MiniLMEmbedder, OnnxEmbedder, SentenceTransformerEmbedder

pytestmark = pytest.mark.weights

SENTENCES = ["A cat sits on the mat.", "Stocks fell sharply on Monday. " * 8, "", "The kitten is lying on a rug."]


def test_vectors_are_unit_vectors_in_the_order_of_their_texts(minilm: MiniLMEmbedder) -> None:
    done: list[int] = []
    vectors = minilm.embed(SENTENCES * 10, progress=done.append)
    assert vectors.shape == (40, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alone = np.concatenate([minilm.embed([sentence]) for sentence in SENTENCES])
    assert (vectors[:4] * alone).sum(axis=1).min() > 0.999
    assert alone[0] @ alone[3] > alone[0] @ alone[1] + 0.3
    assert done == [32, 8]


def test_a_query_is_embedded_as_a_passage_is(minilm: MiniLMEmbedder) -> None:
    assert minilm.embed_query(SENTENCES[0]) @ minilm.embed(SENTENCES[:1])[0] > 0.9999


def test_the_fast_dtype_gives_nearly_the_vectors_of_float32(minilm: MiniLMEmbedder) -> None:
    exact = MiniLMEmbedder(dtype=torch.float32).embed(SENTENCES)
    assert (minilm.embed(SENTENCES) * exact).sum(axis=1).min() > 0.998


def test_no_texts_are_no_vectors(minilm: MiniLMEmbedder) -> None:
    assert minilm.embed([]).shape == (0, 384)


def test_the_tokenizer_counts_what_the_model_reads(minilm: MiniLMEmbedder) -> None:
    for text in [*SENTENCES, "café naïve [SEP] 你好 한국어 😀 \u200b\x01 ½ ﬁ " + "x" * 99, "a " * 254]:
        ids = minilm._model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert minilm.tokenizer.encode(text, add_special_tokens=False).ids == ids


def test_every_token_up_to_the_limit_is_read(minilm: MiniLMEmbedder) -> None:
    longest = "word " * 253
    cats, cars = minilm.embed([longest + "cats", longest + "cars"])
    assert not np.array_equal(cats, cars)


def test_a_text_over_the_limit_is_refused_and_not_cut(minilm: MiniLMEmbedder) -> None:
    message = r"^text 1 of 2 has 255 wordpieces; all-MiniLM-L6-v2 reads 254\. Cut it into chunks first\.$"
    with pytest.raises(UsageError, match=message):
        minilm.embed(["a", "a " * 255])


def test_a_query_over_the_limit_is_refused(minilm: MiniLMEmbedder) -> None:
    message = r"^the query has 300 wordpieces; all-MiniLM-L6-v2 reads 254\. Ask a shorter question\.$"
    with pytest.raises(UsageError, match=message):
        minilm.embed_query("a " * 300)


def test_missing_weights_are_told_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: object) -> None:
        raise SetupError("the weights are not on this machine. Run `stripedrag setup`.")

    monkeypatch.setattr("stripedrag.weights.find", nowhere)
    with pytest.raises(SetupError, match="Run `stripedrag setup`"):
        MiniLMEmbedder()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights as sentence-transformers saves it, with prompts for queries and documents."""
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-embedder")
    letters = "abcdefghijklmnopqrstuvwxyz:."
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    tokenizer = Tokenizer(kinds.WordPiece({token: n for n, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=128, **sizes)).save_pretrained(folder)
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    transformer = models.Transformer(str(folder), max_seq_length=100)
    model = SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu")
    model.prompts = {"query": "query: ", "document": "text: "}
    model.save(str(folder / "saved"))
    return folder / "saved"


def test_any_model_of_sentence_transformers_makes_an_index_that_opens_by_its_name(
    tmp_path: Path, tiny_model: Path, contents: Callable
) -> None:
    embedder = SentenceTransformerEmbedder(tiny_model, dtype=torch.float32)
    assert (embedder.dimension, embedder.max_tokens) == (32, 100 - 2 - len("query:"))
    with Index.create(tmp_path / "i", embedder=embedder) as index:
        index.add([Document("a", "Cats", "the cat sat on the mat. " * 30), Document("b", "", "another text")])
        before = contents(index)
    with Index.open(tmp_path / "i") as index:
        assert index.manifest.embedder.name == str(tiny_model)
        assert contents(index) == before
        assert index.search("a cat", k=1)[0].chunk.doc_id == "a"


def test_the_prompts_that_a_model_declares_are_used(tiny_model: Path) -> None:
    embedder = SentenceTransformerEmbedder(tiny_model, dtype=torch.float32)
    as_query, as_text = embedder.embed_query("cats"), embedder.embed(["cats"])[0]
    plain = embedder._model.encode(["query: cats", "text: cats"], prompt="", normalize_embeddings=True)
    np.testing.assert_allclose(np.stack([as_query, as_text]), plain, atol=1e-5)
    assert not np.allclose(as_query, as_text, atol=1e-3)


def test_a_model_that_is_not_to_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SetupError, match=r"^the embedder 'no-such/model' is no folder and cannot be had"):
        SentenceTransformerEmbedder("no-such/model").sha256  # noqa: B018
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(SetupError, match=r"holds no \*\.safetensors file, and a pickle is never loaded\. Convert"):
        Index.create(tmp_path / "i", embedder=SentenceTransformerEmbedder(tmp_path))
    assert not (tmp_path / "i").exists()


WIDTH = 32


@pytest.fixture
def export(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's folder with, in the place of its weights, a graph that looks each token up in a table."""
    return _export(tiny_model, tmp_path, "input_ids", WIDTH)


def _export(tiny_model: Path, tmp_path: Path, name: str, *axes: int) -> Path:
    import onnx
    from onnx import helper, numpy_helper

    folder = tmp_path / "exported"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    table = np.random.default_rng(0).normal(size=(100, *axes)).astype(np.float32)
    ids = helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["texts", "tokens"])
    output = helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.FLOAT, ["texts", "tokens", *axes])
    look_up = helper.make_node("Gather", ["table", name], ["last_hidden_state"])
    graph = helper.make_graph([look_up], "tiny", [ids], [output], [numpy_helper.from_array(table, "table")])
    (folder / "onnx").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "onnx" / "model.onnx"))
    return folder / "onnx" / "model.onnx"


def test_an_onnx_export_embeds_as_its_graph_and_the_models_pooling_say(export: Path) -> None:
    import onnx
    from onnx import numpy_helper

    embedder = OnnxEmbedder(export)
    (table,) = (numpy_helper.to_array(one) for one in onnx.load(str(export)).graph.initializer)
    texts = ["cats", "a longer text about cats, so that the first is padded"]
    ids = [embedder.tokenizer.encode(f"text: {text}").ids for text in texts]
    means = np.stack([table[numbers].mean(axis=0) for numbers in ids])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-6)
    assert embedder.max_tokens == 100 - 2 - len("query:")
    assert embedder.sha256 == hashlib.sha256(export.read_bytes()).hexdigest()


def test_an_index_made_by_an_onnx_export_opens_by_its_files_name(tmp_path: Path, export: Path) -> None:
    with Index.create(tmp_path / "i", embedder=OnnxEmbedder(export)) as index:
        index.add([Document("a", "", "the cat sat on the mat"), Document("b", "", "quux")])
    with Index.open(tmp_path / "i") as index:
        assert index.manifest.embedder.name == str(export)
        assert index.search("quux", k=1, method="dense")[0].chunk.doc_id == "b"
    copy = pickle.loads(pickle.dumps(OnnxEmbedder(export)))
    assert copy.embed(["cats"]).shape == (1, WIDTH)


def test_what_is_no_onnx_export_is_refused(tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"there is no file .*none\.onnx\. Give the \.onnx file"):
        OnnxEmbedder(tmp_path / "none.onnx")
    alone = tmp_path / "alone" / "onnx" / "model.onnx"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(b"no graph")
    with pytest.raises(SetupError, match=r"there is no modules\.json beside it or above it"):
        OnnxEmbedder(alone)
    modules = export.parents[1] / "modules.json"
    shutil.copy(modules, alone.parents[1])
    for file in export.parents[1].glob("*.json"):
        shutil.copy(file, alone.parents[1])
    shutil.copytree(export.parents[1] / "1_Pooling", alone.parents[1] / "1_Pooling")
    with pytest.raises(SetupError, match=r"cannot be read by ONNX Runtime"):
        OnnxEmbedder(alone).embed(["a"])
    with monkeypatch.context() as patch, pytest.raises(SetupError, match=r"pip install 'stripedrag\[onnx\]'"):
        patch.setitem(sys.modules, "onnxruntime", None)
        OnnxEmbedder(export).embed(["a"])
    pooling = export.parents[1] / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"include_prompt": False}))
    with pytest.raises(SetupError, match=r"pools without its prompts"):
        OnnxEmbedder(export).embed(["a"])
    modules.write_text(modules.read_text().replace("sentence_transformers.", "elsewhere."))
    with pytest.raises(SetupError, match=r"brings modules of its own \(elsewhere\."):
        OnnxEmbedder(export).embed(["a"])


@pytest.mark.parametrize(("name", "axes"), [("inputs_embeds", (WIDTH,)), ("input_ids", ())])
def test_an_export_of_something_else_is_refused(tiny_model: Path, tmp_path: Path, name: str, axes: tuple[int]) -> None:
    embedder = OnnxEmbedder(_export(tiny_model, tmp_path, name, *axes))
    with pytest.raises(
        SetupError, match=rf"takes {name} and gives last_hidden_state of {2 + len(axes)} axes; the export"
    ):
        embedder.embed(["a"])
