"""The benchmarks measure what they say: rivals that compute the same, sides in turn, files that are whole."""

import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hyena_inputs import assert_close, make
from stripedrag.errors import BackendError, CorpusError, StoreError, UsageError
from stripedrag.eval.bench.fft import hyena_fft, hyena_fft_prefill
from stripedrag.eval.bench.filter import parameters, rows_of
from stripedrag.eval.bench.passages import reciprocal_ranks
from stripedrag.eval.bench.repeats import Repeats
from stripedrag.eval.bench.report import Bandwidth, interleaved, medians, peak_bytes, plot
from stripedrag.eval.cli import app
from stripedrag.eval.data_formats import CorpusDocument, CorpusQuestion
from stripedrag.eval.places import holds, touches
from stripedrag.eval.schema import Stretch
from stripedrag.indexes import Document, Index
from stripedrag.jsonl import read_lines
from stripedrag.kernels import cpu, ops
from stripedrag.kernels.attention import by_whole_heads
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import BASELINE, STRIPED, prepared_dir
from stripedrag.rag import Pipeline
from stripedrag.rag.context_cache import ContextCache
from tiny_striped import tiny_striped


def test_the_fft_rival_computes_the_operator():
    inputs = make(300, modes=2)
    inputs.pop("heads")
    inputs["poles"][0, 0] = 0.1  # a logarithm has no pole of 0
    y, state = ops.hyena_filter(**inputs)
    assert_close(hyena_fft(**inputs), y, 1e-4)  # in float32 the FFT is the less exact one
    prefilled, modes = hyena_fft_prefill(**inputs)
    assert_close(prefilled, y, 1e-4)
    assert_close(torch.view_as_real(modes), state.iir, 1e-4)


def test_the_fft_rival_has_the_gradients_of_the_operator():
    inputs = make(100, modes=2)
    inputs.pop("heads")
    inputs["poles"][0, 0] = 0.1
    leaves = [t.requires_grad_() for t in inputs.values()]
    ours = torch.autograd.grad(ops.hyena_filter(**inputs)[0].sum(), leaves)
    theirs = torch.autograd.grad(hyena_fft(**inputs).sum(), leaves)
    for name, a, b in zip(inputs, theirs, ours, strict=True):
        assert_close(a, b, 1e-4, name)


def test_sides_are_taken_in_turn_and_the_first_round_does_not_count():
    calls = []
    seconds = interleaved(2, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 2, "b": 2}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_triad_and_copy_move_what_they_count():
    bandwidth = Bandwidth()
    bandwidth.triad()
    assert bandwidth._c[0] == 4.0
    bandwidth.copy()
    assert torch.equal(bandwidth._c, bandwidth._a)
    assert bandwidth.triad_bytes == 3 * 2**27


def test_the_rise_of_memory_is_seen():
    rise = peak_bytes(lambda: torch.ones(2**25))
    if rise is None:
        pytest.skip("this system does not tell")
    assert 2**27 <= rise < 2**28


def test_the_benchmarks_filter_is_stable_and_of_the_length_asked_for():
    given = parameters(64, 8, torch.bfloat16)
    assert torch.view_as_complex(given["poles"]).abs().max() < 1
    assert rows_of(64, 2048, torch.bfloat16).shape == (1, 2048, 192)


