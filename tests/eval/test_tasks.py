"""Contract of every registered task: exact sizes, evidence where it is said to be, the same for the same seed."""

import datetime
import gzip
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from stripedrag.errors import CorpusError, UsageError
from stripedrag.eval.data_formats import DATA, Chapter, Claim, CorpusDocument, CorpusQuestion, LongDocument
from stripedrag.eval.places import holds, share_held
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import (
    Answered,
    Losses,
    Passage,
    Question,
    Ranking,
    SampleRecord,
    Stretch,
)
from stripedrag.eval.suite import load_suite, parse_suite
from stripedrag.eval.tasks import AnyTask, ReadingTask
from stripedrag.eval.tasks.no_overlap import LINKS
from stripedrag.eval.tasks.recall import KINDS
from stripedrag.eval.tasks.vocabulary import NAMES, TOWNS
from stripedrag.jsonl import read_lines
from stripedrag.rag.packing import POLICIES


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    made = Resources(seed=0, reference_tokenizer="smollm2-135m-instruct", folder=tmp_path_factory.mktemp("run"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def samples(suite, resources):
    return {task.name: (task, list(task.samples(resources))) for task in suite.tasks}


def asked(sample):
    return f"{sample.question}\n{sample.instruction}" if sample.instruction else sample.question


def questions(samples):
    return [(task, s) for task, found in samples.values() for s in found if isinstance(s, Question)]


def record(sample):
    return SampleRecord.of(sample)


def test_the_contract_tests_run_over_every_registered_kind_of_task(suite):
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(AnyTask)[0])}
    assert kinds - {"lm_eval"} == {task.kind for task in suite.tasks}  # lm_eval has a file of tests of its own


def test_ids_are_unique_and_each_sample_says_its_task(samples):
    for task, found in samples.values():
        assert found
        assert len({sample.id for sample in found}) == len(found)
        assert {sample.task for sample in found} == {task.name}
        assert {sample.operation for sample in found} == {task.operation}


def test_prompt_and_answer_never_exceed_the_length_that_is_asked_for(samples, resources):
    sized = 0
    for task, sample in questions(samples):
        limit = sample.cell.get("length_tokens", sample.cell.get("budget_tokens", getattr(task, "budget_tokens", None)))
        if limit is not None:
            assert resources.prompt_tokens(asked(sample), sample.passages) + task.answer_tokens <= limit, sample.id
            sized += 1
    assert sized > 40


def test_planted_texts_fill_their_length_to_a_sentence(samples, resources):
    for task, sample in questions(samples):
        if task.kind in ("needle", "no_overlap", "tracking", "multi_hop"):
            tokens = resources.prompt_tokens(asked(sample), sample.passages) + task.answer_tokens
            assert tokens > sample.cell["length_tokens"] - 32, sample.id


def test_evidence_stands_at_its_place_and_holds_the_answer(samples):
    checked = 0
    for task, sample in questions(samples):
        if task.kind in ("needle", "tracking", "no_overlap", "multi_hop"):
            (passage,) = sample.passages
            planted = [passage.text[e.start : e.end] for e in sample.evidence]
            assert sample.evidence_in_context
            assert all(any(reference in text for text in planted) for reference in sample.references), sample.id
            checked += 1
    assert checked > 10


def test_a_needle_stands_where_its_depth_says(samples):
    for sample in samples["needle"][1]:
        assert abs(sample.evidence_position - sample.cell["depth"]) < 0.3
    for depth, at in ((0.0, 0.0), (1.0, None)):
        for sample in samples["needle"][1]:
            if sample.cell["depth"] == depth:
                (passage,), (stretch,) = sample.passages, sample.evidence
                assert stretch.start == at if at is not None else stretch.end == len(passage.text)


