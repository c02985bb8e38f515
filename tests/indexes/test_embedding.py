"""MiniLM as it runs on this machine, and any other model of sentence-transformers."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stripedrag.errors import SetupError, UsageError
from stripedrag.indexes import Document, Index, MiniLMEmbedder, OnnxEmbedder, SentenceTransformerEmbedder
from stripedrag.indexes.embedding import embedder_named

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


def test_bfloat16_gives_nearly_the_vectors_of_float32() -> None:
    exact, fast = (MiniLMEmbedder(dtype=dtype).embed(SENTENCES) for dtype in (torch.float32, torch.bfloat16))
    assert 0.998 < (fast * exact).sum(axis=1).min() < 1 - 1e-6


def test_its_vectors_are_those_of_sentence_transformers() -> None:
    embedder = MiniLMEmbedder(dtype=torch.float32)
    texts = [*SENTENCES, "café naïve [SEP] 你好 한국어 😀 \u200b\x01 ½ ﬁ " + "x" * 99, "a " * 254]
    expected = embedder._model.encode(texts, batch_size=len(texts), normalize_embeddings=True)
    np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-5)


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


def test_missing_weights_are_told_with_the_command_that_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRIPEDRAG_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
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
    embedder = SentenceTransformerEmbedder(tiny_model)
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


def test_a_folder_that_is_no_whole_model_is_told(tmp_path: Path, tiny_model: Path) -> None:
    def changed(name: str, file: str, content: str) -> SentenceTransformerEmbedder:
        shutil.copytree(tiny_model, tmp_path / name)
        (tmp_path / name / file).write_text(content)
        return SentenceTransformerEmbedder(tmp_path / name)

    modules = json.loads((tiny_model / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    own = {"idx": 2, "name": "2", "path": "2_Own", "type": "own.Own"}
    broken = {
        "weights": ("model.safetensors", "cut"),
        "tokenizer": ("tokenizer.json", "{"),
        "parts": ("modules.json", "["),
        "code": ("modules.json", json.dumps([*modules, own])),
    }
    for name, (file, content) in broken.items():
        with pytest.raises(SetupError, match=r"cannot be loaded as a model of sentence-transformers: .* Get it anew"):
            Index.create(tmp_path / "i", embedder=changed(name, file, content))
    partly = changed("pickled", "modules.json", json.dumps([*modules, dense]))
    (tmp_path / "pickled" / "2_Dense").mkdir()
    (tmp_path / "pickled" / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(SetupError, match=r"2_Dense holds no \*\.safetensors file, and a pickle is never loaded"):
        Index.create(tmp_path / "i", embedder=partly)
    endless = SentenceTransformerEmbedder(tiny_model)
    endless._model.max_seq_length = None
    with pytest.raises(SetupError, match=r"does not say how many tokens it reads \(max_seq_length is None\)\. Set it"):
        endless.max_tokens  # noqa: B018
    for place, message in (("", "name is empty"), ("x" * 300, "cannot be looked up: File name too long")):
        for take in (SentenceTransformerEmbedder, embedder_named):
            with pytest.raises(SetupError, match=message):
                take(place)
    assert not (tmp_path / "i").exists()


def test_what_is_given_of_a_model_has_to_be_true(tiny_model: Path, export: Path) -> None:
    for kind, place in ((SentenceTransformerEmbedder, tiny_model), (OnnxEmbedder, export)):
        with pytest.raises(UsageError, match=r"^max_tokens is 512; .* reads 92\. Give that, or none\.$"):
            kind(place, max_tokens=512).embed(["a"])
        with pytest.raises(UsageError, match=r"^the vectors of .* have 32 numbers, not 64\. Give that dimension, or"):
            kind(place, dimension=64).embed(["a"])
        assert kind(place, dimension=32, max_tokens=50).embed(["a"]).shape == (1, 32)


def test_a_folder_stays_the_same_wherever_the_process_goes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    embedder = SentenceTransformerEmbedder("saved")
    monkeypatch.chdir(tmp_path)
    assert embedder.dimension == 32 and embedder.name == str(tiny_model)


def test_a_model_of_the_hub_that_is_there_is_not_asked_for_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    embedder = SentenceTransformerEmbedder("someone/tiny")
    assert (embedder.name, embedder.dimension) == ("someone/tiny", 32)


def _exported(folder: Path, model: Path, ids: torch.Tensor, mask: torch.Tensor, *, any_number: bool = True) -> Path:
    """A copy of `model` with an export of its transformer, traced with these tokens and this mask."""
    from transformers import AutoModel

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(model)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    shutil.copytree(model, folder)
    (folder / "onnx").mkdir()
    axes: dict[int, Any] = {1: torch.export.Dim("tokens", max=128)}
    if any_number:
        axes[0] = torch.export.Dim("texts")
    torch.onnx.export(
        Traced().eval(),
        (ids, mask, ids * 0),
        folder / "onnx" / "model.onnx",
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["last_hidden_state"],
        dynamic_shapes=(axes, axes, axes),
        verbose=False,
    )
    return folder / "onnx" / "model.onnx"


@pytest.fixture(scope="session")
def export(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's export, as one is to be made."""
    ids = torch.ones(2, 16, dtype=torch.int64)
    return _exported(tmp_path_factory.mktemp("exported") / "model", tiny_model, ids, ids.clone())


