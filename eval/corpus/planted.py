"""Facts planted in documents, and questions about them, for training. No wording, name or attribute is an evaluation's.

A fact stands in one sentence among those of a real document, with like facts of others beside it, so that an answer has
to be found by its name and not by its form; and with facts of other kinds, so that much is asked about few tokens.
"""

import re
from collections.abc import Callable, Container, Sequence
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
# What things are called by two words: a look and a thing.
LOOKS = (
    "battered bent blunt brittle bulky charred cheap chipped clumsy coarse cracked creased damp dented dull "
    "dusty enamelled faint feathered flat folded forged fragile frosted gilded glazed glossy greasy heavy inlaid "
    "jagged knotted lacquered leaky light limp lopsided matt mouldy muddy oily ornate padded patched peeling "
    "pointed portable precious rare ribbed rigid rippled shabby shaggy shiny slender slim sooty speckled spiky "
    "square stained stiff striped tarnished thick thin tilted twisted unfinished upright varnished waxed "
    "weathered woven worn"
).split()
OBJECTS = (
    "apron barometer bathtub bench blender boat bonnet bracelet brooch bucket cabinet cape cauldron chandelier "
    "chariot chimney churn coat comb corkscrew couch crate cupboard dagger decanter desk doll fan figurine flag "
    "flask fork frame goblet gramophone gown grindstone hairbrush hat hinge hourglass jacket jug kimono lamp "
    "lens loom mallet mask mattress mug necklace oar parasol pendant pitcher plaque plate plough pram puppet "
    "purse radio raft rake ring rope rug sabre sandal sash scale sceptre scooter screen shield sieve sledge "
    "slipper sofa spade spear spindle sponge stool sword tankard throne tiara toaster tray tricycle tripod "
    "trolley trough trunk turban urn valise veil vest waistcoat wardrobe washtub watch wreath yacht yoke zither"
).split()
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
PETS = (
    "Biscuit Bramble Cinder Domino Figaro Ginger Hazel Jigsaw Moppet Nutmeg Pepper Pickle Rascal Smudge Tango".split()
)
SUBJECTS = (
    "archaeology astronomy economics forestry geography history journalism law linguistics medicine music pharmacy "
    "philosophy physics psychology statistics theology zoology"
).split()
LANGUAGES = (
    "Arabic Basque Catalan Czech Danish Estonian Finnish Greek Hungarian Icelandic Korean Latvian Maltese Persian "
    "Polish Swahili Tamil Thai Turkish Welsh"
).split()
DRINKS = "black coffee|buttermilk|cider|cocoa|fennel tea|ginger ale|lemonade|mint tea|oat milk|tomato juice".split("|")
SMELLS = (
    "almonds|burnt sugar|camphor|cinnamon|cloves|coal|fresh paint|garlic|grass|honey|lilac|mothballs|"
    "mustard seed|onions|peppermint|petrol|rain|rosemary|sawdust|smoke|soap|tar|tobacco|turpentine|vanilla|"
    "vinegar"
).split("|")
RIVERS = "Aune Brathy Cowen Dulse Erme Fenwater Gannel Irwell Lune Mardle Nidd Ottery Rawthey Skell Tavy Wharfe".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FLOORS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
MONTHS = "January February March April May June July August September October November December".split()


ONSETS = "b bl br c ch cl d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z".split()
VOWELS = "a a e e i i o o u ai ea ie oo ou".split()
CODAS = "b ck d g l ll lt m n nd nk p r rd rn rt s sk ss st t th x".split()
_OPEN = 0.6  # of the words that could stand in a list
_MADE_UP = 0.4  # of those


class Chance(Random):
    """Chance with a vocabulary, so that what is asked for can be any word, not one of a list that a model comes to know
    by heart: `names` begin with a capital, `words` do not. Without one, words are made up, none of them `barred`.
    """

    names: Sequence[str] = ()
    words: Sequence[str] = ()
    barred: Container[str] = ()

    def one_of(self, listed: Sequence[str]) -> str:
        """One of `listed`, or more often a word of the vocabulary or a made-up one that is written like them."""
        if self.random() >= _OPEN:
            return self.choice(listed)
        capital = listed[0][0].isupper()
        known = self.names if capital else self.words
        if known and self.random() >= _MADE_UP:
            return self.choice(known)
        while True:
            syllables = [self.choice(ONSETS) + self.choice(VOWELS) for _ in range(self.randrange(1, 3))]
            made = "".join([*syllables, self.choice(ONSETS), self.choice(VOWELS), self.choice(CODAS)])
            made = made.capitalize() if capital else made
            if made not in self.barred:
                return made


