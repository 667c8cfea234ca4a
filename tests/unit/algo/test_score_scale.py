from __future__ import annotations

import math
import random

import pytest

from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR, ScaleError, ScoreScale
from real_openrlhf.algo.target import Target
from tests.helpers.algo_factory import ANCHOR_WORDS, LETTERS, PieceTokenizer, WordTokenizer, merged_tokenizer
from tests.helpers.algo_factory import spaced_tokenizer as spaced

FIVE = ScoreScale.parse("1-5")


@pytest.mark.parametrize(
    ("text", "values", "labels"),
    [
        ("1-5", (1, 2, 3, 4, 5), ("1", "2", "3", "4", "5")),
        (" 0 - 2 ", (0, 1, 2), ("0", "1", "2")),
        ("9-11", (9, 10, 11), ("9", "10", "11")),
        ("1,2,4", (1, 2, 4), ("1", "2", "4")),
        ("-1,0.5", (-1, 0.5), ("-1", "0.5")),
        ("-2-2", (-2, -1, 0, 1, 2), ("-2", "-1", "0", "1", "2")),
        ("-3 - -1", (-3, -2, -1), ("-3", "-2", "-1")),
        ("1=Bad, 2=Very good", (1, 2), ("Bad", "Very good")),
        ("0=A,0.5=a=b", (0, 0.5), ("A", "a=b")),
        ("1.0,2.0", (1, 2), ("1.0", "2.0")),
        ("1234567,1234568", (1234567, 1234568), ("1234567", "1234568")),
        ("0.12345678=x,1=y", (0.12345678, 1), ("x", "y")),
    ],
)
def test_parse_and_back(text: str, values: tuple[float, ...], labels: tuple[str, ...]) -> None:
    scale = ScoreScale.parse(text)
    assert (scale.values, scale.labels) == (values, labels)
    assert ScoreScale.parse(str(scale)) == scale
    assert scale.tensor().tolist() == list(values)
    assert len(scale) == len(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5-1", "does not ascend"),
        ("3-3", "does not ascend"),
        ("3", "at least two"),
        ("", "cannot read ''"),
        ("1,,2", "cannot read ''"),
        ("1,two", "cannot read 'two'"),
        ("Bad,Good", "cannot read 'Bad'"),
        ("-1--3", "does not ascend"),
        ("--1-3", "cannot read '--1-3'"),
        ("-2-", "cannot read '-2-'"),
        ("1-²", "cannot read '1-²'"),
        ("2,1", "must ascend"),
        ("1,1.0", "must ascend"),
        ("0,nan", "finite"),
        ("0,inf", "finite"),
        ("1=Good,2=Good", "must differ"),
        ("1=,2=Good", "'' is empty"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ScaleError, match=message):
        ScoreScale.parse(text)


def test_constructor_refuses() -> None:
    with pytest.raises(ScaleError, match="2 values but 1 labels"):
        ScoreScale((1.0, 2.0), ("1",))
    with pytest.raises(ScaleError, match=r"' 2'.*space"):
        ScoreScale((1.0, 2.0), ("1", " 2"))


@pytest.mark.parametrize(
    ("value", "low", "high", "weight"),
    [(1, 0, 0, 0.0), (5.0, 4, 4, 0.0), (3, 2, 2, 0.0), (3.25, 2, 3, 0.25), (4.5, 3, 4, 0.5), (1.75, 0, 1, 0.75)],
)
def test_target(value: float, low: int, high: int, weight: float) -> None:
    assert FIVE.target(value) == Target(value=value, low=low, high=high, weight=weight)


def test_target_restores_the_label_on_uneven_scales() -> None:
    scale = ScoreScale.parse("-2,0,0.5,7")
    rng = random.Random(0)
    for value in (rng.uniform(-2, 7) for _ in range(200)):
        t = scale.target(value)
        assert t.high == t.low + 1 and 0 < t.weight < 1
        assert (1 - t.weight) * scale.values[t.low] + t.weight * scale.values[t.high] == pytest.approx(value)


@pytest.mark.parametrize("value", [0.999, 5.001, -1, math.nan, math.inf, -math.inf, "3", None, True])
def test_target_refuses(value: object) -> None:
    with pytest.raises(ScaleError, match=r"off the scale|finite number"):
        FIVE.target(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "correct"), [(3, {2}), (3.25, {2}), (3.5, {2, 3}), (3.75, {3}), (1, {0}), (5, {4}), (4.999, {4})]
)
def test_is_correct_when_nearest(value: float, correct: set[int]) -> None:
    target = FIVE.target(value)
    assert {i for i in range(5) if FIVE.is_correct(i, target)} == correct
    assert not FIVE.is_correct(None, target)