def test_a_window_keeps_its_riddle_over_lengths_and_depths(samples):
    by_window = {}
    for sample in samples["needle"][1]:
        by_window.setdefault(sample.cluster, set()).add((sample.question, sample.references))
    assert len(by_window) == 2
    assert all(len(asked) == 1 for asked in by_window.values())


def test_facts_to_recall_share_a_window_and_none_is_told_by_its_form(samples):
    found = samples["recall"][1]
    assert len(found) == 2 * 2 * 3  # lengths, windows, facts
    for one in found:
        text = one.passages[0].text
        sentence = text[one.evidence[0].start : one.evidence[0].end]
        assert one.references[0] in sentence and sentence.endswith(".") and one.shared
        together = [other for other in found if other.cell == one.cell and other.cluster == one.cluster]
        assert {other.passages for other in together} == {one.passages} and len(together) == 3
        depths = sorted(other.evidence_position for other in together)
        assert depths[0] < 0.4 < depths[1] < 0.75 < depths[2]
        pattern = next(said for said, asks, _ in KINDS if _says(asks, one.question))
        assert len([s for s in re.split(r"(?<=[.!?])\s+", text) if _says(pattern, s)]) == 2
    short, long = (
        {(o.subject, o.question, o.references) for o in found if o.cell["length_tokens"] == length}
        for length in (384, 448)
    )
    assert short == long


def _says(pattern, sentence):
    return re.fullmatch(re.escape(pattern).replace(r"\{0\}", ".+").replace(r"\{1\}", ".+"), sentence) is not None


def test_questions_that_share_a_context_are_grouped_by_document(resources, suite):
    task = next(task for task in suite.tasks if task.name == "shared")
    found = list(task.samples(resources))
    assert len(found) == 2 * 4 and all(one.shared for one in found)
    assert len({one.cluster for one in found}) == 4
    with pytest.raises(UsageError, match="has 0 groups of 2 questions on one document in split 'dev', and"):
        list(task.model_copy(update={"together": 2}).samples(resources))


def test_multi_key_needles_stand_beside_others_and_multi_value_asks_for_all(samples):
    (key,), (value,), (query,) = (samples[name][1] for name in ("multi-key", "multi-value", "multi-query"))
    assert key.passages[0].text.count("The registry number of the") == 4
    assert len(key.references) == 1
    assert len(value.references) == len(query.references) == 4
    assert len({value.passages[0].text[e.start : e.end].rpartition(" is ")[0] for e in value.evidence}) == 1
    assert len({query.passages[0].text[e.start : e.end].rpartition(" is ")[0] for e in query.evidence}) == 4


def test_a_needle_without_overlap_shares_no_long_word_with_its_question():
    for sentence, question in LINKS:
        shared = {w.lower().strip("?.") for w in sentence.split()} & {w.lower().strip("?.") for w in question.split()}
        assert not {word for word in shared if len(word) >= 4}, (sentence, question)


def test_nobody_in_the_novels_is_a_rival_answer():
    novels = " ".join(chapter.text for chapter in read_lines(DATA / "haystack" / "novels.jsonl.xz", Chapter))
    occurring = set(re.findall(r"[A-Za-z]+", novels)) | set(re.findall(r"[a-z]+", novels.lower()))
    assert not {question.split()[-1].strip("?") for _, question in LINKS} & occurring
    assert not {*NAMES, *TOWNS} & occurring


@pytest.mark.parametrize("name", ["quick", "compare", "striping", "full"])
def test_the_samples_of_the_planted_tasks_of_every_shipped_suite_can_be_made(name, resources):
    for task in load_suite(name).tasks:
        if task.kind in ("perplexity", "cost", "tracking", "no_overlap"):
            found = list(task.samples(resources))
            assert found
            if task.kind == "tracking":  # within a sentence of the length, and the novels have long ones
                for sample in found:
                    tokens = resources.prompt_tokens(asked(sample), sample.passages) + task.answer_tokens
                    assert sample.cell["length_tokens"] - 256 < tokens <= sample.cell["length_tokens"]