@dataclass(frozen=True)
class Kind:
    """A kind of fact: sentences that state it and questions that ask for it, {0} its name and {1} its value."""

    sentences: Sequence[str]
    questions: Sequence[str]
    name: Callable[[Chance], str]
    value: Callable[[Chance], str]


def _person(rng: Chance) -> str:
    return f"{rng.one_of(FIRST)} {rng.one_of(LAST)}"


def _city(rng: Chance) -> str:
    return rng.one_of(CITIES)


def _thing(rng: Chance) -> str:
    return f"{rng.one_of(COLOURS if rng.random() < 0.3 else LOOKS)} {rng.one_of(OBJECTS)}"


def _one_of_two(rng: Chance) -> str:
    """A person by both names or by the first alone."""
    return _person(rng) if rng.random() < 0.5 else rng.one_of(FIRST)


def _code(rng: Chance) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2)) + f"-{rng.randrange(100, 1000)}"


def _date(rng: Chance) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1890, 2024)}"


KINDS = (
    Kind(
        ["{0} keeps the {1[0]} {1[1]}.", "You will find {0}'s {1[0]} {1[1]}.", "The {1[0]} of {0} is {1[1]}."],
        ["Where is {0}'s {1[0]}?", "Where can one find the {1[0]} of {0}?", "Where does {0} keep the {1[0]}?"],
        _person,
        lambda rng: f"{rng.one_of(THINGS)}|{rng.choice(SPOTS)}",
    ),
    Kind(
        [
            "The access code of the {0} office is {1}.",
            "To enter the {0} office, type {1}.",
            "At the door of the office in {0} the code {1} is asked for.",
        ],
        ["What is the access code of the {0} office?", "Which code opens the office in {0}?"],
        _city,
        _code,
    ),
    Kind(
        ["{0} works as a {1}.", "By trade {0} is a {1}.", "{0} has earned a living as a {1} for years."],
        ["What does {0} do for a living?", "What is the profession of {0}?", "What is {0}'s job?"],
        _person,
        lambda rng: rng.one_of(TRADES),
    ),
    Kind(
        ["{0} was born in {1}.", "The birthplace of {0} is {1}.", "{0} came into the world in {1}."],
        ["Where was {0} born?", "In which town was {0} born?", "What is {0}'s birthplace?"],
        _person,
        _city,
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
        _city,
        lambda rng: str(rng.randrange(12, 400)),
    ),
    Kind(
        ["For dinner {0} always orders {1}.", "{0}'s favourite dish is {1}.", "Nothing tastes better to {0} than {1}."],
        ["What does {0} like to eat?", "What is {0}'s favourite dish?", "What does {0} order for dinner?"],
        _person,
        lambda rng: rng.one_of(DISHES),
    ),
    Kind(
        ["{0} has a dog called {1}.", "The dog of {0} answers to the name {1}.", "{1} is the name of {0}'s dog."],
        ["What is {0}'s dog called?", "What is the name of the dog that {0} has?", "How does {0} call the dog?"],
        _person,
        lambda rng: rng.one_of(PETS),
    ),
    Kind(
        ["{0} lives on the {1} floor.", "The flat of {0} is on the {1} floor.", "To visit {0}, go to the {1} floor."],
        ["On which floor does {0} live?", "Which floor is {0}'s flat on?"],
        _person,
        lambda rng: rng.choice(FLOORS),
    ),
    Kind(
        ["The cattle fair in {0} is held every {1}.", "Every {1} there is a cattle fair in {0}."],
        ["On which day is the cattle fair in {0} held?", "When can one go to the cattle fair in {0}?"],
        _city,
        lambda rng: rng.choice(DAYS),
    ),
    Kind(
        ["The museum of {0} opens at {1}.", "At {1} the doors of the museum of {0} are unlocked."],
        ["When does the museum of {0} open?", "At what hour does the museum of {0} open its doors?"],
        _city,
        lambda rng: f"{rng.randrange(6, 12)}:{rng.choice(('00', '15', '30', '45'))}",
    ),
    Kind(
        ["{0} learned to swim from {1}.", "{1} taught {0} to swim.", "It was {1} who taught {0} how to swim."],
        ["Who taught {0} to swim?", "From whom did {0} learn to swim?"],
        _person,
        _person,
    ),
    Kind(
        [
            "{0} plays the {1} on Sundays.",
            "The instrument of {0} is the {1}.",
            "{0} has played the {1} since childhood.",
        ],
        ["Which instrument does {0} play?", "What does {0} play?"],
        _person,
        lambda rng: rng.one_of(
            ("accordion", "banjo", "cello", "flute", "guitar", "violin", "harp", "oboe", "trombone")
        ),
    ),
    Kind(
        ["{0} speaks fluent {1}.", "At home {0} speaks {1}.", "The mother tongue of {0} is {1}."],
        ["What language does {0} speak?", "Which language can one speak with {0}?"],
        _person,
        lambda rng: rng.choice(LANGUAGES),
    ),
    Kind(
        ["{0} has {1} inhabitants.", "At the last count {1} people lived in {0}.", "The population of {0} is {1}."],
        ["How many people live in {0}?", "What is the population of {0}?", "How many inhabitants does {0} have?"],
        _city,
        lambda rng: f"{rng.randrange(2, 90)},{rng.randrange(1000):03d}",
    ),
    Kind(
        ["{0} lies on the river {1}.", "The river that flows through {0} is the {1}.", "Through {0} flows the {1}."],
        ["On which river does {0} lie?", "What is the river in {0} called?", "Which river flows through {0}?"],
        _city,
        lambda rng: rng.one_of(RIVERS),
    ),
    Kind(
        ["The mayor of {0} is {1}.", "In {0} they elected {1} as mayor.", "{1} has been mayor of {0} for a year."],
        ["Who is the mayor of {0}?", "Whom did they elect as mayor in {0}?"],
        _city,
        _person,
    ),
    Kind(
        ["{0} reports to {1}.", "The manager of {0} is {1}.", "{1} is the person whom {0} works for."],
        ["Who is {0}'s manager?", "Whom does {0} report to?", "For whom does {0} work?"],
        _person,
        _person,
    ),
    Kind(
        ["Invoice {0} was paid by {1}.", "{1} settled invoice {0}.", "The money for invoice {0} came from {1}."],
        ["Who paid invoice {0}?", "By whom was invoice {0} settled?"],
        _code,
        _person,
    ),
    Kind(
        ["Flight {0} lands in {1}.", "{1} is where flight {0} goes.", "The destination of flight {0} is {1}."],
        ["Where does flight {0} land?", "What is the destination of flight {0}?"],
        _code,
        _city,
    ),
    Kind(
        ["{0} wears shoes of size {1}.", "The shoes of {0} are a size {1}.", "Size {1} fits the feet of {0}."],
        ["What size are {0}'s shoes?", "Which shoe size does {0} wear?"],
        _person,
        lambda rng: str(rng.randrange(34, 49)),
    ),
    Kind(
        [
            "The brewery of {0} was founded in {1}.",
            "Since {1} beer has been brewed in {0}.",
            "In {1} {0} got a brewery.",
        ],
        ["In what year was the brewery of {0} founded?", "Since what year has beer been brewed in {0}?"],
        _city,
        lambda rng: str(rng.randrange(1800, 1999)),
    ),
    Kind(
        [
            "{0} pays a rent of {1} dollars.",
            "The rent of {0} is {1} dollars a month.",
            "{1} dollars go from {0} for rent.",
        ],
        ["How much rent does {0} pay?", "What is {0}'s rent in dollars?"],
        _person,
        lambda rng: str(rng.randrange(400, 2900)),
    ),
    Kind(
        ["{0} studied {1} at university.", "{0} holds a degree in {1}.", "The subject that {0} read was {1}."],
        ["What did {0} study?", "In which subject does {0} hold a degree?"],
        _person,
        lambda rng: rng.one_of(SUBJECTS),
    ),
    Kind(
        ["The deadline of the {0} project is {1}.", "The {0} project has to be finished by {1}."],
        ["What is the deadline of the {0} project?", "By when has the {0} project to be finished?"],
        _city,
        _date,
    ),
    Kind(
        ["The meeting with {0} takes place in room {1}.", "Room {1} is booked for {0}.", "{0} waits in room {1}."],
        ["In which room is the meeting with {0}?", "Which room is booked for {0}?", "In what room does {0} wait?"],
        _person,
        lambda rng: f"{rng.randrange(1, 9)}{rng.choice('ABCDEF')}",
    ),
    Kind(
        ["From {0} it is {1} kilometres to the border.", "The border is {1} kilometres from {0}."],
        ["How far is it from {0} to the border?", "How many kilometres from {0} is the border?"],
        _city,
        lambda rng: str(rng.randrange(3, 800)),
    ),
    Kind(
        ["{0} drinks nothing but {1}.", "For breakfast {0} wants {1}.", "Offer {0} some {1}, and nothing else."],
        ["What does {0} drink?", "Which drink should one offer {0}?"],
        _person,
        lambda rng: rng.one_of(DRINKS),
    ),
    Kind(
        ["The eldest daughter of {0} is named {1}.", "{0} has a daughter, {1}.", "{1} is the daughter of {0}."],
        ["What is the name of {0}'s daughter?", "Who is {0}'s daughter?", "How is the daughter of {0} named?"],
        _person,
        lambda rng: rng.one_of(FIRST),
    ),
    Kind(
        [
            "The serial number of {0}'s {1[0]} is {1[1]}.",
            "{0} wrote {1[1]} on the {1[0]}.",
            "The {1[0]} of {0} bears {1[1]}.",
        ],
        ["What is the serial number of {0}'s {1[0]}?", "Which number does the {1[0]} of {0} bear?"],
        _person,
        lambda rng: f"{rng.one_of(THINGS)}|{rng.randrange(10_000, 100_000)}",
    ),
    Kind(
        [
            "{0} lent the {1[0]} to {1[1]}.",
            "{1[1]} borrowed the {1[0]} from {0}.",
            "The {1[0]} went from {0} to {1[1]}.",
        ],
        ["To whom did {0} lend the {1[0]}?", "Who borrowed the {1[0]} from {0}?", "Who got {0}'s {1[0]}?"],
        _person,
        lambda rng: f"{rng.one_of(THINGS)}|{_person(rng)}",
    ),
    Kind(
        ["The night train to {0} leaves at {1}.", "At {1} the night train departs for {0}."],
        ["When does the night train to {0} leave?", "At what time does the night train depart for {0}?"],
        _city,
        lambda rng: f"{rng.randrange(20, 24)}:{rng.randrange(0, 60):02d}",
    ),
    Kind(
        ["{0} sold the {1[0]} for {1[1]}.", "The {1[0]} brought {0} {1[1]}."],
        ["How much did {0} get for the {1[0]}?", "For what price did {0} sell the {1[0]}?"],
        _person,
        lambda rng: f"{rng.one_of(THINGS)}|{rng.randrange(2, 99) * 5} francs",
    ),
    Kind(
        ["The crew of the ferry {0} numbers {1}.", "{1} people work aboard the ferry {0}."],
        ["How many people are in the crew of the ferry {0}?", "How large is the crew of the ferry {0}?"],
        lambda rng: f"{rng.one_of(FIRST)} of {rng.one_of(CITIES)}",
        lambda rng: str(rng.randrange(11, 90)),
    ),
    Kind(
        ["{1} built the {0}.", "The {0} was built by {1}.", "{1} is the one who built the {0}."],
        ["Who built the {0}?", "By whom was the {0} built?"],
        _thing,
        _one_of_two,
    ),
    Kind(
        ["{1} owns the {0}.", "The {0} belongs to {1}.", "The owner of the {0} is {1}.", "To {1} belongs the {0}."],
        ["Who owns the {0}?", "To whom does the {0} belong?", "Who is the owner of the {0}?"],
        _thing,
        _one_of_two,
    ),
    Kind(
        ["{1} sent the {0} by train.", "The {0} was sent by {1}.", "From {1} somebody got the {0} by train."],
        ["Who sent the {0}?", "Who sent the {0} by train?"],
        _thing,
        _one_of_two,
    ),
    Kind(
        ["{1} dropped the {0} on the stairs.", "On the stairs the {0} was dropped by {1}.", "{1} let the {0} fall."],
        ["Who dropped the {0}?", "Who let the {0} fall?"],
        _thing,
        _one_of_two,
    ),
    Kind(
        ["{1} keeps watch over the {0}.", "Over the {0} watches {1}.", "It is {1} that guards the {0}."],
        ["Who keeps watch over the {0}?", "Who guards the {0}?"],
        _thing,
        _one_of_two,
    ),
    Kind(
        ["{1} made a drawing of the {0}.", "It took {1} a week to draw the {0}.", "The {0} was drawn by {1}."],
        ["Who made a drawing of the {0}?", "Who drew the {0}?", "By whom was the {0} drawn?"],
        _thing,
        _one_of_two,
    ),
    Kind(
        ["The {0} is {1} centimetres long.", "{1} centimetres is the length of the {0}.", "The {0} measures {1} cm."],
        ["How long is the {0}?", "What is the length of the {0}?", "How many centimetres long is the {0}?"],
        _thing,
        lambda rng: str(rng.randrange(11, 980)),
    ),
    Kind(
        [
            "The {0} is insured for {1} pounds.",
            "An insurance of {1} pounds covers the {0}.",
            "{1} pounds will be paid if the {0} burns.",
        ],
        ["For how much is the {0} insured?", "For how many pounds is the {0} insured?"],
        _thing,
        lambda rng: str(rng.randrange(1000, 9900)),
    ),
    Kind(
        [
            "The {0} was invented in {1}.",
            "In {1} somebody invented the {0}.",
            "{1} is the year in which the {0} came up.",
        ],
        ["In what year was the {0} invented?", "When was the {0} invented?"],
        _thing,
        lambda rng: str(rng.randrange(1410, 1990)),
    ),
    Kind(
        [
            "In the catalogue the {0} has number {1}.",
            "Number {1} in the catalogue is the {0}.",
            "Under {1} see the {0}.",
        ],
        ["Which number has the {0} in the catalogue?", "Under what number is the {0} in the catalogue?"],
        _thing,
        lambda rng: str(rng.randrange(100, 10_000)),
    ),
    Kind(
        ["On {1} they wash the {0}.", "The {0} is washed on {1}.", "{1} is the day on which the {0} gets a wash."],
        ["On which day do they wash the {0}?", "When is the {0} washed?"],
        _thing,
        lambda rng: rng.choice(DAYS),
    ),
    Kind(
        ["On {1} the {0} was delivered.", "The {0} was delivered on {1}.", "{1} saw the {0} delivered."],
        ["When was the {0} delivered?", "On what date was the {0} delivered?"],
        _thing,
        _date,
    ),
    Kind(
        ["{1} opens the lock of the {0}.", "The lock of the {0} opens with {1}.", "Turn to {1} to unlock the {0}."],
        ["What opens the lock of the {0}?", "With which code does the lock of the {0} open?"],
        _thing,
        _code,
    ),
    Kind(
        ["Somebody left the {0} {1}.", "{1} you can see the {0}.", "The {0} was found {1}."],
        ["Where did somebody leave the {0}?", "Where was the {0} found?", "Where can you see the {0}?"],
        _thing,
        lambda rng: rng.choice(SPOTS),
    ),
    Kind(
        ["{1} is written on the {0}.", "The words on the {0} are {1}.", "On the {0} something is written in {1}."],
        ["In what language are the words on the {0}?", "Which language is written on the {0}?"],
        _thing,
        lambda rng: rng.choice(LANGUAGES),
    ),
    Kind(
        ["The {0} was traded for a {1}.", "For a {1} they gave the {0} away.", "A {1} was what they got for the {0}."],
        ["What was the {0} traded for?", "For what did they give the {0} away?"],
        _thing,
        lambda rng: rng.one_of(THINGS),
    ),
    Kind(
        ["The {0} smells of {1}.", "A smell of {1} comes from the {0}.", "It is {1} that the {0} smells of."],
        ["What does the {0} smell of?", "Of what does the {0} smell?"],
        _thing,
        lambda rng: rng.one_of(SMELLS),
    ),
    Kind(
        [
            "The {0} was ordered from {1}.",
            "{1} is where the {0} was ordered.",
            "A shop in {1} took the order for the {0}.",
        ],
        ["From where was the {0} ordered?", "In which town was the {0} ordered?"],
        _thing,
        _city,
    ),
)


