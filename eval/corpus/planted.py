"""Facts planted in documents, and questions about them, for training. No wording, name or attribute is an evaluation's.

A fact stands in one sentence among those of a real document, with like facts of others beside it, so that an answer has
to be found by its name and not by its form.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from stripedrag.model.striping.data import Asked, Text

FIRST = (
    "Abigail Amir Beatrix Benedict Camille Cedric Clement Daphne Desmond Eleanor Emeka Farida Felix "
    "Gareth Giselle Hamid Harriet Isadora Ivo Jasmine Joachim Keziah Lambert Lorna Magnus Maribel Nadia "
    "Neville Octavia Oscar Petra Quentin Ramona Rufus Sabina Selim Thaddeus Una Valerie Wilfred Yolanda "
    "Zachary"
).split()
LAST = (
    "Abernathy Barlow Castellan Dressler Eastman Fairbanks Galloway Hargrove Ibsen Jernigan Kowalski "
    "Lindqvist Mbeki Nakamura Okafor Pemberton Quill Rosenthal Santoro Tremblay Underhill Vandermeer "
    "Whitlock Xiang Yarrow Zimmer"
).split()
CITIES = (
    "Aldermoor Brackenridge Corvane Dellingham Estermouth Fallowfield Grimsdyke Hollins Inverlade "
    "Jasperton Kelmscot Lowmere Mossgate Netherby Ormsley Pellworth Quenby Rushmoor Saltash Tolland "
    "Umberleigh Vexford Wyndale Yoxley"
).split()
THINGS = (
    "accordion banjo binoculars bicycle blanket bookcase camera cello chessboard chronometer dictionary "
    "drill envelope easel flute globe guitar haversack keyboard kite lawnmower manuscript microscope "
    "notebook painting passport printer raincoat rucksack sculpture sextant suitcase tapestry telescope "
    "tent toolbox typewriter violin"
).split()
SPOTS = (
    "behind the radiator|in the attic|under the staircase|on the top shelf|in the blue cupboard|below the workbench|"
    "beside the fireplace|in the glove compartment|inside the freezer|at the back of the wardrobe|in the laundry room|"
    "on the windowsill|in the third drawer|under the doormat|in the boathouse|above the sink"
).split("|")
COLOURS = "beige crimson cyan indigo lavender magenta maroon mustard navy olive orange pink teal turquoise".split()
TRADES = (
    "accountant architect beekeeper blacksmith botanist carpenter cartographer chemist conductor "
    "electrician florist geologist glazier interpreter jeweller librarian locksmith mason midwife notary "
    "optician plumber sculptor surveyor tailor translator upholsterer veterinarian"
).split()
DISHES = (
    "apricot dumplings|barley soup|beetroot salad|carrot cake|cheese pie|chestnut stew|fennel risotto|ginger biscuits|"
    "leek tart|lemon pudding|lentil curry|mushroom omelette|onion bread|pumpkin pasta|rhubarb crumble|walnut rolls"
).split("|")
MONTHS = "January February March April May June July August September October November December".split()


@dataclass(frozen=True)
class Kind:
    """A kind of fact: sentences that state it and questions that ask for it, {0} its name and {1} its value."""

    sentences: Sequence[str]
    questions: Sequence[str]
    name: Callable[[Random], str]
    value: Callable[[Random], str]


def _person(rng: Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def _code(rng: Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2)) + f"-{rng.randrange(100, 1000)}"


def _date(rng: Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1890, 2024)}"


KINDS = (
    Kind(
        ["{0} keeps the {1[0]} {1[1]}.", "You will find {0}'s {1[0]} {1[1]}.", "The {1[0]} of {0} is {1[1]}."],
        ["Where is {0}'s {1[0]}?", "Where can one find the {1[0]} of {0}?", "Where does {0} keep the {1[0]}?"],
        _person,
        lambda rng: f"{rng.choice(THINGS)}|{rng.choice(SPOTS)}",
    ),
    Kind(
        [
            "The access code of the {0} office is {1}.",
            "To enter the {0} office, type {1}.",
            "At the door of the office in {0} the code {1} is asked for.",
        ],
        ["What is the access code of the {0} office?", "Which code opens the office in {0}?"],
        lambda rng: rng.choice(CITIES),
        _code,
    ),
    Kind(
        ["{0} works as a {1}.", "By trade {0} is a {1}.", "{0} has earned a living as a {1} for years."],
        ["What does {0} do for a living?", "What is the profession of {0}?", "What is {0}'s job?"],
        _person,
        lambda rng: rng.choice(TRADES),
    ),
    Kind(
        ["{0} was born in {1}.", "The birthplace of {0} is {1}.", "{0} came into the world in {1}."],
        ["Where was {0} born?", "In which town was {0} born?", "What is {0}'s birthplace?"],
        _person,
        lambda rng: rng.choice(CITIES),
    ),
    Kind(
        ["The contract with {0} was signed on {1}.", "{0} signed the contract on {1}."],
        ["When was the contract with {0} signed?", "On what date did {0} sign the contract?"],
        _person,
        _date,
    ),
    Kind(
        ["{0}'s favourite colour is {1}.", "Of all colours {0} likes {1} best.", "{0} paints every room {1}."],
        ["Which colour does {0} prefer?", "What is {0}'s favourite colour?"],
        _person,
        lambda rng: rng.choice(COLOURS),
    ),
    Kind(
        ["The extension of {0} is {1}.", "{0} can be reached at extension {1}.", "Dial {1} to speak to {0}."],
        ["What is {0}'s extension?", "At which extension can {0} be reached?", "What number reaches {0}?"],
        _person,
        lambda rng: str(rng.randrange(1000, 10000)),
    ),
    Kind(
        ["A ticket from {0} to the coast costs {1} crowns.", "In {0} they ask {1} crowns for a ticket to the coast."],
        ["How much does a ticket from {0} to the coast cost?", "What is the price of a ticket from {0} to the coast?"],
        lambda rng: rng.choice(CITIES),
        lambda rng: str(rng.randrange(12, 400)),
    ),
    Kind(
        ["For dinner {0} always orders {1}.", "{0}'s favourite dish is {1}.", "Nothing tastes better to {0} than {1}."],
        ["What does {0} like to eat?", "What is {0}'s favourite dish?", "What does {0} order for dinner?"],
        _person,
        lambda rng: rng.choice(DISHES),
    ),
    Kind(
        ["The night train to {0} leaves at {1}.", "At {1} the night train departs for {0}."],
        ["When does the night train to {0} leave?", "At what time does the night train depart for {0}?"],
        lambda rng: rng.choice(CITIES),
        lambda rng: f"{rng.randrange(20, 24)}:{rng.randrange(0, 60):02d}",
    ),
    Kind(
        ["{0} sold the {1[0]} for {1[1]}.", "The {1[0]} brought {0} {1[1]}."],
        ["How much did {0} get for the {1[0]}?", "For what price did {0} sell the {1[0]}?"],
        _person,
        lambda rng: f"{rng.choice(THINGS)}|{rng.randrange(2, 99) * 5} francs",
    ),
    Kind(
        ["The crew of the ferry {0} numbers {1}.", "{1} people work aboard the ferry {0}."],
        ["How many people are in the crew of the ferry {0}?", "How large is the crew of the ferry {0}?"],
        lambda rng: f"{rng.choice(FIRST)} of {rng.choice(CITIES)}",
        lambda rng: str(rng.randrange(11, 90)),
    ),
)


def plant(document: Text, rng: Random) -> list[Asked]:
    """Questions on a document into which one to four facts of one kind were put, each a sentence of its own.

    One in four documents states two values under one name, both of which are asked for.
    """
    kind = rng.choice(KINDS)
    names = list(dict.fromkeys(kind.name(rng) for _ in range(rng.randrange(1, 5))))
    facts = [(name, kind.value(rng)) for name in names]
    thing = facts[0][1].split("|")[0]
    facts = [(name, "|".join([thing, *value.split("|")[1:]]) if "|" in value else value) for name, value in facts]
    if "|" not in facts[0][1] and rng.random() < 0.25:
        facts.append((facts[0][0], kind.value(rng)))
    rng.shuffle(facts)
    sentences = [s for s in re.split(r"(?<=[.!?]) +", document.text) if s]
    for name, value in facts:
        sentences.insert(rng.randrange(len(sentences) + 1), _filled(rng.choice(kind.sentences), name, value))
    passage = " ".join(sentences)
    asked = []
    for name in dict.fromkeys(name for name, _ in facts):
        values = list(dict.fromkeys(value for named, value in facts if named == name))
        answers = sorted((value.split("|")[-1] for value in values), key=passage.find)
        asked.append(
            Asked(
                id=f"planted:{document.id}:{name}",
                source="planted",
                title=document.title,
                passage=passage,
                question=_filled(rng.choice(kind.questions), name, values[0]),
                answers=(" and ".join(answers),),
            )
        )
    return asked


def _filled(pattern: str, name: str, value: str) -> str:
    parts = value.split("|")
    sentence = pattern.format(name, parts if len(parts) > 1 else value)
    return sentence[0].upper() + sentence[1:]