def test_an_onnx_export_gives_the_vectors_of_its_model(export: Path, tiny_model: Path) -> None:
    by_onnx, by_torch = OnnxEmbedder(export), SentenceTransformerEmbedder(tiny_model, dtype=torch.float32)
    texts = ["cats", "a longer text about cats, so that the first is padded", "x"]
    np.testing.assert_allclose(by_onnx.embed(texts), by_torch.embed(texts), atol=1e-5)
    np.testing.assert_allclose(by_onnx.embed_query("cats"), by_torch.embed_query("cats"), atol=1e-5)
    assert (by_onnx.dimension, by_onnx.max_tokens) == (by_torch.dimension, by_torch.max_tokens)
    assert by_onnx.sha256 != by_torch.sha256
    assert (export.parent / "model.onnx.data").is_file() and len(by_onnx._weight_files()) == 3
    copy = pickle.loads(pickle.dumps(by_onnx))
    np.testing.assert_array_equal(copy.embed(texts), by_onnx.embed(texts))


def test_it_is_the_onnx_export_that_runs(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertModel

    embedder = OnnxEmbedder(export)
    expected = embedder.embed(["cats"])
    monkeypatch.delattr(BertModel, "forward")
    np.testing.assert_array_equal(embedder.embed(["cats"]), expected)


def test_an_index_made_by_an_onnx_export_opens_by_its_files_name(tmp_path: Path, export: Path) -> None:
    blob = tmp_path / "blob"  # as the hub's cache keeps it
    shutil.copytree(export.parents[1], tmp_path / "model")
    (tmp_path / "model" / "onnx" / "model.onnx").rename(blob)
    (link := tmp_path / "model" / "onnx" / "model.onnx").symlink_to(blob)
    with Index.create(tmp_path / "i", embedder=OnnxEmbedder(link)) as index:
        index.add([Document("a", "", "the cat sat on the mat"), Document("b", "", "quux")])
        before = index.search("quux", k=1, method="dense")
    with Index.open(tmp_path / "i") as index:
        assert index.manifest.embedder.name == str(link)
        assert index.search("quux", k=1, method="dense") == before


def test_an_onnx_export_that_gives_other_vectors_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    ids = torch.ones(2, 16, dtype=torch.int64)  # one tensor for both: the trace takes the mask for the tokens
    confused = _exported(tmp_path / "model", tiny_model, ids, ids)
    with pytest.raises(
        SetupError, match=r"gives vectors of cosine -?0\.\d+ with those of the model .* the limit is 0\.95"
    ):
        OnnxEmbedder(confused).embed(["a"])


def test_an_onnx_export_for_so_many_texts_alone_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    ids = torch.ones(2, 16, dtype=torch.int64)
    pairs = _exported(tmp_path / "model", tiny_model, ids, ids.clone(), any_number=False)
    with pytest.raises(SetupError, match=r"cannot run on 1 x \d+ tokens: .* Export that model anew, for texts of any"):
        OnnxEmbedder(pairs).embed(["a"])


def test_an_onnx_export_of_another_model_is_refused(minilm: MiniLMEmbedder, tmp_path: Path, export: Path) -> None:
    shutil.copytree(minilm._folder, tmp_path / "model")
    shutil.copytree(export.parent, tmp_path / "model" / "onnx")
    with pytest.raises(SetupError, match=r"cannot run on \d+ x \d+ tokens: .*indices element out of data bounds"):
        OnnxEmbedder(tmp_path / "model" / "onnx" / "model.onnx").embed(["a"])


def test_an_onnx_export_of_a_model_of_another_width_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(tiny_model)
    config.hidden_size = 64
    shutil.copytree(tiny_model, tmp_path / "wide")
    BertModel(config).save_pretrained(tmp_path / "wide")
    ids = torch.ones(2, 16, dtype=torch.int64)
    wide = _exported(tmp_path / "exported", tmp_path / "wide", ids, ids.clone())
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(wide.parent, tmp_path / "model" / "onnx")
    with pytest.raises(SetupError, match=r"cannot do what the model in whose folder it lies does: .*64.*32"):
        OnnxEmbedder(tmp_path / "model" / "onnx" / "model.onnx").embed(["a"])


def test_what_is_no_onnx_export_is_refused(tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"there is no \.onnx file .*none\.onnx\. Give that of a model"):
        OnnxEmbedder(tmp_path / "none.onnx")
    (alone := tmp_path / "a" / "b" / "model.onnx").parent.mkdir(parents=True)
    alone.write_bytes(b"no graph")
    with pytest.raises(SetupError, match=r"there is no modules\.json beside it or above it"):
        OnnxEmbedder(alone)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SetupError, match=r"pip install 'stripedrag\[onnx\]'"):
        OnnxEmbedder(export).embed(["a"])


def test_an_onnx_file_that_cannot_run_is_refused(tmp_path: Path, export: Path) -> None:
    import onnx
    from onnx import helper

    shutil.copytree(export.parents[1], tmp_path / "model")
    file = tmp_path / "model" / "onnx" / "model.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(SetupError, match=r"cannot be read by ONNX Runtime"):
        OnnxEmbedder(file).embed(["a"])
    sides = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["texts"])
        for name in ("pixels", "last_hidden_state")
    ]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["last_hidden_state"])], "g", sides[:1], sides[1:]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))
    with pytest.raises(SetupError, match=r"takes pixels, which the tokenizer does not give\. Export"):
        OnnxEmbedder(file).embed(["a"])
