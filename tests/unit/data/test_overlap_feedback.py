"""Feedback on two sentences by a program: what it says, and that it holds no digit."""

from __future__ import annotations

import random
import re

import pytest

from real_openrlhf.data.overlap_feedback import MAX_SHARED, stem, write_feedback

SENTENCES = [
    ("A man is playing a guitar.", "A man plays the flute."),
    ("Death toll rises to 49", "Death toll rises to 638"),
    ("He isn't here.", "He is here with 3 dogs and 12 cats, running."),
    ("4", "5 of them"),
    ("So the overall score is 2", "So the overall score is high"),
    ("One two three four five six seven", "alpha beta gamma delta epsilon zeta eta theta"),
    ("Tan cow with ear tags on a grassy field by a red barn.", "Many sheep standing on a green hill."),
]


def test_feedback_names_shared_and_differing_words() -> None:
    text = write_feedback("A man plays a guitar.", "A man is playing the flute.", random.Random(0))
    assert text == ("Both mention man, plays. Only the first has guitar. Only the second has flute. Most words agree.")


@pytest.mark.parametrize(
    ("first", "second", "clause"),
    [
        ("It costs $5", "It costs $7", "The numbers differ."),
        ("5 cats sleep", "Sleeping are 5 cats", "The numbers agree."),
        ("He can't swim", "He can swim", "Only the first is negated."),
        ("He swims", "He never swims", "Only the second is negated."),
        ("Dogs run", "Dogs run, jump, bark, eat, sleep", "The second says more."),
        ("Cats sleep", "Cats sleep", "All words agree."),
        ("Cats sleep", "Prices rose", "They share no content word."),
    ],
)
def test_feedback_clauses(first: str, second: str, clause: str) -> None:
    assert clause in write_feedback(first, second, random.Random(0))


@pytest.mark.parametrize(("first", "second"), [("He swims", "He dives"), ("He never swims", "He can't swim")])
def test_no_clause_without_a_difference(first: str, second: str) -> None:
    text = write_feedback(first, second, random.Random(0))
    assert "negated" not in text and "numbers" not in text and "says more" not in text


@pytest.mark.parametrize(
    ("one", "other"),
    [("plays", "playing"), ("runs", "running"), ("carry", "carries"), ("taking", "take"), ("stopped", "stops")],
)
def test_forms_of_a_word_share_a_stem(one: str, other: str) -> None:
    assert stem(one) == stem(other)


@pytest.mark.parametrize(("one", "other"), [("glass", "gla"), ("king", "k"), ("cat", "car"), ("sing", "s")])
def test_different_words_keep_their_stems(one: str, other: str) -> None:
    assert stem(one) != stem(other)


def test_long_word_lists_are_capped_in_order() -> None:
    words = [f"{a}{b}" for a in "bdfgk" for b in ("alo", "umi")]
    text = write_feedback(" ".join(words), " ".join(words), random.Random(3))
    match = re.match(r"Both mention (.*?)\.", text)
    assert match is not None
    named = match.group(1).split(", ")
    assert len(named) == MAX_SHARED and named == sorted(named, key=words.index)


def test_it_holds_no_digit_and_no_verdict() -> None:
    for first, second in SENTENCES:
        text = write_feedback(first, second, random.Random(0))
        assert not any(char.isdigit() for char in text) and "overall score is" not in text.lower()
