"""What a striping run is to do, as it is read from a file and kept with the result."""

from itertools import zip_longest
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Stage(_Part):
    """One stretch of training at one length.

    `layers` trains each Hyena layer alone, on its teacher layer's inputs and outputs; `end-to-end` trains the whole
    network on what the teacher says and on answers. A step takes as many whole windows as `batch_tokens` tokens hold,
    a stage as many whole steps as `tokens` hold, and of either one at least. Rates, `hyena_rate` of the Hyena layers
    and `adapter_rate` of all others, rise for `warmup_steps`, or half of the stage if that is shorter, and fall to a
    tenth along a cosine. `questions` is the share of windows that hold questions, the others are text. What a token of
    text is to be is what the teacher says, but for a share of `text_labels`, which is what the token was. In a share
    `answers_only` of the windows of questions, answers alone are learnt, and the teacher is not asked; a step's loss is
    the sum over the tokens that count, by all its tokens. Of the passages of a source only the share `source_shares`
    comes in a round, where it is named.
    """

    name: str = Field(pattern=r"^[a-z0-9-]+$", max_length=64)
    kind: Literal["layers", "end-to-end"] = "end-to-end"
    tokens: int = Field(ge=1, le=10**12)
    length: int = Field(ge=64, le=2**20)
    batch_tokens: int = Field(default=4096, ge=64)
    hyena_rate: Positive
    adapter_rate: Positive = 5e-4
    warmup_steps: int = Field(default=20, ge=0)
    questions: Share = 0.5
    unanswerable: Share = 0.08
    filler: Share = 0.0
    answers_only: Share = 0.0
    source_shares: dict[str, Share] = Field(default_factory=dict)
    answer_weight: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    text_labels: Share = 0.25

    @property
    def windows_a_step(self) -> int:
        """How many windows a step takes."""
        return max(1, self.batch_tokens // self.length)

    @property
    def steps(self) -> int:
        """How many steps the stage has."""
        return max(1, self.tokens // (self.windows_a_step * self.length))

    @model_validator(mode="after")
    def _holds_a_window(self) -> "Stage":
        if self.tokens < self.length:
            raise ValueError(f"its {self.tokens} tokens are less than one window of {self.length}")
        return self


class Recipe(_Part):
    """A whole run. `hyena_layers` names the layers that become Hyena layers, or says how many the ranking is to choose;
    with 0 the transformer is only fine-tuned, by the same end-to-end steps on the same windows.

    `modes` and `taps` size the Hyena filters, `rank` the low-rank differences of all linear layers that stay (0: of
    what stays the norms alone are trained). A kill costs the steps of the last `checkpoint_seconds`. A run may begin
    from what another run changed: `begins_from` is the sha256 of that file; it wants another `seed`, or it reads the
    same windows again. The defaults made the first weights of `stripedhyena-smol-135m`, with its layers named.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    hyena_layers: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] = 15
    modes: int = Field(default=8, ge=1, le=1024)
    taps: int = Field(default=3, ge=1, le=1024)
    rank: int = Field(default=32, ge=0, le=2**16)
    checkpoint_seconds: float = Field(default=300, ge=0)
    begins_from: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    stages: tuple[Stage, ...] = Field(
        default=(
            Stage(name="layers", kind="layers", tokens=400_000, length=512, batch_tokens=2048, hyena_rate=3e-3),
            Stage(name="short", tokens=2_000_000, length=1024, hyena_rate=6e-4, questions=0.7),
            Stage(
                name="middle",
                tokens=700_000,
                length=4096,
                hyena_rate=4e-4,
                adapter_rate=4e-4,
                questions=0.7,
                filler=0.3,
            ),
            Stage(
                name="long",
                tokens=500_000,
                length=8192,
                batch_tokens=8192,
                hyena_rate=3e-4,
                adapter_rate=3e-4,
                questions=0.7,
                filler=0.4,
            ),
        ),
        min_length=1,
    )

    def unlike(self, begun: "Recipe") -> str:
        """In what it is another recipe than that of a run which was begun, by name; "" where the run can go on with it:
        it may have more stages after those, and other checkpoints."""
        fixed = (name for name in Recipe.model_fields if name not in ("stages", "checkpoint_seconds"))
        pairs = zip_longest(self.stages[: len(begun.stages)], begun.stages)
        unlike = [name for name in fixed if getattr(self, name) != getattr(begun, name)]
        unlike += [f"stage {theirs.name!r}" for ours, theirs in pairs if ours != theirs]
        return next(iter(unlike), "")

    @property
    def only_fine_tunes(self) -> bool:
        """Whether no layer becomes a Hyena layer."""
        return self.hyena_layers in (0, ())

    @property
    def stages_taken(self) -> list[tuple[int, Stage]]:
        """The stages that are taken, with their numbers: without Hyena layers none is layer by layer."""
        taken = enumerate(self.stages)
        return [(n, stage) for n, stage in taken if not (self.only_fine_tunes and stage.kind == "layers")]

    @model_validator(mode="after")
    def _trains(self) -> "Recipe":
        if not self.stages_taken:
            raise ValueError("without Hyena layers its stages, all layer by layer, train nothing; give one end to end")
        return self

    @model_validator(mode="after")
    def _begins_once(self) -> "Recipe":
        if self.begins_from and (again := [stage.name for stage in self.stages if stage.kind == "layers"]):
            raise ValueError(f"the stage {again[0]!r} distils layers that begin as trained ones; leave it out")
        return self

    @model_validator(mode="after")
    def _names_each_layer_once(self) -> "Recipe":
        layers = self.hyena_layers
        if isinstance(layers, tuple) and len(set(layers)) < len(layers):
            raise ValueError(f"hyena_layers names a layer twice: {', '.join(map(str, layers))}")
        return self

    @model_validator(mode="after")
    def _names_each_stage_once(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages share a name: {', '.join(names)}")
        return self
