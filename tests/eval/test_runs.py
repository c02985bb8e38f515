"""A run loses nothing and repeats nothing, its bytes are the same every time, and the stubs prove the harness."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stripedrag.errors import UsageError
from stripedrag.eval import runs
from stripedrag.eval.analysis import analyse
from stripedrag.eval.cli import app
from stripedrag.eval.evidence import gaps
from stripedrag.eval.meter import Meter, OutOfTimeError, bounded_memory
from stripedrag.eval.report import write_report
from stripedrag.eval.rows import Row
from stripedrag.eval.run_files import Run
from stripedrag.eval.runs import run
from stripedrag.eval.schema import Answered, Failure, Prediction, SampleRecord, Score, Timing
from stripedrag.eval.scoring import score
from stripedrag.eval.suite import parse_suite
from stripedrag.eval.systems import ModelSpec, ModelSystem

FILES = ("suite.json", "manifest.json", "samples.jsonl", "predictions.jsonl", "scores.jsonl")
PROGRAM = """
import json, sys
from pathlib import Path
from stripedrag.eval.runs import run
from stripedrag.eval.suite import parse_suite
run(parse_suite(json.load(open(sys.argv[1])), name="suite"), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def finished(suite, tmp_path_factory):
    """Every task by every system, run and scored."""
    made = run(suite, tmp_path_factory.mktemp("runs") / "run")
    score(made)
    return made


def scores_of(made, system, task):
    tasks = {sample.id: sample.task for sample in made.lines(made.samples, SampleRecord)}
    return [s.scores for s in made.lines(made.scores, Score) if s.system == system and tasks[s.sample_id] == task]


def small(suite, systems=("tiny", "oracle"), tasks=("needle", "perplexity")):
    declared = suite.model_dump(mode="json", by_alias=True)
    declared["systems"] = [s for s in declared["systems"] if s["name"] in systems]
    declared["tasks"] = [t for t in declared["tasks"] if t["name"] in tasks]
    return declared | {"headline": [], "families": []}


def test_every_system_does_every_task_that_it_can(finished, suite):
    done = {(p.system, p.sample_id) for p in finished.lines(finished.predictions, Prediction)}
    samples = finished.lines(finished.samples, SampleRecord)
    assert len(done) == len(finished.lines(finished.predictions, Prediction))
    systems = [spec.open() for spec in suite.systems]
    assert done == {(system.name, s.id) for system in systems for s in samples if s.operation in system.operations}


def test_the_oracle_scores_one_and_the_empty_answer_nothing_on_every_task(finished, suite):
    for task in suite.tasks:
        if task.operation in ("answer", "search"):
            for scores in scores_of(finished, "oracle", task.name):
                assert set(scores.values()) == {1.0}, task.name
        if task.operation == "answer" and task.kind != "unanswerable":
            for scores in scores_of(finished, "empty", task.name):
                assert set(scores.values()) == {0.0}, task.name


def test_echo_scores_nothing_by_matches_and_chance_little(finished, suite):
    for task in suite.tasks:
        if task.operation != "answer" or task.kind in ("unanswerable", "long_documents"):
            continue
        for metric in ("string_match_all", "exact_match", "substring_exact_match"):
            echoed = [s[metric] for s in scores_of(finished, "echo", task.name) if metric in s]
            assert not any(echoed), (task.name, metric)
    drawn = [s["exact_match"] for s in scores_of(finished, "chance", "answers")]
    assert drawn and not any(drawn)  # another question's answer is never this one's


def test_a_real_model_answers_within_its_limits(finished):
    answers = [p.output for p in finished.lines(finished.predictions, Prediction) if p.system == "tiny"]
    answered = [a for a in answers if isinstance(a, Answered)]
    assert len(answered) > 40
    assert all(a.prompt_tokens + a.answer_tokens <= 512 for a in answered)
    assert all(a.cache_bytes > 0 for a in answered)
    assert not [a for a in answers if isinstance(a, Failure)]


def test_alike_prompts_are_answered_once_and_loads_every_time(finished):
    predictions = finished.lines(finished.predictions, Prediction)
    timings = finished.lines(finished.timings, Timing)
    assert len(timings) == len({(t.system, t.key) for t in timings}) == len({(p.system, p.key) for p in predictions})
    assert len(timings) < len(predictions)
    assert len([t for t in timings if t.sample_id.startswith("cost/")]) == 4


def test_a_second_run_elsewhere_has_the_same_bytes_and_a_third_in_place_changes_nothing(suite, finished, tmp_path):
    again = run(suite, tmp_path / "again")
    score(again)
    for name in FILES:
        assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes(), name
    before = {path.name: path.read_bytes() for path in again.folder.glob("*.json*")}
    run(suite, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.folder.glob("*.json*")} == before


def _kill_and_resume(suite, folder, tmp_path, kills):
    """Runs in a process of its own, which is killed after the first or second prediction, then once more to the end."""
    file = tmp_path / "suite.json"
    file.write_text(json.dumps(suite))
    command = [sys.executable, "-c", PROGRAM, str(file), str(folder)]
    predictions = folder / "predictions.jsonl"
    killed = 0
    for kill in range(kills):
        process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
        had = predictions.read_bytes().count(b"\n") if predictions.exists() else 0
        while process.poll() is None:
            now = predictions.read_bytes().count(b"\n") if predictions.exists() else 0
            if now > had + kill % 2:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        killed += process.wait() == -signal.SIGKILL
    subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, capture_output=True)
    return killed


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_with_equal_bytes_and_no_work_twice(suite, tmp_path, kills):
    declared = small(suite)
    whole = run(parse_suite(declared, name="small"), tmp_path / "whole")
    killed = _kill_and_resume(declared, tmp_path / "killed", tmp_path, kills)
    assert killed == kills
    for name in ("suite.json", "manifest.json", "samples.jsonl", "predictions.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole.folder / name).read_bytes(), name
    timed = Run(tmp_path / "killed").lines(tmp_path / "killed" / "timings.jsonl", Timing)
    # Only a kill between a timing and its prediction can time a sample twice.
    assert len(timed) <= len({(t.system, t.key) for t in timed}) + kills


def test_a_torn_last_line_is_cut_off_and_made_again(suite, tmp_path):
    declared = parse_suite(small(suite, systems=("oracle",), tasks=("needle", "answers")), name="small")
    made = run(declared, tmp_path / "run")
    whole = made.predictions.read_bytes()
    made.predictions.write_bytes(whole[:-20])
    run(declared, tmp_path / "run")
    assert made.predictions.read_bytes() == whole


def test_a_folder_of_another_suite_or_of_something_else_is_refused(suite, finished, tmp_path):
    with pytest.raises(UsageError, match=r"is of something else \(suite\.json differs: .*\)\. Choose another folder"):
        run(parse_suite(small(suite), name="small"), finished.folder)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"holds 'letter\.txt' and no run\. Choose an empty folder"):
        run(suite, tmp_path)
    with pytest.raises(UsageError, match=r"is no run: it has no suite\.json"):
        Run(tmp_path).suite()


