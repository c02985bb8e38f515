"""Variable tracking: chains of assignments through a novel (after RULER, Hsieh et al. 2024; wording our own)."""

from random import Random
from string import ascii_uppercase
from typing import Literal

from pydantic import Field

from stripedrag.eval.schema import Axis
from stripedrag.eval.tasks.planted import PlantedTask, Riddle


class TrackingTask(PlantedTask):
    """`chains` chains of 1 + `hops` variables, each set from the one before; all names of one value are asked for."""

    kind: Literal["tracking"]
    chains: int = Field(default=2, ge=1, le=100)
    hops: int = Field(default=2, ge=1, le=100)
    answer_tokens: int = Field(default=48, ge=1)

    def riddles(self, rng: Random) -> list[tuple[dict[str, Axis], Riddle]]:
        """See the class."""
        length = 1 + self.hops
        names: list[str] = []
        while len(names) < self.chains * length:
            name = "".join(rng.choices(ascii_uppercase, k=4))
            if name not in names:
                names.append(name)
        values = rng.sample(range(10_000, 100_000), self.chains)
        facts: list[tuple[float, str]] = []
        for chain, value in enumerate(values):
            links = names[chain * length : (chain + 1) * length]
            depths = sorted(rng.random() for _ in links)
            facts.append((depths[0], f"VAR {links[0]} = {value}."))
            facts += [
                (depth, f"VAR {link} = VAR {before}.")
                for depth, link, before in zip(depths[1:], links[1:], links, strict=False)
            ]
        riddle = Riddle(
            facts=tuple(facts),
            question=f"Which variables have the value {values[0]}, directly or through other variables?",
            instruction=f"Name all {length} of them.",
            references=tuple(names[:length]),
            needed=tuple(range(length)),
        )
        return [({}, riddle)]
