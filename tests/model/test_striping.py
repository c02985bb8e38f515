"""Striping: the loss, how a student begins, what it may change, the windows, and a stage that was killed."""

import json
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from stripedrag.errors import CheckpointError, UsageError
from stripedrag.model.striping import layerwise
from stripedrag.model.striping.changes import changes, striped_model, take_up
from stripedrag.model.striping.data import (
    ANSWER,
    PADDING,
    REFUSAL,
    TEXT,
    UNKNOWN,
    Asked,
    Conversations,
    Corpus,
    Framing,
    Text,
    Windows,
    pack,
    text_windows,
)
from stripedrag.model.striping.distillation import measure, said_of_text, take_step
from stripedrag.model.striping.families import striped_config
from stripedrag.model.striping.loss import Targets, divergence
from stripedrag.model.striping.processes import Processes
from stripedrag.model.striping.ranking import LayerCost, choose, rank_layers
from stripedrag.model.striping.recipe import Recipe, Stage
from stripedrag.model.striping.run import Run
from stripedrag.model.striping.student import StablePoles, make_trainable, stripe_layers
from stripedrag.model.striping.teacher import Teacher, likeliest

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=256,
)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-biased": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
}


def letters(text):
    return [2 + ord(letter) % 120 for letter in text]


FRAMING = Framing(
    head=[1],
    reply=[122, 123],
    turn=[124, 125],
    encode=letters,
    passage=lambda title, text: f"{title}\n{text}\n",
    question=lambda question: f"Q {question}",
)
TEXTS = [Text(id=str(i), title=f"T{i}", text=f"Number {i} is here. " * 5) for i in range(12)]
ASKED = [
    Asked(
        id=str(i),
        passage=f"The cat {i} of Rome eats {i} mice.",
        question=f"How many does cat {i} eat?",
        answers=[str(i)],
    )
    for i in range(12)
]
CORPUS = Corpus(TEXTS, ASKED, TEXTS[:2], ASKED[:2])


def teacher_of(name="llama"):
    kind, config = FAMILIES[name]
    torch.manual_seed(0)
    return kind(config).eval()


