"""lm-evaluation-harness's tasks in our runs, and our models in its: the same figures either way."""

import json

import datasets
import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stripedrag.errors import UsageError
from stripedrag.eval.lm import HarnessLM, WindowOverflow, greedy_settings
from stripedrag.eval.reading import DoesNotFitError
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import LMRequest, LMResponses, SampleRecord, content_sha256
from stripedrag.eval.tasks import lm_eval as tasks_lm_eval
from stripedrag.eval.tasks.lm_eval import OPENLLM, SHIPPED, LMEvalTask
from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM
from stripedrag.model.smollm2 import prepared_dir

WINDOW = 96
LONG = "The lighthouse keeper counted the ships, and the ships counted the keeper. " * 24
PAIRS = [
    ("Question: What is bread made from?\nAnswer:", " flour"),
    ("Question: What is bread made from?\nAnswer:", " a stone that was left in the rain"),
    ("Question: What is bread made from?\nAnswer: ", "flour"),  # the space belongs to the continuation
    ("Question: What is bread made from?\nAnswer: \n ", "flour, \u00e9t\u00e9, \u4e16\u754c"),
    ("", "A text that nothing comes before."),
    ("", "<|im_start|>user and the prefix token is there already"),
    ("<|im_start|>user\nHello", " there<|im_end|>"),
    ("un", "believably small"),  # tokens that would cross the border
]
PROMPTS = [
    ("Question: What is bread made from?\nAnswer:", {"until": ["\n\n"], "max_gen_toks": 24}),
    ("<|im_start|>user\nHello<|im_end|>\n", {"until": "e", "max_gen_toks": 24, "do_sample": False}),
    ("The ships", {"until": [], "max_new_tokens": 5, "temperature": 0.0}),
    ("The ships", {"until": ["t", "s", "a"], "max_gen_toks": 16}),
    ("The ships", {"until": ["<|im_end|>", "no such words"], "max_gen_toks": 40}),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(prepared_dir("smollm2-135m-instruct"))


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,  # far from uniform, so that what is likeliest is no matter of rounding
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_striped():
    torch.manual_seed(0)
    config = StripedHyenaConfig(
        vocab_size=49152,
        hidden_size=32,
        num_filters=32,
        num_layers=3,
        attn_layer_idxs=[1],
        num_attention_heads=4,
        inner_mlp_size=64,
        max_seqlen=2048,
    )
    return StripedHyenaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def lm(model, tokenizer):
    return HarnessLM(model, tokenizer, window_tokens=WINDOW)


@pytest.fixture(scope="module")
def theirs(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW)


@pytest.fixture
def resources(tmp_path):
    told = []
    made = Resources(seed=7, reference_tokenizer="none", folder=tmp_path, tell=told.append)
    made.told = told
    return made


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def declared(task, **fields):
    return LMEvalTask(kind="lm_eval", name="t", task=task, **fields)


def scored(task, sample, responses):
    return task.score(SampleRecord.of(sample), LMResponses(responses=tuple(responses)))


# The model


@pytest.mark.weights
def test_log_likelihoods_and_greedy_flags_are_those_of_lm_evals_own_model(lm, theirs):
    ours = lm.loglikelihood(instances("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


@pytest.mark.weights
def test_what_greedy_decoding_writes_is_greedy_and_its_beginning_with_another_end_is_not(lm, theirs, tokenizer):
    context = tokenizer.decode(tokenizer.encode(PAIRS[0][0]))
    written = lm.respond(LMRequest(kind="generate_until", arguments=(context, {"until": [], "max_gen_toks": 1})))
    pairs = [(context, written), (context, f"{written} flour")]
    ours = lm.loglikelihood(instances("loglikelihood", pairs))
    assert [greedy for _, greedy in ours] == [True, False]
    assert ours == [
        (pytest.approx(nats, abs=1e-4), greedy)
        for nats, greedy in theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    ]


@pytest.mark.weights
def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model_over_several_windows(lm, theirs, tokenizer):
    assert len(tokenizer.encode(LONG)) > 2 * WINDOW
    texts = [(LONG,), ("Short.",), ("<|im_start|>user\nHello",), ("",)]
    ours = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert ours == pytest.approx(expected, abs=1e-3, rel=1e-6)


@pytest.mark.weights
@pytest.mark.parametrize("seed", range(3))
def test_texts_are_those_of_lm_evals_own_model(seed, tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = tiny_llama(seed)
    ours = HarnessLM(model, tokenizer, window_tokens=WINDOW).generate_until(instances("generate_until", PROMPTS))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW)
    assert ours == theirs.generate_until(instances("generate_until", PROMPTS), disable_tqdm=True)
    assert any(ours)


@pytest.mark.weights
def test_the_models_end_token_ends_a_text(tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = tiny_llama()
    free = HarnessLM(model, tokenizer).generate_until(instances("generate_until", [("The ships", {"until": []})]))[0]
    assert tokenizer.eos_token not in free
    # The fourth token that it writes becomes its end token.
    ids = tokenizer.encode("The ships")
    written = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    model.generation_config.eos_token_id = written[3]
    asked = instances("generate_until", [("The ships", {"until": [], "max_gen_toks": 20})])
    (ours,) = HarnessLM(model, tokenizer).generate_until(asked)
    assert ours == tokenizer.decode(written)
    assert [ours] == HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)


@pytest.mark.weights
@pytest.mark.parametrize("build", [tiny_llama, tiny_striped])
def test_requests_that_share_a_context_get_what_each_gets_alone(build, tokenizer):
    lm = HarnessLM(build(), tokenizer)
    requests = [LMRequest(kind="loglikelihood", arguments=pair) for pair in PAIRS]
    requests.insert(1, LMRequest(kind="loglikelihood_rolling", arguments=(LONG,)))
    requests.insert(3, LMRequest(kind="generate_until", arguments=PROMPTS[0]))
    together, alone = lm.respond_all(requests), [lm.respond(request) for request in requests]
    assert json.loads(json.dumps(together)) == together
    assert together[3] == alone[3]
    for one, other in zip(together, alone, strict=True):
        if isinstance(one, list):
            assert one == [pytest.approx(other[0], abs=1e-4), other[1]]


@pytest.mark.weights
def test_a_shared_context_is_read_once(model, tokenizer):
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        lm = HarnessLM(model, tokenizer)
        lm.respond_all([LMRequest(kind="loglikelihood", arguments=("One context", f" {c}")) for c in "ABCD"])
    finally:
        hook.remove()
    assert lengths == [len(tokenizer.encode("One context"))]  # continuations of one token are only predicted


@pytest.mark.weights
@pytest.mark.parametrize("build", [tiny_llama, tiny_striped])
def test_a_continuation_longer_than_a_segment_is_scored_as_in_one_forward_pass(build, tokenizer):
    model, text = build(), LONG * 4
    ids = torch.tensor([tokenizer.encode(text)])
    assert ids.shape[1] > 2 * 512
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor([[1]]), ids], 1), use_cache=False).logits[0, :-1]
    expected = -torch.nn.functional.cross_entropy(logits.double(), ids[0], reduction="sum").item()
    assert HarnessLM(model, tokenizer)._rolling(text) == pytest.approx(expected, rel=1e-5)
    ((nats, _),) = HarnessLM(model, tokenizer).loglikelihood(instances("loglikelihood", [("", text)]))
    assert nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.weights
