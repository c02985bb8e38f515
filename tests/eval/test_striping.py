"""Striping as a command: a model, its card and what changed; killed and gone on with; in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import called
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stripedrag.errors import UsageError
from stripedrag.eval.striping import corpus_files
from stripedrag.model.loading import load_model
from stripedrag.model.smollm2 import STRIPED, prepared_dir
from stripedrag.weights import sha256

SCRIPT = Path(sys.executable).with_name("stripedrag")
RECIPE = {
    "hyena_layers": 1,
    "modes": 4,
    "rank": 2,
    "checkpoint_seconds": 0,
    "stages": [
        {"name": "layers", "kind": "layers", "tokens": 1280, "length": 128, "batch_tokens": 256, "hyena_rate": 0.01},
        {"name": "whole", "tokens": 5120, "length": 128, "batch_tokens": 256, "hyena_rate": 0.001, "warmup_steps": 2},
    ],
}
TOWNS = ("Oslo", "Bergen", "Turku", "Visby", "Lund", "Kiel", "Bremen", "Ghent")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny random Llama in float32 under the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = AutoTokenizer.from_pretrained(prepared_dir(STRIPED))
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        intermediate_size=48,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts and questions, and some of either held out."""
    folder = tmp_path_factory.mktemp("data")
    for prefix, towns in (("", TOWNS * 5), ("held-out-", ("Riga", "Tartu", "Narva"))):
        texts = [
            {"id": f"t/{i}", "text": f"{town} lies by the water. It is old. " * 12} for i, town in enumerate(towns)
        ]
        asked = [
            {
                "id": str(i),
                "source": "towns",
                "passage": f"Ship {i} sails from {town} in May.",
                "question": f"Where does ship {i} sail from?",
                "answers": [town],
            }
            for i, town in enumerate(towns)
        ]
        for name, lines in (("texts", texts), ("questions", asked)):
            (folder / f"{prefix}{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    return path


def command(teacher, data, recipe, to):
    return ["stripe", str(teacher), "--data", str(data), "--recipe", str(recipe), "--to", str(to)]


def run(arguments, program=(SCRIPT,), **options):
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=600, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done


def refused(arguments):
    done = called(*arguments)
    assert done.returncode == 2, done.stderr
    return " ".join(done.stderr.split())


def killed_at_checkpoints(arguments, folder, stages):
    """Run a command and kill it at the first checkpoint of each of so many stages."""
    seen = 0
    while seen < stages:
        process = subprocess.Popen([SCRIPT, *arguments], stderr=subprocess.DEVNULL)
        while not (started := list(folder.glob("run/stages/*/checkpoint.safetensors"))[seen:]):
            assert process.poll() is None
            time.sleep(0.02)
        seen = seen + len(started)
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def striped(tmp_path_factory, teacher, data):
    """A finished run."""
    scratch = tmp_path_factory.mktemp("striped")
    recipe = scratch / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    done = run([*command(teacher, data, recipe, scratch / "ferry-135"), "--json"])
    return scratch / "ferry-135", done


def test_a_striped_model_is_a_folder_that_loads_with_card_curves_and_changes(striped, teacher):
    folder, done = striped
    assert json.loads(done.stdout) == {
        "model": str(folder),
        "card": str(folder / "README.md"),
        "changes": str(folder / "changes.safetensors"),
    }
    assert "whole, step 20 of 20: kl " in done.stderr
    model, tokenizer = load_model(folder, dtype=torch.float32)
    assert len(model.config.attn_layer_idxs) == 2
    out = model.generate(**tokenizer("Ship 1 sails", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 3
    card = (folder / "README.md").read_text()
    assert "# ferry-135" in card
    for part in ("perplexity", "answers exact", "| whole | end-to-end | 128 | 5,120 |", "| questions | towns | 40 |"):
        assert part in card, part
    assert card.count("passage: Ship") == 20
    assert f"`stripedrag stripe {teacher} --data … --recipe recipe.json --to …`" in card
    assert len({oct(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}) == 1
    assert not (folder / "run" / "written").exists()
    assert "<svg" in (folder / "curves.svg").read_text()
    measured = json.loads((folder / "evaluation.json").read_text())
    assert set(measured["lengths"]["128"]) == {"teacher", "striped"}
    assert measured["lengths"]["128"]["teacher"]["kl"] == pytest.approx(0, abs=1e-4)
    assert measured["stretches"][0]["start"] == 0
    assert len(json.loads((folder / "run" / "ranking.json").read_text())) == 3


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_tensors(striped, teacher, data, recipe, tmp_path):
    folder = tmp_path / "killed"
    killed_at_checkpoints(command(teacher, data, recipe, folder), folder, 2)
    run(command(teacher, data, recipe, folder))
    whole, resumed = (load_file(path / "changes.safetensors") for path in (striped[0], folder))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "off"), [("whole", 0.01), ("layers", 0.05)])
def test_two_processes_take_the_steps_of_one(striped, teacher, data, recipe, tmp_path, stage, off):
    layers = json.loads((striped[0] / "config.json").read_text())["attn_layer_idxs"]
    wanted = json.loads(recipe.read_text())
    wanted["hyena_layers"] = sorted({0, 1, 2} - set(layers))
    wanted["stages"] = [one for one in wanted["stages"] if one["name"] == stage]
    recipe.write_text(json.dumps(wanted))
    program = tmp_path / "program.py"
    program.write_text(
        "from stripedrag.eval.cli import main\n"
        "from stripedrag.model.striping.processes import Processes\n"
        "assert Processes().count == 2\n"
        "main()\n"
    )
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program))
    run(command(teacher, data, recipe, tmp_path / "one"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = run(command(teacher, data, recipe, tmp_path / "two"), launch, env=environment)
    assert done.stdout.count("model: ") == 1
    one, two = (load_file(tmp_path / name / "changes.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        # Not number by number: where a gradient is about nothing, its sign is chance, and Adam's step the sign's.
        # Layer by layer a mean of each process's relative errors would be off by half.
        assert (two[name].double() - tensor.double()).norm() <= off * tensor.double().norm(), name


def test_without_hyena_layers_the_transformer_is_fine_tuned(teacher, data, recipe, tmp_path):
    run([*command(teacher, data, recipe, tmp_path / "tuned"), "--layers", "0"])
    changed = load_file(tmp_path / "tuned" / "changes.safetensors")
    assert not any("filter" in name for name in changed) and any(name.endswith(".up") for name in changed)
    model, _ = load_model(tmp_path / "tuned")
    assert model.config.attn_layer_idxs == [0, 1, 2]
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "fine-tuned, without Hyena layers" in card and "| layers | layers |" not in card


@pytest.mark.slow
def test_a_run_goes_on_from_a_finished_one(striped, teacher, data, recipe, tmp_path):
    begun = striped[0]
    own = {"checkpoint_seconds": 0, "stages": [RECIPE["stages"][1] | {"name": "more"}]}
    recipe.write_text(json.dumps(own))
    run([*command(teacher, data, recipe, tmp_path / "more"), "--from", str(begun)])
    digest = sha256(begun / "changes.safetensors")
    made = json.loads((tmp_path / "more" / "recipe.json").read_text())
    assert made["begins_from"] == digest and digest in (tmp_path / "more" / "README.md").read_text()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (begun, tmp_path / "more")]
    assert configs[0]["attn_layer_idxs"] == configs[1]["attn_layer_idxs"]
    before, after = (load_file(folder / "changes.safetensors") for folder in (begun, tmp_path / "more"))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)
    kept = tmp_path / "more" / "run" / "begun-from"
    assert sha256(kept / "changes.safetensors") == digest
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy, ignore=shutil.ignore_patterns("run"))
    again = command(teacher, data, recipe, tmp_path / "again")
    killed_at_checkpoints([*again, "--from", str(copy)], tmp_path / "again", 1)
    changed = {name: tensor + 1 for name, tensor in load_file(copy / "changes.safetensors").items()}
    save_file(changed, copy / "changes.safetensors")
    kept = tmp_path / "again" / "run" / "begun-from"
    assert f"began from other changes; this run's own copy of what it began from is {kept}" in refused(
        [*again, "--from", str(copy)]
    )
    shutil.rmtree(copy)
    assert f"own copy of what it began from is {kept}, give that" in refused([*again, "--from", str(copy)])
    run([*again, "--from", str(kept)])
    resumed = load_file(tmp_path / "again" / "changes.safetensors")
    assert [name for name in after if not torch.equal(after[name], resumed[name])] == []


def test_what_cannot_be_gone_on_from_is_told_before_any_work(striped, teacher, data, recipe, tmp_path):
    begun = striped[0]
    own = {"stages": [RECIPE["stages"][1]]}
    digest = sha256(begun / "changes.safetensors")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: t * 1.5 for name, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    recipe.write_text(json.dumps(own))
    told = refused([*command(other, data, recipe, tmp_path / "new"), "--from", str(begun)])
    assert "is of a transformer with tensors of sha256" in told and f"not of {other}; give the model" in told
    unlike = tmp_path / "unlike"
    shutil.copytree(begun, unlike)
    changed = load_file(begun / "changes.safetensors")
    save_file({name: t[..., :-1].contiguous() for name, t in changed.items()}, unlike / "changes.safetensors")
    others = (
        ([], {"begins_from": digest}, f"begins from changes of sha256 {digest}; give their folder by --from"),
        (["--from", begun], {"begins_from": "0" * 64}, f"the recipe's begins_from is {'0' * 64} and that of"),
        (["--from", begun], {"stages": RECIPE["stages"]}, "'layers' distils layers that begin as trained ones; leave"),
        (["--from", begun], {"rank": 3}, "the recipe's rank is 3 and that of"),
        (["--from", data], {}, "give a folder that `stripedrag stripe` wrote, or stripedhyena-smol-135m"),
        (["--from", begun, "--layers", "1"], {}, "--from goes with --recipe"),
        (["--from", STRIPED], {}, f"{STRIPED}.safetensors is of a transformer with tensors of sha256 "),
        (["--from", unlike], {}, f"changes.safetensors does not go with {teacher}: "),
    )
    for more, changed, message in others:
        recipe.write_text(json.dumps(own | changed))
        assert message in refused([*command(teacher, data, recipe, tmp_path / "new"), *map(str, more)])
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_striped_is_told_before_any_work(teacher, data, recipe, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert "holds something that is no striping run; give a new folder" in refused(command(teacher, data, recipe, full))
    killed = tmp_path / "killed" / "run"  # before its recipe was written
    (killed / "teacher").mkdir(parents=True)
    (killed / "model.sha256").write_text("other")
    (killed / ".recipe.json.part").touch()
    assert "holds a run of another model or tokenizer" in refused(command(teacher, data, recipe, killed.parent))
    told = refused(["corpus", "--to", full / "thesis.txt"])
    assert "thesis.txt cannot be a folder: File exists; give another" in told
    (full / "run").mkdir()
    assert "holds something that is no striping run" in refused(command(teacher, data, recipe, full))
    assert (full / "thesis.txt").read_text() == "mine"
    long = RECIPE["stages"][1] | {"length": 4096, "tokens": 8192}
    recipe.write_text(json.dumps(RECIPE | {"stages": [long]}))
    for _ in range(2):  # and again, when the folder is there
        told = refused(command(teacher, data, recipe, tmp_path / "long"))
    assert "the stage 'whole' has windows of 4096 tokens and the model reads 2048; shorten its windows" in told
    recipe.write_text('{"stages": [{"name": "a", "tokens": 128, "length": 128, "hyena_rate": -1}]}')
    told = refused(command(teacher, data, recipe, tmp_path / "new"))
    assert "is no recipe: stages.0.hyena_rate: Input should be greater than 0" in told
    assert not (tmp_path / "new").exists()
    recipe.write_text("{}")
    told = refused([*command(teacher, data, recipe, tmp_path / "new"), "--layers", "3-5"])
    assert "--layers is '3-5'; it is a number, or layers with commas between, as 3,4,9" in told
    told = refused([*command(teacher, data, recipe, tmp_path / "new"), "--layers", "1,1"])
    assert "recipe.json with --layers 1,1 is no recipe: hyena_layers names a layer twice: 1, 1" in told
    assert "cannot be read: No such file" in refused(command(teacher, data, tmp_path / "none", tmp_path / "new"))
    told = refused(command(teacher, data, recipe, os.fsdecode(bytes(tmp_path / "new") + b"\xff")))
    assert "'new\\udcff' cannot be written on the model's card; give a name of printable characters" in told
    told = refused([*command(teacher, data, recipe, tmp_path / "new"), "--teacher-cache", str(recipe)])
    assert "recipe.json is no folder; what the teacher says is kept in one" in told
    assert "File name too long" in refused(command(teacher, data, recipe, tmp_path / ("n" * 300)))
    assert "File name too long" in refused(command(teacher, tmp_path / ("n" * 300), recipe, tmp_path / "new"))
    lacking = tmp_path / "lacking"
    shutil.copytree(teacher, lacking)
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    told = refused(command(lacking, data, recipe, tmp_path / "new"))
    assert "lacks tensors: model.layers.1.mlp.up_proj.weight. Its weights and its config.json are not of" in told
    assert not (tmp_path / "new").exists()


def test_a_folder_stands_for_its_files(data, tmp_path):
    files, apart = corpus_files([data], [])
    assert [file.name for file in files] == ["questions.jsonl", "texts.jsonl"]
    assert [file.name for file in apart] == ["held-out-questions.jsonl", "held-out-texts.jsonl"]
    (tmp_path / "link.jsonl").symlink_to(data / "texts.jsonl")
    assert len(corpus_files([data, data / "texts.jsonl", tmp_path / "link.jsonl"], [])[0]) == 2
    (tmp_path / "link.jsonl").unlink()
    with pytest.raises(UsageError, match=r"holds no \.jsonl file"):
        corpus_files([tmp_path], [])