def test_data_that_changed_under_a_run_is_refused(suite, finished, files, tmp_path):
    declared = small(suite, systems=("oracle",), tasks=("answers",))
    copy = tmp_path / "questions.jsonl"
    lines = Path(files["questions"]).read_text().splitlines()
    copy.write_text("\n".join(lines) + "\n")
    declared["tasks"][0]["questions"] = str(copy)
    parsed = parse_suite(declared, name="small")
    run(parsed, tmp_path / "run")
    copy.write_text("\n".join(reversed(lines)) + "\n")
    from stripedrag import weights

    weights.sha256.cache_clear()
    with pytest.raises(UsageError, match=r"was made with something else \(manifest\.json differs"):
        run(parsed, tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("no more"), "out-of-memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out-of-memory"),
        (OutOfTimeError("no result after 3 s"), "timeout"),
    ],
)
def test_short_memory_and_time_are_results_and_are_not_tried_again(suite, tmp_path, monkeypatch, error, reason):
    declared = parse_suite(small(suite, tasks=("needle",)), name="small")
    calls = []

    def fail(self, sample, task, resources, meter):
        calls.append(sample.id)
        raise error

    monkeypatch.setattr(ModelSystem, "perform", fail)
    made = run(declared, tmp_path / "run")
    run(declared, tmp_path / "run")
    score(made)
    failures = [p.output for p in made.lines(made.predictions, Prediction) if p.system == "tiny"]
    assert len(calls) == len(failures) == 12
    assert {failure.reason for failure in failures} == {reason}
    assert scores_of(made, "tiny", "needle") == [{}] * 12
    cells = [cell for cell in analyse(made).cells if cell.system == "tiny"]
    assert all(cell.mean != cell.mean and cell.failures == {reason: cell.samples} for cell in cells)


