"""A needle that shares no word with its question: knowledge links them (after NoLiMa, Modarressi et al. 2025)."""

from random import Random
from typing import Literal

from pydantic import Field

from stripedrag.eval.schema import Axis
from stripedrag.eval.tasks.planted import Depth, PlantedTask, Riddle
from stripedrag.eval.tasks.vocabulary import NAMES

# (what the sentence says of a person, what is asked). No word of four letters or more is in both, and the question's
# last word stands nowhere in the novels, so that nobody in them is an answer.
LINKS = (
    ("eats neither meat nor eggs nor cheese", "Who is a vegan?"),
    ("swells up and gasps after a single peanut", "Who has an allergy?"),
    ("pulls teeth and fills cavities for a living", "Who is a dentist?"),
    ("has floated weightless in orbit for half a year", "Who is an astronaut?"),
    ("writes software in Python all day", "Who is a programmer?"),
    ("lands a jumbo jet twice a week", "Who flies an airplane?"),
    ("ran forty-two kilometres through the city without a stop", "Who has finished a marathon?"),
    ("scores goals for the national eleven", "Who is a footballer?"),
    ("measures the sugar in every drop of blood and injects insulin", "Who is diabetic?"),
    ("lies awake until dawn, night after night", "Who suffers from insomnia?"),
    ("takes portraits with an old Leica", "Who is a photographer?"),
    ("rides a Harley-Davidson to the office", "Who owns a motorcycle?"),
    ("drives strangers around town with the meter running", "Who works in a taxi?"),
    ("speaks Spanish with one parent and Dutch with the other", "Who is bilingual?"),
    ("pours espresso behind the counter of a coffee bar", "Who is a barista?"),
    ("has a flat with a view of the Gyeongbokgung palace", "Who lives in Seoul?"),
    ("sells souvenirs at the foot of the Sagrada Familia", "Who works in Barcelona?"),
    ("walks past the Pyramids on the way to the Nile", "Who lives in Cairo?"),
    ("queues at the Shibuya crossing every morning", "Who lives in Tokyo?"),
    ("stretches on a mat and greets the sun at daybreak", "Who practises yoga?"),
)


class NoOverlapTask(PlantedTask):
    """A person is described in one sentence, asked for in other words; `others` persons stand beside."""

    kind: Literal["no_overlap"]
    depths: tuple[Depth, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
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