def plant(document: Text, rng: Chance, number: int = 0) -> list[Asked]:
    """Questions on a document into which facts of one to five kinds were put, up to four of a kind, each a sentence.

    Half of the documents have kinds about one sort of name only, people, towns, things or numbers, so that all names
    are alike. One kind in four states two values under one name, both of which are asked for. `number` is part of the
    ids.
    """
    sentences = [s for s in _BETWEEN.split(document.text) if s]
    sort = rng.choice(KINDS).name
    kinds = [kind for kind in KINDS if kind.name is sort] if rng.random() < 0.5 else KINDS
    told = [(kind, _facts(kind, rng)) for kind in rng.sample(kinds, min(len(kinds), rng.randrange(1, 6)))]
    for kind, facts in told:
        for name, value in facts:
            sentences.insert(rng.randrange(len(sentences) + 1), _filled(rng.choice(kind.sentences), name, value))
    passage = " ".join(sentences)
    asked = []
    for which, (kind, facts) in enumerate(told):
        for name in dict.fromkeys(name for name, _ in facts):
            values = list(dict.fromkeys(value for named, value in facts if named == name))
            answers = sorted((value.split("|")[-1] for value in values), key=lambda value: _place(value, passage))
            asked.append(
                Asked(
                    id=f"planted:{number}:{document.id}:{which}:{name}",
                    source="planted",
                    title=document.title,
                    passage=passage,
                    question=_filled(rng.choice(kind.questions), name, values[0]),
                    answers=(" and ".join(answers),),
                )
            )
    return asked


