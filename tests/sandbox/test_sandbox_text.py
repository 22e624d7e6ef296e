"""The grammar and the words: prompts and reviews that read well, and levels that mean what they say."""

from __future__ import annotations

import random
import re

import pytest

from prefopt.sandbox import words
from prefopt.sandbox.text import Subject, prompts_about, subjects, write_review
from prefopt.sandbox.words import SENTIMENT

CAFE = Subject("café", "on Mill Street")


def levels(phrase: str) -> list[int]:
    return [SENTIMENT[word] for word in re.findall(r"\w+", phrase.lower()) if word in SENTIMENT]


def reviews(count: int = 500) -> list[str]:
    rng = random.Random(0)
    return [write_review(CAFE, rng) for _ in range(count)]


@pytest.mark.parametrize("table", ["QUALITIES", "MANNERS", "VERBS", "EXCLAMATIONS", "VERDICTS"])
def test_a_phrase_judges_by_exactly_the_level_it_is_listed_under(table):
    for level, phrases in getattr(words, table).items():
        for phrase in phrases:
            assert sum(levels(phrase)) == level, phrase


def test_names_facts_and_degrees_do_not_judge():
    aspects = [aspect for several in words.ASPECTS.values() for aspect in several]
    degrees = [degree for several in words.DEGREES.values() for degree in several]
    neutral = [*words.ASPECTS, *aspects, *words.PLACES, *words.PEOPLE, *words.COMPANIONS, *words.OCCASIONS]
    assert not any(levels(phrase) for phrase in [*neutral, *words.FACTS, *degrees])


def test_there_are_hundreds_of_different_prompts():
    prompts = [prompt for subject in subjects() for prompt in prompts_about(subject)]
    assert len(prompts) == len(set(prompts)) == 1200
    assert "Write a review of the café on Mill Street." in prompts


def test_reviews_are_several_whole_sentences():
    for review in reviews():
        sentences = re.findall(r"[^.!?]+[.!?]", review)
        assert "".join(sentences) == review
        assert 4 <= len(sentences) <= 5
        assert all(sentence.strip()[0].isupper() for sentence in sentences)
        assert "  " not in review


def test_no_aspect_is_judged_twice_in_a_review():
    for review in reviews():
        aspects = re.findall(r"(?:The|the) ([a-z ]+?) was", review)
        assert len(aspects) == len(set(aspects)), review


def test_moods_reach_from_dreadful_to_wonderful_and_balance():
    totals = [sum(levels(review)) for review in reviews(2000)]
    assert min(totals) <= -8
    assert max(totals) >= 8
    assert abs(sum(totals) / len(totals)) < 0.4