def student_of(teacher, layers, *, rank=0):
    student = stripe_layers(teacher, layers, modes=4, taps=3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    make_trainable(student, rank=rank)
    return student


@pytest.fixture
def ids():
    return torch.randint(2, 120, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("vocabulary", [200, 40])
def test_a_share_of_what_a_teacher_says_goes_to_the_token_that_comes(vocabulary, tmp_path):
    torch.manual_seed(0)
    teacher = Teacher(LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": vocabulary}))).eval(), tmp_path)
    ids = torch.randint(0, vocabulary, (2, 30), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    ids[0, 1] = 0
    windows = Windows(ids, torch.full((2, 30), TEXT, dtype=torch.uint8))

    def whole(targets):
        dense = torch.zeros(len(targets.ids), vocabulary)
        return dense.scatter_add_(1, targets.ids, targets.probabilities)

    said = whole(teacher.targets(windows, answer_weight=1.0))
    mixed = teacher.targets(windows, answer_weight=1.0, text_labels=0.25)
    labels = torch.nn.functional.one_hot(ids[:, 1:].reshape(-1).long(), vocabulary)
    wrong = (whole(mixed) - (0.75 * said + 0.25 * labels)).abs()
    # A label that was not among the likeliest takes the place of the last of them.
    assert ((wrong > 1e-6).sum(1) <= (vocabulary > 64)).all() and wrong.max() < 0.02
    known = torch.where(mixed.probabilities > 0, mixed.ids, -1).sort(1).values
    assert not ((known[:, 1:] == known[:, :-1]) & (known[:, 1:] >= 0)).any()  # each token once


def test_the_loss_is_the_divergence_over_known_tokens_and_one_class_of_others():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator, requires_grad=True)
    unembedding = torch.randn(50, 16, generator=generator)
    known, probabilities = likeliest(torch.randn(7, 50, generator=generator), 5)
    known[0], probabilities[0] = 0, 0
    known[0, 0], probabilities[0, 0] = 3, 1  # a label, padded by tokens without mass
    weights = torch.rand(7, generator=generator)
    loss = divergence(hidden, unembedding, Targets(known, probabilities, weights), rows=3)
    (gradient,) = torch.autograd.grad(loss, hidden)

    expected = torch.zeros(())
    for row in range(7):
        p, q, i = (hidden[row] @ unembedding.T).softmax(-1), probabilities[row], known[row]
        i, q = i[q > 0], q[q > 0]
        expected = expected + weights[row] * (q * (q / p[i]).log()).sum()
        if (rest := 1 - q.sum()) > 1e-6:
            expected = expected + weights[row] * rest * (rest / (1 - p[i].sum())).log()
    (wanted,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_is_zero_where_the_student_says_what_the_teacher_says():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    targets = Targets(*likeliest(logits, 8), torch.ones(6))
    hidden = logits.clone().requires_grad_()
    loss = divergence(hidden, torch.eye(40), targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(loss.item()) < 1e-5 and gradient.abs().max() < 1e-5


@given(st.floats(0.001, 0.9999), st.floats(-3, 3))
def test_any_stable_pole_comes_back_from_its_free_parameters(radius, angle):
    pole = torch.tensor([[[[radius, 0.0]]]]) * 1.0
    pole[..., 1] = pole[..., 0] * torch.tensor(angle).sin()
    pole[..., 0] = pole[..., 0] * torch.tensor(angle).cos()
    stable = StablePoles()
    torch.testing.assert_close(stable(stable.right_inverse(pole)), pole, rtol=1e-4, atol=1e-5)


def test_no_free_parameter_makes_an_unstable_pole():
    free = torch.randn(100, 4, 1, 2, generator=torch.Generator().manual_seed(0)) * 5
    assert (torch.linalg.vector_norm(StablePoles()(free), dim=-1) <= 1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_without_a_replaced_layer_keeps_its_logits(name, ids):
    teacher = teacher_of(name)
    student = student_of(teacher, [], rank=4)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_striped_teacher_learns_layer_by_layer_and_leaves_the_teacher_alone(name, ids):
    teacher = teacher_of(name)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    student = student_of(teacher, [1, 3])
    windows = Windows(ids.int(), torch.full(ids.shape, TEXT, dtype=torch.uint8))
    untouched = layerwise.measure(student, teacher, windows)["error"]
    layerwise.fit_scales(student, teacher, windows)
    fitted = layerwise.measure(student, teacher, windows)["error"]
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        layerwise.take_step(student, teacher, windows, Processes())
        optimizer.step()
    learnt = layerwise.measure(student, teacher, windows)
    assert learnt["error"] < 0.7 * fitted < untouched
    assert set(learnt) == {"error", "error_1", "error_3"}
    filled = Windows(
        torch.cat([windows.ids, torch.zeros(2, 24, dtype=torch.int32)], dim=1),
        torch.cat([windows.kinds, torch.full((2, 24), PADDING, dtype=torch.uint8)], dim=1),
    )
    assert layerwise.measure(student, teacher, filled) == pytest.approx(learnt, rel=1e-4)
    gradients = []
    for some in (windows, filled):
        optimizer.zero_grad()
        layerwise.take_step(student, teacher, some, Processes())
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    changed = changes(student)
    striped_model(teacher.state_dict(), student.config, changed)
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())


def test_what_a_student_trains_is_not_the_teachers():
    teacher = teacher_of()
    own = {tensor.data_ptr() for tensor in teacher.parameters()}
    trained = [parameter for parameter in student_of(teacher, [1], rank=2).parameters() if parameter.requires_grad]
    assert trained and not own & {parameter.data_ptr() for parameter in trained}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_is_had_again_from_its_teacher_and_what_changed(name, ids, tmp_path):
    teacher = teacher_of(name)
    student = student_of(teacher, [2], rank=4)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trained = student(ids).logits
        save_file(changes(student), tmp_path / "changes.safetensors")
        model = striped_model(teacher.state_dict(), student.config, load_file(tmp_path / "changes.safetensors"))
        torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-5)
        another = student_of(teacher, [2], rank=4)
        take_up(another, load_file(tmp_path / "changes.safetensors"))
        torch.testing.assert_close(another(ids).logits, trained, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_changes_of_another_network_are_refused(tmp_path):
    teacher = teacher_of()
    student = student_of(teacher, [2], rank=4)
    changed = changes(student)
    transformer = teacher.state_dict()
    layer = "blocks.0.mlp.l1"
    halves = {f"{layer}.down": torch.zeros(4, 9)}, {f"{layer}.down": torch.zeros(2, 32)}, {f"{layer}.up": None}
    for other, shapes in zip(
        halves, (r"\(4, 9\) and up \(48, 4\)", r"\(2, 32\) and up \(48, 4\)", r"\(4, 32\) and up None"), strict=True
    ):
        broken = {name: tensor for name, tensor in (changed | other).items() if tensor is not None}
        with pytest.raises(
            CheckpointError, match=rf"of 'blocks\.0\.mlp\.l1' does not fit: .*\(48, 32\), down {shapes}; give"
        ):
            striped_model(transformer, student.config, broken)
    with pytest.raises(CheckpointError, match=r"of 'blocks\.2\.inner_mha_cls\.Wqkv' does not fit: the weight is None"):
        striped_model(transformer, student.config, changed | {"blocks.2.inner_mha_cls.Wqkv.down": torch.zeros(4, 32)})
    with pytest.raises(CheckpointError, match=r"down is \(4, 32\), and the model's \(2, 32\)"):
        take_up(student_of(teacher, [2], rank=2), changed)
    poles = changed["blocks.2.filter.poles"]
    for wrong, told in ((poles * 50, r"has a pole of \|λ\| = 4\d\.\d*; a stable"), (poles * torch.nan, "holds values")):
        with pytest.raises(CheckpointError, match=rf"blocks\.2\.filter\.poles {told}"):
            striped_model(transformer, student.config, changed | {"blocks.2.filter.poles": wrong})
        with pytest.raises(CheckpointError, match=rf"blocks\.2\.filter\.poles {told}"):
            take_up(student_of(teacher, [2], rank=4), changed | {"blocks.2.filter.poles": wrong})
    del changed["blocks.2.filter.poles"]
    with pytest.raises(CheckpointError, match=r"blocks\.2\.filter\.poles is missing, and the model's \(32, 4, 1, 2\)"):
        striped_model(transformer, student.config, changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gpt2"), "a gpt2 model cannot be striped; those of the families llama, mistral, qwen2 can"),
        (dict(head_dim=16), "4 heads are 16 wide, which is not its width of 32 together"),
        (dict(hidden_act="gelu"), "has the activation 'gelu'"),
        (
            dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "scales its rotary positions",
        ),
        (
            dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}),
            "turns 0.5 of each head by its position",
        ),
        (dict(sliding_window=64), "sees a sliding window of 64 tokens"),
    ],
)
def test_a_network_that_no_stripedhyena_can_stand_for_is_refused(change, message):
    config = LlamaConfig(**SIZES)
    for key, value in change.items():
        if key == "model_type":
            config.__class__ = type("Other", (LlamaConfig,), {"model_type": value})
        else:
            setattr(config, key, value)
    with pytest.raises(CheckpointError, match=message):
        striped_config(config, [], [1], modes=4, taps=3)


def test_mlp_biases_and_layers_that_are_not_there_are_refused():
    config = LlamaConfig(**SIZES)
    with pytest.raises(CheckpointError, match="MLP has biases"):
        striped_config(config, ["model.layers.0.mlp.gate_proj.bias"], [1], modes=4, taps=3)
    with pytest.raises(CheckpointError, match="has no layer 4; its layers are 0 to 3"):
        striped_config(config, [], [1, 4], modes=4, taps=3)


def test_text_windows_hold_every_token_once_and_in_order():
    whole = [i for text in TEXTS for i in letters(FRAMING.passage(text.title, text.text))]
    windows = pack(text_windows(TEXTS, FRAMING, 64), 64, 1000)
    assert windows.ids.flatten().tolist() == whole[: len(whole) // 64 * 64]
    assert (windows.kinds[:, 0] == UNKNOWN).all() and (windows.kinds[:, 1:] == TEXT).all()


def test_of_windows_in_which_answers_alone_are_learnt_the_teacher_is_not_asked(tmp_path):
    talks = Conversations(ASKED, TEXTS, FRAMING, answers_only=0.5)
    windows = pack(talks.windows(256, Random(0)), 256, 12)
    silent = ~(windows.kinds == TEXT).any(1)
    assert 0 < silent.sum() < 12 and (windows.kinds == ANSWER).any(1).all()
    teacher = Teacher(teacher_of(), tmp_path)
    whole = teacher.targets(windows, answer_weight=2.0)
    assert len(list(tmp_path.iterdir())) == (~silent).sum()
    apart = [teacher.targets(windows.at([i]), answer_weight=2.0) for i in range(12)]
    for together, parts in zip(whole, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-3, atol=1e-3)


def test_passages_of_a_source_come_in_the_share_that_is_asked_for():
    asked = [one.model_copy(update={"source": "odd" if i % 2 else "even"}) for i, one in enumerate(ASKED * 20)]
    asked = [one.model_copy(update={"title": f"T{i}"}) for i, one in enumerate(asked)]
    talks = Conversations(asked, [], FRAMING, source_shares={"odd": 0.25})
    coming = [ones[0].source for ones in talks._arranged(Random(0))]
    assert coming.count("even") == 120 and 15 <= coming.count("odd") <= 45
    assert not list(Conversations(asked, [], FRAMING, source_shares={"odd": 0, "even": 0}).windows(256, Random(0)))


def test_a_source_that_the_data_have_not_is_refused(tmp_path):
    stage = Stage(name="one", tokens=256, length=64, hyena_rate=1e-3, source_shares={"plantd": 0.5})
    with pytest.raises(UsageError, match=r"stage 'one' has a share of 'plantd', .* those of the data are ''"):
        Run(tmp_path, Recipe(hyena_layers=[1], stages=[stage]), teacher_of(), FRAMING, CORPUS)


def test_an_answer_weighs_the_same_whatever_else_its_step_learns(tmp_path):
    teacher = teacher_of()
    sayings, student = Teacher(teacher, tmp_path), student_of(teacher, [1])
    stage = Stage(name="one", tokens=256, length=64, hyena_rate=1e-3)
    [full] = pack(Conversations(ASKED, [], FRAMING).windows(160, Random(0)), 160, 1).ids
    kinds = torch.full((2, 160), UNKNOWN, dtype=torch.uint8)
    kinds[0, 100:104] = ANSWER
    ids = full.expand(2, 160)

    def step(kinds):
        student.zero_grad()
        take_step(student, sayings, stage, Windows(ids, kinds), Processes())
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    of_answer = step(kinds)
    kinds[1, 1:] = TEXT
    of_both = step(kinds)
    kinds[0] = UNKNOWN
    torch.testing.assert_close(of_answer + step(kinds), of_both, rtol=1e-3, atol=1e-6)
    assert of_answer.norm() > 0


@given(st.integers(120, 400), st.integers(0, 1000))
def test_conversations_never_exceed_their_length_and_ask_about_what_is_there(length, seed):
    talks = Conversations(ASKED, TEXTS, FRAMING, unanswerable=0.3, filler=0.3)
    windows = talks.windows(length, Random(seed))
    for _ in range(5):
        pieces = next(windows)
        assert sum(len(piece.ids) for piece in pieces) <= length
        text = "".join(chr(0)) + "".join(map(chr, (i for piece in pieces if piece.kind == TEXT for i in piece.ids)))
        answers = [piece.ids for piece in pieces if piece.kind == ANSWER]
        asked = [piece.ids for piece in pieces if piece.kind == TEXT and piece.ids[:2] == letters("Q ")]
        assert len(answers) == len(asked) >= 1
        for question, answer in zip(asked, answers, strict=True):
            about = next(one for one in ASKED if letters(FRAMING.question(one.question)) == question)
            is_there = "".join(map(chr, letters(about.passage))) in text
            expected = about.answers[0] if is_there else REFUSAL
            assert answer == [*letters(f" {expected}"), FRAMING.turn[0]]


def test_a_question_without_an_answer_says_so():
    with pytest.raises(ValidationError, match="it has no answer, or a blank first one; give one, or say"):
        Asked(id="1", passage="p", question="q")
    with pytest.raises(ValidationError, match="it has no answer, or a blank first one"):
        Asked(id="1", passage="p", question="q", answers=[" ", "Paris"])
    assert Asked(id="1", passage="p", question="q", unanswerable=True).taught == REFUSAL
    with pytest.raises(ValidationError, match="it is unanswerable and has answers; take either out"):
        Asked(id="1", passage="p", question="q", answers=["Paris"], unanswerable=True)


def test_layers_are_ranked_on_text_and_on_recall_together():
    costs = [
        LayerCost(layer=i, kl=kl, answer_nats=nats) for i, (kl, nats) in enumerate([(9, 9), (1, 1), (1, 50), (2, 0)])
    ]
    assert choose(costs, 2) == [1, 3]
    with pytest.raises(UsageError, match="4 Hyena layers of 4; choose 1 to 3"):
        choose(costs, 4)


def test_skipping_a_layer_costs_what_measuring_without_it_says(ids):
    teacher = teacher_of()
    kinds = torch.full(ids.shape, TEXT, dtype=torch.uint8)
    kinds[1, -5:] = ANSWER
    windows = Windows(ids.int(), kinds)
    costs = rank_layers(teacher, windows, lambda done, layers: None)
    said = said_of_text(teacher, windows)
    whole = measure(teacher, windows, said)
    assert abs(whole["kl"]) < 1e-5
    teacher.model.layers[2].self_attn.o_proj.weight.data.zero_()
    without = measure(teacher, windows, said)
    logits = [model(ids[:1]).logits[0, :-1].log_softmax(-1) for model in (teacher_of(), teacher)]
    assert without["kl"] == pytest.approx((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item(), rel=1e-3)
    assert costs[2].kl == pytest.approx(without["kl"], abs=1e-5)
    assert costs[2].answer_nats == pytest.approx(without["answer_nats"] - whole["answer_nats"], abs=1e-5)


def test_an_answer_is_exact_where_greedy_decoding_gives_all_of_it():
    teacher = teacher_of()
    start = torch.randint(2, 120, (3, 20), generator=torch.Generator().manual_seed(0))
    greedy = teacher.generate(start, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    greedy[1, -1] = (greedy[1, -1] + 1) % 128  # one of three goes wrong at its last token
    ids = torch.cat([greedy, start[:, :2], greedy[:, -4:]], dim=1)  # and what they say of a second answer is chance
    kinds = torch.full(ids.shape, TEXT, dtype=torch.uint8)
    kinds[:, 20:24] = ANSWER
    windows = Windows(ids.int(), kinds)
    assert measure(teacher, windows, said_of_text(teacher, windows)).keys() == {"exact", "answer_nats"}
    assert measure(teacher, windows, said_of_text(teacher, windows))["exact"] == pytest.approx(2 / 3)
    kinds[:, -4:] = ANSWER
    assert measure(teacher, windows, said_of_text(teacher, windows))["exact"] <= 0.5


def recipe():
    stages = (
        Stage(name="layers", kind="layers", tokens=1280, length=128, batch_tokens=128, hyena_rate=1e-2, warmup_steps=2),
        Stage(name="whole", tokens=1280, length=128, batch_tokens=256, hyena_rate=1e-2, warmup_steps=0),
    )
    return Recipe(hyena_layers=(1, 3), modes=4, rank=2, checkpoint_seconds=0, stages=stages)


class KilledError(Exception):
    pass


@pytest.mark.parametrize(("stage", "step"), [("layers", 4), ("whole", 2)])
def test_a_run_that_was_killed_ends_with_the_numbers_of_a_whole_one(tmp_path, stage, step):
    def run(folder, heard):
        torch.manual_seed(5)
        return Run(folder, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], heard)

    def kill(name, at, steps, measured):
        if (name, at) == (stage, step):
            raise KilledError

    whole = run(tmp_path / "whole", lambda *heard: None)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill)
    resumed = run(tmp_path / "killed", lambda *heard: None)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / folder / "stages" / stage / "log.jsonl").read_text().splitlines()
        ]
        for folder in ("whole", "killed")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == recipe().stages[stage == "whole"].steps


def test_another_recipe_is_refused_in_the_folder_of_a_run(tmp_path):
    Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS)
    told = "holds a run of another recipe, with another {}; choose another folder, or remove it"
    hotter = recipe().stages[1].model_copy(update={"hyena_rate": 1.0})
    for name, other in ("seed", {"seed": 1}), ("stage 'whole'", {"stages": (recipe().stages[0], hotter)}):
        with pytest.raises(UsageError, match=told.format(name)):
            Run(tmp_path, recipe().model_copy(update=other), teacher_of(), FRAMING, CORPUS)
    Run(tmp_path, recipe().model_copy(update={"checkpoint_seconds": 9}), teacher_of(), FRAMING, CORPUS)


