"""The report says what the analysis says, in four formats: nothing is lost, made up or fetched from a network."""

import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from typing import get_args

import pytest

from stripedrag.errors import UsageError
from stripedrag.eval import plots
from stripedrag.eval.analysis import analyse
from stripedrag.eval.report import write_report
from stripedrag.eval.reporting import parts
from stripedrag.eval.run_files import Run
from stripedrag.eval.schema import (
    Answered,
    Carried,
    Failure,
    Losses,
    Prediction,
    Ranking,
    SampleRecord,
    Score,
    Stretch,
    Timing,
    dumps,
)
from stripedrag.eval.suite import parse_suite
from stripedrag.eval.tasks import long_documents
from stripedrag.eval.tasks.retrieved import ContextName

MODELS = {"stripedhyena-smol-135m": 0.08, "smollm2-135m-instruct": 0.0}  # and how much better than plain each is
STUBS = {"oracle": 1.0, "chance": 0.05, "echo": 0.0, "empty": 0.0}
CONTEXTS = {"fill": 0.55, "top-5": 0.42, "top-20": 0.5, "reranked-5": 0.6, "oracle": 0.72, "random": 0.1, "none": 0.12}
BUDGETS = (1024, 2048, 4096)
LENGTHS = (512, 1024, 2048, 4096)
DASH = "\N{EN DASH}"
EVIDENCE = Stretch(doc_id="d", start=0, end=10)
TASKS = (
    {"kind": "rag", "name": "answers", "contexts": list(CONTEXTS), "budgets": list(BUDGETS)},
    {"kind": "needle", "name": "needle", "lengths": list(LENGTHS)},
    {"kind": "tracking", "name": "tracking", "lengths": list(LENGTHS)},
    {"kind": "unanswerable", "name": "unanswerable", "budget_tokens": 2048},
    {"kind": "long_documents", "name": "meetings", "contexts": ["fill", "top-5", "head"], "budgets": [2048, 4096]},
    {"kind": "retrieval", "name": "search", "budgets": list(BUDGETS)},
    {"kind": "perplexity", "name": "novels", "positions": list(LENGTHS)},
    {"kind": "cost", "name": "cost", "lengths": list(LENGTHS)},
)


