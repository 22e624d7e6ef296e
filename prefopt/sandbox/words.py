"""The words of the small world: what is reviewed, where it stands, and how strongly every word judges.

A judgement has a level from -2 (dreadful) to 2 (wonderful). The grammar chooses words by level and the gold
reward reads the level back from the word: both use the tables of this page, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

Levels = Mapping[int, tuple[str, ...]]
"""Words or phrases by level of sentiment, from -2 to 2."""

ASPECTS: dict[str, tuple[str, ...]] = {
    "café": ("coffee", "tea", "carrot cake", "breakfast", "music", "service"),
    "bakery": ("bread", "apple cake", "coffee", "smell", "choice", "service"),
    "restaurant": ("soup", "fish", "wine", "menu", "dessert", "service"),
    "hotel": ("room", "bed", "breakfast", "view", "lobby", "service"),
    "museum": ("exhibition", "collection", "light", "shop", "audio guide", "building"),
    "cinema": ("film", "sound", "screen", "popcorn", "seat", "building"),
    "theatre": ("play", "acting", "stage", "sound", "seat", "building"),
    "bookshop": ("choice", "poetry shelf", "reading corner", "smell", "tea", "service"),
    "library": ("reading room", "choice", "light", "silence", "garden", "building"),
    "guesthouse": ("room", "bed", "breakfast", "garden", "view", "welcome"),
}
"""Kinds of places to review, each with the things one can say something about."""

PLACES: tuple[str, ...] = (
    "on Mill Street",
    "on Castle Street",
    "on Bridge Street",
    "on Orchard Lane",
    "on Willow Lane",
    "on Chapel Lane",
    "on Station Road",
    "on Abbey Road",
    "in Alder Square",
    "in Linden Square",
    "by the river",
    "by the canal",
    "by the lake",
    "near the harbour",
    "near the cathedral",
    "near the lighthouse",
    "behind the church",
    "behind the town hall",
    "at the old bridge",
    "at the city gate",
)

PEOPLE: tuple[str, ...] = ("owner", "manager", "staff", "woman at the door", "young man at the desk")
COMPANIONS: tuple[str, ...] = ("my sister", "my brother", "my daughter", "a friend", "my uncle", "a colleague")
OCCASIONS: tuple[str, ...] = (
    "on Sunday",
    "last week",
    "yesterday",
    "after work",
    "on a rainy morning",
    "on a sunny afternoon",
    "in the spring",
    "during our holiday",
)

QUALITIES: Levels = {
    2: ("wonderful", "superb", "excellent", "magnificent", "delightful", "marvellous"),
    1: ("good", "lovely", "pleasant", "nice", "charming"),
    0: ("ordinary", "plain", "simple", "average", "modest"),
    -1: ("poor", "dull", "disappointing", "weak", "tiresome"),
    -2: ("dreadful", "awful", "terrible", "horrible", "miserable", "hopeless"),
}
MANNERS: Levels = {
    2: ("adorable", "brilliant", "generous"),
    1: ("friendly", "helpful", "kind"),
    0: ("quiet", "busy", "polite"),
    -1: ("careless", "cold", "slow"),
    -2: ("rude", "hostile", "insulting"),
}
VERBS: Levels = {
    2: ("adored", "loved"),
    1: ("enjoyed", "liked"),
    0: ("tried", "noticed"),
    -1: ("disliked", "regretted"),
    -2: ("hated", "detested"),
}
EXCLAMATIONS: Levels = {
    2: ("What a joy!", "What a treasure!"),
    1: ("What a pleasure!", "What a treat!"),
    0: ("What a day!",),
    -1: ("What a pity!", "What a shame!"),
    -2: ("What a disaster!", "What a nightmare!"),
}
VERDICTS: Levels = {
    2: ("I give it five stars.", "I will gladly come back.", "I recommend it warmly."),
    1: ("I give it four stars.", "I will certainly come back.", "I recommend it."),
    0: ("I give it three stars.", "Perhaps I will come back.", "It is what it is."),
    -1: ("I give it two stars.", "I doubt that I will come back.", "I expected more."),
    -2: ("I give it one star.", "I will never come back.", "I warn everyone."),
}
DEGREES: Levels = {
    2: ("simply", "truly", "absolutely"),
    1: ("really", "very"),
    0: ("rather", "quite"),
    -1: ("rather", "really"),
    -2: ("simply", "truly", "absolutely"),
}
"""How a quality of each level is strengthened; these words do not judge by themselves."""

FACTS: tuple[str, ...] = (
    "It opens at nine every morning.",
    "We sat near the window.",
    "There was a short queue at the door.",
    "The walls are painted green.",
    "We stayed for an hour.",
    "It has been there for many years.",
    "You can walk there from the centre.",
)

_JUDGING_WORDS_OF_PHRASES: Levels = {
    2: ("joy", "treasure", "five", "gladly"),
    1: ("pleasure", "treat", "four", "certainly", "recommend", "warmly"),
    -1: ("pity", "shame", "two", "doubt", "expected"),
    -2: ("disaster", "nightmare", "one", "never", "warn"),
}

SENTIMENT: dict[str, int] = {
    word: level
    for level, words in chain.from_iterable(
        table.items() for table in (QUALITIES, MANNERS, VERBS, _JUDGING_WORDS_OF_PHRASES)
    )
    for word in words
    if level
}
"""The level of every word that judges, lower case."""