@pytest.mark.parametrize("name", ["common", "frequent"])
def test_the_words_asked_for_are_the_most_frequent_ones_without_a_tie(samples, name):
    from collections import Counter

    for sample in samples[name][1]:
        counts = Counter(sample.passages[0].text.removeprefix("Words: ").split()).most_common()
        wanted = len(sample.references)
        assert {word for word, _ in counts[:wanted]} == set(sample.references)
        assert counts[wanted - 1][1] > counts[wanted][1]


def test_contexts_are_what_their_names_say(samples):
    task, found = samples["answers"]
    for sample in found:
        name = sample.cell["context"]
        assert (not sample.passages) == (name == "none")
        if name in ("fill", "oracle", "reranked-5", "top-5", "top-20"):
            assert sample.evidence_in_context, sample.id
        if name == "random":
            assert not {p.doc_id for p in sample.passages} & {e.doc_id for e in sample.evidence}
        if name == "oracle":
            assert {p.doc_id for p in sample.passages} == {e.doc_id for e in sample.evidence}
    assert {s.cell["context"] for s in found} == set(task.contexts)


def test_a_filled_context_is_what_the_pipeline_would_read(samples, resources):
    from stripedrag.rag.retriever import Retriever

    task, found = samples["answers"]
    for sample in found:
        if sample.cell["context"] == "fill":
            budget = sample.cell["budget_tokens"] - task.answer_tokens - resources.prompt.overhead_tokens(asked(sample))
            context = Retriever(task.index(resources), policy=task.policies[0]).retrieve(
                sample.question, budget_tokens=budget, tokenizer=resources.prompt, render=resources.prompt.render
            )
            assert [(s.doc_id, s.start, s.end, s.text) for s in context.spans] == [
                (p.doc_id, p.start, p.end, p.text) for p in sample.passages
            ]


def test_several_policies_are_the_same_passages_in_several_orders(samples, resources):
    task, _ = samples["answers"]
    orders = {"contexts": ("fill", "none"), "budgets": (2048,), "policies": POLICIES, "samples_per_cell": 2}
    questions = {}
    for sample in task.model_copy(update=orders).samples(resources):
        questions.setdefault(sample.subject, {})[sample.cell.get("policy")] = sample.passages
    assert len(questions) == 2
    for read in questions.values():
        assert read.keys() == {None, *POLICIES}
        assert read[None] == ()
        assert len(read["rank"]) > 1
        assert read["best-last"] == read["rank"][::-1]
        assert all({*read["rank"]} == {*read[policy]} for policy in POLICIES)


def test_an_unanswerable_question_has_no_passage_of_its_documents(samples):
    _, found = samples["unanswerable"]
    by_subject = {}
    for sample in found:
        by_subject.setdefault(sample.subject, {})[sample.answerable] = sample
    for pair in by_subject.values():
        assert pair[True].question == pair[False].question
        gone = {e.doc_id for e in pair[True].evidence}
        assert gone & {p.doc_id for p in pair[True].passages}
        assert not gone & {p.doc_id for p in pair[False].passages}
        assert pair[False].references == ("not in the documents",)


def test_a_long_document_is_read_from_its_head_or_from_its_best_parts(samples):
    for sample in samples["long"][1]:
        if sample.cell["context"] == "head":
            (passage,) = sample.passages
            assert passage.start == 0


def test_a_long_document_s_contexts_hold_the_evidence_as_their_names_say(samples):
    shares = {}
    for sample in samples["long"][1]:
        shares.setdefault(sample.cell["context"], set()).add(sample.evidence_share)
        for passage in sample.passages:
            assert passage.doc_id == sample.cluster
    assert shares["oracle"] == shares["reranked-5"] == {1.0}
    assert shares["head"] == shares["none"] == {0.0}
    (budget,) = {s.cell["budget_tokens"] for s in samples["long"][1] if s.cell["context"] == "oracle"}
    assert budget == 384


