"""Worked problems of our own. Each is longer than a short window, so that its solution has to look back into it.

A question has six numbers among its words, and the solution takes them up one by one, in sentences that say whose they
are. Every kind of problem ends in a form of its own.
"""

from __future__ import annotations

import random

PEOPLE = ("Ada", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luis")
GOODS = ("honey", "cider", "mustard", "vinegar", "pickle", "marmalade", "chutney", "olive", "ginger", "lemon")
TOWNS = ("Arlen", "Bexton", "Carrow", "Dunmere", "Elstow", "Farley", "Garrick", "Hollin")


def stall(rng: random.Random) -> tuple[str, str]:
    """Income less three costs."""
    (owner, helper), goods = rng.sample(PEOPLE, 2), rng.choice(GOODS)
    buyers, jars, price = rng.randrange(12, 40), rng.randrange(2, 6), rng.randrange(5, 12)
    hours, wage, rent = rng.randrange(3, 8), rng.randrange(4, 9), rng.randrange(10, 30)
    sold, paid = buyers * jars, hours * wage
    return (
        f"Problem. On Saturday {owner} sells {goods} jars at the market. {buyers} people stop at the stall, and each "
        f"of them buys {jars} jars, which cost {price} coins apiece. {helper} carries the crates for {hours} hours "
        f"and gets {wage} coins for every hour, and the town asks {rent} coins for the place. How many coins does "
        f"{owner} take home in the evening?\nWorking.",
        f"The {buyers} people buy {jars} jars each, so {owner} sells {buyers} * {jars} = {sold} {goods} jars. At "
        f"{price} coins apiece they bring {sold} * {price} = {sold * price} coins. {helper} works {hours} hours for "
        f"{wage} coins, which costs {hours} * {wage} = {paid} coins. With {rent} coins for the place, the costs are "
        f"{paid} + {rent} = {paid + rent} coins. So {owner} takes home {sold * price} - {paid + rent} = "
        f"{sold * price - paid - rent} coins.\nFinal: <{sold * price - paid - rent}>",
    )


def journey(rng: random.Random) -> tuple[str, str]:
    """A way of three parts, and back."""
    (name, friend), (first, last) = rng.sample(PEOPLE, 2), rng.sample(TOWNS, 2)
    walk, times, bus, train = rng.randrange(2, 9), rng.randrange(2, 5), rng.randrange(11, 30), rng.randrange(40, 90)
    extra, days = rng.randrange(2, 7), rng.randrange(2, 6)
    ride = walk * times
    way = walk + ride + bus + train
    return (
        f"Task: To get from {first} to {last}, {name} walks {walk} miles to the farm of {friend}. From there a cart "
        f"goes {times} times as far to the bus, the bus takes {bus} miles to the station, and the train another "
        f"{train} miles to {last}. In {last} there are {extra} more miles to the office. {name} makes the whole way "
        f"on {days} days, once each day. How many miles are these together?\nSolution:",
        f"{name} walks {walk} miles, and the cart goes {times} times {walk}, that is {ride} miles. To the bus these "
        f"are {walk} plus {ride}, or {walk + ride} miles. The bus adds {bus}, which makes {walk + ride + bus}, and "
        f"the train {train}, which makes {way} miles to {last}. With {extra} miles to the office the way is "
        f"{way + extra} miles long. On {days} days these are {days} times {way + extra}, so {days * (way + extra)} "
        f"miles.\nResult -> [{days * (way + extra)}]",
    )


def shelves(rng: random.Random) -> tuple[str, str]:
    """A stock that is counted, sold from and filled again."""
    (keeper, guest), goods = rng.sample(PEOPLE, 2), rng.choice(GOODS)
    rows, each, boxes = rng.randrange(3, 9), rng.randrange(12, 30), rng.randrange(2, 6)
    packed, broken, sold = rng.randrange(6, 16), rng.randrange(2, 9), rng.randrange(15, 40)
    stood, came = rows * each, boxes * packed
    return (
        f"Q) In the shop of {keeper} there are {rows} shelves, and on every shelf stand {each} {goods} jars. Before "
        f"noon a cart brings {boxes} boxes, with {packed} jars in each box, but {broken} of these jars are broken "
        f"and go back. Then {guest} comes in and buys {sold} jars for a wedding. How many {goods} jars does {keeper} "
        "count when the shop closes?\nA)",
        f"The {rows} shelves held {rows} x {each}, that is {stood} jars. The cart brought {boxes} x {packed}, that "
        f"is {came} jars, of which {broken} went back, so {came - broken} were kept. Together {keeper} had {stood} "
        f"and {came - broken}, that is {stood + came - broken} jars. {guest} bought {sold} of them, and "
        f"{stood + came - broken} without {sold} leaves {stood + came - broken - sold}.\n=> "
        f"{stood + came - broken - sold} jars",
    )


PROBLEMS = (stall, journey, shelves)
"""Functions from a random generator to a problem and its solution."""