def _facts(kind: Kind, rng: Chance) -> list[tuple[str, str]]:
    """Names and values of one kind; what they are about, if the kind says it, is the same in all.

    A third name often has the first word of one and the second of another.
    """
    names = [kind.name(rng) for _ in range(rng.randrange(1, 5))]
    if len(names) > 2 and " " in names[0] and rng.random() < 0.5:
        names[2] = " ".join([*names[0].split()[:1], *names[1].split()[1:]])
    names = list(dict.fromkeys(names))
    facts = [(name, kind.value(rng)) for name in names]
    if "|" in facts[0][1]:
        thing = facts[0][1].split("|")[0]
        return [(name, "|".join([thing, *value.split("|")[1:]])) for name, value in facts]
    if rng.random() < 0.25:
        facts.append((facts[0][0], kind.value(rng)))
        rng.shuffle(facts)
    return facts


def _filled(pattern: str, name: str, value: str) -> str:
    parts = value.split("|")
    sentence = pattern.format(name, parts if len(parts) > 1 else value)
    return _ARTICLE.sub(r"\1n ", sentence[0].upper() + sentence[1:])


def _place(value: str, passage: str) -> int:
    """Where a value that was planted stands: as a word, and perhaps at the beginning of a sentence."""
    found = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", passage, re.IGNORECASE)
    assert found is not None, (value, passage)
    return found.start()


_BETWEEN = re.compile(r"(?<=\w{3}[.!?]) +(?=[A-Z\"“])")  # "c. 1949" and "translit. ani" are no ends
_ARTICLE = re.compile(r"\b([Aa]) (?=[aio]|e(?!u)|u(?!ni|s[aeu]|ti|ra))")