def test_what_does_not_fit_the_window_is_refused_with_both_numbers(lm, tokenizer):
    context = tokenizer.decode(tokenizer.encode(LONG)[:WINDOW])
    assert len(tokenizer.encode(context)) == WINDOW
    assert lm.respond(LMRequest(kind="loglikelihood", arguments=(context, " A")))[0] < 0  # predicted, not read
    with pytest.raises(WindowOverflow, match=rf"^{WINDOW + 1} tokens, {WINDOW} of them context; the window has 96$"):
        lm.respond(LMRequest(kind="loglikelihood", arguments=(context, " A B")))
    with pytest.raises(WindowOverflow, match=rf"^{WINDOW + 8} tokens, {WINDOW} of them context; the window has 96$"):
        lm.respond(LMRequest(kind="generate_until", arguments=(context, {"until": [], "max_gen_toks": 8})))
    assert issubclass(WindowOverflow, DoesNotFitError)  # which a run records as a failure


@pytest.mark.weights
def test_what_is_no_greedy_decoding_is_refused(lm, tokenizer):
    assert greedy_settings({}) == ([], 256)
    assert greedy_settings({"until": "x", "temperature": 0.7, "do_sample": False, "top_p": 0.9}) == (["x"], 256)
    with pytest.raises(UsageError, match=r"asks for sampling \(temperature 0.7\); .* Set do_sample: false"):
        greedy_settings({"temperature": 0.7})
    with pytest.raises(UsageError, match=r"sets num_beams for generation; greedy decoding here takes until and"):
        greedy_settings({"num_beams": 4, "do_sample": False})
    with pytest.raises(UsageError, match="the continuation '' of a context that ends in 'context' has no tokens"):
        lm.respond(LMRequest(kind="loglikelihood", arguments=("context", "")))
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(UsageError, match="neither a BOS nor an EOS token"):
        HarnessLM(lm.model, bare).respond(LMRequest(kind="loglikelihood", arguments=("", "text")))