def test_any_other_error_ends_the_run(suite, tmp_path, monkeypatch):
    def fail(self, sample, task, resources, meter):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ModelSystem, "perform", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(parse_suite(small(suite, tasks=("needle",)), name="small"), tmp_path / "run")


def test_work_that_takes_too_long_is_ended():
    meter = Meter()
    with pytest.raises(OutOfTimeError, match=r"no result after 0\.1 s"), meter.running(0.1):
        time.sleep(5)
    assert 0.05 < meter.total_s < 4
    time.sleep(0.15)  # the alarm is off


def test_memory_that_the_machine_has_not_is_refused_and_not_fatal():
    with bounded_memory(200_000_000):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(400_000_000, dtype=torch.uint8)
        assert torch.ones(1000).sum() == 1000
    torch.empty(400_000_000, dtype=torch.uint8)


@pytest.mark.parametrize("policy", ["refuse", "cut-start", "cut-middle", "cut-end"])
def test_what_does_not_fit_is_refused_or_cut_and_counted(suite, tmp_path, policy):
    declared = small(suite, systems=("tiny",), tasks=("needle",))
    declared["systems"][0]["window_tokens"] = 200
    declared["tasks"][0] |= {"overflow": policy, "lengths": [384], "depths": [0.0, 0.5, 1.0], "samples": 1}
    made = run(parse_suite(declared, name="small"), tmp_path / "run")
    outputs = {p.sample_id.split("depth=")[1][:3]: p.output for p in made.lines(made.predictions, Prediction)}
    if policy == "refuse":
        assert {o.reason for o in outputs.values()} == {"overflow"}
        assert "tokens of prompt and 48 of answer; the window has 200" in outputs["0.0"].message
        return
    assert all(o.cut_tokens >= 150 and o.prompt_tokens <= 152 for o in outputs.values())
    assert all(o.prompt_tokens > 140 for o in outputs.values())  # no more is cut than must be
    survived = {depth for depth, o in outputs.items() if o.gold_survived}
    assert survived == {"cut-start": {"1.0"}, "cut-middle": {"0.0", "1.0"}, "cut-end": {"0.0"}}[policy]
    score(made)
    cells = analyse(made).cells
    assert sum(cell.cut for cell in cells) == 3
    assert sum(cell.gold_lost for cell in cells) == 3 - len(survived)


def test_scores_are_made_anew_without_a_model(finished, monkeypatch):
    monkeypatch.setattr(ModelSpec, "open", None)
    before = finished.scores.read_bytes()
    finished.scores.unlink()
    score(finished)
    assert finished.scores.read_bytes() == before


def test_an_unfinished_run_says_so_and_scores_of_fewer_predictions_are_refused(finished, tmp_path):
    import shutil

    from stripedrag.eval.report import write_report

    folder = tmp_path / "half"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns("indexes"))
    half = Run(folder)
    lines = half.predictions.read_text().splitlines(keepends=True)
    half.predictions.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(UsageError, match=r"has scores of \d+ predictions and the run has \d+\. Score it"):
        write_report(half)
    score(half)
    text = write_report(half)["report.md"].read_text()
    assert f"This run is not finished.** {len(lines) // 2:,} of {len(lines):,} results are there" in text
    assert "This run is not finished" not in write_report(finished)["report.md"].read_text()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("manifest.json", lambda text: "[]", r"manifest\.json is no manifest of a run: the file: "),
        ("manifest.json", lambda text: text.replace('"cores"', '"kernels"'), r"no manifest of a run: machine\."),
        ("manifest.json", lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version"),
        ("manifest.json", lambda text: "{", r"manifest\.json cannot be read"),
        ("scores.jsonl", lambda text: text.replace("1.0", "NaN", 1), r"scores\.jsonl, line \d+ is no Score: scores\."),
        ("predictions.jsonl", lambda text: "{}\n", r"line 1 is no Prediction: key: Field required"),
        (
            "samples.jsonl",
            lambda text: text.replace('"task": "needle"', '"task": "pin"', 1),
            r"changed by hand: no task",
        ),
    ],
)
def test_files_that_were_changed_by_hand_are_named_with_the_place(finished, tmp_path, file, change, message):
    shutil.copytree(finished.folder, tmp_path / "run")
    place = tmp_path / "run" / file
    text = place.read_text()
    assert change(text) != text
    place.write_text(change(text))
    with pytest.raises(UsageError, match=message):
        write_report(Run(tmp_path / "run"))


