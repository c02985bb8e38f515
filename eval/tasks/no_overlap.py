"""A needle that shares no word with its question: knowledge links them (after NoLiMa, Modarressi et al. 2025)."""

from random import Random
from typing import Literal

from pydantic import Field

from stripedrag.eval.schema import Axis
from stripedrag.eval.tasks.planted import Depth, PlantedTask, Riddle
from stripedrag.eval.tasks.vocabulary import NAMES

# (what the sentence says of a person, what is asked). No word of four letters or more stands in both.
LINKS = (
    ("can see the Eiffel Tower from the kitchen window", "Who lives in Paris?"),
    ("rents a room right beside the Brandenburg Gate", "Who lives in Berlin?"),
    ("walks past Big Ben every morning", "Who lives in London?"),
    ("takes a boat along the Grand Canal under the Rialto Bridge to get home", "Who lives in Venice?"),
    ("has a flat opposite the Sydney Opera House", "Who lives in Australia?"),
    ("grew up in the shadow of Mount Fuji", "Who comes from Japan?"),
    ("spent childhood summers swimming in the Nile near Cairo", "Who comes from Egypt?"),
    ("sells postcards in front of the Colosseum", "Who works in Italy?"),
    ("guides visitors around the Taj Mahal", "Who works in India?"),
    ("sweeps the square before the Kremlin", "Who works in Moscow?"),
    ("eats neither meat nor eggs nor cheese", "Who is a vegan?"),
    ("swells up and gasps after a single peanut", "Who has an allergy?"),
    ("carries a white cane and reads with the fingertips", "Who is blind?"),
    ("follows every conversation from the lips of others", "Who is deaf?"),
    ("pulls teeth and fills cavities for a living", "Who is a dentist?"),
    ("bakes two hundred loaves before dawn", "Who makes bread?"),
    ("mends shoes in a narrow shop", "Who is a cobbler?"),
    ("lands a jumbo jet twice a week", "Who is a pilot?"),
    ("has stood on the summit of Everest", "Who climbs mountains?"),
    ("was carried over the finish line of the marathon", "Who is a runner?"),
)


class NoOverlapTask(PlantedTask):
    """A person is described in one sentence, asked for in other words; `others` persons stand beside."""

    kind: Literal["no_overlap"]
    depths: tuple[Depth, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    others: int = Field(default=2, ge=0, lt=len(LINKS))
    answer_tokens: int = Field(default=16, ge=1)

    def riddles(self, rng: Random) -> list[tuple[dict[str, Axis], Riddle]]:
        """See the class."""
        links = rng.sample(LINKS, 1 + self.others)
        names = rng.sample(NAMES, 1 + self.others)
        beside = [(rng.random(), f"{name} {link[0]}.") for name, link in zip(names[1:], links[1:], strict=True)]
        return [
            (
                {"depth": depth},
                Riddle(
                    facts=((depth, f"{names[0]} {links[0][0]}."), *beside),
                    question=links[0][1],
                    instruction="Answer with the name only.",
                    references=(names[0],),
                    needed=(0,),
                ),
            )
            for depth in self.depths
        ]
