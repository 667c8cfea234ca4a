from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest

from real_openrlhf.algo.score_position import ScoreReader, _goes_on
from real_openrlhf.algo.types import NO_ANCHOR, OFF_SCALE, SPLIT_ANCHOR, TRUNCATED, ScoreReading
from tests.helpers.algo_factory import ANCHOR, PieceTokenizer, WordTokenizer, merged_tokenizer, reader_of
from tests.helpers.algo_factory import spaced_tokenizer as spaced

EOS = "<eos>"
TOKENIZERS = pytest.mark.parametrize("make", [merged_tokenizer, spaced], ids=["merged", "apart"])


def read(tokenizer: PieceTokenizer, text: str, **kwargs: object) -> ScoreReading:
    return reader_of(tokenizer, **kwargs).read(tokenizer.encode(text, add_special_tokens=False))  # type: ignore[arg-type]


def position_after(tokenizer: PieceTokenizer, head: str) -> int:
    """Where the score stands when the response begins with `head`, which ends in the whole anchor."""
    merged = b" 4" in tokenizer.ids
    return len(tokenizer.encode(head[:-1] if merged else head, add_special_tokens=False))


# head: all up to the anchor; tail: what follows it; label: index on "1".."5" or None for off the scale
SCORED = [
    ("plain", "a. ", "4" + EOS, 3),
    ("missing end of text", "a. ", "4", 3),
    ("trailing newline", "a. ", "4\n" + EOS, 3),
    ("trailing newlines, no end", "a. ", "4\n\n", 3),
    ("text after", "a. ", "4, good job!" + EOS, 3),
    ("full stop", "a. ", "4." + EOS, 3),
    ("full stop, then text", "a. ", "4. ok" + EOS, 3),
    ("out of five", "a. ", "4/5" + EOS, 3),
    ("nothing before the anchor", "", "1" + EOS, 0),
    ("early end of text", "a. ", "5" + EOS + " b So the overall score is 2" + EOS, 4),
    ("repeated end of text", "a. ", "2" + EOS + EOS, 1),
    ("two anchors", f"a {ANCHOR}2. no. ", "3" + EOS, 2),
    ("two anchors, same score", f"{ANCHOR}2\n", "2", 1),
    ("second anchor begun and cut", "a. ", "4\nSo the over", 3),
    ("second anchor begun and ended", "a. ", "4\nSo the over" + EOS, 3),
    ("off scale digit", "a. ", "7" + EOS, None),
    ("zero", "a. ", "0" + EOS, None),
    ("two digits", "a. ", "45" + EOS, None),
    ("decimal", "a. ", "4.5" + EOS, None),
    ("decimal comma", "a. ", "4,5" + EOS, None),
    ("letter behind", "a. ", "4th" + EOS, None),
    ("word", "a. ", "good" + EOS, None),
    ("end of text instead of a score", "a. ", EOS, None),
    ("last of two anchors off scale", f"a {ANCHOR}2. no. ", "9" + EOS, None),
]


@TOKENIZERS
@pytest.mark.parametrize(("head", "tail", "label"), [s[1:] for s in SCORED], ids=[s[0] for s in SCORED])
def test_readable(make: type, head: str, tail: str, label: int | None) -> None:
    tokenizer = make()
    if tail.startswith(EOS) and b" 4" in tokenizer.ids:
        text = head + ANCHOR[:-1] + tail  # the space belongs to the score, which was not written
    else:
        text = head + ANCHOR + tail
    reading = read(tokenizer, text)
    assert reading.position == position_after(tokenizer, head + ANCHOR)
    assert reading.label_index == label
    assert reading.reason == (OFF_SCALE if label is None else None)
    assert reading.anchor_index == 0
    assert reading.readable


INVALID = [
    ("empty", "", NO_ANCHOR, None),
    ("only end of text", EOS, NO_ANCHOR, None),
    ("no anchor", "a good answer. 4" + EOS, NO_ANCHOR, None),
    ("no anchor, cut", "a good ans", NO_ANCHOR, None),
    ("anchor only behind the end of text", "a. " + EOS + ANCHOR + "4", NO_ANCHOR, None),
    ("other case", "a. so the overall score is 4" + EOS, NO_ANCHOR, None),
    ("ended inside the anchor", "a. So the over" + EOS, NO_ANCHOR, None),
    ("cut inside the anchor", "a. So the over", TRUNCATED, None),
    ("cut after the first word", "a. So", TRUNCATED, None),
    ("cut after one letter", "a. S", NO_ANCHOR, None),
    ("cut before the space", "a. So the overall score is", TRUNCATED, 0),
    ("second anchor cut before its score", f"{ANCHOR}4\nSo the overall score is", TRUNCATED, 0),
]