def test_a_run_goes_on_with_stages_that_its_recipe_gets_later(tmp_path):
    whole, begun = recipe(), recipe().model_copy(update={"stages": recipe().stages[:1]})

    def run(folder, steps):
        return Run(tmp_path / folder, steps, teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)

    run("later", begun)
    for (name, a), b in zip(run("at once", whole).named_parameters(), run("later", whole).parameters(), strict=True):
        assert torch.equal(a, b), name
    for another in (begun, whole.model_copy(update={"stages": whole.stages[::-1]})):
        with pytest.raises(UsageError, match="holds a run of another recipe"):
            run("later", another)


def test_a_run_begins_from_what_another_changed(tmp_path):
    def run(folder, steps, begins_from=None):
        begun = Run(tmp_path / folder, steps, teacher_of(), FRAMING, CORPUS, begins_from=begins_from)
        return begun.train([1, 3], lambda *heard: None)

    first = changes(run("first", recipe()))
    idle = recipe().stages[1].model_copy(update={"hyena_rate": 1e-12, "adapter_rate": 1e-12})
    steps = recipe().model_copy(update={"stages": (idle,), "begins_from": "0" * 64})
    second = changes(run("second", steps, first))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, msg=name)
    with pytest.raises(UsageError, match="holds a run of another recipe"):
        run("second", steps.model_copy(update={"begins_from": "1" * 64}), first)