class Maker:
    """Writes a run whose numbers are drawn: `lead` is added to the first model's chance of being right.

    `turned`: contrasts are declared with the second model first.
    """

    def __init__(
        self,
        folder,
        *,
        kinds=None,
        lead=0.0,
        title="Two models, up to 4,096 tokens",
        all_fail=(),
        clusters=12,
        turned=False,
        contexts=tuple(CONTEXTS),
    ):
        self.folder, self.lead, self.all_fail, self.clusters = folder, lead, all_fail, clusters
        self.turned, self.contexts = turned, contexts
        self.tasks = [task for task in TASKS if kinds is None or task["kind"] in kinds]
        self.rng = random.Random(0)
        self.lines = {"samples": [], "predictions": [], "timings": [], "scores": []}
        self.suite = parse_suite(self._declared(title), name="test")
        for task in self.tasks:
            getattr(self, f"_{task['kind']}")(task["name"])
        folder.mkdir(exist_ok=True)
        for name, records in self.lines.items():
            (folder / f"{name}.jsonl").write_text("".join(dumps(record) + "\n" for record in records))
        (folder / "suite.json").write_text(self.suite.model_dump_json(by_alias=True))
        versions = {"python": "3.11.2", "stripedrag": "0.2.0", "torch": "2.9.0", "lm_eval": None}
        machine = {"processor": "A <fast> one", "cores": 2, "threads": 2, "gpu": None}
        systems = {name: {"model": name, "files": {"model.safetensors": "ab" * 32}} for name in MODELS}
        manifest = {"schema_version": 1, "suite_sha256": "cd" * 32, "seed": 0, "commit": "ef" * 20, "data_sha256": {}}
        manifest |= {"versions": versions, "machine": machine, "systems": systems}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def _declared(self, title):
        first, second = MODELS
        names = {task["name"] for task in self.tasks}
        headline = [
            {"label": "Answers, window filled", "task": "answers", "cell": {"context": "fill", "budget_tokens": 4096}},
            {"label": "Needle at 4,096 tokens", "task": "needle", "cell": {"length_tokens": 4096}},
            {"label": "Meetings", "task": "meetings", "cell": {"context": "fill"}},
            {"label": "Knows what it was not told", "task": "unanswerable"},
            {"label": "Loss on novels", "task": "novels"},
        ]
        models = [
            {"label": c["label"], "task": c["task"], "cell": c.get("cell", {}), "system": first, "against": second}
            for c in headline
        ]
        if self.turned:
            models = [c | {"system": second, "against": first} for c in models]
        fill = {
            "label": "fill against top-5",
            "task": "answers",
            "cell": {"context": "fill", "budget_tokens": 2048},
            "against_cell": {"context": "top-5", "budget_tokens": 2048},
        }
        filling = [{**fill, "label": f"fill against top-5, {name}", "system": name} for name in MODELS]
        families = [{"name": "the models", "contrasts": models}, {"name": "filling the window", "contrasts": filling}]
        for family in families:
            family["contrasts"] = [c for c in family["contrasts"] if c["task"] in names]
        return {
            "name": "synthetic",
            "title": title,
            "limits": "With 24 questions a difference below about 15 points cannot be told from chance.",
            "systems": [
                *({"kind": "model", "name": name, "model": name} for name in MODELS),
                {"kind": "retriever", "name": "retriever"},
                *({"kind": "stub", "name": name} for name in STUBS),
            ],
            "tasks": self.tasks,
            "headline": [column for column in headline if column["task"] in names],
            "families": [family for family in families if family["contrasts"]],
        }

    def add(self, task, cell, number, operation, outcomes, **fields):
        """One sample, and for each system its output, scores, prefill and decode seconds and peak bytes."""
        name = f"{task}/{','.join(f'{k}={v}' for k, v in cell.items())}/{number}"
        about = dict(
            task=task, operation=operation, cell=cell, cluster=f"c{number % self.clusters}", subject=f"q{number}"
        )
        sample = SampleRecord(id=name, content_sha256="0", **about, **fields)
        self.lines["samples"].append(sample)
        for system, (output, scores, prefill_s, decode_s, peak_bytes) in outcomes.items():
            if system in self.all_fail:
                output, scores = Failure(reason="timeout", message="no result after 120 s"), {}
            of = dict(system=system, sample_id=name)
            timing = dict(prefill_s=prefill_s, decode_s=decode_s, total_s=1.0, peak_bytes=peak_bytes)
            self.lines["predictions"].append(Prediction(key=f"{system}{name}", output=output, **of))
            self.lines["timings"].append(Timing(key=f"{system}{name}", **of, **timing))
            self.lines["scores"].append(Score(scores=scores, **of))

    def answers(self, chance, tokens, metrics, *, cut=0):
        """Answers of all models and stubs; `chance` of being right for a plain model."""
        outcomes = {}
        for system in (*MODELS, *STUBS):
            better = MODELS.get(system, 0) + (self.lead if system == next(iter(MODELS)) else 0)
            p = STUBS[system] if system in STUBS else min(1.0, chance + better)
            right = float(self.rng.random() < p)
            soft = right if system in STUBS else right * self.rng.uniform(0.6, 1.0)
            whole = ("substring_exact_match", "string_match_all", "decision")
            scores = {metric: right if metric in whole else soft for metric in metrics}
            given = dict(finish="stop", prompt_tokens=0 if system in STUBS else tokens, answer_tokens=5)
            lost = {"cut_tokens": cut, "gold_survived": not cut} if system in MODELS else {}
            seconds = None if system in STUBS else _prefill(system, tokens)
            outcomes[system] = (Answered(text="<script>alert(1)</script>", **given, **lost), scores, seconds, 0.4, None)
        return outcomes

    def _rag(self, task):
        for number in range(24):
            for context, chance in ((c, CONTEXTS[c]) for c in self.contexts):
                for budget in (None,) if context in ("oracle", "none") else BUDGETS:
                    cell = {"context": context} | ({} if budget is None else {"budget_tokens": budget})
                    more = 0.0 if budget is None else 0.1 * math.log2(budget / 2048)
                    held = {"oracle": 1.0, "random": 0.0, "none": 0.0}.get(context, 0.75 + more)
                    inside = self.rng.random() < held
                    most = {"oracle": 300, "none": 60, "top-5": 900, "reranked-5": 900}.get(context, 10_000)
                    tokens = min(most, (budget or 10_000) - 40)
                    outcomes = self.answers(
                        chance + (more if context == "fill" else 0), tokens, ("token_f1", "substring_exact_match")
                    )
                    place = round(self.rng.random(), 4) if inside else None
                    held = dict(evidence_in_context=inside, evidence_share=float(inside))
                    fields = dict(evidence=(EVIDENCE,), evidence_position=place, **held)
                    self.add(task, cell, number, "answer", outcomes, references=("x",), **fields)

    def _needle(self, task):
        for length in LENGTHS:
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                for number in range(3):
                    chance = 1.0 - 0.18 * math.log2(length / 512) - (0.2 if 0 < depth < 1 else 0)
                    outcomes = self.answers(
                        chance, length - 48, ("string_match_all",), cut=100 if (length, depth) == (4096, 1.0) else 0
                    )
                    fields = dict(evidence=(EVIDENCE,), evidence_in_context=True, evidence_position=depth)
                    self.add(task, {"length_tokens": length, "depth": depth}, number, "answer", outcomes, **fields)

    def _tracking(self, task):
        for length in LENGTHS:
            for number in range(12):
                outcomes = self.answers(0.9 - 0.2 * math.log2(length / 512), length - 48, ("string_match_all",))
                if length == 4096 and number > 5:
                    slow = Failure(reason="timeout", message="no result after 120 s")
                    outcomes["smollm2-135m-instruct"] = (slow, {}, None, None, None)
                self.add(task, {"length_tokens": length}, number, "answer", outcomes)

    def _unanswerable(self, task):
        for number in range(24):
            for answerable in (True, False):
                metrics = ("decision", "token_f1") if answerable else ("decision",)
                outcomes = self.answers(0.7 if answerable else 0.3, 2000, metrics)
                self.add(task, {"evidence": "present" if answerable else "absent"}, number, "answer", outcomes)

    def _long_documents(self, task):
        for number in range(20):
            for context in ("fill", "top-5", "head"):
                for length in (2048, 4096):
                    outcomes = self.answers(0.3, length - 128, ("rouge_l", "coverage"))
                    self.add(task, {"context": context, "budget_tokens": length}, number, "answer", outcomes)

    def _retrieval(self, task):
        for number in range(40):
            inside = {budget: self.rng.random() < 0.7 + 0.08 * place for place, budget in enumerate(BUDGETS)}
            scores = {"ndcg@10": self.rng.uniform(0.5, 1.0)} | {f"recall@{b}": float(v) for b, v in inside.items()}
            ranking = Ranking(doc_ids=("d",), evidence_in_budget=inside)
            self.add(task, {}, number, "search", {"retriever": (ranking, scores, None, None, None)})

    def _perplexity(self, task):
        for number in range(8):
            outcomes = {}
            for system, worse in zip(MODELS, (0.05, 0.0), strict=True):
                nats = [3.1 - 0.05 * k + worse + self.rng.gauss(0, 0.1) for k in range(len(LENGTHS))]
                scores = {"nats": sum(nats) / 4} | {f"nats@{p}": n for p, n in zip(LENGTHS, nats, strict=True)}
                outcomes[system] = (Losses(nats=tuple(nats), tokens=(1,) * 4), scores, None, None, None)
            self.add(task, {}, number, "perplexity", outcomes)

    def _cost(self, task):
        for turn in range(4):
            for length in LENGTHS:
                outcomes = {}
                for system in MODELS:
                    striped = system.startswith("striped")
                    cache = 6_000_000 if striped else 46_080 * length
                    carried = Carried(prompt_tokens=length - 16, decode_tokens=16, cache_bytes=cache)
                    seconds = _prefill(system, length) * self.rng.uniform(0.93, 1.1)
                    decode_s = (0.5 if striped else 0.4 + length / 8000) * self.rng.uniform(0.95, 1.05)
                    outcomes[system] = (carried, {}, seconds, decode_s, 90_000_000 + 3 * cache + 40_000 * length)
                self.add(task, {"length_tokens": length, "round": turn}, 0, "cost", outcomes)


