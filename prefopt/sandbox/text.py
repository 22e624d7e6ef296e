"""The grammar of the small world: prompts that ask for a review, and reviews of every mood."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from prefopt.sandbox.words import (
    ASPECTS,
    COMPANIONS,
    DEGREES,
    EXCLAMATIONS,
    FACTS,
    MANNERS,
    OCCASIONS,
    PEOPLE,
    PLACES,
    QUALITIES,
    VERBS,
    VERDICTS,
    Levels,
)

PROMPT_FORMS: tuple[str, ...] = (
    "Write a review of the {kind} {place}.",
    "What did you think of the {kind} {place}?",
    "Tell me about the {kind} {place}.",
    "How was your visit to the {kind} {place}?",
    "Describe the {kind} {place} for a friend.",
    "Should I go to the {kind} {place}?",
)


@dataclass(frozen=True)
class Subject:
    """What a review is about: a kind of place and where it stands."""

    kind: str
    place: str


def subjects() -> list[Subject]:
    """Return every subject of the world, in a fixed order."""
    return [Subject(kind, place) for kind, place in product(ASPECTS, PLACES)]


def prompts_about(subject: Subject) -> list[str]:
    """Return every way to ask for a review of `subject`."""
    return [form.format(kind=subject.kind, place=subject.place) for form in PROMPT_FORMS]


def write_review(subject: Subject, rng: random.Random) -> str:
    """Write one review in a mood drawn uniformly from dreadful (-2) to wonderful (2).

    A review is an opening, two or three different sentences and a verdict. Single judgements scatter by a level
    around the mood, so good reviews hold a reservation now and then.
    """
    review = _Review(subject, rng.randint(-2, 2), rng)
    bodies = rng.sample(_BODIES, k=rng.choice((2, 2, 3)))
    sentences = [_opening(review), *(body(review) for body in bodies), review.choose(VERDICTS)]
    return " ".join(sentences)


class _Review:
    """One review while it is written: its subject and mood, and which aspects were not mentioned yet."""

    def __init__(self, subject: Subject, mood: int, rng: random.Random) -> None:
        self.subject, self.mood, self.rng = subject, mood, rng
        self._aspects = rng.sample(ASPECTS[subject.kind], k=len(ASPECTS[subject.kind]))

    def level(self) -> int:
        return max(-2, min(2, self.mood + self.rng.choice((-1, 0, 0, 0, 0, 0, 0, 1))))

    def choose(self, levels: Levels) -> str:
        return self.rng.choice(levels[self.level()])

    def quality(self, level: int, words: Levels = QUALITIES) -> str:
        degree = f"{self.rng.choice(DEGREES[level])} " if self.rng.random() < 0.4 else ""
        return degree + self.rng.choice(words[level])

    def aspect(self) -> str:
        return self._aspects.pop()


def _opening(review: _Review) -> str:
    """Open a review; two openings of seven leave the subject out or half out, which the gold reward notices."""
    kind, place = review.subject.kind, review.subject.place
    occasion = review.rng.choice(OCCASIONS)
    companion = review.rng.choice(COMPANIONS)
    quality = review.quality(review.level())
    openings = (
        f"The {kind} {place} is {quality}.",
        f"My visit to the {kind} {place} was {quality}.",
        f"I went to the {kind} {place} {occasion} with {companion}.",
        f"{_capitalize(occasion)}, {companion} and I visited the {kind} {place}.",
        f"We found the {kind} {place} by chance {occasion}.",
        f"I came to this {kind} {occasion} with {companion}.",
        f"{_capitalize(companion)} took me there {occasion}.",
    )
    return review.rng.choice(openings)


def _one_aspect(review: _Review) -> str:
    return f"The {review.aspect()} was {review.quality(review.level())}."


def _two_aspects(review: _Review) -> str:
    first, second = review.level(), review.level()
    joint = "but" if first * second < 0 else "and"
    return (
        f"The {review.aspect()} was {review.quality(first)}, "
        f"{joint} the {review.aspect()} was {review.quality(second)}."
    )


def _action(review: _Review) -> str:
    return f"We {review.choose(VERBS)} the {review.aspect()}."


def _person(review: _Review) -> str:
    return f"The {review.rng.choice(PEOPLE)} was {review.quality(review.level(), MANNERS)}."


def _exclamation(review: _Review) -> str:
    return review.choose(EXCLAMATIONS)


def _fact(review: _Review) -> str:
    return review.rng.choice(FACTS)


_BODIES: Sequence[Callable[[_Review], str]] = (_one_aspect, _two_aspects, _action, _person, _exclamation, _fact)


def _capitalize(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]