@TOKENIZERS
@pytest.mark.parametrize(("text", "reason", "anchor"), [s[1:] for s in INVALID], ids=[s[0] for s in INVALID])
def test_invalid(make: type, text: str, reason: str, anchor: int | None) -> None:
    expected = ScoreReading(position=None, label_index=None, reason=reason, anchor_index=anchor)
    assert read(make(), text) == expected
    assert not expected.readable


def test_cut_right_before_the_score() -> None:
    # With the space as a separate token the anchor is complete and only the score is missing.
    assert read(spaced(), "a. " + ANCHOR).reason == TRUNCATED
    # Where " 4" is the score, a lone space is what stands at the score position: it is not a label.
    reading = read(merged_tokenizer(), "a. " + ANCHOR)
    assert (reading.reason, reading.position) == (OFF_SCALE, position_after(merged_tokenizer(), "a. " + ANCHOR))


def test_score_in_other_tokens_than_the_scale_is_off_the_scale() -> None:
    tokenizer = merged_tokenizer()
    reader = reader_of(tokenizer)
    head = tokenizer.encode(ANCHOR[:-1], add_special_tokens=False)
    reading = reader.read([*head, tokenizer.id(" "), tokenizer.id("4"), 0])
    assert (reading.position, reading.label_index, reading.reason) == (len(head), None, OFF_SCALE)


@TOKENIZERS
def test_anchor_in_other_tokens_than_the_tokenizer_would_choose(make: type) -> None:
    tokenizer = make()
    reader = reader_of(tokenizer)
    letters = [tokenizer.id(c) for c in "So the overall score is"]
    tail = [tokenizer.id(" 4")] if b" 4" in tokenizer.ids else [tokenizer.id(" "), tokenizer.id("4")]
    reading = reader.read([*letters, *tail, 0])
    assert reading.position == len(letters) + len(tail) - 1
    assert reading.label_index == 3


def test_anchor_and_score_in_one_token() -> None:
    split = ScoreReading(position=None, label_index=None, reason=SPLIT_ANCHOR, anchor_index=0)
    assert read(spaced(["is 4"]), "a. So the overall score is 4" + EOS).readable  # " is" comes first: no split
    tokenizer = spaced([" 4"])
    head = tokenizer.encode(ANCHOR[:-1], add_special_tokens=False)
    bound = reader_of(spaced()).bound
    assert ScoreReader.build(bound, tokenizer, {0}).read([*head, tokenizer.id(" 4"), 0]) == split
    # The last anchor counts, also when it cannot be read.
    good = [*tokenizer.encode(ANCHOR + "\n", add_special_tokens=False)[:-1], tokenizer.id("3")]
    assert ScoreReader.build(bound, tokenizer, {0}).read([*good, *head, tokenizer.id(" 4"), 0]) == split
    # A word that begins like the end of the anchor.
    merged = merged_tokenizer([" isn"])
    assert read(merged, "So the overall score isn 4" + EOS) == split


def test_ordered_anchors() -> None:
    tokenizer = merged_tokenizer()
    anchors = ("So the overall score is ", "I say ")
    labels = {
        "I say 2\n": (1, 1),
        "So the overall score is 4\n": (0, 3),
        "So the overall score is 4 I say 2\n": (0, 3),
        "I say 2 So the overall score is 4\n": (0, 3),
        "I say 2 I say 5\n": (1, 4),
        "I say 2 So the over": (1, 1),
    }
    tokenizer = merged_tokenizer(["I"])
    for text, (anchor, label) in labels.items():
        reading = read(tokenizer, text, anchors=anchors)
        assert (reading.anchor_index, reading.label_index) == (anchor, label), text
    assert read(tokenizer, "I sa", anchors=anchors).reason == TRUNCATED


# scale, text after the anchor (with EOS where the response ends itself), label that is read
SEVERAL = [
    ("1-10", "10" + EOS, "10"),
    ("1-10", "1" + EOS, "1"),
    ("1-10", "1\n" + EOS, "1"),
    ("1-10", "1. ok", "1"),
    ("1-10", "10.", "10"),
    ("1-10", "2", "2"),
    ("1-10", "1", None),  # cut: it might have become "10"
    ("1-10", "15" + EOS, None),
    ("1-10", "100" + EOS, None),
    ("1-10", "0" + EOS, None),
    ("4,4.5,5", "4.5" + EOS, "4.5"),
    ("4,4.5,5", "4." + EOS, "4"),
    ("4,4.5,5", "4. ok" + EOS, "4"),
    ("4,4.5,5", "4.", None),
    ("4,4.5,5", "4.7" + EOS, None),
    ("4,4.5,5", "4.55" + EOS, None),
    ("1=Very bad,2=Very good", "Very good." + EOS, "Very good"),
    ("1=Very bad,2=Very good", "Very goodish" + EOS, None),
    ("1=Very bad,2=Very good", "Very" + EOS, None),
    ("1=Very,2=Very good", "Very bad" + EOS, "Very"),
    ("1,100", "10" + EOS, None),
    ("1,100", "100" + EOS, "100"),
]


