"""The card of a striped model: what it is, how it was made, what was measured, with the curves of its training."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from pydantic import TypeAdapter

from stripedrag.errors import UsageError
from stripedrag.eval.run_files import write_whole
from stripedrag.model.striping import Corpus, Evaluation, Recipe
from stripedrag.model.striping.data import Windows
from stripedrag.model.striping.ranking import LayerCost
from stripedrag.model.striping.teacher import predicted

SAMPLES = 20
_SHOWN_CHARS = 240
_CURVES = (
    ("error", "relative error"),
    ("kl", "KL to the teacher, nats a token"),
    ("answer_nats", "nats a token of answers"),
    ("exact", "answers exact"),
)


def write_card(
    folder: Path,
    run: Path,
    *,
    name: str,
    teacher: str,
    layers: Sequence[int],
    windows: Mapping[str, Windows],
    evaluation: Evaluation,
    corpus: Corpus,
) -> Path:
    """Write README.md, evaluation.json, recipe.json and, with matplotlib, curves.svg into a model's `folder`; `windows`
    are those of the stages that were taken."""
    recipe = Recipe.model_validate_json((run / "recipe.json").read_bytes())
    logs = {stage.name: list(_log(run / "stages" / stage.name / "log.jsonl")) for _, stage in recipe.stages_taken}
    write_whole(folder / "evaluation.json", evaluation.model_dump_json(indent=1) + "\n")
    write_whole(folder / "recipe.json", recipe.model_dump_json(indent=1) + "\n")
    curves = find_spec("matplotlib") is not None
    if curves:
        write_whole(folder / "curves.svg", draw_curves(recipe, logs, evaluation))
    parts = [
        f"# {name}",
        _what(teacher, layers, recipe),
        "## Measured on held-out data",
        _lengths(evaluation),
        _stretches(evaluation),
        "![what was measured while it was trained](curves.svg)" if curves else "",
        "## Made by",
        _stages(teacher, recipe, logs, windows),
        _ranking(run / "ranking.json", layers),
        "## Trained on",
        _data(corpus),
        "## Questions of the training data, by chance",
        _samples(corpus, recipe.seed),
    ]
    write_whole(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")
    return folder / "README.md"


def _what(teacher: str, layers: Sequence[int], recipe: Recipe) -> str:
    trained = f"norms and differences of rank {recipe.rank}" if recipe.rank else "norms"
    made = (
        f"`{teacher}` striped: layers {', '.join(map(str, layers))} are Hyena layers that were distilled from its "
        f"attention; of the others {trained} were trained."
        if layers
        else f"`{teacher}` fine-tuned, without Hyena layers, as a rival for one with them: {trained} were trained."
    )
    if recipe.begins_from:
        made += f" It began from what an earlier run had changed (sha256 `{recipe.begins_from}`)."
    return f"{made} `changes.safetensors` holds all that changed."


def draw_curves(recipe: Recipe, logs: Mapping[str, list[dict[str, Any]]], evaluation: Evaluation) -> str:
    """An SVG: what was measured on held-out data against tokens of training, and nats by position at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "stripedrag", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
    ):
        figure = Figure(figsize=(11.4, 5.6), layout="constrained")
        axes = figure.subplots(2, 3).flatten()
        for (key, label), panel in zip(_CURVES, axes, strict=False):
            before = 0
            for _, stage in recipe.stages_taken:
                tokens = stage.windows_a_step * stage.length
                points = [(before + line["step"] * tokens, line[key]) for line in logs[stage.name] if key in line]
                if points:
                    panel.plot(
                        *zip(*points, strict=True), marker="o", markersize=3, label=f"{stage.name}, {stage.length}"
                    )
                before += stage.steps * tokens
            panel.set(title=label, xlabel="tokens of training")
            if panel.get_legend_handles_labels()[0]:
                panel.legend(frameon=False)
        for name in evaluation.stretches[0].nats if evaluation.stretches else ():
            places = [stretch.end for stretch in evaluation.stretches]
            axes[4].plot(places, [stretch.nats[name] for stretch in evaluation.stretches], marker="o", label=name)
        axes[4].set(title="nats a token of text by position", xlabel="position", xscale="log")
        if evaluation.stretches:
            axes[4].legend(frameon=False)
        axes[5].set_axis_off()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _lengths(evaluation: Evaluation) -> str:
    rows = [
        [
            f"{length:,}",
            f"{m.text_tokens:,}",
            f"{m.answers:,}",
            name,
            _number(m.kl),
            _number(None if m.nats is None else math.exp(m.nats)),
            _number(m.answer_nats),
            _number(m.exact),
        ]
        for length, models in evaluation.lengths.items()
        for name, m in models.items()
    ]
    return _table(
        [
            "window",
            "tokens of text",
            "answers",
            "model",
            "KL to the teacher",
            "perplexity",
            "nats a token of answers",
            "answers exact",
        ],
        rows,
    )