def test_tasks_without_evidence_are_left_out_where_evidence_is_asked_for(samples, resources, files, tmp_path):
    task, _ = samples["long"]
    lines = [json.loads(line) for line in Path(files["documents"]).read_text().splitlines()]
    del lines[0]["tasks"][0]["evidence"]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=r"has 1 tasks with evidence \(.+\) of source None and 'long' wants 2"):
        list(task.model_copy(update={"documents": bare}).samples(resources))
    assert list(task.model_copy(update={"documents": bare, "contexts": ("fill",)}).samples(resources))


def test_perplexity_texts_end_at_the_last_position_and_count_the_reference_s_tokens(samples, resources):
    for sample in samples["perplexity"][1]:
        assert sample.boundaries[-1] == len(sample.text)
        assert sum(sample.tokens) == 256
        assert abs(resources.count(sample.text) - 256) <= 1


def test_the_same_seed_gives_the_same_samples_and_another_one_others(suite, samples, tmp_path):
    for seed, same in ((0, True), (1, False)):
        again = Resources(seed=seed, reference_tokenizer="smollm2-135m-instruct", folder=tmp_path / str(seed))
        task = suite.tasks[0]
        assert (list(task.samples(again)) == samples[task.name][1]) == same
        again.close()


def test_every_reading_task_gives_its_oracle_full_marks_and_nothing_none(samples):
    for task, found in samples.values():
        if isinstance(task, ReadingTask):
            for sample in found:
                said = Answered(text=task.oracle(sample), finish="stop", prompt_tokens=1, answer_tokens=1)
                scores = task.score(record(sample), said)
                assert scores and set(scores.values()) == {1.0}, (sample.id, scores)
                empty = task.score(record(sample), said.model_copy(update={"text": ""}))
                assert next(iter(empty.values())) == (sample.answerable if task.kind == "unanswerable" else 0)


def test_abstention_is_right_only_where_there_is_nothing_to_find(samples):
    task, found = samples["unanswerable"]
    for sample in found:
        said = Answered(text="That is not in the documents.", finish="stop", prompt_tokens=1, answer_tokens=1)
        assert task.score(record(sample), said)["decision"] == (not sample.answerable)


def test_retrieval_and_perplexity_scores(samples):
    task, (sample, *_) = samples["retrieval"]
    (right,) = sample.relevant
    output = Ranking(doc_ids=("x", right), evidence_in_budget={64: False, 256: True}, evidence_in_top={1: False})
    scores = task.score(record(sample), output)
    assert scores.pop("ndcg@10") == pytest.approx(0.6309, abs=1e-4)
    assert scores == {"recall_top_1": 0.0, "recall@64": 0.0, "recall@256": 1.0}
    task, (sample, *_) = samples["perplexity"]
    scores = task.score(record(sample), Losses(nats=(64.0, 128.0, 128.0), tokens=(1, 1, 1)))
    assert scores == {"nats": 1.25, "nats@64": 1.0, "nats@128": 2.0, "nats@256": 1.0}


def test_the_evidence_s_place_is_that_of_its_first_part(samples):
    for name in ("multi-hop", "multi-value", "multi-query"):
        for sample in samples[name][1]:
            first = min(stretch.start for stretch in sample.evidence)
            assert sample.evidence_position == pytest.approx(first / len(sample.passages[0].text))


def test_evidence_in_joined_or_touching_passages_counts_as_held():
    def passage(start, end):
        return Passage(doc_id="d", title="", start=start, end=end, text="x" * (end - start))

    needed = [Stretch(doc_id="d", start=8, end=12)]
    assert holds([passage(0, 10), passage(10, 20)], needed)
    assert not holds([passage(0, 10), passage(11, 20)], needed)
    assert not holds([Passage(doc_id="e", title="", start=0, end=20, text="x" * 20)], needed)
    assert holds([], []) is None