@pytest.mark.parametrize("file", FILES)
def test_a_folder_where_a_file_should_be_is_named(suite, tmp_path, file):
    declared = parse_suite(small(suite, systems=("oracle",), tasks=("needle",)), name="small")
    (tmp_path / file).mkdir()
    if file != "suite.json":
        (tmp_path / "suite.json").write_text(declared.model_dump_json(indent=1, by_alias=True) + "\n")
    with pytest.raises(UsageError, match=file.replace(".", r"\.")):
        score(run(declared, tmp_path))


def test_a_run_without_predictions_cannot_be_scored(suite, tmp_path):
    (tmp_path / "suite.json").write_text(suite.model_dump_json(by_alias=True))
    with pytest.raises(UsageError, match="has no prediction yet"):
        score(Run(tmp_path))


def test_samples_are_kept_without_their_texts_and_timings_apart(finished):
    for line in finished.samples.read_text().splitlines():
        assert all(set(p) == {"doc_id", "start", "end"} for p in json.loads(line)["passages"])
    assert not {"prefill_s", "total_s", "peak_bytes"} & set(json.loads(finished.predictions.read_text().split("\n")[0]))
    timing = finished.lines(finished.timings, Timing)[0]
    assert timing.total_s > 0


def test_a_score_that_is_no_number_is_named(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.setattr("stripedrag.eval.tasks.perplexity.PerplexityTask.score", lambda *_: {"nats": math.nan})
    with pytest.raises(UsageError, match=r"tiny has nats nan on perplexity/\S+, which is no score"):
        score(Run(tmp_path / "run"))


def test_a_question_whose_control_failed_is_no_question_that_was_not_known():
    about = dict(task="answers", operation="answer", cluster="d", subject="q", content_sha256="0")
    held = SampleRecord(
        id="a", cell={"context": "fill", "budget_tokens": 512}, evidence_in_context=True, evidence_share=1.0, **about
    )
    bare = SampleRecord(id="b", cell={"context": "none"}, **about)
    answer = Answered(text="x", finish="stop", prompt_tokens=1, answer_tokens=1)
    read = Row(held, "m", answer, {"token_f1": 1.0}, None)
    failed = Row(bare, "m", Failure(reason="timeout", message="no result"), {}, None)
    missed = Row(bare, "m", answer, {"token_f1": 0.0}, None)
    assert list(gaps([read, failed])) == []
    assert {gap.kind: gap.mean for gap in gaps([read, missed])}["used"] == 1.0


def test_what_search_finds_in_the_best_chunks_it_finds_in_more_of_them(finished):
    task = next(t for t in finished.suite().tasks if t.name == "retrieval")
    found = scores_of(finished, "retriever", task.name)
    assert found and all(scores["recall_top_1"] <= scores["recall_top_5"] for scores in found)
    assert all(scores["recall_top_5"] == 1.0 for scores in scores_of(finished, "oracle", task.name))


def test_the_analysis_of_stubs_is_what_they_are(finished):
    found = analyse(finished)
    headline = {(h.label, h.system): h for h in found.headline}
    assert headline["F1", "oracle"].mean == headline["needle", "oracle"].mean == 1.0
    assert headline["needle", "empty"].mean == 0.0
    contrasts = {c.label: c for c in found.contrasts}
    assert contrasts["fill or none"].mean == 0.0
    assert contrasts["fill or none"].pairs == 4
    assert contrasts["oracle or chance"].mean > 0.9
    assert contrasts["oracle or chance"].p == pytest.approx(2 / 16)  # of four documents, all sign patterns
    assert contrasts["oracle or chance"].p_holm == pytest.approx(4 / 16)
    lengths = {(e.task, e.system): e for e in found.effective_lengths}
    assert lengths["needle", "oracle"].absolute_tokens == 384
    assert lengths["needle", "empty"].absolute_tokens is None
    shares = defaultdict(dict)
    for gap in found.gaps:
        shares[gap.system, *gap.cell.items()][gap.kind] = gap.mean
        assert gap.low <= gap.mean <= gap.high
    assert all(sum(kinds.values()) == pytest.approx(1) for kinds in shares.values())
    fill = (("context", "fill"), ("budget_tokens", 512))
    assert shares["oracle", *fill]["known"] == 1.0
    assert shares["empty", *fill]["unused"] == 1.0
    recalls = {(r.cell["context"], r.cell.get("budget_tokens")): r.mean for r in found.recalls}
    assert recalls["oracle", None] == 1.0
    assert recalls["random", 512] == recalls["none", None] == 0.0
    assert {c.length_tokens for c in found.costs} == {128, 256}
    assert all(c.rounds == 1 and c.first_token_s > 0 and c.cache_bytes > 0 for c in found.costs)


def test_perplexity_of_a_random_model_is_near_that_of_chance(finished):
    import math

    losses = [loss for loss in analyse(finished).losses if loss.system == "tiny"]
    assert {loss.position for loss in losses} == {64, 128, 256}
    assert all(abs(loss.nats - math.log(49152)) < 1.0 for loss in losses)


def test_two_searches_over_different_corpora_share_nothing(suite, tmp_path):
    declared = small(suite, systems=("retriever",), tasks=("retrieval",))
    (task,) = declared["tasks"]
    declared["tasks"] = [task, task | {"name": "fewer", "distractors": 0}]
    made = run(parse_suite(declared, name="small"), tmp_path / "run")
    found = {p.sample_id: p for p in made.lines(made.predictions, Prediction)}
    assert len({p.key for p in found.values()}) == 8
    for name, prediction in found.items():
        strangers = [doc_id for doc_id in prediction.output.doc_ids if doc_id.startswith("x")]
        assert bool(strangers) == name.startswith("retrieval/")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headline": [{"label": "x", "task": "needle", "cell": {"lenght": 256}}]}, "has no cell .*lenght.*; it has"),
        (
            {
                "families": [
                    {
                        "name": "f",
                        "contrasts": [
                            {
                                "label": "x",
                                "task": "perplexity",
                                "system": "tiny",
                                "cell": {},
                                "against": "oracle",
                                "against_cell": {},
                            }
                        ],
                    }
                ]
            },
            "compares cells of 'perplexity', whose samples share nothing",
        ),
    ],
)
def test_columns_and_tests_over_what_there_is_not_are_refused_before_any_work(suite, tmp_path, change, message):
    declared = parse_suite(small(suite) | change, name="small")
    with pytest.raises(UsageError, match=message):
        run(declared, tmp_path / "run")
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