def test_a_plot_is_drawn(tmp_path):
    plot(tmp_path / "x.svg", {"a": [(1, 2.0), (2, 3.0)]}, "title", "x", "y", log_x=True)
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_the_benchmarks_norm_and_gate_compute_what_torch_does(monkeypatch):
    from stripedrag.eval.bench import rows

    for ours, rival in rows._SIDES.values():
        a, b = torch.randn(3, 8), torch.randn(8)
        b = b if ours is rows._SIDES["norm"][0] else b.expand(3, 8)
        torch.testing.assert_close(ours(a, b), rival(a, b), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(rows, "ROWS", 64)
    monkeypatch.setattr(
        rows, "machine", lambda: {"processor": "p", "threads": 1, "torch": "t", "kernels": "k", "commit": "c"}
    )
    report = rows.run(1)
    assert len(report.figures["rows"]) == 8 and len(report.table.splitlines()) == 13
    assert all(row["torch_over_ours"] > 0 and row["share_of_copy"] > 0 for row in report.figures["rows"])


def test_a_bench_writes_json_and_plot_whole(tmp_path, monkeypatch):
    from stripedrag.eval.bench import BENCHES, report

    def draw(path):
        plot(path, {"a": [("x", 1.0)]}, "", "", "", bars=True)

    monkeypatch.setitem(BENCHES, "mine", "mine")
    monkeypatch.setattr(
        "stripedrag.eval.cli.import_module",
        lambda name: type(
            "Mine", (), {"run": staticmethod(lambda repeats: report.Report({"repeats": repeats}, "a table", draw))}
        ),
    )
    run = CliRunner().invoke(app, ["bench", "mine", "--repeats", "2", "--to", str(tmp_path / "new" / "mine.json")])
    assert run.exit_code == 0, run.output
    assert "a table" in run.stdout
    assert json.loads((tmp_path / "new" / "mine.json").read_text()) == {"repeats": 2}
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["mine.json", "mine.svg"]


def test_a_plots_name_is_no_name_for_the_figures(tmp_path):
    run = CliRunner().invoke(app, ["bench", "decode", "--to", str(tmp_path / "x.svg")])
    assert isinstance(run.exception, UsageError)
    assert "x.svg is where the plot would go; name the JSON file, x.json" in str(run.exception)


@pytest.mark.weights
def test_recall_is_of_whole_evidence_by_every_method(tmp_path, monkeypatch):
    from stripedrag.eval.bench import recall

    monkeypatch.setattr(recall, "cache_dir", lambda: tmp_path)
    towns = ["Veyrac", "Orlat", "Dunmore", "Sulby", "Harth", "Quell"]
    texts = {
        town: f"The lighthouse of {town} was built by {town[::-1]} the elder. " + "Waves. " * 300 for town in towns
    }
    waves = [f"Wave {number} rolls." for number in range(900)]
    texts["cellar"] = " ".join([*waves[:450], "Forty keys hang there.", *waves[450:]])
    questions = [
        {"id": town, "question": f"Who built the lighthouse of {town}?", "answers": [town[::-1]]}
        | {"gold_spans": [{"doc_id": town, "start": 0, "end": texts[town].index(".") + 1}]}
        | {"split": "dev" if town == "Veyrac" else "test"}
        for town in towns
    ]
    start = texts["cellar"].index("Forty")  # no method's first thousand tokens hold what its words do not ask for
    hidden = [{"doc_id": "cellar", "start": start, "end": start + len("Forty keys hang there.")}]
    questions.append(questions[1] | {"id": "hidden", "gold_spans": hidden})
    corpus, asked = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text("\n".join(json.dumps({"id": town, "title": "", "text": text}) for town, text in texts.items()))
    asked.write_text("\n".join(map(json.dumps, questions)))
    figures = recall.run(1, corpus, asked).figures
    assert set(figures["curves"]) == {
        recall.OURS,
        *(f"{unit}, {by}" for unit in ("passages", "titled passages") for by in ("BM25", "cosine", "fusion")),
    }
    for name, curve in figures["curves"].items():
        found = [point["recall"] for point in curve]
        assert found[0] == pytest.approx(6 / 7) and found == sorted(found), name
        assert found[-1] == (pytest.approx(6 / 7) if name.endswith("BM25") else 1.0), name  # words alone rank it never
    assert {rival: points[0]["mean"] for rival, points in figures["ours_less"].items()} == dict.fromkeys(
        recall.RIVALS, 0
    )
    assert all(top["top_k"]["recall"] <= top["oracle_reranked"]["recall"] for top in figures["top_k"])
    assert figures["top_k"][0]["top_k"]["recall"] == pytest.approx(6 / 7)
    assert figures["search"]["p95_ms"] >= figures["search"]["p50_ms"] > 0
    assert figures["apart"]["number"] == len(towns)
    assert figures["apart"]["curves"].keys() == figures["curves"].keys()

    asked.write_text(json.dumps(questions[0] | {"gold_spans": [{"doc_id": "Veyrac", "start": 5, "end": 10**6}]}))
    with pytest.raises(CorpusError, match="question 'Veyrac' has gold at 5:1000000 of document 'Veyrac', which has"):
        recall.run(1, corpus, asked)
    end = texts["Veyrac"].index(".") + 1
    asked.write_text(json.dumps(questions[0] | {"gold_spans": [{"doc_id": "Veyrac", "start": end, "end": end + 1}]}))
    with pytest.raises(CorpusError, match="the evidence of question 'Veyrac' is white space"):
        recall.run(1, corpus, asked)


def test_a_stream_tells_what_was_read_before_and_what_the_contexts_hold(tmp_path, monkeypatch):
    from stripedrag.eval.bench import recall, stream

    tokenizer = AutoTokenizer.from_pretrained(prepared_dir(STRIPED))
    model = tiny_striped(tokenizer, window_tokens=2048)

    def opened(index):
        pipeline = Pipeline(index, model, tokenizer, model_name="tiny", contexts=ContextCache(model))
        pipeline.retriever.own_tokens = 0  # the documents are short
        return pipeline

    monkeypatch.setattr(recall, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(stream.Pipeline, "open", opened)
    monkeypatch.setattr(stream, "CONTEXT_TOKENS", 900)
    monkeypatch.setattr(stream, "EVERY", 2)
    texts = {
        town: "".join(f"{town} built tower {n} in {1200 + n}. The sea is near {town}. " for n in range(20))
        for town in ("Veyrac", "Orlat", "Dunmore")
    }
    questions = [
        {
            "id": f"{town} {n}",
            "question": f"When did {town} build tower {n}?",
            "answers": [f"{1200 + n}"],
            "split": "dev",
        }
        | {"gold_spans": [{"doc_id": town, "start": (at := text.index(f"{1200 + n}")), "end": at + 4}]}
        for n in (3, 11, 18)
        for town, text in texts.items()
    ]
    corpus, asked = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text("\n".join(json.dumps({"id": town, "title": "", "text": text}) for town, text in texts.items()))
    asked.write_text("\n".join(map(json.dumps, questions)))
    report = stream.run(2, corpus, asked)
    figures = report.figures
    assert [name.split()[0] for name in figures["questions"]] == ["Veyrac"] * 3 + ["Orlat"] * 3 + ["Dunmore"] * 3
    first, second = figures["rows"][:9], figures["rows"][9:]
    assert [row["reused_tokens"] for row in first] == [row["reused_tokens"] for row in second], "from nothing kept"
    assert sum(row["reused_tokens"] for row in first) > 0.3 * sum(row["prompt_tokens"] for row in first)
    assert ["alone_s" in row for row in first] == [False, True] * 4 + [False]
    assert set(figures["evidence_in"]) == {"shared", "alone"} and any(figures["evidence_in"]["shared"])
    assert len(figures["answers_f1"]) == 5 and all(0 <= f1 <= 1 for one in figures["answers_f1"] for f1 in one.values())
    assert "prompt tokens that were read before" in report.table


def test_the_rivals_fusion_is_by_reciprocal_ranks():
    scores = reciprocal_ranks([np.array([2, 0]), np.array([2, 3])], 4)
    assert scores == pytest.approx([1 / 62, 0, 2 / 61, 1 / 62])


@pytest.mark.weights
def test_embedding_is_measured_on_the_passages_that_an_index_embeds(monkeypatch):
    from stripedrag.eval.bench import embed

    monkeypatch.setattr(embed, "DOCUMENTS", 3)
    seen = []
    batches = embed._batches
    monkeypatch.setattr(embed, "_batches", lambda *given: seen.append(batches(*given)) or seen[-1])
    figures = embed.run(1).figures
    assert sum(len(batch["input_ids"]) for batch in seen[0]) == figures["passages"] >= 3
    assert sum(int(batch["attention_mask"].sum()) for batch in seen[0]) == figures["tokens"]
    assert figures["share_of_encoder"]["encoder"] == 1
    assert all(
        figures["tokens_per_s"][side] == pytest.approx(figures["tokens"] / seconds[0])
        for side, seconds in figures["seconds"].items()
    )


@pytest.mark.weights
def test_a_scaled_index_has_the_chunks_that_it_says_and_returns_as_many_as_are_asked_for(tmp_path, monkeypatch):
    from stripedrag.eval.bench import recall, scale

    text = " ".join(f"The lighthouse number {n} stands on a rock of its own, far from the coast." for n in range(30))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "a", "title": "", "text": text}))
    question = {"question": "Which lighthouse stands on a rock?", "answers": ["0"]}
    question["gold_spans"] = [{"doc_id": "a", "start": 0, "end": 9}]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(question | {"id": str(n)}) for n in range(4)))
    monkeypatch.setattr(scale, "CORPUS", tmp_path / "corpus.jsonl")
    monkeypatch.setattr(scale, "QUESTIONS", tmp_path / "questions.jsonl")
    for module in (scale, recall):
        monkeypatch.setattr(module, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(scale, "SIZES", (1200,))
    monkeypatch.setattr(scale, "QUERIES", 3)
    (row,) = scale.run(1).figures["rows"]
    assert row["chunks"] >= 1200
    assert row["found"]["dense"] == row["found"]["hybrid"] == 1000
    assert row["recall"] == 1.0
    assert row["build_s"] > 0 and all(ms["p95_ms"] >= ms["p50_ms"] > 0 for ms in row["search_ms"].values())
    assert not (tmp_path / "bench" / "scale" / "1200").exists()


@pytest.mark.weights
def test_evidence_counts_where_it_is_repeated_with_the_words_around_it(tmp_path):
    said = "The lighthouse of Veyrac was built by Ada Lorne in 1862 on a rock."
    texts = {"a": said, "b": f"A guide says: {said} It is closed.", "c": "Ada Lorne lived in 1862.", "d": "Ada Lorne"}
    index = Index.create(tmp_path / "index")
    index.add(Document(doc_id, "", text) for doc_id, text in texts.items())
    start = said.index("1862")
    piece = Stretch(doc_id="a", start=start, end=start + 4)
    repeats = Repeats(index, [piece, Stretch(doc_id="d", start=0, end=9)])

    def chunk(doc_id, length=None):
        return Stretch(doc_id=doc_id, start=0, end=length or len(index.document(doc_id).text))

    assert repeats.found([chunk("a")], [piece])
    assert repeats.found([chunk("b")], [piece])
    assert not repeats.found([chunk("b", len("A guide says: " + said) - 1)], [piece])  # a word short
    assert not repeats.found([chunk("c")], [piece])
    assert not repeats.found(
        [chunk("a"), chunk("b"), chunk("c")], [Stretch(doc_id="d", start=0, end=9)]
    )  # too few words
    assert not repeats.found([], [piece])


def test_evidence_is_held_to_its_last_character_by_what_touches_it():
    def places(*stretches):
        return [Stretch(doc_id=doc_id, start=start, end=end) for doc_id, start, end in stretches]

    evidence = places(("a", 10, 20), ("b", 0, 5))
    assert holds(places(("b", 0, 9), ("a", 15, 25), ("a", 5, 15)), evidence)
    assert not holds(places(("b", 0, 9), ("a", 16, 25), ("a", 5, 15)), evidence)
    assert not holds(places(("b", 0, 9), ("a", 5, 19)), evidence)
    assert not holds(places(("a", 0, 30)), evidence)
    assert not holds([], evidence)
    assert [touches(p, evidence) for p in places(("a", 0, 10), ("a", 19, 30), ("c", 0, 9))] == [False, True, False]


def test_the_published_layout_is_written_with_every_tensor_and_loaded_to_the_bit(golden_dir, tmp_path):
    from stripedrag.eval.bench import load

    published = load.published()
    assert published == json.loads((golden_dir / "hf_nous_7b_config.json").read_text())
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    expected = {
        name: (tuple(tensor["shape"]), names[tensor["dtype"]])
        for name, tensor in json.loads((golden_dir / "hf_7b_tensors.json").read_text()).items()
    }
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load.layout(published)} == expected
    tiny = published | {"hidden_size": 64, "num_filters": 64, "num_attention_heads": 8, "inner_mlp_size": 96}
    digests = load.write(tmp_path / "tiny", tiny | {"vocab_size": 64}, shard_bytes=200_000)
    assert len(digests) == 355 and len(list((tmp_path / "tiny").glob("model-*.safetensors"))) > 3
    row = load._loaded(tmp_path / "tiny", digests)
    assert (row["tensors_used"], row["wrong"], row["unused"], row["finite"]) == (355 - 16, [], [], True)
    name = "backbone.blocks.0.projections.weight"
    assert load._loaded(tmp_path / "tiny", digests | {name: "0", "more": "1"})["wrong"] == [name]
    small = load._loaded(tmp_path / "tiny", digests, "int8")
    assert (small["tensors_used"], small["wrong"], small["unused"], small["finite"]) == (355 - 16, [], [], True)
    assert small["quantized"] == 32 * 5 + 1
    assert small["weight_bytes"] < row["weight_bytes"]