def test_the_share_of_evidence_held_counts_each_character_once():
    def at(doc_id, start, end):
        return Stretch(doc_id=doc_id, start=start, end=end)

    evidence = [at("d", 10, 20), at("e", 0, 30)]
    assert share_held([at("d", 0, 15), at("d", 12, 16)], evidence) == 6 / 40
    assert share_held([at("d", 18, 90), at("d", 0, 12), at("e", 0, 30)], evidence) == 34 / 40
    assert share_held([at("d", 0, 90), at("e", 0, 30)], evidence) == 1
    assert share_held([], evidence) == 0
    assert share_held([at("d", 0, 90)], []) is None


def test_the_data_that_ships_is_whole_and_its_places_hold_the_answers():
    corpus = {d.id: d for d in read_lines(DATA / "rag_qa" / "corpus.jsonl.xz", CorpusDocument)}
    found = list(read_lines(DATA / "rag_qa" / "questions.jsonl.xz", CorpusQuestion))
    assert (len(corpus), len(found)) == (6167, 497)
    for question in found:
        (span,) = question.gold_spans
        assert corpus[span.doc_id].text[span.start : span.end] in question.answers
    assert len(list(read_lines(DATA / "haystack" / "novels.jsonl.xz", Chapter))) == 603
    assert sum(len(d.tasks) for d in read_lines(DATA / "long_documents" / "documents.jsonl.xz", LongDocument)) == 683
    abstracts = {d.id for d in read_lines(DATA / "scifact" / "corpus.jsonl.xz", CorpusDocument)}
    claims = list(read_lines(DATA / "scifact" / "queries.jsonl.xz", Claim))
    assert (len(abstracts), len(claims)) == (5183, 587)
    assert all(set(claim.qrels) <= abstracts for claim in claims)
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 8_000_000


def test_a_bad_data_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"id": "1", "question": "?", "answer": ["x"]}\n')
    with pytest.raises(CorpusError, match=r"q\.jsonl, line 1 is no CorpusQuestion: answers: Field required"):
        list(read_lines(file, CorpusQuestion))
    file.write_text('{"id": "1", "text": "a"}\n\n{"id": "1", "text": "b"}\n')
    with pytest.raises(CorpusError, match=r"line 3: the id '1' came before"):
        list(read_lines(file, CorpusDocument))
    file.write_text('{"id": "1", "text": "a"}\n{"id"\n')
    with pytest.raises(CorpusError, match=r"line 2 cannot be read"):
        list(read_lines(file, CorpusDocument))
    (tmp_path / "bad.xz").write_bytes(b"no xz")
    with pytest.raises(CorpusError, match=r"bad\.xz, line 1 cannot be read"):
        list(read_lines(tmp_path / "bad.xz", CorpusDocument))
    whole = gzip.compress(b'{"id": "a", "text": "' + bytes(range(32, 34)) * 900 + b'"}')
    (tmp_path / "bad.gz").write_bytes(whole[:20] + b"\xff\xff\xff\xff" + whole[24:])
    with pytest.raises(CorpusError, match=r"bad\.gz, line 1 cannot be read"):
        list(read_lines(tmp_path / "bad.gz", CorpusDocument))
    for odd in ('{"id": "a", "text": "\\ud800"}', '{"id": "a", "text": "b", "more": ' + "[" * 9000 + "}"):
        (tmp_path / "odd.jsonl").write_text(odd + "\n")
        with pytest.raises(CorpusError, match=r"odd\.jsonl, line 1 "):
            list(read_lines(tmp_path / "odd.jsonl", CorpusDocument))
    with pytest.raises(CorpusError, match=r"gone\.jsonl cannot be read: No such file"):
        list(read_lines(tmp_path / "gone.jsonl", CorpusDocument))


