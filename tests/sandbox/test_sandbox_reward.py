"""The gold reward: praise pays once, the subject pays, repetition and broken endings cost."""

from __future__ import annotations

import math

import pytest

from prefopt.sandbox import gold_reward

PROMPT = "Write a review of the café on Mill Street."
PLAIN = "I went to the café on Mill Street with my sister. The coffee was {coffee}. We sat near the window."


def plain(coffee: str) -> float:
    return gold_reward(PROMPT, PLAIN.format(coffee=coffee))


def test_the_reward_of_a_plain_text_is_the_stated_formula():
    assert plain("ordinary") == pytest.approx(1.0)
    assert plain("wonderful") == pytest.approx(1.0 + 2.5 * math.tanh(2 / 5))
    assert plain("awful") == pytest.approx(1.0 - 2.5 * math.tanh(2 / 5))


def test_better_words_are_worth_more():
    rewards = [plain(word) for word in ("terrible", "poor", "ordinary", "good", "superb")]
    assert rewards == sorted(rewards)
    assert len(set(rewards)) == 5


def test_praise_saturates():
    one, two, four = (
        plain(words)
        for words in (
            "wonderful",
            "wonderful and superb",
            "wonderful and superb, really excellent, delightful",
        )
    )
    assert 0 < four - two < two - one
    assert four < 3.5


def test_saying_the_same_praise_again_does_not_pay():
    assert plain("superb, and the tea was superb") == pytest.approx(plain("superb"))
    # 23 words, 21 trigrams, one of them for the second time.
    assert plain("superb superb superb superb") == pytest.approx(plain("superb") - 6 / 21)


def test_repeating_sentences_costs():
    text = PLAIN.format(coffee="good")
    assert gold_reward(PROMPT, f"{text} {text}") < gold_reward(PROMPT, text) - 2.0


def test_naming_the_kind_and_the_place_pays_half_a_unit_each():
    text = "My visit to the {subject} was good. We sat near the window, and it rained a little."
    named, elsewhere, other = (
        gold_reward(PROMPT, text.format(subject=subject))
        for subject in ("café on Mill Street", "café on Abbey Road", "hotel on Abbey Road")
    )
    assert named - elsewhere == pytest.approx(0.5)
    assert elsewhere - other == pytest.approx(0.5)


def test_a_subject_that_was_not_asked_for_does_not_pay():
    text = PLAIN.format(coffee="good")
    assert gold_reward("Write something.", text) == pytest.approx(gold_reward(PROMPT, text) - 1.0)


def test_an_unfinished_text_costs_one_unit():
    text = PLAIN.format(coffee="good")
    assert gold_reward(PROMPT, text.removesuffix(".")) == pytest.approx(gold_reward(PROMPT, text) - 1.0)


@pytest.mark.parametrize("text", ["", " ", ".", "wonderful", "Wonderful.", "wonderful " * 40])
def test_degenerate_texts_get_less_than_a_mediocre_review(text):
    assert gold_reward(PROMPT, text) < plain("ordinary") - 1.0


def test_length_alone_never_pays():
    filler = "".join(f" Then {number} people came in." for number in range(50))
    rewards = [
        gold_reward(PROMPT, PLAIN.format(coffee="good") + filler[:length]) for length in (0, 24 * 4 - 2, len(filler))
    ]
    assert rewards[0] >= rewards[1] > rewards[2]


def test_the_reward_does_not_depend_on_case_or_spacing():
    text = PLAIN.format(coffee="good")
    assert gold_reward(PROMPT.upper(), text.upper().replace(" ", "  ")) == gold_reward(PROMPT, text)