def test_a_suite_that_was_refused_can_be_mended_in_its_folder(suite, tmp_path):
    declared = small(suite, systems=("oracle",), tasks=("needle",))
    with pytest.raises(UsageError, match="has no cell"):
        run(
            parse_suite(declared | {"headline": [{"label": "x", "task": "needle", "cell": {"a": 1}}]}, name="t"),
            tmp_path,
        )
    assert score(run(parse_suite(declared, name="t"), tmp_path))


def test_systems_take_turns_at_being_first_in_rounds_of_a_cost_task(finished):
    cost = next(task for task in finished.suite().tasks if task.name == "cost")
    sample = SampleRecord(id="c", task="cost", operation="cost", cell={}, cluster="", subject="", content_sha256="")
    pair = [ModelSystem(ModelSpec(kind="model", name=name, model="m")) for name in ("a", "b")]
    work = [(cost, sample.model_copy(update={"cell": {"round": turn}})) for turn in range(3)]
    assert [system.name for _, _, system in runs.turns_of(work, pair)] == ["a", "b", "b", "a", "a", "b"]


def test_a_task_that_no_system_can_do_is_refused(suite, tmp_path):
    with pytest.raises(UsageError, match="no system of the suite can do perplexity"):
        run(parse_suite(small(suite, systems=("oracle",)), name="small"), tmp_path / "run")