def _prefill(system, tokens):
    return tokens / 1500 if system.startswith("striped") else tokens / 1800 + (tokens / 3600) ** 2


class Page(HTMLParser):
    """The tags of a page that are left open, what its tags link to, and its text by tag."""

    VOID = frozenset({"meta", "br", "hr", "img", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.sections, self.cells = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        self.sections += [value for name, value in attributes if tag == "section" and name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.cells and "table" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    Maker(folder)
    return Run(folder)


@pytest.fixture(scope="module")
def report(run):
    return {name: path.read_text() for name, path in write_report(run).items()}


def written(folder, **options):
    Maker(folder, **options)
    return {name: path.read_text() for name, path in write_report(Run(folder)).items()}


def test_the_page_needs_no_network_and_no_script(report):
    page = Page(report["report.html"])
    assert not {"script", "link", "iframe", "object", "img", "image"} & set(page.tags)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in report["report.html"]
    assert "@import" not in report["report.html"]
    assert not re.search(r"\son[a-z]+=", re.sub(r">[^<]*<", "><", report["report.html"]))


def test_every_tag_is_closed_and_no_id_comes_twice(report):
    assert Page(report["report.html"]).open == []
    ids = re.findall(r'\sid="([^"]+)"', report["report.html"])
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in Page(report["report.html"]).links} <= set(ids)


def test_the_sections_come_in_reading_order(report):
    order = "headline thesis gap length position perplexity unanswerable tasks cost controls lost everything"
    assert Page(report["report.html"]).sections == order.split()


def test_the_first_table_has_every_headline_number_with_its_interval(run, report):
    cells = [" ".join(cell.split()) for cell in Page(report["report.html"]).cells]
    scores = analyse(run).headline
    assert len(scores) > 20
    for score in scores:
        text = f"{score.mean:.2f} [{score.low:.2f}, {score.high:.2f}] n {score.answered}"
        assert text in cells, (score, text)
        assert (
            f"{score.mean:.2f}{'**' if f'**{score.mean:.2f}**' in report['report.md'] else ''} [{score.low:.2f}"
            in (report["report.md"])
        )


def test_the_limits_of_the_run_stand_before_its_numbers(report):
    for text in (report["report.html"], report["report.md"]):
        assert text.index("cannot be told from chance") < text.index("[0.")


def test_models_come_first_and_stubs_last_in_the_first_table(report):
    head = next(line for line in report["report.md"].splitlines() if line.startswith("|"))
    names = [name.strip().removeprefix("for scale, no rivals: ") for name in head.strip("|").split("|")]
    assert names == ["what", "measured in", *MODELS, "first less second (p after Holm)", *STUBS]


def test_the_first_table_has_the_declared_difference_of_the_two_models(run, report):
    contrasts = {c.label: c for c in analyse(run).contrasts if c.family == "the models"}
    for label, found in contrasts.items():
        line = next(line for line in report["report.md"].splitlines() if line.startswith(f"| {label} |"))
        said = parts.number(found.mean)
        assert line.split("|")[5].strip().startswith(f"{said} ["), line


def test_a_difference_that_was_declared_the_other_way_is_turned(tmp_path):
    texts = [written(tmp_path / str(turned), kinds=("needle",), turned=turned)["report.md"] for turned in (False, True)]
    lines = [next(line for line in text.splitlines() if line.startswith("| Needle at 4,096")) for text in texts]
    assert lines[0] == lines[1]
    assert "(p = " in lines[0].split("|")[5]


def test_every_context_that_a_task_can_have_is_drawn():
    drawn = {"fill", *plots._CONTEXTS, *plots._FLAT}
    assert drawn == {*get_args(ContextName), *get_args(long_documents._Context)}


def test_filling_is_shown_even_where_it_is_compared_with_nothing(tmp_path):
    texts = written(tmp_path / "run", kinds=("rag",), contexts=("fill", "none"))
    assert "answers: quality and its price" in texts["report.md"]


def test_what_was_not_measured_is_a_dash_and_never_0(tmp_path):
    texts = written(tmp_path / "run", kinds=("needle", "cost"), all_fail=("smollm2-135m-instruct",))
    line = next(line for line in texts["report.md"].splitlines() if line.startswith("| Needle at 4,096 tokens"))
    assert line.split("|")[4].strip() == f"{DASH} (n 0 of 15)"
    assert not re.search(r"\bnan\b", texts["report.html"] + texts["report.md"], re.IGNORECASE)
    scores = json.loads(texts["report.json"])["analysis"]["headline"]
    assert [s["mean"] for s in scores if s["system"] == "smollm2-135m-instruct"] == [None]
    means = [row["mean"] for row in csv.DictReader(texts["cells.csv"].splitlines()) if row["system"].startswith("smol")]
    assert set(means) == {""}


def test_a_column_that_every_system_failed_stays_in_the_first_table(tmp_path):
    texts = written(tmp_path / "run", kinds=("perplexity",), all_fail=tuple(MODELS))
    assert "| Loss on novels |" in texts["report.md"]
    assert texts["report.md"].count(f" {DASH} (n 0 of 8) |") == len(MODELS)
    assert "16 results, 16 of them failures" in texts["report.md"]


def test_text_of_others_stays_text(tmp_path):
    hostile = "<script>alert(1)</script> & <img src=https://example.com/x> | **bold** [x](javascript:y)"
    texts = written(tmp_path / "run", title=hostile, kinds=("needle",))
    assert "script" not in Page(texts["report.html"]).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;img" in texts["report.html"]
    assert "A &lt;fast&gt; one" in texts["report.html"]
    assert "<" not in texts["report.md"]
    assert "\\| \\*\\*bold\\*\\* \\[x\\](javascript:y)" in texts["report.md"]
    assert json.loads(texts["report.json"])["suite"]["title"] == hostile


def test_the_same_run_gives_the_same_bytes_wherever_they_are_written(run, report, tmp_path):
    again = write_report(run, tmp_path / "elsewhere" / "deep")
    assert {name: path.read_text() for name, path in again.items()} == report
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "deep").iterdir()) == sorted(report)