def test_another_corpus_and_another_network_are_refused_in_the_folder_of_a_run(tmp_path):
    Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)
    with pytest.raises(UsageError, match="holds a run on other data"):
        Run(tmp_path, recipe(), teacher_of(), FRAMING, Corpus(TEXTS[1:], ASKED, TEXTS[:2], ASKED[:2]))
    with pytest.raises(UsageError, match="is of a network of other layers or sizes"):
        Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 2], lambda *heard: None)


def test_another_teacher_of_the_same_sizes_is_refused_in_the_folder_of_a_run(tmp_path):
    Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS)
    other = teacher_of()
    weight = other.model.layers[0].mlp.up_proj.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))  # which bfloat16 does not tell apart
    with pytest.raises(UsageError, match="holds a run of another model or tokenizer"):
        Run(tmp_path, recipe(), other, FRAMING, CORPUS)


@pytest.mark.parametrize(
    ("layers", "message"),
    [(4, "4 Hyena layers of 4; a StripedHyena keeps one"), ((0, 1, 2, 3), "4 Hyena layers of 4"), ((7,), "no layer 7")],
)
def test_layers_that_cannot_go_are_refused_before_any_work(tmp_path, layers, message):
    with pytest.raises((UsageError, CheckpointError), match=message):
        Run(tmp_path / "run", recipe().model_copy(update={"hyena_layers": layers}), teacher_of(), FRAMING, CORPUS)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS)
    student_step = layerwise.take_step

    def diverge(*taken):
        measured, student = student_step(*taken), taken[0]
        if len(steps) == 3:
            next(p for p in student.parameters() if p.grad is not None).grad[0] = float("nan")
        return measured

    steps = []
    monkeypatch.setattr("stripedrag.model.striping.run.layerwise.take_step", diverge)
    told = (
        "the gradient is no number at step 4 of stage 'layers', at rates 0.01; lower them, and begin in another folder"
    )
    with pytest.raises(UsageError, match=told):
        run.train([1, 3], lambda *heard: steps.append(heard))
    kept = load_file(tmp_path / "stages" / "layers" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_broken_checkpoint_is_named_and_a_broken_word_of_the_teacher_asked_for_again(tmp_path):
    Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)
    for path in (tmp_path / "teacher").iterdir():
        path.write_bytes(b"")
    checkpoint = tmp_path / "stages" / "whole" / "checkpoint.safetensors"
    kept = {name: tensor.clone() for name, tensor in load_file(checkpoint).items()}  # not mapped from what is cut
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(
        UsageError, match=r"whole/checkpoint\.safetensors cannot be read .*; remove it to take the stage"
    ):
        Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)
    checkpoint.unlink()
    (tmp_path / "windows" / "whole.safetensors").write_bytes(b"")
    Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)
    again = load_file(checkpoint)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_held_out_data_that_give_no_window_of_questions_are_refused(tmp_path):
    asked = [Asked(id="1", passage="long " * 200, question="q", answers=["a"])]
    run = Run(tmp_path, recipe(), teacher_of(), FRAMING, Corpus(TEXTS, ASKED, TEXTS[:2], asked))
    with pytest.raises(UsageError, match="do not give a window of 128 tokens of text and one of questions"):
        run.train([1, 3], lambda *heard: None)


