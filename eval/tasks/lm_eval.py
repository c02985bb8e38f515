"""Tasks of lm-evaluation-harness (EleutherAI): its prompts, few-shot examples, filters and metrics, our runs.

lm-eval is an extra and is imported when a task is used.
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from stripedrag.errors import UsageError
from stripedrag.eval.data_formats import DATA
from stripedrag.eval.resources import Resources
from stripedrag.eval.schema import LMDocument, LMRequest, LMResponses, SampleRecord
from stripedrag.eval.tasks.base import Task

# Examples in the context, as the Open LLM Leaderboard asked for (its first version, 2023).
OPENLLM = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
# Where lm-eval keeps them: reading its whole index takes 20 s, a folder none.
_OPENLLM_FOLDERS = {
    "arc_challenge": "arc",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "truthfulqa_mc2": "truthfulqa",
    "winogrande": "winogrande",
    "gsm8k": "gsm8k",
}
SHIPPED = DATA / "lm_eval"
_UNLIKELY = -100.0


class LMEvalTask(Task):
    """The lm-eval task or group `task`, a sample for each document of each of its tasks, the first `limit` of each.

    `include_path` is a folder of YAML in which it is declared; None takes those that ship here, then lm-eval's own.
    `num_fewshot` None is the task's own number, or the official one for `OPENLLM`. The run's seed draws the examples.

    Metrics are those that lm-eval averages: another one (a perplexity, F1 over all documents) is left out and told of,
    and a task with no other is refused. `acc_norm` is the headline where there is one, else the task's first metric.
    Where a task has several filters, a metric is the first filter's and `metric@filter` another's: gsm8k scores
    `exact_match` (strict-match) and `exact_match@flexible-extract`. A document that is asked `repeats` times is asked
    once here, since greedy answers are all the same.
    """

    kind: Literal["lm_eval"]
    task: str
    include_path: str | None = None
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)

    operation: ClassVar[str] = "lm_eval"

    def samples(self, resources: Resources) -> Iterator[LMDocument]:
        """The documents with their requests. Raises `UsageError` where lm-eval, the task or its data is missing."""
        for name, (found, _) in self._tasks().items():
            if left_out := _not_averaged(name, found):
                resources.tell(f"{self.name}: {', '.join(left_out)} of {name} left out, which lm-eval does not average")
            found.set_fewshot_seed(seed=resources.seed)
            try:
                with _lm_eval_seeds():
                    found.build_all_requests(limit=self.limit, rank=0, world_size=1)
            except ValueError as error:
                shots = found.get_config("num_fewshot")
                raise UsageError(
                    f"lm-eval cannot make the requests of {name!r} with num_fewshot {shots}: {error}"
                ) from error
            for doc_id, instances in groupby(found.instances, key=lambda instance: instance.doc_id):
                ordered = sorted(instances, key=lambda instance: int(instance.idx))
                yield LMDocument(
                    id=f"{self.name}/{name}/{doc_id}",
                    task=self.name,
                    cell={"subtask": name},
                    cluster=f"{name}/{doc_id}",
                    requests=tuple(LMRequest(kind=i.request_type, arguments=i.args) for i in ordered),
                )

    def score(self, sample: SampleRecord, output: LMResponses) -> dict[str, float]:
        """What lm-eval's filters and `process_results` make of the responses. Needs the data, and no model."""
        from lm_eval.api.instance import Instance

        name, found, doc = self._document(sample)
        repeats = found.get_config("repeats") or 1
        found._instances = [
            Instance(
                request_type=found.OUTPUT_TYPE,
                doc=doc,
                arguments=(),
                idx=idx,
                resps=[tuple(response) if isinstance(response, list) else response] * repeats,
            )
            for idx, response in enumerate(output.responses)
        ]
        found.apply_filters()
        left_out, scores = _not_averaged(name, found), dict[str, float]()
        for number, kept in enumerate(found.instances[0].filtered_resps):
            values = found.process_results(doc, [instance.filtered_resps[kept] for instance in found.instances])
            suffix = f"@{kept}" if number else ""
            scores |= {f"{metric}{suffix}": float(value) for metric, value in values.items() if metric not in left_out}
        return {"acc_norm": scores["acc_norm"]} | scores if "acc_norm" in scores else scores

    def oracle(self, sample: LMDocument) -> tuple[Any, ...]:
        """The responses of a model that knows what the task names as its target, and thinks all else unlikely."""
        name, found, doc = self._document(sample)
        if not hasattr(found, "doc_to_choice"):
            raise UsageError(f"{name!r} is written in Python and not declared in YAML; its right answers are not known")
        target = found.doc_to_target(doc)
        choices: Any = None if found.config.doc_to_choice is None else found.doc_to_choice(doc)
        if found.OUTPUT_TYPE == "multiple_choice":
            if found.multiple_input:
                target = found.doc_to_text(doc)
            targets = target if isinstance(target, list) else [target]
            right = {choices.index(t) if isinstance(t, str) else t for t in targets}
            return tuple([0.0, True] if i in right else [_UNLIKELY, False] for i in range(len(sample.requests)))
        if found.OUTPUT_TYPE == "generate_until":
            target = choices[target] if choices is not None else target
            return (str(target[0] if isinstance(target, list) else target),) * len(sample.requests)
        return tuple(0.0 if r.kind == "loglikelihood_rolling" else [0.0, True] for r in sample.requests)

    def data(self) -> Mapping[str, str]:
        """The files of the local folder; none for lm-eval's own tasks, whose data are the hub's."""
        folder = self._folder()
        if folder is None:
            return {}
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix(): str(path) for path in files}

    def _folder(self) -> Path | None:
        if self.include_path is not None:
            return Path(self.include_path).resolve()
        return SHIPPED if (SHIPPED / f"{self.task}.yaml").is_file() else None

    def _tasks(self) -> dict[str, tuple[Any, Any]]:
        shots = OPENLLM.get(self.task) if self.num_fewshot is None else self.num_fewshot
        return _load(self.task, self._folder(), shots)

    def _document(self, sample: Any) -> tuple[str, Any, Any]:
        """The lm-eval task's name, the task, and the document that a sample is made of."""
        name = str(sample.cell["subtask"])
        found, documents = self._tasks()[name]
        return name, found, documents[int(sample.id.rpartition("/")[2])]


