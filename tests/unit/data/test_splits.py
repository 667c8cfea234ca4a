"""Groups, not rows, are split: by a hash that depends on nothing but seed and group, or as the sources name them."""

from __future__ import annotations

from collections import Counter

import pytest

from real_openrlhf.data.row import DataError
from real_openrlhf.data.splits import keep_one_split, parse_fractions, split_of

SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}


def test_shares_hold_on_average_and_seeds_differ() -> None:
    first = [split_of(f"q{i}", SHARES, 0) for i in range(4000)]
    counts = Counter(first)
    # Four standard deviations of a binomial: 4 * sqrt(4000 * 0.8 * 0.2) = 101, 4 * sqrt(4000 * 0.1 * 0.9) = 76.
    assert abs(counts["train"] - 3200) < 101 and abs(counts["dev"] - 400) < 76 and abs(counts["test"] - 400) < 76
    assert first == [split_of(f"q{i}", SHARES, 0) for i in range(4000)]
    assert first != [split_of(f"q{i}", SHARES, 1) for i in range(4000)]


def test_one_split_takes_all() -> None:
    assert {split_of(f"q{i}", {"test": 1.0}, 3) for i in range(50)} == {"test"}


def test_a_group_in_several_named_splits_stays_in_the_held_out_one() -> None:
    rows = [("train", "a"), ("train", "b"), ("dev", "a"), ("test", "b"), ("train", "c"), ("dev", "b")]
    assert keep_one_split(rows) == ["dev", "test", None, None, None, "test"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=0.5", "sum to 1"),
        ("train=1.5,test=-0.5", "above 0"),
        ("trian=1", r"no split 'trian' \(did you mean 'train'\?\)"),
        ("train=x", "'x' is not a number"),
        ("train", "'' is not a number"),
    ],
)
def test_bad_shares(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_fractions(text)