def test_a_recipe_that_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="its 100 tokens are less than one window of 128"):
        Stage(name="a", tokens=100, length=128, hyena_rate=1.0)
    stage = Stage(name="a", tokens=128, length=128, hyena_rate=1.0)
    with pytest.raises(ValidationError, match="two stages share a name: a, a"):
        Recipe(stages=(stage, stage))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Recipe(laters=3)
    with pytest.raises(ValidationError, match="finite number"):
        Recipe(checkpoint_seconds=float("inf"))
    with pytest.raises(ValidationError, match="without Hyena layers its stages, all layer by layer, train nothing"):
        Recipe(hyena_layers=0, stages=(stage.model_copy(update={"kind": "layers"}),))


def test_a_step_to_no_number_at_the_end_is_told_and_not_kept(tmp_path):
    stage = Stage(name="one", tokens=128, length=128, batch_tokens=128, hyena_rate=1e300, adapter_rate=1e300)
    hot = recipe().model_copy(update={"stages": (stage,)})
    with pytest.raises(
        UsageError, match=r"blocks\..* is no number at step 1 of stage 'one', at rates 1e\+300, 1e\+300"
    ):
        Run(tmp_path, hot, teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)
    assert not (tmp_path / "stages" / "one" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("name", ["recipe.json", "model.sha256"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name):
    Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS)
    (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match=rf"{name} is damaged \(.*; remove it, and the same command makes it again"):
        Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS)