def test_ties_survive_float_rounding() -> None:
    scale = ScoreScale.parse("0.1,0.2,0.3")
    target = scale.target(0.15)
    assert target.weight != 0.5  # what makes this a test
    assert scale.is_correct(0, target) and scale.is_correct(1, target) and not scale.is_correct(2, target)


def test_worst_squared_error_includes_zero() -> None:
    assert FIVE.target(4).worst_squared_error(FIVE.values) == 16
    assert FIVE.target(2).worst_squared_error(FIVE.values) == 9
    below = ScoreScale.parse("-3,-2")
    assert below.target(-2.5).worst_squared_error(below.values) == 6.25


def test_bind_word_level() -> None:
    tokenizer = WordTokenizer("So the overall score is 1 2 3 4 5")
    (anchor,) = bind_scale(FIVE, tokenizer).anchors
    assert anchor.text == DEFAULT_ANCHOR
    assert anchor.prefix == "So the overall score is"
    assert anchor.token_ids == (6, 7, 8, 9, 10)


def test_bind_space_merged_into_the_score() -> None:
    tokenizer = merged_tokenizer()
    (anchor,) = bind_scale(FIVE, tokenizer).anchors
    assert anchor.prefix == "So the overall score is"
    assert anchor.token_ids == tuple(tokenizer.id(f" {d}") for d in "12345")


def test_bind_space_and_score_apart() -> None:
    tokenizer = spaced()
    (anchor,) = bind_scale(FIVE, tokenizer).anchors
    assert anchor.prefix == "So the overall score is "
    assert anchor.token_ids == tuple(tokenizer.id(d) for d in "12345")


def test_bind_labels_of_several_tokens() -> None:
    tokenizer = spaced()
    (anchor,) = bind_scale(ScoreScale.parse("9-10"), tokenizer).anchors
    nine, one, zero = (tokenizer.id(c) for c in "910")
    assert anchor.labels == ((nine,), (one, zero))
    assert anchor.trie.labels == anchor.labels
    with pytest.raises(ScaleError, match="here every label must be one token"):
        anchor.token_ids  # noqa: B018
    bound = bind_scale(ScoreScale.parse("1-10"), tokenizer)
    assert bound.read_token_ids == sorted(tokenizer.id(d) for d in "0123456789")
    assert bound.extra_tokens == 1 and bind_scale(FIVE, tokenizer).extra_tokens == 0


@pytest.mark.parametrize(("tokenizer", "space"), [(merged_tokenizer(), " "), (spaced(), "")], ids=["merged", "apart"])
def test_bind_labels_lend_no_token_to_the_anchor(tokenizer: PieceTokenizer, space: str) -> None:
    # "10".."13" all start with "1": taken into the anchor, the labels would be read as "0".."3".
    (anchor,) = bind_scale(ScoreScale.parse("10-13"), tokenizer).anchors
    assert anchor.prefix == "So the overall score is" + (" " if not space else "")
    assert anchor.labels == tuple((tokenizer.id(space + "1"), tokenizer.id(d)) for d in "0123")


@pytest.mark.parametrize(
    ("scale", "pieces"),
    [
        ("1=4,2=4.5", [["4"], ["4", ".", "5"]]),
        ("1=Very bad,2=Very good", [[*"Very", " ", *"bad"], [*"Very", " ", *"good"]]),
        ("0,100", [["0"], ["1", "0", "0"]]),
    ],
)
def test_bind_labels_of_words_and_fractions(scale: str, pieces: list[list[str]]) -> None:
    tokenizer = spaced(["V"])
    (anchor,) = bind_scale(ScoreScale.parse(scale), tokenizer).anchors
    assert [[tokenizer.decode([i]) for i in label] for label in anchor.labels] == pieces


