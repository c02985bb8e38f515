"""Two planted facts that only together answer a question, far from each other in a novel."""

from random import Random
from typing import Literal

from pydantic import Field

from stripedrag.eval.schema import Axis
from stripedrag.eval.tasks.planted import PlantedTask, Riddle
from stripedrag.eval.tasks.vocabulary import NAMES, TOWNS


class MultiHopTask(PlantedTask):
    """Where a person's teacher lives: one sentence names the teacher, another the town. `others` pairs distract."""

    kind: Literal["multi_hop"]
    others: int = Field(default=2, ge=0, le=8)
    answer_tokens: int = Field(default=16, ge=1)

    def riddles(self, rng: Random) -> list[tuple[dict[str, Axis], Riddle]]:
        """See the class."""
        pairs = 1 + self.others
        names, towns = rng.sample(NAMES, 2 * pairs), rng.sample(TOWNS, pairs)
        facts: list[tuple[float, str]] = []
        for pupil, teacher, town in zip(names[:pairs], names[pairs:], towns, strict=True):
            # One in the first half and one in the second, in either order.
            depths = [rng.uniform(0.0, 0.5), rng.uniform(0.5, 1.0)]
            rng.shuffle(depths)
            facts.append((depths[0], f"{pupil} learned to play the violin from {teacher}."))
            facts.append((depths[1], f"{teacher} lives in the town of {town}."))
        riddle = Riddle(
            facts=tuple(facts),
            question=f"In which town does the person live who taught {names[0]} the violin?",
            instruction="Answer with the name of the town only.",
            references=(towns[0],),
            needed=(0, 1),
        )
        return [({}, riddle)]