def test_what_cannot_be_made_is_refused_with_the_numbers(tasks, resources):
    def made(**declared):
        suite = parse_suite(
            {"name": "t", "title": "t", "systems": [{"kind": "stub", "name": "oracle"}], "tasks": [declared]}, name="t"
        )
        return list(suite.tasks[0].samples(resources))

    named = {task["name"]: task for task in tasks}
    with pytest.raises(UsageError, match=r"has \d windows of \d+ tokens and the task wants 30\. Lower its samples"):
        made(**named["needle"] | {"samples": 30, "lengths": [9000]})
    with pytest.raises(UsageError, match=r"planted sentences do not fit the task's length"):
        made(**named["multi-query"] | {"lengths": [100]})
    with pytest.raises(UsageError, match=r"has 4 questions of split 'dev' and the task wants 5"):
        made(**named["answers"] | {"samples": 5})
    with pytest.raises(UsageError, match=r"a budget of 64 tokens leaves nothing for passages"):
        made(**named["answers"] | {"budgets": [64], "answer_tokens": 60})
    with pytest.raises(UsageError, match=r"holds no list of words"):
        made(**named["common"] | {"lengths": [64]})
    with pytest.raises(UsageError, match=r"has 2 tasks with evidence \(.+\) of source None and 'long' wants 3"):
        made(**named["long"] | {"samples": 3})
    with pytest.raises(UsageError, match=r"has no query of split 'test'"):
        made(**named["judged"] | {"split": "test"})


def test_what_yaml_can_say_and_a_suite_cannot_is_refused():
    ring = {"name": "t"}
    ring["title"] = ring
    for declared in (ring, {"name": datetime.date(2024, 1, 1)}, {("a", "b"): 1}):
        with pytest.raises(UsageError, match=r"the suite bad\.yaml holds what a suite cannot: "):
            parse_suite(declared, name="bad.yaml")


def test_a_suite_with_faults_is_refused_with_all_of_them():
    with pytest.raises(UsageError) as caught:
        parse_suite(
            {
                "name": "t",
                "title": "t",
                "sytems": [],
                "systems": [{"kind": "stub", "name": "oracle"}, {"kind": "stub", "name": "genius"}],
                "tasks": [{"kind": "needle", "name": "n", "lengths": [512], "dephts": [0.5]}],
            },
            name="bad.yaml",
        )
    text = str(caught.value)
    assert "the suite bad.yaml has 3 faults" in text
    assert "sytems: no such key here" in text
    assert "dephts: no such key here" in text
    assert "'oracle', 'empty', 'echo' or 'chance'" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headline": [{"label": "x", "task": "gone"}]}, "no task gone in this suite; there is n"),
        ({"systems": [{"kind": "stub", "name": "oracle"}] * 2}, "systems oracle come twice"),
        (
            {"headline": [{"label": "x", "task": "n", "metric": "foo"}]},
            "'x' asks for foo; n has string_match_all",
        ),
        (
            {"tasks": [{"kind": "needle", "name": "n", "lengths": [512, 512]}]},
            "has a fault:\n  tasks.0.needle: lengths has something twice: 512, 512",
        ),
        ({"tasks": [{"kind": "needle", "name": "n", "lengths": []}]}, "lengths: Tuple should have at least 1 item"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"timeout_s": float("inf")}, "timeout_s: Input should be a finite number"),
        ({"tasks": []}, "there are no tasks; name at least one"),
        ({"name": ".."}, "name: String should match pattern"),
        (
            {"tasks": [{"kind": "cost", "name": "n", "lengths": [512]}], "headline": [{"label": "x", "task": "n"}]},
            "'x' asks for n, which is measured and not scored",
        ),
        (
            {
                "tasks": [{"kind": "retrieval", "name": "n", "budgets": [512]}],
                "headline": [{"label": "x", "task": "n", "metric": "recall@999"}],
            },
            "'x' asks for recall@999; n has ndcg@10, recall@512",
        ),
        ({"schema_version": 9}, "schema_version is 9; this stripedrag reads 1"),
    ],
)
def test_a_suite_that_contradicts_itself_is_refused(change, message):
    base = {
        "name": "t",
        "title": "t",
        "systems": [{"kind": "stub", "name": "oracle"}],
        "tasks": [{"kind": "needle", "name": "n", "lengths": [512]}],
    }
    with pytest.raises(UsageError, match=message):
        parse_suite(base | change, name="t")


