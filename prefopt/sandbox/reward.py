"""The gold reward of the small world: what the reader of a review really wants, as a pure function of words."""

from __future__ import annotations

import math
import re

from prefopt.sandbox.words import ASPECTS, PLACES, SENTIMENT

SENTIMENT_SCALE = 2.5
"""The most that good (or bad) words can add (or take)."""
SENTIMENT_SATURATION = 5.0
"""Sum of levels at which three quarters of `SENTIMENT_SCALE` are reached."""
SUBJECT_BONUS = 0.5
"""For naming the kind of place, and again for saying where it stands."""
REPETITION_PENALTY = 6.0
"""Per share of three-word sequences that have occurred before; natural reviews have at most a few percent."""
UNFINISHED_PENALTY = 1.0
"""For a text that does not end with a full stop, an exclamation or a question mark."""
SHORTEST, LONGEST = 12, 60
"""Number of words between which length costs nothing; each missing or excess share of `SHORTEST` costs 2."""

_WORD = re.compile(r"\w+")


def gold_reward(prompt: str, completion: str) -> float:
    """Return how good a review is, from its words alone; about -2.5 to 3.5 for reviews, lower for degenerate text.

        2.5 tanh(sum of levels / 5) + 0.5 [kind named] + 0.5 [place named]
          - 6 (share of repeated trigrams) - [unfinished] - 2 (missing or excess words) / 12

    Each judging word counts once, so neither length nor repetition of praise pays.

    Args:
        prompt: text of the user's turn; subjects of this world that occur in it are the ones to name
        completion: text of the assistant's turn, without special tokens
    """
    words = _WORD.findall(completion.lower())
    return (
        _sentiment(words)
        + _subject(_WORD.findall(prompt.lower()), words)
        - REPETITION_PENALTY * _repetition(words)
        - UNFINISHED_PENALTY * (not completion.rstrip().endswith((".", "!", "?")))
        - 2.0 * max(SHORTEST - len(words), len(words) - LONGEST, 0) / SHORTEST
    )


def _sentiment(words: list[str]) -> float:
    total = sum(SENTIMENT.get(word, 0) for word in set(words))
    return SENTIMENT_SCALE * math.tanh(total / SENTIMENT_SATURATION)


def _subject(prompt: list[str], words: list[str]) -> float:
    """Return the bonus for naming the kind and the place that the prompt asks about."""
    asked, said = f" {' '.join(prompt)} ", f" {' '.join(words)} "
    kinds = [f" {kind} " for kind in ASPECTS if f" {kind} " in asked]
    places = [f" {place.lower()} " for place in PLACES if f" {place.lower()} " in asked]
    named = sum(any(name in said for name in names) for names in (kinds, places))
    return SUBJECT_BONUS * named


def _repetition(words: list[str]) -> float:
    """Return the share of three-word sequences that repeat an earlier one."""
    trigrams = list(zip(words, words[1:], words[2:]))
    return 1.0 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
