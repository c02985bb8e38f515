"""What crosses a file in an evaluation: samples, predictions, scores, timings and the manifest of a run.

A run is a folder. `samples.jsonl`, `predictions.jsonl`, `manifest.json` and what is made from them hold the same bytes
for the same seed on the same machine; everything that a clock or a memory meter says stands in `timings.jsonl`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stripedrag.eval.places import holds, share_held

SCHEMA_VERSION: Literal[1] = 1
Axis = str | int | float  # a coordinate of a cell: length_tokens, depth, context, budget_tokens, …
Overflow = Literal["refuse", "cut-start", "cut-middle", "cut-end"]


class Record(BaseModel):
    """Something that is read and written: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Stretch(Record):
    """Characters [start, end) of a document."""

    doc_id: str
    start: int
    end: int


class Passage(Stretch):
    """A stretch of a document that a system reads: `text` is what stands there, `title` the document's."""

    title: str
    text: str


class _Sample(Record):
    """`id` is unique in a run, `cell` says where on the task's axes it lies, `cluster` what it shares its luck with.

    `subject` is what stays the same from cell to cell, such as the question, so that cells can be compared in pairs.
    """

    id: str
    task: str
    cell: dict[str, Axis]
    cluster: str
    subject: str = ""


class Question(_Sample):
    """A question over passages that are given, in the order in which they are read.

    `instruction` says how to answer and is read after the question. `evidence` is what an answer needs, in whatever
    document it stands; where it lies in the passages is known from `passages`. References are empty only for tasks
    that score something else than words. Of neighbouring questions with the same `passages` that say `shared`, a
    system reads these once.
    """

    operation: Literal["answer"] = "answer"
    question: str
    instruction: str = ""
    passages: tuple[Passage, ...] = ()
    references: tuple[str, ...] = ()
    evidence: tuple[Stretch, ...] = ()
    answerable: bool = True
    shared: bool = False

    @property
    def asked(self) -> str:
        """Question and instruction, as they are read."""
        return asked(self.question, self.instruction)

    @property
    def evidence_in_context(self) -> bool | None:
        """Whether the passages hold all of the evidence; None where a task names none."""
        return holds(self.passages, self.evidence)

    @property
    def evidence_share(self) -> float | None:
        """How much of the evidence the passages hold, in characters, from 0 to 1; None where a task names none."""
        return share_held(self.passages, self.evidence)

    @property
    def evidence_position(self) -> float | None:
        """Where in the passages the first evidence begins, from 0 to 1 of their characters; None where it does not."""
        before, places = 0, []
        for passage in self.passages:
            places += [
                before + stretch.start - passage.start
                for stretch in self.evidence
                if passage.doc_id == stretch.doc_id and passage.start <= stretch.start < passage.end
            ]
            before += len(passage.text)
        return min(places) / before if places else None


class Text(_Sample):
    """A text whose every token is predicted from all before it.

    `boundaries` are character offsets, ascending, the last one the text's length; between two of them the losses are
    summed. `tokens` are the reference tokenizer's between them, so that systems with other tokenizers compare.
    """

    operation: Literal["perplexity"] = "perplexity"
    text: str
    boundaries: tuple[int, ...]
    tokens: tuple[int, ...]


class Search(_Sample):
    """A query for a retriever alone: what it should find, in documents (`relevant`) or in stretches (`evidence`)."""

    operation: Literal["search"] = "search"
    query: str
    relevant: tuple[str, ...]
    evidence: tuple[Stretch, ...] = ()


class Load(_Sample):
    """A text to be prefilled and `decode_tokens` to be decoded after it, for what that costs.

    A load is carried for its `bytes`, with the heap trimmed before so that all it takes is seen, or for its `seconds`.
    """

    operation: Literal["cost"] = "cost"
    text: str
    prompt_tokens: int
    decode_tokens: int
    measures: Literal["bytes", "seconds"]


class LMRequest(Record):
    """One request of lm-evaluation-harness; `arguments` as it passes them."""

    kind: Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
    arguments: tuple[Any, ...]


class LMDocument(_Sample):
    """A document of an lm-evaluation-harness task, with the requests it makes of a model, in their order."""

    operation: Literal["lm_eval"] = "lm_eval"
    requests: tuple[LMRequest, ...]


Sample = Annotated[Question | Text | Search | Load | LMDocument, Field(discriminator="operation")]


class Answered(Record):
    """A generated answer. `cut_tokens` of the passages were left out by the task's overflow policy.

    `gold_survived` says whether the evidence that the sample's passages held was still there after that.
    """

    kind: Literal["answered"] = "answered"
    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    answer_tokens: int
    cut_tokens: int = 0
    gold_survived: bool | None = None
    cache_bytes: int = 0


class Losses(Record):
    """Nats between the boundaries of a text, and how many tokens of the system's own they are the sum of."""

    kind: Literal["losses"] = "losses"
    nats: tuple[float, ...]
    tokens: tuple[int, ...]