def test_the_csv_has_a_row_for_each_cell_and_gives_its_numbers_back(run, report):
    cells = analyse(run).cells
    rows = list(csv.DictReader(report["cells.csv"].splitlines()))
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        assert (row["task"], row["system"], json.loads(row["cell"])) == (cell.task, cell.system, cell.cell)
        assert json.loads(row["failures"]) == cell.failures
        assert row["mean"] == ("" if math.isnan(cell.mean) else str(cell.mean))
    assert len(list(csv.DictReader(report["costs.csv"].splitlines()))) == len(analyse(run).costs)


def test_the_json_is_the_analysis_with_the_manifest_and_the_limits(run, report):
    whole = json.loads(report["report.json"])
    assert whole["analysis"] == json.loads(analyse(run).model_dump_json())
    assert whole["manifest"] == run.manifest().model_dump(mode="json")
    assert whole["suite"]["limits"] == run.suite().limits


def test_the_tables_of_the_markdown_have_as_many_columns_in_every_line(report):
    tables = re.findall(r"(?:^\|.*\n)+", report["report.md"], re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table


def test_a_suite_without_a_headline_says_so_where_the_table_would_be(tmp_path):
    texts = written(tmp_path / "run", kinds=("retrieval",))
    for text in (texts["report.html"], texts["report.md"]):
        assert "names no figures to come first" in text
    assert "nDCG@10" in texts["report.html"]


def test_contrasts_that_so_few_clusters_cannot_decide_say_so(tmp_path):
    texts = written(tmp_path / "run", kinds=("rag",), clusters=4)
    assert "the least p that 4 clusters and 1 test allow is 0.12" in texts["report.md"]
    assert "the least p that" not in written(tmp_path / "more", kinds=("rag",))["report.md"]


def test_sections_with_nothing_to_show_are_left_out(tmp_path):
    texts = written(tmp_path / "run", kinds=("rag",))
    sections = Page(texts["report.html"]).sections
    assert sections == ["headline", "thesis", "gap", "position", "controls", "lost", "everything"]
    assert "first token" not in texts["report.html"]
    assert "Perplexity" not in texts["report.html"]
    assert "None: every prompt that was run fitted whole" in texts["report.html"]


def test_nothing_is_bold_where_no_contrast_shows_a_model_ahead(tmp_path):
    texts = written(tmp_path / "run", kinds=("rag",), lead=-0.08)
    table, _, rest = texts["report.html"].partition("</table>")
    assert "<strong>" not in table.partition("<table>")[2]
    assert "Nothing is bold" in rest
    assert "No difference can be shown (p &lt; .05 after Holm over 1 test)" in rest


def test_the_model_that_a_contrast_shows_ahead_is_bold_and_named(tmp_path):
    texts = written(tmp_path / "run", kinds=("rag",), lead=0.5)
    first, second = MODELS
    bold = re.findall(r"^\| Answers, window filled \| token F1 \| \*\*0\.\d\d\*\*", texts["report.md"], re.MULTILINE)
    assert len(bold) == texts["report.md"].count("**0.") == 1
    assert f"{first} beats {second} by 0." in texts["report.md"]


def test_of_losses_the_lower_is_ahead(report):
    first, second = MODELS  # the first has the higher loss
    said = rf"Loss on novels: {second} beats {first} by 0\.\d\d \\\[0\.\d\d, 0\.\d\d\\\] nats per token less"
    assert re.search(said, report["report.md"])
    assert re.search(r"^\| Loss on novels \| [^|]+ \| [^*|]+ \| \*\*\d\.\d\d\*\*", report["report.md"], re.MULTILINE)


def test_everything_that_was_cut_or_failed_is_listed(report):
    lines = report["report.md"].partition("## Truncation and failures")[2]
    assert "| tracking | smollm2-135m-instruct | 4,096 tokens | 12 | timeout 6 | 0 | 0 |" in lines
    for model in MODELS:
        assert f"| needle | {model} | 4,096 tokens, depth 100 % | 3 | {DASH} | 3 | 3 |" in lines


def test_a_run_that_was_not_scored_is_refused(tmp_path):
    Maker(tmp_path / "run", kinds=("needle",))
    (tmp_path / "run" / "scores.jsonl").unlink()
    with pytest.raises(UsageError, match=r"run has no scores\.jsonl\. Score it first: `stripedrag eval score .*run`\."):
        write_report(Run(tmp_path / "run"))