def _stretches(evaluation: Evaluation) -> str:
    if not evaluation.stretches:
        return ""
    names = list(evaluation.stretches[0].nats)
    rows = [
        [f"{s.start:,} to {s.end:,}", f"{s.tokens:,}", *(_number(s.nats[name]) for name in names)]
        for s in evaluation.stretches
    ]
    return _table(["positions", "tokens", *(f"nats, {name}" for name in names)], rows)


def _stages(
    teacher: str, recipe: Recipe, logs: Mapping[str, list[dict[str, Any]]], windows: Mapping[str, Windows]
) -> str:
    rows = []
    for _, stage in recipe.stages_taken:
        if not logs[stage.name]:  # removed since
            continue
        tokens = stage.windows_a_step * stage.length
        seconds = sum(line["seconds"] for line in logs[stage.name])
        rate = f"{stage.steps * tokens / seconds:,.0f}"
        rates = f"{stage.hyena_rate:g}" + (f", {stage.adapter_rate:g}" if stage.kind != "layers" else "")
        read = windows[stage.name]
        learnt = int(predicted(read).sum())
        rows.append(
            [
                *(stage.name, stage.kind, f"{stage.length:,}", f"{stage.steps * tokens:,}"),
                *(("", "") if stage.kind == "layers" else (f"{learnt:,}", f"{read.answers:,}")),
                *(f"{tokens:,}", rates, rate),
            ]
        )
    head = ["stage", "kind", "window", "tokens", "learnt from", "answers", "tokens a step", "rates (Hyena, others)"]
    begun = " --from …" if recipe.begins_from else ""
    return (
        f"Seed {recipe.seed}; {recipe.modes} modes, {recipe.taps} taps. The whole recipe: `recipe.json`; `stripedrag "
        f"stripe {teacher} --data … --recipe recipe.json{begun} --to …` with the data below makes the model again.\n\n"
        + _table([*head, "tokens/s"], rows)
    )


def _ranking(path: Path, layers: Sequence[int]) -> str:
    if not path.exists():
        return ""
    costs = TypeAdapter(list[LayerCost]).validate_json(path.read_bytes())
    rows = [
        [str(c.layer), _number(c.kl), _number(c.answer_nats), "Hyena" if c.layer in layers else "attention"]
        for c in costs
    ]
    return "What skipping a layer's attention costs the teacher:\n\n" + _table(
        ["layer", "KL on text", "nats a token of answers", "became"], rows
    )


def _data(corpus: Corpus) -> str:
    questions = Counter(one.source or "(no source)" for one in corpus.asked)
    texts = Counter(re.split(r"/|-\d", one.id)[0] for one in corpus.texts)
    chars = sum(len(one.text) for one in corpus.texts)
    rows = [["texts", source, f"{count:,}"] for source, count in texts.most_common()]
    rows += [["questions", source, f"{count:,}"] for source, count in questions.most_common()]
    passages = {one.passage for one in corpus.asked}
    unanswerable = sum(one.unanswerable for one in corpus.asked)
    return (
        f"Windows were drawn, as far as the stages go, from {len(corpus.texts):,} texts of {chars / 1e6:.1f} million "
        f"characters and {len(corpus.asked):,} questions on {len(passages):,} passages, {unanswerable:,} of them "
        f"without an answer; others are asked where their passage is not. Held out: {len(corpus.held_texts):,} "
        f"texts, {len(corpus.held_asked):,} questions. sha256 of all lines: `{corpus.fingerprint()}`.\n\n"
        + _table(["kind", "source", "count"], rows)
    )


def _samples(corpus: Corpus, seed: int) -> str:
    chosen = Random(seed).sample(corpus.asked, k=min(SAMPLES, len(corpus.asked)))
    return "\n".join(
        f"{number}. {_line(one.question)} → **{_line(one.taught)}** ({_line(one.source)}; "
        f"passage: {_line(one.passage)})"
        for number, one in enumerate(chosen, start=1)
    )


def _line(text: str) -> str:
    joined = " ".join(text.split())
    return (joined if len(joined) <= _SHOWN_CHARS else joined[: _SHOWN_CHARS - 1] + "…").replace("|", "\\|")


def _log(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            measured = json.loads(line)
            measured["step"], measured["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} is damaged; remove it, and the same command writes the model and its card"
            ) from error
        yield measured


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_line(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1 else f"{value:.2f}"