def test_a_run_that_is_under_way_is_not_touched_by_another_suite(suite, tmp_path):
    first = parse_suite(small(suite, systems=("oracle",), tasks=("needle",)), name="t")
    other = parse_suite(small(suite, systems=("empty",), tasks=("needle",)), name="t")
    run(first, tmp_path)
    (tmp_path / "predictions.jsonl").unlink()  # as it is while samples are still being made
    before = {name: (tmp_path / name).read_bytes() for name in ("suite.json", "manifest.json", "samples.jsonl")}
    with runs.only_run_here(tmp_path), pytest.raises(UsageError, match="another process runs in"):
        run(other, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_two_processes_cannot_run_in_one_folder(suite, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process runs in"):
            run(parse_suite(small(suite), name="small"), tmp_path / "run")


def test_pairs_over_cells_take_the_mean_of_what_the_cells_hold(suite, tmp_path):
    """Two budgets in one cell: both count, not the last."""
    declared = small(suite, systems=("oracle", "empty"), tasks=("answers",))
    declared["families"] = [
        {
            "name": "f",
            "contrasts": [
                {
                    "label": "x",
                    "task": "answers",
                    "system": "oracle",
                    "cell": {"context": "fill"},
                    "against": "empty",
                    "against_cell": {"context": "none"},
                }
            ],
        }
    ]
    made = run(parse_suite(declared, name="small"), tmp_path / "run")
    lines = made.lines(made.predictions, Prediction)
    samples = {s.id: s for s in made.lines(made.samples, SampleRecord)}
    scores = []
    for p in lines:  # as if the oracle were right at the smaller budget alone
        right = p.system == "oracle" and samples[p.sample_id].cell.get("budget_tokens") == 256
        scores.append(Score(system=p.system, sample_id=p.sample_id, scores={"token_f1": float(right)}))
    made.scores.write_text("".join(s.model_dump_json() + "\n" for s in scores))
    (contrast,) = analyse(made).contrasts
    assert (contrast.mean, contrast.pairs) == (0.5, 4)


def test_a_folder_that_is_a_baseline_has_its_window_and_template(tiny_model_folder):
    known = {"kind": "model", "name": "tiny", "model": str(tiny_model_folder)}
    assert ModelSpec(**known).open().window_tokens == 512
    assert ModelSpec(**known, baseline="qwen3-0.6b").open()._known_as == "qwen3-0.6b"
    small = ModelSpec(**known, quantize="int8").open()
    assert small.identity()["quantize"] == "int8" and "quantize" not in ModelSpec(**known).open().identity()
    assert ModelSpec(**known, baseline="llama-2-7b").open().window_tokens == 512  # never above what its config allows
    with pytest.raises(ValueError, match="no baseline 'qwen'; there is"):
        ModelSpec(**known, baseline="qwen")


def test_losses_are_those_of_one_pass(tiny_model_folder):
    from stripedrag.eval import losses as module
    from stripedrag.model.loading import load_model

    model, tokenizer = load_model(tiny_model_folder, dtype=torch.float32, device="cpu")
    text = "The crew of the ship mended sails. " * 20
    ids = tokenizer(text, add_special_tokens=False).input_ids
    starts = [start for start, _ in tokenizer(text, return_offsets_mapping=True).offset_mapping]
    whole = torch.tensor([[1, *ids]])
    with torch.no_grad():
        logits = model(whole).logits[0, :-1].double()
    each = torch.nn.functional.cross_entropy(logits, whole[0, 1:], reduction="none")
    half = starts[len(ids) // 2]
    module.SEGMENT_TOKENS, kept = 37, module.SEGMENT_TOKENS
    try:
        found = module.losses(model, ids, starts, [half, len(text)], head=[1])
    finally:
        module.SEGMENT_TOKENS = kept
    middle = len(ids) // 2
    assert found.tokens == (middle, len(ids) - middle)
    assert found.nats == pytest.approx((each[:middle].sum().item(), each[middle:].sum().item()), rel=1e-4)


def test_the_command_line_runs_scores_and_reports(suite, tmp_path):
    import yaml

    declared = small(suite, systems=("oracle", "empty"), tasks=("needle", "answers"))
    declared["tasks"] = [{k: v for k, v in t.items() if v is not None} for t in declared["tasks"]]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(declared))
    folder = tmp_path / "run"
    done = CliRunner().invoke(app, ["eval", "run", str(tmp_path / "suite.yaml"), "--to", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert Path(json.loads(done.stdout)["report.html"]).is_file()
    assert CliRunner().invoke(app, ["eval", "score", str(folder)]).exit_code == 0
    again = CliRunner().invoke(app, ["eval", "report", str(folder)])
    assert again.exit_code == 0
    assert str(folder / "report.html") in again.stdout.split()
    missing = CliRunner().invoke(app, ["eval", "report", str(tmp_path / "gone")])
    assert "is no run" in str(missing.exception)


@pytest.mark.parametrize("command", [["run", "quick"], ["score", "run"], ["report", "run"]])
def test_a_missing_package_of_the_extra_is_told_before_any_work(command, monkeypatch):
    monkeypatch.setattr("stripedrag.eval.cli.find_spec", lambda name: None if name == "scipy" else name)
    done = CliRunner().invoke(app, ["eval", *command])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == "an evaluation needs scipy: `pip install 'stripedrag[eval]'`"


def test_a_run_s_key_names_system_content_and_settings(suite, tmp_path):
    declared = small(suite, systems=("oracle",), tasks=("needle",))
    first = run(parse_suite(declared, name="small"), tmp_path / "one")
    declared["tasks"][0]["answer_tokens"] = 40
    second = run(parse_suite(declared, name="small"), tmp_path / "two")
    keys = [{p.key for p in made.lines(made.predictions, Prediction)} for made in (first, second)]
    assert not keys[0] & keys[1]
    assert Run(tmp_path / "one").manifest().systems == {"oracle": {"stub": "oracle"}}


@pytest.mark.slow
@pytest.mark.weights
def test_the_default_model_and_its_baseline_give_the_same_bytes_again_after_kills(tmp_path):
    declared = {
        "name": "real",
        "title": "real",
        "systems": [
            {"kind": "model", "name": "striped", "model": "stripedhyena-smol-135m"},
            {"kind": "model", "name": "smol", "model": "smollm2-135m-instruct"},
        ],
        "tasks": [
            {"kind": "needle", "name": "needle", "lengths": [512], "depths": [0.0, 1.0], "samples": 2},
            {"kind": "rag", "name": "answers", "samples": 3, "distractors": 20, "budgets": [512]},
            {"kind": "perplexity", "name": "perplexity", "positions": [256, 512], "samples": 1},
        ],
    }
    whole = run(parse_suite(declared, name="real"), tmp_path / "whole")
    assert _kill_and_resume(declared, tmp_path / "killed", tmp_path, 4) == 4
    for name in ("manifest.json", "samples.jsonl", "predictions.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_neighbours_that_share_their_passages_read_them_once(suite, finished, tmp_path, monkeypatch):
    from stripedrag.eval.resources import Resources
    from stripedrag.rag import context_cache

    read = []

    class Counted(context_cache.ContextCache):
        def read(self, ids, marks=(), **options):
            reading = super().read(ids, marks, **options)
            read.append(reading.reused_tokens == 0)
            return reading

    monkeypatch.setattr(context_cache, "ContextCache", Counted)
    system = next(spec for spec in suite.systems if spec.name == "tiny").open()
    resources = Resources(seed=0, reference_tokenizer=suite.reference_tokenizer, folder=tmp_path)
    task = next(task for task in suite.tasks if task.name == "recall")
    asked = list(task.samples(resources))
    together = [system.perform(sample, task, resources, Meter()) for sample in asked]
    assert sum(read) == len({(sample.cluster, sample.cell["length_tokens"]) for sample in asked}) == 4
    alone = [system.perform(s.model_copy(update={"shared": False}), task, resources, Meter()) for s in asked]
    assert together == alone and len(read) == len(asked)