@TOKENIZERS
@pytest.mark.parametrize(("scale", "tail", "label"), SEVERAL)
def test_labels_of_several_tokens(make: type, scale: str, tail: str, label: str | None) -> None:
    tokenizer = make([" V" if make is merged_tokenizer else "V"])
    head = tokenizer.encode("a. " + ANCHOR[:-1], add_special_tokens=False)
    ids = tokenizer.encode("a. " + ANCHOR + tail, add_special_tokens=False)
    reader = reader_of(tokenizer, scale)
    reading = reader.read(ids)
    assert reading.position == len(head) + (make is spaced)
    assert reading.reason == (OFF_SCALE if label is None else None)
    assert (None if reading.label_index is None else reader.bound.scale.labels[reading.label_index]) == label


def test_a_label_in_other_tokens_is_off_the_scale() -> None:
    tokenizer = spaced(["10", "4."])
    head = tokenizer.encode(ANCHOR, add_special_tokens=False)
    one, zero, four, five = (tokenizer.id(c) for c in "1045")
    # "10" is one token here; in two digits it is not the label, and not a "1" either.
    assert reader_of(tokenizer, "1-10").read([*head, tokenizer.id("10"), 0]).label_index == 9
    for scale, ids in (("1-10", [one, zero, 0]), ("4,4.5", [four, tokenizer.id("."), five, 0])):
        reading = reader_of(tokenizer, scale).read([*head, *ids])
        assert (reading.position, reading.label_index, reading.reason) == (len(head), None, OFF_SCALE)


def test_word_level_and_word_labels() -> None:
    tokenizer = WordTokenizer("So the overall score is Bad Good ok")
    reader = reader_of(tokenizer, "1=Bad,2=Good")
    reader = ScoreReader.build(reader.bound, tokenizer, {len(tokenizer.words)})
    ids = tokenizer.encode("ok So the overall score is Good ok", add_special_tokens=False)
    reading = reader.read(ids)
    assert (reading.position, reading.label_index) == (6, 1)
    pieces = merged_tokenizer([" Good", " Bad"])
    assert read(pieces, ANCHOR + "Good.", scale="1=Bad,2=Good").label_index == 1
    assert read(pieces, ANCHOR + "Goodish", scale="1=Bad,2=Good").reason == OFF_SCALE


def test_characters_split_over_tokens() -> None:
    # Four bytes of one character decode to one to four characters, depending on how many are there.
    tokenizer = spaced([bytes([b]) for b in "😀é".encode()])
    for head in ("😀é", "é😀é😀" * 9, "a😀. "):
        reading = read(tokenizer, head + ANCHOR + "4😀")
        assert (reading.position, reading.label_index) == (position_after(tokenizer, head + ANCHOR), 3)
    # Broken bytes before and after it.
    ids = tokenizer.encode("😀", add_special_tokens=False)[:2] + tokenizer.encode(
        ANCHOR + "4", add_special_tokens=False
    )
    reading = reader_of(tokenizer).read(ids + tokenizer.encode("é", add_special_tokens=False)[:1])
    assert (reading.position, reading.label_index) == (len(ids) - 1, 3)


def slow_reference(tokenizer: PieceTokenizer, ids: list[int], prefix: str) -> tuple[int | None, int | None, str | None]:
    """The same rules from bytes and a regular expression, without any decode of a part."""
    ended = 0 in ids
    body = ids[: ids.index(0)] if ended else ids
    pieces = [tokenizer.pieces[i] for i in body]
    data, mark = b"".join(pieces), prefix.encode()
    if not ended and data.endswith((mark, mark.rstrip())):
        return None, None, TRUNCATED
    starts = [m.start() for m in re.finditer(b"(?=" + re.escape(mark) + b")", data)]
    if not starts:
        cut = not ended and any(data.endswith(mark[:n]) for n in range(2, len(mark)))
        return None, None, TRUNCATED if cut else NO_ANCHOR
    end = starts[-1] + len(mark)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    if end not in ends:
        return None, None, SPLIT_ANCHOR
    position = ends.index(end)
    pattern = (
        rb" ([1-5])(?![0-9A-Za-z]|[.,][0-9])" if not prefix.endswith(" ") else rb"([1-5])(?![0-9A-Za-z]|[.,][0-9])"
    )
    match = re.match(pattern, data[end:])
    if match is None or tokenizer.pieces[ids[position]] != match.group(0):
        return position, None, OFF_SCALE
    return position, int(match.group(1)) - 1, None