def test_windows_that_are_not_those_of_the_run_are_made_again(tmp_path):
    run = Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS)
    made = run.make_windows()["whole"]
    assert (tmp_path / "held-out" / "128.safetensors").exists()
    path = tmp_path / "windows" / "whole.safetensors"
    for wrong in (made.at([0]), made._replace(ids=made.ids + 128), made._replace(kinds=made.kinds + 4)):
        save_file(wrong._asdict(), path)
        for kept, again in zip(made, run.make_windows()["whole"], strict=True):
            assert torch.equal(kept, again)


def test_data_that_a_later_stage_cannot_take_are_told_before_the_first(tmp_path):
    later = Stage(name="later", tokens=640, length=64, hyena_rate=1e-3, questions=1.0)
    brief = Corpus(TEXTS, ASKED, TEXTS[:2], [Asked(id="b", passage="It is 1.", question="q", answers=["1"])])
    both = recipe().model_copy(update={"stages": (recipe().stages[0], later)})
    with pytest.raises(UsageError, match=r"the data give 0 windows of 64 tokens; the stage 'later' asks for 64"):
        Run(tmp_path, both, teacher_of(), FRAMING, brief).make_windows()


def test_passages_that_fit_no_window_are_told(tmp_path):
    far = Asked(id="x", passage="long " * 60, question="q", answers=["a"])
    corpus = Corpus(TEXTS, [*ASKED[:3], far], TEXTS, ASKED)
    with pytest.warns(UserWarning, match=r"1 passages, 'long long .*' among them, do not fit a window of 128 tokens"):
        Run(tmp_path, recipe(), teacher_of(), FRAMING, corpus).make_windows()


