"""A suite: the tasks, systems and comparisons of a run, declared in YAML and validated; unknown keys are refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from stripedrag.errors import UsageError
from stripedrag.eval.schema import SCHEMA_VERSION, Axis, Record
from stripedrag.eval.systems import AnySystem
from stripedrag.eval.tasks import AnyTask

SUITES = Path(__file__).parent / "suites"


class Headline(Record):
    """A line of the report's first table: the mean over all samples of a task whose cells agree with `cell`.

    `metric` None is the task's first.
    """

    label: str
    task: str
    cell: dict[str, Axis] = {}
    metric: str | None = None


class Contrast(Headline):
    """A paired difference: `system` in `cell` less `against` in `against_cell`; None is the same system or cell."""

    system: str
    against: str | None = None
    against_cell: dict[str, Axis] | None = None


class Family(Record):
    """Tests whose p-values are corrected together (Holm 1979)."""

    name: str
    contrasts: tuple[Contrast, ...] = Field(min_length=1)


class Suite(Record):
    """What a run does. `headline` is the report's first table; `limits` says what the suite is too small to show."""

    schema_version: int = SCHEMA_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    title: str
    limits: str = ""
    seed: int = Field(default=0, ge=0)
    reference_tokenizer: str = "smollm2-135m-instruct"
    timeout_s: float = Field(default=600.0, gt=0, le=604_800, allow_inf_nan=False)
    systems: tuple[AnySystem, ...]
    tasks: tuple[AnyTask, ...]
    headline: tuple[Headline, ...] = ()
    families: tuple[Family, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        systems, tasks = [s.name for s in self.systems], [t.name for t in self.tasks]
        for kind, names in (("systems", systems), ("tasks", tasks)):
            if not names:
                raise ValueError(f"there are no {kind}; name at least one")
            if twice := _twice(names):
                raise ValueError(f"{kind} {', '.join(twice)} come twice; names are unique")
        labels = [("headlines", [h.label for h in self.headline]), ("families", [f.name for f in self.families])]
        labels += [(f"contrasts of {f.name}", [c.label for c in f.contrasts]) for f in self.families]
        for kind, names in labels:
            if twice := _twice(names):
                raise ValueError(f"{kind} {', '.join(map(repr, twice))} come twice; give each a label of its own")
        named_systems = [name for task in self.tasks for name in task.systems or ()]
        named_systems += [name for c in self.contrasts for name in (c.system, c.against or c.system)]
        tested = [
            json.dumps([c.task, c.cell, c.metric, sorted([c.system, c.against or c.system]), c.against_cell])
            for c in self.contrasts
        ]
        if again := _twice(tested):
            label = self.contrasts[tested.index(again[0])].label
            raise ValueError(f"the contrast {label!r} is declared twice; a second family would undo Holm's correction")
        for contrast in self.contrasts:
            if contrast.against in (None, contrast.system) and contrast.against_cell in (None, contrast.cell):
                raise ValueError(f"the contrast {contrast.label!r} compares {contrast.system} with itself")
        _refuse_strangers("system", named_systems, systems)
        _refuse_strangers("task", [headline.task for headline in (*self.headline, *self.contrasts)], tasks)
        by_name = {task.name: task for task in self.tasks}
        for asked in (*self.headline, *self.contrasts):
            known = by_name[asked.task].known_metrics()
            if known == ():
                raise ValueError(f"{asked.label!r} asks for {asked.task}, which is measured and not scored")
            if asked.metric is not None and known is not None and asked.metric not in known:
                raise ValueError(f"{asked.label!r} asks for {asked.metric}; {asked.task} has {', '.join(known)}")
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {self.schema_version}; this stripedrag reads {SCHEMA_VERSION}")
        return self

    @property
    def contrasts(self) -> list[Contrast]:
        """The contrasts of all families."""
        return [contrast for family in self.families for contrast in family.contrasts]

    def named_cells(self) -> list[tuple[str, dict[str, Axis]]]:
        """Every (task, cell) that the headline and the contrasts speak of."""
        named = [(headline.task, headline.cell) for headline in (*self.headline, *self.contrasts)]
        return named + [(c.task, c.against_cell) for c in self.contrasts if c.against_cell is not None]


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error, and not the last one's."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises `YAMLError` for a key that came before."""
        merge = "tag:yaml.org,2002:merge"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        if twice := _twice(keys):
            raise yaml.YAMLError(f"the key {twice[0]!r} comes twice at line {node.start_mark.line + 1}")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load_suite(name_or_path: str) -> Suite:
    """The suite of that name among those that ship, or of that file.

    Raises `UsageError` for a file that is missing, is no YAML, or declares what there is not.
    """
    shipped = {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise UsageError(f"no suite {name_or_path!r}: it is not one of {', '.join(shipped)}, and not a file")
    try:
        declared = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UsageError(f"the suite {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # of dates, numbers, keys, depth
        raise UsageError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from error
    return parse_suite(declared, name=str(path))


def parse_suite(declared: Any, *, name: str) -> Suite:
    """A suite from its plain value. Raises `UsageError` with every fault and where it is."""
    try:
        plain = json.dumps(declared)
    except (TypeError, ValueError) as error:  # dates, and YAML that holds itself
        raise UsageError(f"the suite {name} holds what a suite cannot: {error}") from error
    try:
        # From JSON, because only there strictness (no true for 1) leaves lists to be tuples and words to be paths.
        return Suite.model_validate_json(plain, strict=True)
    except ValidationError as error:
        errors = error.errors()
        # A list with a bad element is also said to be too short: once is enough.
        places = [e["loc"] for e in errors if e["type"] != "too_short"]
        real = [
            e for e in errors if e["type"] != "too_short" or not any(p[: len(e["loc"])] == e["loc"] for p in places)
        ]
        faults = [f"{'.'.join(map(str, e['loc'])) or 'the suite'}: {_words(e['msg'])}" for e in real]
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UsageError(f"the suite {name} has {count}:\n  " + "\n  ".join(faults)) from error


def _twice(names: Sequence[Any]) -> list[Any]:
    """What comes more than once, in the order in which it first comes."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _words(message: str) -> str:
    """pydantic's words in ours."""
    if message == "Extra inputs are not permitted":
        return "no such key here"
    return message.removeprefix("Value error, ")


def _refuse_strangers(kind: str, named: Sequence[str], known: Sequence[str]) -> None:
    strangers = sorted(set(named) - set(known))
    if strangers:
        raise ValueError(f"no {kind} {', '.join(strangers)} in this suite; there is {', '.join(known)}")