class Ranking(Record):
    """Documents in the order found; per budget of tokens, and in the best so many chunks, whether all evidence was.

    Both are empty where no evidence is named.
    """

    kind: Literal["ranking"] = "ranking"
    doc_ids: tuple[str, ...]
    evidence_in_budget: dict[int, bool] = {}
    evidence_in_top: dict[int, bool] = {}


class Carried(Record):
    """A load that was carried: what of it is the same every time."""

    kind: Literal["carried"] = "carried"
    prompt_tokens: int
    decode_tokens: int
    cache_bytes: int


class LMResponses(Record):
    """A response for each request of a document: [log-likelihood, is greedy], a log-likelihood, or a text."""

    kind: Literal["lm_responses"] = "lm_responses"
    responses: tuple[Any, ...]


class Failure(Record):
    """No result: the prompt did not fit the window, memory was short, or time ran out. `message` says the numbers."""

    kind: Literal["failure"] = "failure"
    reason: Literal["overflow", "out-of-memory", "timeout"]
    message: str


Output = Annotated[Answered | Losses | Ranking | Carried | LMResponses | Failure, Field(discriminator="kind")]


OUTPUT_KINDS = {  # what comes back for a sample's operation, if nothing fails
    "answer": "answered",
    "perplexity": "losses",
    "search": "ranking",
    "cost": "carried",
    "lm_eval": "lm_responses",
}


class Prediction(Record):
    """What a system made of a sample. `key` is the hash of the system's identity, the sample and the settings."""

    key: str
    system: str
    sample_id: str
    output: Output


class Timing(Record):
    """What a clock and the memory meter said of a prediction, in seconds and bytes; None where nothing tells."""

    key: str
    system: str
    sample_id: str
    prefill_s: float | None = None
    decode_s: float | None = None
    total_s: float
    peak_bytes: int | None = None
    joules: float | None = None


class Score(Record):
    """A prediction's scores by metric, the task's first one first; empty for a failure."""

    system: str
    sample_id: str
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]]


class Machine(Record):
    """What a run ran on."""

    processor: str
    cores: int | None
    threads: int
    gpu: str | None


class Manifest(Record):
    """What a run was made with: versions, the commit at which it began, and hashes of weights, prompts and data."""

    schema_version: Literal[1]
    suite_sha256: str
    seed: int
    versions: dict[str, str | None]
    commit: str | None
    machine: Machine
    data_sha256: dict[str, str]
    systems: dict[str, dict[str, Any]]


class SampleRecord(Record):
    """A sample as a run keeps it: without the texts, which come again from data and seed (see `content_sha256`)."""

    id: str
    task: str
    operation: str
    cell: dict[str, Axis]
    cluster: str
    subject: str
    content_sha256: str
    question: str = ""
    references: tuple[str, ...] = ()
    answerable: bool = True
    passages: tuple[Stretch, ...] = ()
    evidence: tuple[Stretch, ...] = ()
    evidence_in_context: bool | None = None
    evidence_share: float | None = None
    evidence_position: float | None = None
    relevant: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, sample: Any) -> "SampleRecord":
        """The record of a sample."""
        whole = ("id", "task", "operation", "cell", "cluster", "subject")
        fields: dict[str, Any] = {name: getattr(sample, name) for name in whole}
        fields["content_sha256"] = content_sha256(sample)
        for name in ("references", "answerable", "evidence", "evidence_in_context", "relevant", "tokens"):
            fields |= {name: getattr(sample, name)} if hasattr(sample, name) else {}
        if isinstance(sample, Question):
            passages = tuple(Stretch(doc_id=p.doc_id, start=p.start, end=p.end) for p in sample.passages)
            fields |= {"question": sample.question, "passages": passages}
            position = sample.evidence_position
            fields["evidence_share"] = sample.evidence_share
            fields["evidence_position"] = None if position is None else round(position, 4)
        elif isinstance(sample, Search):
            fields["question"] = sample.query
        return cls(**fields)


def asked(question: str, instruction: str) -> str:
    """A question with its instruction, as they are read; an empty instruction is none."""
    return f"{question}\n{instruction}" if instruction else question


def agrees(cell: Mapping[str, Axis], wanted: Mapping[str, Axis]) -> bool:
    """Whether a cell has all the coordinates that are wanted."""
    return all(cell.get(axis) == value for axis, value in wanted.items())


def content_sha256(sample: Any) -> str:
    """The hash of all that a system is shown or judged by, whatever the sample is called and wherever it lies."""
    return digest(sample.model_dump(mode="json", exclude={"id", "task", "cell", "cluster", "subject"}))


def digest(value: Any) -> str:
    """The sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def dumps(record: BaseModel | Mapping[str, Any]) -> str:
    """One line of JSON, keys in the order of the fields."""
    value = record.model_dump(mode="json", exclude_defaults=False) if isinstance(record, BaseModel) else record
    return json.dumps(value, ensure_ascii=False)