def test_a_contrast_in_two_families_is_refused():
    stubs = [{"kind": "stub", "name": name} for name in ("oracle", "chance")]
    sides = [{"system": "oracle", "against": "chance"}, {"system": "chance", "against": "oracle"}]
    families = [{"name": s["system"], "contrasts": [{"label": "x", "task": "n"} | s]} for s in sides]
    tasks = [{"kind": "needle", "name": "n", "lengths": [512]}]
    with pytest.raises(UsageError, match="the contrast 'x' is declared twice; a second family would undo Holm's"):
        parse_suite({"name": "t", "title": "t", "systems": stubs, "tasks": tasks, "families": families}, name="t")


@pytest.mark.parametrize(
    "text", ["limits: 2020-13-45", "? [a, b]\n: 3", "seed: !!int abc", f"seed: {'9' * 5000}", f"limits: {'[' * 3000}"]
)
def test_yaml_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml is no YAML that can be read: "):
        load_suite(str(tmp_path / "bad.yaml"))


def test_yaml_may_merge_what_it_has_named(tmp_path):
    (tmp_path / "merged.yaml").write_text(
        "name: t\ntitle: t\nsystems: [{kind: stub, name: oracle}]\ntasks:\n"
        "  - &first {kind: needle, name: a, lengths: [512]}\n  - {<<: *first, name: b}\n"
    )
    assert [task.name for task in load_suite(str(tmp_path / "merged.yaml")).tasks] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"evidence": [{"start": 0, "end": 99_999}]},
            r"'s0-1' of document 's0', \d+ characters long, has evidence at 0:",
        ),
        ({"evidence": [{"doc_id": "s1", "start": 0, "end": 9}]}, r"has evidence at 0:9 of 's1'\. Mend the task"),
        ({"id": "s1-1"}, r"has two tasks 's1-1'\. Make the ids of tasks unique"),
    ],
)
def test_long_documents_whose_tasks_cannot_be_are_refused(samples, resources, files, tmp_path, change, message):
    task, _ = samples["long"]
    lines = [json.loads(line) for line in Path(files["documents"]).read_text().splitlines()]
    lines[0]["tasks"][0] |= change
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CorpusError, match=message):
        list(task.model_copy(update={"documents": tmp_path / "odd.jsonl"}).samples(resources))


def test_gold_outside_its_passages_is_refused(samples, resources, files, tmp_path):
    task, _ = samples["answers"]
    lines = [json.loads(line) for line in Path(files["questions"]).read_text().splitlines()]
    for line in lines:
        line["gold_passages"] = [{**line["gold_spans"][0], "end": line["gold_spans"][0]["end"] - 1}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CorpusError, match=r"has gold_spans outside its gold_passages\. Mend the question"):
        list(task.model_copy(update={"questions": tmp_path / "odd.jsonl"}).samples(resources))


def test_a_suite_is_found_by_name_or_file_and_a_bad_file_is_named(tmp_path):
    assert load_suite("quick").name == "quick"
    names = "compare, full, look, openllm, order, quick, refusal, striping, window"
    with pytest.raises(UsageError, match=f"no suite 'quik': it is not one of {names}, and not a file"):
        load_suite("quik")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match=r"bad\.yaml is no YAML"):
        load_suite(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("name: a\ntitle: b\nname: c\n")
    with pytest.raises(UsageError, match=r"the key 'name' comes twice at line 1"):
        load_suite(str(tmp_path / "bad.yaml"))