def test_evos_layout_is_written_with_every_tensor_and_loaded_to_the_bit(golden_dir, tmp_path):
    """The keys of Evo-1's published config (the 131k one), its 32 layers, and tensors without a prefix or an output."""
    from stripedrag.eval.bench import load

    small = json.loads((golden_dir / "evo_tiny.json").read_text())["config"]
    attention = [8, 16, 24]
    layers = {"num_layers": 32, "attn_layer_idxs": attention}
    layers["hyena_layer_idxs"] = [i for i in range(32) if i not in attention]
    published = (
        small | layers | {"max_seqlen": 131072, "auto_map": {"AutoTokenizer": ["tokenizer.ByteTokenizer", None]}}
    )
    digests = load.write(tmp_path / "evo", published, shard_bytes=1_000_000)
    assert len(digests) == 438 and len(list((tmp_path / "evo").glob("model-*.safetensors"))) > 1
    row = load._loaded(tmp_path / "evo", digests)
    assert (row["tensors_used"], row["wrong"], row["unused"], row["finite"]) == (438 - 3, [], [], True)


def test_the_sides_of_attention_compute_the_same(monkeypatch):
    from stripedrag.eval.bench import attention

    monkeypatch.setattr(attention, "SHAPES", {"small": (6, 2, 32)})
    monkeypatch.setattr(attention, "LENGTHS", ((1, 40), (7, 40), (20, 0)))
    monkeypatch.setattr(attention, "OF_GRADIENT", (20,))
    made, gradients = {}, {}

    def keep(repeats, **sides):
        for name, run in sides.items():
            if "torch" in sides:
                gradients[name] = run()
            else:
                made.setdefault(name, []).append(run()[0])
        return {name: [1.0] for name in sides}

    monkeypatch.setattr(attention, "interleaved", keep)
    here = {"processor": "p", "threads": 1, "torch": "t", "commit": "c", "matmul_flop_per_s": 1, "read_bytes_per_s": 1}
    here["dtype"] = "d"
    monkeypatch.setattr(attention, "machine", lambda: here)
    report = attention.run(1)
    assert [(row["new"], row["past"]) for row in report.figures["rows"]] == [(1, 40), (7, 40), (20, 0)]
    assert report.table.count("small") == 4
    for ours, other in zip(gradients["ours"], gradients["torch"], strict=True):
        torch.testing.assert_close(ours, other.to(ours.dtype), atol=3e-2, rtol=1e-2)
    for ours, *others in zip(*made.values(), strict=True):
        for other in others:
            torch.testing.assert_close(ours, other.to(ours.dtype), atol=2e-2, rtol=0)