@TOKENIZERS
def test_random_responses_against_a_slow_reference(make: type) -> None:
    tokenizer = make([" 4.", "is", "is 4", "4\n", "score is", " isn"] + [bytes([b]) for b in "é".encode()])
    reader = reader_of(tokenizer)
    prefix = reader.bound.anchors[0].prefix
    rng = random.Random(0)
    fragments = [
        "So the overall score is 4",
        "So the overall score is 4.",
        "So the overall score isn",
        "So the overall score is 2",
        ANCHOR,
        "So the over",
        " 5",
        "a. ",
        ".5",
    ]
    seen: dict[str | None, int] = {}
    for _ in range(3000):
        ids: list[int] = []
        for _ in range(rng.randint(0, 4)):
            ids += tokenizer.encode(rng.choice(fragments), add_special_tokens=False)
        for _ in range(rng.choice([0, 0, 1, 2, 4])):
            ids.insert(rng.randint(0, len(ids)), rng.randrange(len(tokenizer.pieces)))
        if rng.random() < 0.5:
            ids.append(0)
        reading = reader.read(ids)
        result = (reading.position, reading.label_index, reading.reason)
        assert result == slow_reference(tokenizer, ids, prefix), (ids, tokenizer.decode(ids))
        seen[reading.reason] = seen.get(reading.reason, 0) + 1
    assert min(seen.get(reason, 0) for reason in (None, NO_ANCHOR, TRUNCATED, SPLIT_ANCHOR, OFF_SCALE)) >= 5, seen


@TOKENIZERS
@pytest.mark.parametrize("before", [0, 10, 500, 995])
def test_few_decodes(make: type, before: int) -> None:
    tokenizer = make()
    reader = reader_of(tokenizer)
    ids = tokenizer.encode("a" * before + ANCHOR + "4\n" + "b " * 500, add_special_tokens=False)[:1000]
    tokenizer.n_decodes = tokenizer.n_decoded = 0
    reading = reader.read(ids)
    assert reading.reason == ("truncated" if before == 995 else None)
    assert tokenizer.n_decodes < 40
    assert tokenizer.n_decoded < 40 * 1000


class ByteFallback(PieceTokenizer):
    """Every byte of a broken character reads as one replacement, as in SentencePiece's byte fallback."""

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        data, out = b"".join(self.pieces[i] for i in token_ids), ""
        while data:
            width = next((n for n in range(1, 5) if data[:n].decode(errors="ignore")), 1)
            out += data[:width].decode(errors="ignore") or "\ufffd"
            data = data[width:]
        return out


def test_anchor_whose_decoded_length_shrinks_with_its_last_byte() -> None:
    tokenizer = ByteFallback(["<eos>", *"12345", ".", *(bytes([b]) for b in sorted(set("得分是".encode())))])
    for head in ("", ".", "....得分"):
        ids = tokenizer.encode(head + "得分是4.", add_special_tokens=False)
        reading = reader_of(tokenizer, anchors=("得分是",)).read(ids)
        assert (reading.position, reading.label_index) == (len(ids) - 2, 3)


UNITS = ("分", "点", "점", "балла", "คะแนน", "अंक", " points", "pts", "points.", "/5", "\ufe0f\u20e3")
UNITS += ("Punkte", "puntos", "điểm", "étoiles", "puan", "点。", "点 5", "星", "ч", " 5", "、", "’s", "\u00a0Punkte")


@pytest.mark.parametrize(
    ("label", "rest", "goes_on"),
    [
        *(("4", unit, False) for unit in UNITS),
        *(("4", more, True) for more in ("5", "５", ".5", "，5", "½", "十", "th", "a", "pointless", "e3", "٤")),
        *(("4", more, True) for more in ("点5", "點五", "半", "分半", "·5", "'000", "\u202f000", "º", "ª", "puntosy")),
        *(("Good", more, True) for more in ("ish", "4")),
        *(("Good", more, False) for more in ("", ".", " ish", "分")),
        ("优", "秀", True),
        ("优", "!", False),
    ],
)
def test_what_belongs_to_a_label(label: str, rest: str, goes_on: bool) -> None:
    assert _goes_on(label, rest) is goes_on