def test_bind_labels_with_and_without_the_space_of_the_anchor() -> None:
    # "1" keeps the space apart, " Bad" merges with it: the space is then the first token of "1".
    tokenizer = spaced([" Bad"])
    (anchor,) = bind_scale(ScoreScale.parse("0=Bad,1=1"), tokenizer).anchors
    assert anchor.prefix == "So the overall score is"
    assert anchor.labels == ((tokenizer.id(" Bad"),), (tokenizer.id(" "), tokenizer.id("1")))


def test_bind_anchors_after_which_labels_split_otherwise_are_refused() -> None:
    tokenizer = merged_tokenizer([" 10"])
    with pytest.raises(ScaleError) as error:
        bind_scale(ScoreScale.parse("9-10"), tokenizer, [DEFAULT_ANCHOR, "is\n"])
    assert "'10' -> ['1', '0']" in str(error.value) and "'10' -> [' 10']" in str(error.value)
    assert "choose anchors that end alike" in str(error.value)


def test_bind_two_digit_labels_of_one_token() -> None:
    tokenizer = spaced(["10", "11"])
    (anchor,) = bind_scale(ScoreScale.parse("10-11"), tokenizer).anchors
    assert anchor.token_ids == (tokenizer.id("10"), tokenizer.id("11"))


def test_bind_unknown_labels_are_refused() -> None:
    with pytest.raises(ScaleError, match=r"tokens that no other label has.*'4' -> .*<unk>.*'5' -> .*<unk>"):
        bind_scale(FIVE, WordTokenizer("So the overall score is 1 2 3"))
    with pytest.raises(ScaleError, match="'5' becomes the token ids \\[0\\], which read '<unk>'"):
        bind_scale(FIVE, WordTokenizer("So the overall score is 1 2 3 4"))


def test_bind_anchor_that_the_tokenizer_changes_is_refused() -> None:
    with pytest.raises(ScaleError, match="choose an anchor"):
        bind_scale(FIVE, WordTokenizer("Score: 1 2 3 4 5"), ["Score:  Score: "])
    with pytest.raises(ScaleError, match="'Final <unk>'"):
        bind_scale(FIVE, WordTokenizer("Final 1 2 3 4 5"), ["Final score: "])


def test_bind_decodes_without_clean_up() -> None:
    # Some tokenizers drop spaces before punctuation unless told not to; the reader compares exact text.
    tokenizer = PieceTokenizer(["<eos>", *LETTERS, ":", *"12345"], cleans_up=True)
    (anchor,) = bind_scale(FIVE, tokenizer, ["score : "]).anchors
    assert anchor.prefix == "score : "


@pytest.mark.parametrize("anchors", [[], [" "], [""], [DEFAULT_ANCHOR, "\n"]])
def test_bind_blank_anchors_are_refused(anchors: list[str]) -> None:
    with pytest.raises(ScaleError, match="anchor"):
        bind_scale(FIVE, spaced(), anchors)


def test_bind_ordered_anchors_and_read_ids() -> None:
    tokenizer = merged_tokenizer()
    bound = bind_scale(FIVE, tokenizer, [DEFAULT_ANCHOR, "is "[:2] + "\n"])
    assert [a.text for a in bound.anchors] == [DEFAULT_ANCHOR, "is\n"]
    merged, bare = ([tokenizer.id(s + d) for d in "12345"] for s in (" ", ""))
    assert [list(a.token_ids) for a in bound.anchors] == [merged, bare]
    assert bound.read_token_ids == sorted(merged + bare)


def test_bind_word_labels() -> None:
    tokenizer = PieceTokenizer([*ANCHOR_WORDS, " Bad", " Good", " Bad", *LETTERS])
    (anchor,) = bind_scale(ScoreScale.parse("1=Bad,2=Good"), tokenizer).anchors
    assert [tokenizer.decode([i]) for i in anchor.token_ids] == [" Bad", " Good"]