def test_a_gpus_benchmark_runs_and_predicts(monkeypatch):
    """In Triton's interpreter; what a GPU adds are its events and the size of its cache."""
    pytest.importorskip("triton")
    from stripedrag.eval.bench import filter_gpu, roofline

    monkeypatch.setattr(filter_gpu, "SHAPES", ((4, 1),))
    monkeypatch.setattr(filter_gpu, "LENGTHS", (2, 3))
    monkeypatch.setattr(filter_gpu, "GRADIENT_LENGTH", 3)
    monkeypatch.setattr(filter_gpu, "WARM_UPS", 1)
    monkeypatch.setitem(roofline.DEVICES, "cpu", roofline.DEVICES["H100"]._replace(name="cpu"))
    report = filter_gpu.run(2, torch.device("cpu"))
    assert [(row["dtype"], row["length"]) for row in report.figures["forward"]] == [
        (dtype, length) for dtype in ("bfloat16", "float32") for length in (2, 3)
    ]
    for row in (*report.figures["forward"], *report.figures["gradient"]):
        assert all(len(runs) == 2 and min(runs) > 0 for runs in row["seconds"].values())
        assert (row["predicted_s"] is not None) == (row["dtype"] == "bfloat16")
    assert "bfloat16     4   1       3" in report.table
    right = (torch.ones(2), torch.tensor([1.0, 2.0]), torch.zeros(3))
    assert filter_gpu._apart(torch.float32, right, right) == 0
    for wrong, told in ((right[1] * 1.001, "1.0e-03"), (right[1] * torch.nan, "nan")):
        with pytest.raises(BackendError, match=rf"the triton backend is {told} of the largest number from the torch"):
            filter_gpu._apart(torch.float32, (right[0], wrong, right[2]), right)
    run = CliRunner().invoke(app, ["bench", "filter", "--device", "cuda"])
    assert run.exit_code and "torch finds no CUDA device here" in str(run.exception)
    run = CliRunner().invoke(app, ["bench", "rows", "--device", "cuda"])
    assert run.exit_code and "it is cpu, or with `filter` and `train` cuda" in str(run.exception)


