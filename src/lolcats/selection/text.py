"""Plain English text of our own to hide answers in: sentences made from templates, as many as are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator

PEOPLE = (
    "the baker", "a retired pilot", "my neighbour", "the new teacher", "an old sailor", "the gardener", "her cousin",
    "the night guard", "a young painter", "the postman", "our landlord", "the violin maker", "a visiting doctor",
    "the ferry captain", "his grandmother", "the librarian", "a tired farmer", "the mayor", "two students", "the cook",
)  # fmt: skip
PLACES = (
    "the harbour", "the market square", "the station", "a small chapel", "the upper mill", "the reading room",
    "the river bank", "an empty warehouse", "the school yard", "the botanical garden", "the old bridge", "the workshop",
    "a quiet side street", "the town hall", "the orchard", "the quarry", "the theatre", "the bus depot",
)  # fmt: skip
THINGS = (
    "a wooden ladder", "three letters", "a broken clock", "the blue umbrella", "a basket of pears", "an unsigned map",
    "a copper kettle", "the spare key", "a box of nails", "two tickets", "a roll of canvas", "a jar of honey",
    "the heavy ledger", "a bicycle pump", "an iron bell", "some faded photographs", "a pair of skates", "a lantern",
)  # fmt: skip
TIMES = (
    "In the morning", "Late in the autumn", "On the second day", "After the storm", "Before lunch", "That same week",
    "Around midnight", "At the end of March", "While it rained", "A year later", "Just before the holidays",
    "On market days", "When the lights went out", "By the time the snow had melted",
)  # fmt: skip
SENTENCES = (
    "{time}, {person} walked to {place} with {thing}.",
    "{person} had promised to bring {thing}, but nobody at {place} remembered the reason.",
    "{time}, {person} and {other} argued about {thing} for almost an hour.",
    "There was a smell of smoke near {place}, and {person} went to look for its cause.",
    "{person} wrote a long report on {thing}, which {other} read twice and then put away.",
    "{time}, the road from {place} to {place2} was closed, so everyone took the longer way.",
    "Nothing at {place} was as {person} had described it, apart from {thing}.",
    "{person} kept {thing} for years, although it had been of no use since the move to {place}.",
    "It took {other} a whole afternoon to carry {thing} from {place} to {place2}.",
    "{time}, {person} sold {thing} and bought a train ticket instead.",
    "If {person} had asked, {other} would have explained why {place} stays shut in winter.",
    "The committee met at {place}, listened to {person}, and decided nothing.",
    "{person} measured the walls of {place} again and found that the drawing was wrong.",
    "{time}, someone left {thing} on the steps of {place}, without a note.",
    "Most visitors pass {place} without a glance, yet {person} goes there every week.",
    "{other} laughed at the idea, but {person} had already paid for {thing}.",
    "The prices at {place} had doubled, and even {person} complained about them.",
    "{person} taught {other} how to repair {thing} with wire and a little patience.",
)  # fmt: skip


def sentences(seed: str) -> Iterator[str]:
    """Sentences without end, the same for the same seed; now and then a new paragraph."""
    rng = random.Random(seed)
    while True:
        person, other = rng.sample(PEOPLE, 2)
        place, place2 = rng.sample(PLACES, 2)
        words = {"person": person, "other": other, "place": place, "place2": place2}
        sentence = rng.choice(SENTENCES).format(**words, thing=rng.choice(THINGS), time=rng.choice(TIMES))
        yield sentence[0].upper() + sentence[1:] + ("\n\n" if rng.random() < 0.15 else " ")