# The tasks


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "metrics"), [("stripedrag_tiny_mc", ["acc_norm", "acc"]), ("stripedrag_tiny_gen", ["exact_match"])]
)
def test_a_run_of_ours_and_simple_evaluate_score_every_document_alike(
    name, metrics, model, tokenizer, resources, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # paths in the YAML do not depend on where the process was started
    lm = HarnessLM(model, tokenizer)
    theirs = lm_eval.simple_evaluate(
        model=lm,
        tasks=[name],
        num_fewshot=2,
        fewshot_random_seed=resources.seed,
        task_manager=TaskManager(include_path=str(SHIPPED), include_defaults=False),
        bootstrap_iters=0,
    )
    task = declared(name, num_fewshot=2)
    samples = list(task.samples(resources))
    prompts = [[request.arguments for request in sample.requests] for sample in samples]
    assert prompts == [record["arguments"] for record in theirs["samples"][name]]
    scores = [scored(task, sample, lm.respond_all(sample.requests)) for sample in samples]
    assert [list(one) for one in scores] == [metrics] * len(samples)
    (kept,) = {record["filter"] for record in theirs["samples"][name]}
    for metric in metrics:
        assert [one[metric] for one in scores] == [record[metric] for record in theirs["samples"][name]]
        assert sum(one[metric] for one in scores) / len(scores) == theirs["results"][name][f"{metric},{kept}"]


@pytest.mark.parametrize(("name", "count"), [("stripedrag_tiny_mc", 24), ("stripedrag_tiny_gen", 12)])
def test_an_oracle_scores_1_and_its_opposite_0_on_every_document(name, count, resources):
    task = declared(name)
    samples = list(task.samples(resources))
    assert len(samples) == len({sample.id for sample in samples}) == count
    for sample in samples:
        right = task.oracle(sample)
        assert set(scored(task, sample, right).values()) == {1.0}
        wrong = [[-100.0 - r[0], not r[1]] if isinstance(r, list) else f"not {r}" for r in right]
        assert set(scored(task, sample, wrong).values()) == {0.0}


def test_samples_name_their_document_and_come_again_for_the_same_seed(resources, tmp_path):
    task = declared("stripedrag_tiny_mc", limit=3, num_fewshot=2)
    first = list(task.samples(resources))
    assert [s.id for s in first] == [f"t/stripedrag_tiny_mc/{i}" for i in range(3)]
    assert first[1].cell == {"subtask": "stripedrag_tiny_mc"}
    assert first[1].cluster == "stripedrag_tiny_mc/1"
    assert [request.arguments[1] for request in first[0].requests] == [" duck", " dolphin", " rabbit", " horse"]
    assert first[0].requests[0].arguments[0].count("Question:") == 3
    assert list(task.samples(resources)) == first
    other = list(task.samples(Resources(seed=8, reference_tokenizer="none", folder=tmp_path)))
    assert [content_sha256(s) for s in other] != [content_sha256(s) for s in first]
    assert resources.told == []


def test_the_files_of_a_local_folder_belong_to_the_manifest():
    files = declared("stripedrag_tiny_mc").data()
    assert set(files) >= {"stripedrag_tiny_mc.yaml", "stripedrag_tiny_mc.jsonl", "stripedrag_tiny_gen.jsonl"}
    assert declared("stripedrag_tiny_mc", include_path=str(SHIPPED)).data() == files
    assert declared("gsm8k").data() == {}


def test_what_cannot_be_loaded_says_how_to_mend_it(resources, tmp_path, monkeypatch):
    def refused(message, task, **fields):
        with pytest.raises(UsageError, match=message):
            list(declared(task, **fields).samples(resources))

    refused(
        r"the data of the lm-eval task 'arc_challenge' cannot be had: Couldn't reach 'allenai/ai2_arc' on the Hub .*"
        r"They need the Hugging Face hub \(a network, HF_HUB_OFFLINE not set\) or include_path, a folder",
        "arc_challenge",
    )
    refused(
        r"no lm-eval task 'stripedrag_tiny_mx' in the YAML of .*lm_eval; did you mean 'stripedrag_tiny_mc'\?",
        "stripedrag_tiny_mx",
        include_path=str(SHIPPED),
    )
    refused(
        r"no lm-eval task 'x' in the YAML of .* YAML that cannot be read counts as none",
        "x",
        include_path=str(tmp_path),
    )
    refused(r"include_path is '.*nowhere', which is no folder", "x", include_path=str(tmp_path / "nowhere"))
    refused(
        r"cannot make the requests of 'stripedrag_tiny_mc' with num_fewshot 24: Sample larger",
        "stripedrag_tiny_mc",
        num_fewshot=24,
    )
    monkeypatch.setattr(tasks_lm_eval, "find_spec", lambda _: None)
    refused(
        r"the task 'stripedrag_tiny_gen' needs lm-evaluation-harness: `pip install",
        "stripedrag_tiny_gen",
        num_fewshot=3,
    )


@pytest.fixture
def local(tmp_path):
    """Tasks over two documents, by name: what is written into their YAML."""

    def write(name, **yaml):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "docs.jsonl").write_text('{"q": "1?", "a": "one"}\n{"q": "2?", "a": "two"}\n')
        config = {
            "task": name,
            "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
            "test_split": "test",
            "doc_to_text": "q",
            "doc_to_target": "a",
            **yaml,
        }
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())
        loader = "custom_dataset: !function stripedrag.eval.tasks.lm_eval.beside\n"
        (folder / f"{name}.yaml").write_text(lines + loader)
        return declared(name, include_path=str(folder))

    return write