def test_the_roofline_counts_what_the_kernels_move():
    from stripedrag.eval.bench import roofline

    report = roofline.run(1)
    row = next(
        row for row in report.figures["rows"] if (row["device"], row["length"], row["modes"]) == ("H100", 131_072, 2)
    )
    elements = 4096 * 131_072
    # z read once, x1 and v once before, y written once, of two bytes: 12 bytes a token and channel, 8 the floor
    moved = sum(one["bytes"] for one in row["forward"])
    assert 12 * elements < moved < 12.2 * elements
    assert row["least_s"] == pytest.approx(8 * elements / 3.35e12)
    assert row["forward_s"] == pytest.approx(moved / 3.35e12)
    assert row["forward"][2]["programs"] == 64 * 131_072 // 512
    assert 1 < row["attention_layer_s"] / row["hyena_layer_s"] < 4
    assert "H100     131,072   2" in report.table


@pytest.mark.weights
def test_small_weights_are_measured_on_articles_that_were_not_trained_on(monkeypatch):
    from stripedrag.eval.bench import quantize
    from stripedrag.eval.bench.recall import QUESTIONS

    parts = {q.gold_spans[0].doc_id: q.split for q in read_lines(QUESTIONS, CorpusQuestion)}
    texts = {d.text: parts.get(d.id) for d in read_lines(quantize.CORPUS, CorpusDocument)}
    articles = list(quantize.unseen_articles())
    assert len(articles) == sum(part == "dev" for part in parts.values()) > 15
    assert {texts[article] for article in articles} == {"dev"}
    monkeypatch.setattr(quantize, "WINDOWS", 1)
    monkeypatch.setattr(quantize, "WINDOW_TOKENS", 128)
    monkeypatch.setattr(quantize, "PROMPT_TOKENS", 16)
    here = defaultdict(str, threads=1, read_bytes_per_s=1e9)
    monkeypatch.setattr(quantize, "machine", lambda: here)
    report = quantize.run(1)
    (losses,), bytes_ = report.figures["losses"], report.figures["bytes"]
    assert losses["as it is"]["divergence"] == 0 < losses["int8"]["divergence"] < losses["int4"]["divergence"] < 1
    assert abs(losses["int8"]["nats"] - losses["as it is"]["nats"]) < 0.05
    assert bytes_["as it is"] > bytes_["int8"] > bytes_["int4"]
    assert f"{torch.tensor(losses['int4']['nats']).exp():.2f}" in report.table


@pytest.mark.weights
def test_the_memory_of_reading_is_the_caches_by_the_formula_and_little_else(monkeypatch):
    from stripedrag.eval.bench import memory

    monkeypatch.setattr(memory, "SEGMENTED", 600)
    rows = {name: memory.read(name, 600) for name in (STRIPED, BASELINE)}
    for row in rows.values():
        assert row["cache_bytes"] == row["formula_bytes"] <= row["peak_bytes"] <= row["cache_bytes"] + 2**28
    assert rows[STRIPED]["token_bytes"] == rows[BASELINE]["token_bytes"] / 2
    assert rows[BASELINE]["state_bytes"] == 0 < rows[STRIPED]["state_bytes"] < 2**20
    named = [row | {"model": name} for name, row in rows.items()]
    monkeypatch.setattr(memory.generation, "SEGMENT_TOKENS", 256)
    named.append(memory.read(STRIPED, 600))
    assert named[-1]["cache_bytes"] == named[0]["cache_bytes"]
    figures = {"machine": defaultdict(str), "segment": 2048, "rows": named}
    lines = [line.split() for line in memory._table(figures).splitlines() if line.startswith(STRIPED)]
    assert [(len(line), line[-3]) for line in lines] == [(8, lines[0][-3]), (4, "256"), (4, "2,048")]


def test_training_is_timed_whole_in_parts_and_composed(monkeypatch, tmp_path):
    from stripedrag.eval.bench import train

    small = {"WIDTH": 64, "HEAD_WIDTH": 16, "BASE": 64, "WHOLE": (64, 128), "COMPOSED": (64, 128, 256)}
    small |= {"CURVE_WIDTHS": (128,), "CURVE_LENGTHS": (32, 64), "_WARM_UP_TOKENS": 16}
    for name, value in small.items():
        monkeypatch.setattr(train, name, value)
    train.parameters.cache_clear()
    so_far = tmp_path / ".train.json.train"
    report = train.run(2, so_far=so_far)
    again = train.run(2, so_far=so_far)
    train.parameters.cache_clear()
    assert again.figures["whole"] == report.figures["whole"] and again.figures["parts"] == report.figures["parts"]
    assert again.figures["resumed"] > report.figures["resumed"] == 0
    figures = report.figures
    steps = {(row["model"], row["tokens"]): row["seconds"] for row in figures["whole"]}
    assert set(steps) == {
        *((name, tokens) for name in (train.STRIPED, train.LLAMA) for tokens in (64, 128)),
        (train.TRANSFORMERS, 64),
    }
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in steps.values())
    assert len(figures["checked"]) == 4
    assert [row["tokens"] for row in figures["slices"]] == [64, 128, 256]
    assert {(row["pattern"], row["layers"]) for row in figures["patterns"]} == {
        ("1 of 2", 32),
        ("1 of 3", 33),
        ("1 of 11", 33),
    }
    assert f"{train.ratio(figures['whole'], 128):.2f}x as fast" in report.table
    report.plot(tmp_path / "train.svg")
    assert "<svg" in (tmp_path / "train.svg").read_text()