def test_a_share_of_nothing_is_refused(tmp_path):
    stage = Stage(name="one", tokens=256, length=64, hyena_rate=1e-3, source_shares={"": 0})
    with pytest.raises(UsageError, match=r"'one' has a share of 0 of every source, and 0\.5 of its windows are"):
        Run(tmp_path, Recipe(hyena_layers=[1], stages=[stage]), teacher_of(), FRAMING, CORPUS)


def test_a_teacher_that_is_not_whole_is_refused_before_any_work(tmp_path):
    teacher = teacher_of()
    teacher.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are no numbers"):
        Run(tmp_path / "run", recipe(), teacher, FRAMING, CORPUS)
    assert not (tmp_path / "run").exists()


def test_what_is_measured_as_no_number_at_the_end_is_told_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("stripedrag.model.striping.run.distillation.measure", lambda *of: {"kl": float("nan")})
    with pytest.raises(UsageError, match="the held-out kl is no number at step 1 of stage 'whole', at rates"):
        Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)
    assert not (tmp_path / "stages" / "whole" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("metadata", [None, {"step": "six"}, {"step": "99"}])
def test_a_checkpoint_of_no_step_is_named(tmp_path, metadata):
    Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)
    path = tmp_path / "stages" / "whole" / "checkpoint.safetensors"
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, metadata=metadata)
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors cannot be read \(its step is '.*', of 5\); remove"):
        Run(tmp_path, recipe(), teacher_of(), FRAMING, CORPUS).train([1, 3], lambda *heard: None)