MEAN = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}


def test_a_metric_that_is_no_mean_is_left_out_and_told_of_and_refused_alone(local, resources):
    both = local("both", output_type="loglikelihood", metric_list=[PERPLEXITY, MEAN])
    sample, _ = both.samples(resources)
    assert scored(both, sample, both.oracle(sample)) == {"acc": 1.0}
    assert resources.told == ["t: perplexity of both left out, which lm-eval does not average"]
    alone = local("alone", output_type="loglikelihood", metric_list=[PERPLEXITY])
    with pytest.raises(UsageError, match=r"'alone' has only metrics that are no means over documents \(perplexity\)"):
        list(alone.samples(resources))


def test_tasks_that_cannot_be_run_here_are_refused_before_anything_is_asked(local, resources):
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    unsafe = local("unsafe", output_type="generate_until", metric_list=exact, unsafe_code=True)
    drawn = local(
        "drawn",
        output_type="generate_until",
        metric_list=exact,
        generation_kwargs={"do_sample": True, "temperature": 1, "until": ["x"]},
    )
    seen = local("seen", output_type="generate_until", metric_list=exact, doc_to_image="q")
    bare = local("bare", output_type="loglikelihood", metric_list=[MEAN], num_fewshot=0).model_copy(
        update={"num_fewshot": 2}
    )
    for task, message in [
        (unsafe, "'unsafe' runs code that the model writes"),
        (drawn, "asks for sampling"),
        (seen, "'seen' shows images or sounds"),
        (bare, "num_fewshot is 2; 'bare' is defined without examples. Leave num_fewshot out"),
    ]:
        with pytest.raises(UsageError, match=message):
            list(task.samples(resources))