def test_a_step_is_composed_of_its_parts(monkeypatch):
    """Parts that cost a second for each thousand positions, or for each million pairs, make steps that are known."""
    from stripedrag.eval.bench import train

    monkeypatch.setattr(train, "BASE", 1000)
    monkeypatch.setattr(train, "COMPOSED", (1000, 4000))

    def passes(seconds):
        return {"forward": seconds, "backward": 2 * seconds}

    lengths = (1000, 4000)
    parts = {
        "seconds": {
            "head": {"1000": passes(1.0)},
            "last_product": {"1000": passes(0.25)},  # which is made once alone
            "attention_layer": {"1000": passes(3.0)},  # of which attention is 1
            "hyena_layer": {"1000": passes(2.5)},  # of which the operator is half a second
            "core": {str(n): passes((n / 1000) ** 2) for n in lengths},
            "llama_core": {str(n): passes(2 * (n / 1000) ** 2) for n in lengths},  # torch's takes twice as long
            "operator": {str(n): passes(n / 2000) for n in lengths},
        },
        "optimizer_s_a_parameter": 0.01,
        "parameters": {"attention": 100, "hyena": 200, "rest": 300},
        "makes_again": {"1000": False, "4000": True},
    }
    # Forward once and backward twice as long: 3; with activations made again 4, but for the head and the last product.
    llama_s = 4 * 3 * 1.0 + 0.01 * (2 * 100 + 300) + 2 * (4 * (4 * 2.0 - 0.25) + 4 * 32.0)
    striped_s = 4 * 3 * 1.0 + 0.01 * (100 + 200 + 300) + 4 * (4 * 2.0 - 0.25 + 16.0) + 4 * (4 * 2.0 - 0.25 + 2.0)
    whole = [
        {"model": name, "layers": 2, "tokens": 4000, "again": True, "median_s": seconds}
        for name, seconds in ((train.LLAMA, llama_s), (train.STRIPED, 2 * striped_s))
    ]
    made = train._composed(whole, parts)
    assert [row["composed_s"] for row in made["checked"]] == pytest.approx([llama_s, striped_s])
    assert [row["error"] for row in made["checked"]] == pytest.approx([0, -0.5])
    assert made["slices"][1]["ratio"] == pytest.approx(llama_s / striped_s)
    assert made["slices"][1]["by_pattern"] == pytest.approx((llama_s - 2 * 4 * 16.0) / striped_s)
    kept = (3 + 0.01 * 500 + 2 * 3 * 4.0) / (3 + 0.01 * 600 + 3 * 3.0 + 3 * 2.5)
    assert made["slices"][0]["ratio"] == pytest.approx(kept)
    of_eleven = {row["tokens"]: row for row in made["patterns"] if row["pattern"] == "1 of 11"}
    assert of_eleven[1000]["by_pattern"] < of_eleven[4000]["by_pattern"] < 11
    parts["curves"] = [{"tokens": 64, "width": 8, "llama": 6.0, "attention": 4.0, "hyena": 2.0}]
    curve = train._curve({"curves": parts["curves"], "parts": parts})
    assert curve[-1][:2] == (8, 8) and curve[-1].llama == 3 and curve[-1].attention == 2
    (place,) = (place for place in curve if place.length_over_width == 4000 / train.WIDTH)
    hyena_s = 4 * (7.5 - 1.5) + 6
    assert place[2:] == pytest.approx(((4 * 6 + 96) / hyena_s, (4 * 6 + 48) / hyena_s))


def test_operations_are_counted():
    from stripedrag.eval.bench import train

    mlp, output = 3 * 4096 * 14_336, 2 * 3 * 4096 * 32_000
    attention, hyena = 4096 * 6144 + 4096 * 4096 + mlp, 4 * 4096 * 4096 + mlp
    pairs = 4 * 4096 * 1000 / 2  # of each position with those before it, in two products
    assert train.flops(1, 0, 1000, again=False) == 1000 * (2 * 3 * attention + 3.5 * pairs + output)
    again = 2 * 2 * (4 * hyena - mlp / 3)
    assert train.flops(0, 2, 1000, again=True) == 1000 * (again + output)
    again = 2 * (4 * attention - mlp / 3) + 4.5 * pairs
    assert train.flops(1, 0, 1000, again=True) == 1000 * (again + output)


@pytest.mark.parametrize("every", [1, 2])
def test_a_layer_that_is_made_again_goes_without_its_last_product(monkeypatch, every):
    """What `flops` and what is composed take for granted of torch's checkpoint."""
    from stripedrag.eval.bench import train

    monkeypatch.setattr(train, "HEAD_WIDTH", 16)
    training = train.Training(train.configuration(64, 2, every), torch.device("cpu"), again=True)
    ran = Counter()
    for block in training.model.backbone.blocks:
        for name, product in block.mlp.named_children():
            product.register_forward_hook(lambda *_, name=name: ran.update([name]))  # after the product
    training.step(torch.randint(3, 99, (1, 32)))
    assert ran == {"l1": 4, "l2": 4, "l3": 2}


def test_the_llamas_of_a_bench_have_torchs_attention(monkeypatch):
    from stripedrag.eval.bench import layer, train

    monkeypatch.setattr(train, "HEAD_WIDTH", 16)
    kinds = {}
    for every in (1, 2):
        training = train.Training(train.configuration(64, 2, every), torch.device("cpu"), again=False)
        attention = [block.inner_mha_cls for block in training.model.backbone.blocks if block.is_attention]
        kinds[every] = {type(module) for module in attention}
    assert kinds == {1: {layer.TorchsAttention}, 2: {layer.Attention}}
    layers = layer.Layers(train.widths(64), torch.device("cpu"))
    core = layers.core(32, 1)
    sides = layers.sides(32, gradient=True, torchs=True)
    outputs = {name: side.run() for name, side in (core | sides).items()}
    for ours, torchs in (("core", "llama_core"), ("attention_layer", "llama_layer")):
        torch.testing.assert_close(outputs[ours], outputs[torchs], rtol=0.05, atol=0.02)
    assert "ScaledDotProduct" in type(outputs["llama_core"].grad_fn).__name__
    assert ("_Attention" in type(outputs["core"].grad_fn).__name__) == cpu.has_attention(outputs["core"].dtype)
    swapped = []
    monkeypatch.setattr(layer, "by_whole_heads", lambda *qkv: swapped.append(qkv) or by_whole_heads(*qkv))
    sides["attention_layer"].run()
    assert not swapped
    sides["llama_layer"].run()
    assert len(swapped) == 1