def test_what_a_teacher_said_is_asked_again_where_it_is_not_what_a_teacher_says(tmp_path):
    [window] = pack(text_windows(TEXTS, FRAMING, 64), 64, 1).ids
    windows = Windows(window[None], torch.full((1, 64), TEXT, dtype=torch.uint8))
    teacher = Teacher(teacher_of(), tmp_path)
    wanted = teacher.targets(windows, answer_weight=1.0)
    [path] = tmp_path.iterdir()
    said = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for wrong in (float("nan"), -0.5, 2.0):
        save_file(said | {"probabilities": torch.full_like(said["probabilities"], wrong)}, path)
        torch.testing.assert_close(teacher.targets(windows, answer_weight=1.0).probabilities, wanted.probabilities)


def test_layers_are_ranked_within_the_models_window_and_on_nothing_that_is_held_out(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "stripedrag.model.striping.run.rank_layers", lambda teacher, windows, heard: read.append(windows) or costs
    )
    costs = [LayerCost(layer=i, kl=i, answer_nats=i) for i in range(4)]
    two = recipe().model_copy(update={"hyena_layers": 2})
    corpus = Corpus(TEXTS[2:], ASKED[2:], TEXTS[:2], ASKED[:2])
    assert Run(tmp_path, two, teacher_of(), FRAMING, corpus).hyena_layers(lambda *heard: None) == [0, 1]
    assert read[0].ids.shape[1] == SIZES["max_position_embeddings"]
    held = [letters(one.question) for one in ASKED[:2]]
    rows = ["".join(map(chr, row)) for row in read[0].ids.tolist()]
    assert not any("".join(map(chr, question)) in row for row in rows for question in held)
    assert Run(tmp_path, two, teacher_of(), FRAMING, corpus).hyena_layers(lambda *heard: None) == [0, 1]
    assert len(read) == 1