def test_a_document_that_is_asked_several_times_is_asked_once(local, resources):
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    vote = [{"name": "vote", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]}]
    settings = {"until": ["x"], "do_sample": False}
    task = local(
        "again",
        output_type="generate_until",
        metric_list=exact,
        filter_list=vote,
        repeats=5,
        generation_kwargs=settings,
    )
    for sample in task.samples(resources):
        assert len(sample.requests) == 1
        assert scored(task, sample, task.oracle(sample)) == {"exact_match": 1.0}


# Documents of the leaderboard's six, in the form of the hub's data: enough of them for the official examples.
def leaderboard(path, name=None, **_):
    def rows(count, **fields):
        return datasets.Dataset.from_list(
            [
                {key: f"{value} {i}" if isinstance(value, str) else value for key, value in fields.items()}
                for i in range(count)
            ]
        )

    four = ["alpha", "beta beta", "gamma", "delta"]
    match path:
        case "allenai/ai2_arc":
            data = rows(40, question="q", choices={"text": four, "label": ["A", "B", "C", "D"]}).map(
                lambda _: {"answerKey": "B"}
            )
            return {"train": data, "validation": data, "test": data}
        case "Rowan/hellaswag":
            data = rows(40, activity_label="act", ctx_a="a man", ctx_b="he", endings=four).map(lambda _: {"label": "2"})
            return {"train": data, "validation": data}
        case "cais/mmlu":
            return {
                "test": rows(3, question="q", choices=four, answer=3),
                "dev": rows(5, question="q", choices=four, answer=1),
            }
        case "truthfulqa/truthful_qa":
            targets = {"choices": four, "labels": [1, 0, 0, 0]}
            return {"validation": rows(3, question="q", mc1_targets=targets, mc2_targets=targets)}
        case "allenai/winogrande":
            data = rows(
                40, sentence="The cup fell on the plate because _ was wet.", option1="cup", option2="plate"
            ).map(lambda _: {"answer": "2"})
            return {"train": data, "validation": data}
        case "openai/gsm8k":
            data = rows(40, question="q").map(lambda row: {"answer": f"Think of {row['question']}.\n#### 1,204"})
            return {"train": data, "test": data}
    raise AssertionError(path)


EXAMPLES = {  # what stands in a context once for each example and once for the question itself
    "arc_challenge": "Question:",
    "hellaswag": "act ",
    "mmlu": "Answer:",
    "truthfulqa_mc2": "Q: q",
    "winogrande": "The cup fell",
    "gsm8k": "Question:",
}
HEADLINES = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "gsm8k": "exact_match"}


@pytest.mark.parametrize("name", OPENLLM)
def test_the_leaderboards_tasks_take_the_official_examples_and_an_oracle_solves_them(name, resources, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", leaderboard)
    tasks_lm_eval._load.cache_clear()
    try:
        task = declared(name, limit=1)
        samples = list(task.samples(resources))
        assert len(samples) == (57 if name == "mmlu" else 1)
        for sample in samples:
            for request in sample.requests:
                assert request.arguments[0].count(EXAMPLES[name]) == OPENLLM[name] + 1
            scores = scored(task, sample, task.oracle(sample))
            assert next(iter(scores)) == HEADLINES.get(name, "acc")
            assert set(scores.values()) == {1.0}
    finally:
        tasks_lm_eval._load.cache_clear()
    assert OPENLLM == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }


def test_a_second_filters_metric_carries_its_name(resources, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", leaderboard)
    tasks_lm_eval._load.cache_clear()
    try:
        task = declared("gsm8k", limit=1)
        (sample,) = task.samples(resources)
        assert scored(task, sample, ["It is 1,204."]) == {"exact_match": 0.0, "exact_match@flexible-extract": 1.0}
    finally:
        tasks_lm_eval._load.cache_clear()