def beside(*, data_files: Mapping[str, str], config_source: str, **metadata: Any) -> dict[str, Any]:
    """Splits from JSON lines files whose paths are relative to the task's YAML: a `custom_dataset` of lm-eval.

    With `dataset_path: json` such paths would be relative to wherever the process was started.
    """
    from datasets import Dataset

    del metadata
    folder = Path(config_source).parent
    lines = {split: (folder / file).read_text(encoding="utf-8").splitlines() for split, file in data_files.items()}
    return {split: Dataset.from_list([json.loads(line) for line in of_split]) for split, of_split in lines.items()}


@cache
def _load(task: str, folder: Path | None, shots: int | None) -> dict[str, tuple[Any, Any]]:
    """lm-eval's tasks of that name with their documents, ready to make requests."""
    if find_spec("lm_eval") is None:
        raise UsageError(f"the task {task!r} needs lm-evaluation-harness: `pip install 'stripedrag[eval]'`")
    manager = _manager(folder, None if folder else _OPENLLM_FOLDERS.get(task))
    if task not in manager.all_tasks:
        near = get_close_matches(task, manager.all_tasks, n=1)
        raise UsageError(
            f"no lm-eval task {task!r} {f'in the YAML of {folder}' if folder else 'in lm-eval'}"
            + (f"; did you mean {near[0]!r}?" if near else ". YAML that cannot be read counts as none.")
        )
    with _lm_eval_seeds():
        try:
            found = manager.load(task)["tasks"]
        except (ConnectionError, FileNotFoundError) as error:
            raise UsageError(
                f"the data of the lm-eval task {task!r} cannot be had: {str(error).partition(chr(10))[0]}. They need "
                f"the Hugging Face hub (a network, HF_HUB_OFFLINE not set) or include_path, a folder with the task's "
                f"YAML over local files."
            ) from error
    for name, one in found.items():
        _refuse_unfit(name, one)
        _set_shots(name, one, shots)
    loaded = {}
    for name, one in found.items():
        with _lm_eval_seeds():
            loaded[name] = (one, one.eval_docs)
    return loaded


@cache
def _manager(folder: Path | None, inside: str | None) -> Any:
    """lm-eval's index of a folder, of one inside its own, or of all that it has."""
    import lm_eval.tasks

    if folder is None and inside is None:
        return lm_eval.tasks.TaskManager()
    place = folder or Path(lm_eval.tasks.__file__).parent / str(inside)
    if not place.is_dir():
        raise UsageError(f"include_path is {str(place)!r}, which is no folder; it holds lm-eval's YAML")
    return lm_eval.tasks.TaskManager(include_path=place, include_defaults=False)


def _set_shots(name: str, found: Any, shots: int | None) -> None:
    own = found.get_config("num_fewshot")
    if own == 0 and shots:  # lm-eval would go on with none
        raise UsageError(f"num_fewshot is {shots}; {name!r} is defined without examples. Leave num_fewshot out.")
    found.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)


def _refuse_unfit(name: str, found: Any) -> None:
    if getattr(found, "UNSAFE_CODE", False):
        raise UsageError(f"the lm-eval task {name!r} runs code that the model writes, which is not done here")
    if getattr(found, "MULTIMODAL", False):
        raise UsageError(f"the lm-eval task {name!r} shows images or sounds; the models here read text")
    if found.OUTPUT_TYPE == "generate_until" and found.config.generation_kwargs:
        from stripedrag.eval.lm import greedy_settings

        greedy_settings(found.config.generation_kwargs)
    _not_averaged(name, found)


def _not_averaged(name: str, found: Any) -> list[str]:
    """The metrics that lm-eval aggregates by something else than their mean. Raises `UsageError` where all are such."""
    from lm_eval.api.metrics import mean

    aggregations = found.aggregation()
    others = [metric for metric, aggregate in aggregations.items() if aggregate is not mean]
    if others and len(others) == len(aggregations):
        raise UsageError(
            f"the lm-eval task {name!r} has only metrics that are no means over documents ({', '.join(others)}); runs "
            f"here average. Use `lm_eval` itself, or declare the task with another metric."
        )
    return others


@contextmanager
def _lm_eval_seeds() -> Iterator[None]:
    """The global generators as lm-eval seeds them, put back afterwards: some tasks shuffle when they are loaded.

    So scoring sees the documents that were asked about, whatever the run's seed is.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