def test_a_bench_that_was_cut_goes_on(tmp_path):
    from stripedrag.eval.bench.so_far import SoFar

    path, run = tmp_path / ".train.json.train", {"commit": "abc", "repeats": 3}
    assert SoFar(path, run).measured("core", lambda: (1.5, 2.0)) == (1.5, 2.0)
    again = SoFar(path, run)
    assert again.resumed == 1
    assert again.measured("core", lambda: pytest.fail("measured twice")) == [1.5, 2.0]
    assert again.measured("step", lambda: None) is None  # as where memory was short
    assert SoFar(path, run).measured("step", lambda: 2.5) == 2.5
    with pytest.raises(UsageError, match="a run with commit abc; go on with that one, or remove the file"):
        SoFar(path, run | {"commit": "def"})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    for text in ("", "{", "[]", '{"bench": "train"}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="does not hold what a run measured so far; remove it"):
            SoFar(path, run)
    assert SoFar(None, run).measured("core", lambda: 3) == 3


def test_a_long_bench_goes_on_by_the_same_command(tmp_path, monkeypatch):
    from stripedrag.eval.bench import report
    from stripedrag.eval.bench.so_far import SoFar

    ran = []

    def bench(repeats, so_far):
        measured = SoFar(so_far, {"repeats": repeats}).measured
        measured("first", lambda: ran.append("first") or 1)
        if len(ran) == 1:
            ran.append("cut")
            raise KeyboardInterrupt
        return report.Report({"second": measured("second", lambda: 2)}, "a table")

    monkeypatch.setattr(
        "stripedrag.eval.cli.import_module", lambda name: type("Train", (), {"run": staticmethod(bench)})
    )
    command = ["bench", "train", "--to", str(tmp_path / "x.json")]
    run = CliRunner().invoke(app, command)
    assert run.exit_code and f"the same command goes on from {tmp_path / '.x.json.train'}" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".x.json.train"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0 and ran == ["first", "cut"]
    assert f"going on from {tmp_path / '.x.json.train'}" in run.stderr
    assert json.loads((tmp_path / "x.json").read_text()) == {"second": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    run = CliRunner().invoke(app, ["bench", "train", "--to", str(tmp_path)])
    assert f"{tmp_path} is a folder; name a file in it, {tmp_path / 'train.json'}" in str(run.exception)


def test_what_is_trained_is_of_one_shape():
    from stripedrag.eval.bench import train

    with torch.device("meta"):
        ours = train.StripedHyenaForCausalLM(train.configuration(4096, 2, 1))
        theirs = train.LlamaForCausalLM(train.llama(ours.config))
        striped = train.StripedHyenaForCausalLM(train.configuration(4096, 32, 2))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    counted = 16 * (train.parameters("attention") + train.parameters("hyena")) + train.parameters("rest")
    assert sum(p.numel() for p in striped.parameters()) == counted == 7_646_023_680
    assert striped.config.attn_layer_idxs == list(range(1, 32, 2))
    assert train.configuration(4096, 33, 11).attn_layer_idxs == [10, 21, 32]


@pytest.mark.parametrize("again", [False, True])
def test_a_step_trains(monkeypatch, again):
    from stripedrag.eval.bench import train

    monkeypatch.setattr(train, "HEAD_WIDTH", 16)
    training = train.Training(train.configuration(64, 2, 2), torch.device("cpu"), again=again)
    for group in training.optimizer.param_groups:
        group["lr"] = 3e-3
    ids = torch.randint(3, 99, (1, 64), generator=torch.Generator().manual_seed(0))
    losses = [training.step(ids) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    training.model.backbone.unembed.weight.data.fill_(torch.nan)
    with pytest.raises(StoreError, match="loss of a step on 64 tokens is nan"):
        training.step(ids)


def test_a_decode_step_is_divided(monkeypatch, tmp_path):
    from stripedrag.eval.bench import decode

    monkeypatch.setattr(decode, "PROMPT_TOKENS", (32,))
    monkeypatch.setattr(decode, "SHAPES", ((32, 2),))
    monkeypatch.setattr(decode, "TEXT_TOKENS", 64)
    report = decode.run(1)
    (model,) = report.figures["models"]
    assert sum(model["share"].values()) == pytest.approx(1)
    assert len(model["seconds"]["blocks"]) >= len(model["seconds"]["step"])
    nats = report.figures["nats"]
    assert nats["float32, token by token"] == pytest.approx(nats["float32, read at once"], abs=1e-4)
    assert all(value == pytest.approx(nats["float32, read at once"], rel=0.02) for value in nats.values())
    report.plot(tmp_path / "decode.svg")
    assert "<svg" in (tmp_path / "decode.svg").read_text()


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="its rival is of torch 2.13")
def test_losses_are_timed_beside_their_limit(monkeypatch):
    from stripedrag.eval.bench import loss

    monkeypatch.setattr(loss, "ROWS", 64)
    monkeypatch.setattr(loss, "SHAPES", {"small": (16, 100)})
    report = loss.run(2)
    (row,) = report.figures["rows"]
    assert set(row["seconds"]) == {"ours", "torch", "whole logits"}
    assert all(len(runs) == 2 and min(runs) > 0 for runs in row["seconds"].values())
    assert row["least_s"] * report.figures["machine"]["matmul_flop_per_s"] == pytest.approx(3 * 2 * 64 * 16 * 100)
    assert f"{row['median_s']['torch'] / row['median_s']['ours']:.2f}x" in report.table


def test_a_prefill_is_divided(monkeypatch, tmp_path):
    from stripedrag.eval.bench import prefill

    monkeypatch.setattr(prefill, "PROMPT_TOKENS", (24, 64))
    report = prefill.run(2)
    for row, tokens in zip(report.figures["rows"], (24, 64), strict=True):
        assert row["tokens"] == tokens and len(row["parts"]) == len(row["seconds"]["plain"]) == 2
        for run, whole in zip(row["parts"], row["seconds"]["divided"], strict=True):
            assert all(seconds > 0 for seconds in run.values())
            assert 0 < whole - sum(run.values()) < whole / 2  # timing itself is no part
        assert f"{row['share']['attention']:.1%} at {row['of_rate']['attention']:.0%}" in report.table
    report.plot(tmp_path / "prefill.svg")
    assert "<svg" in (tmp_path / "prefill.svg").read_text()


def test_a_part_takes_what_is_not_in_other_parts(monkeypatch):
    from stripedrag.eval.bench import prefill

    clock = itertools.count()

    def seconds_of(run):
        begun = next(clock)  # it ticks when a run begins and when it ends
        run()
        return next(clock) - begun

    monkeypatch.setattr(prefill, "seconds_of", seconds_of)
    model = tiny_striped(range(99), window_tokens=64)
    ids = torch.arange(9).unsqueeze(0)
    expected = model(input_ids=ids).logits
    with prefill.own_seconds(model.backbone.blocks) as seconds:
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    blocks = model.backbone.blocks
    attention = sum(block.is_attention for block in blocks)
    # 1 for a part that holds none, and 1 more for each that it holds.
    assert seconds == {
        "products with weights": 5 * len(blocks),
        "attention": 3 * attention,
        "Hyena operator": len(blocks) - attention,
        "gates of the MLPs": 4 * len(blocks),
        "norms": 2 * len(blocks),
    }
    assert not any("forward" in vars(module) for module in model.modules())


def test_operations_of_a_prefill_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    from stripedrag.eval.bench import prefill

    model = tiny_striped(range(99), window_tokens=64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.backbone.blocks[0].mlp(torch.zeros(1, 7, model.config.hidden_size))
    counted = prefill.flops(model.backbone.blocks, model.config, 7)
    mlp = sum(p.numel() for p in model.backbone.blocks[0].mlp.parameters())
    weights = sum(p.numel() for name, p in model.backbone.blocks.named_parameters() if name.endswith(".weight"))
    assert counter.get_total_flops() == 2 * 7 * mlp
    assert counted["products with weights"] == 2 * 7 * weights
    assert counted["attention"] == len(model.config.attn_layer_idxs) * 4 * model.config.hidden_size * 28


@pytest.mark.parametrize("asked", [["rows", "--longest", "2048"], ["prefill", "--longest", "1000"]])
def test_long_prompts_are_left_out_where_there_are_some(asked):
    run = CliRunner().invoke(app, ["bench", *asked])
    assert f"--longest is {asked[-1]}; it goes with `generate` and `prefill`, from 1024 on" in str(run.exception)


def test_reading_and_writing_are_timed_with_needles(monkeypatch, tmp_path):
    from stripedrag.eval.bench import generate

    for name, value in {"LENGTHS": (24, 40, 64), "LONGEST": 600, "ROW_TOKENS": 16, "ANSWER_TOKENS": 12}.items():
        monkeypatch.setattr(generate, name, value)
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    report = generate.run(1)
    places = {(row["system"], row["rows"], row["prompt_tokens"]) for row in report.figures["rows"]}
    assert places == {(n, r, t) for n in (STRIPED, BASELINE) for r, t in ((1, 24), (1, 40), (8, 16), (1, 64))}
    for row in report.figures["rows"]:
        assert row["first_token_s"] > 0 and row["cache_bytes"] > 0
    needles = report.figures["needles"]
    assert needles["tokens"] <= 600
    assert [one["depth"] for one in needles["answers"]] == [0.1, 0.5, 0.9]
    assert any(one["right"] for one in needles["answers"])
    report.plot(tmp_path / "generate.svg")
    assert "<svg" in (tmp_path / "generate.svg").read_text()
    report = generate.run(1, longest=24)
    assert {(row["rows"], row["prompt_tokens"]) for row in report.figures["rows"]} == {(1, 24), (8, 16)}
    assert report.figures["needles"] is None and "needles" not in report.table
    report.plot(tmp_path / "short.svg")
    assert (tmp_path / "short.svg").exists()


def test_llama_cpp_writes_what_the_transformer_writes():
    pytest.importorskip("llama_cpp")
    from stripedrag.eval.bench import generate, llama_cpp

    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
    ids = AutoTokenizer.from_pretrained(prepared_dir(BASELINE))(text).input_ids
    runs = llama_cpp.LlamaCpp(llama_cpp.published(), 2)
    told = []
    written = runs.generate([ids, ids], 3, told.append)
    assert len(told) == 3 and told == sorted(told)
    model, _ = load_model(BASELINE, device="cpu")
    assert runs.weight_bytes < generate.InTorch(model, at_once=True).weight_bytes
    expected = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, len(ids) :].tolist()
    assert written == [expected, expected]
