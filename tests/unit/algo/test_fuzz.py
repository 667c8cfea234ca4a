"""The score-position finder and the label trie on whatever hypothesis comes up with, against independent readings."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from functools import cache

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is in the extra dev; bash examples/install/cpu.sh installs it")

from hypothesis import given, settings
from hypothesis import strategies as st

from real_openrlhf.algo.bound_scale import decode
from real_openrlhf.algo.label_trie import TokenTrie, passes
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.types import NO_ANCHOR, SPLIT_ANCHOR, TRUNCATED
from tests.helpers.algo_factory import ANCHOR, PieceTokenizer, merged_tokenizer, reader_of, spaced_tokenizer

# The same examples in every run; a search for new ones: --hypothesis-seed=random with derandomize=False.
FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None)
EOS = 0


def with_all_bytes(make: type) -> PieceTokenizer:
    """Any text can be written, and tokens may end within a character."""
    more: list[str | bytes] = [bytes([n]) for n in range(256)]
    merges = ["45", "4.", "is 4", " is ", "So the", "e is", "。", "分", "👍", b"\xf0\x9f", b"\x91\x8d"]
    known = set(make().ids)
    return make(
        [piece for piece in [*more, *merges] if (piece if isinstance(piece, bytes) else piece.encode()) not in known]
    )


@cache
def tokenizer_and_reader(kind: str) -> tuple[PieceTokenizer, ScoreReader]:
    tokenizer = with_all_bytes(merged_tokenizer if kind == "merged" else spaced_tokenizer)  # type: ignore[arg-type]
    return tokenizer, reader_of(tokenizer)


KINDS = st.sampled_from(["merged", "apart"])
PARTS = st.sampled_from(
    [
        ANCHOR,
        ANCHOR.rstrip(),
        "So the over",
        "So",
        "4",
        "5",
        " 4",
        "45",
        "4.5",
        "4分",
        "4th",
        "\n",
        " ",
        ".",
        "é",
        "👍",
        "a",
    ]
)
TEXTS = st.lists(st.one_of(PARTS, st.text(max_size=6)), max_size=10).map("".join)


@FUZZ
@given(KINDS, st.data())
def test_any_tokens_are_read_and_the_reading_is_consistent(kind: str, data: st.DataObject) -> None:
    tokenizer, reader = tokenizer_and_reader(kind)
    by_text = TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    some = st.lists(st.integers(0, len(tokenizer.pieces) - 1), max_size=12)
    ids = list(itertools.chain.from_iterable(data.draw(st.lists(st.one_of(by_text, some), max_size=4))))
    reading = reader.read(ids)
    body = ids[: ids.index(EOS)] if EOS in ids else ids
    prefix = reader.bound.anchors[0].prefix
    text = decode(tokenizer, body)
    if reading.position is None:
        assert reading.label_index is None and reading.reason in (NO_ANCHOR, TRUNCATED, SPLIT_ANCHOR)
        assert reading.reason != NO_ANCHOR or prefix not in text
        assert reading.reason != TRUNCATED or EOS not in ids
        return
    assert 0 < reading.position <= len(body)
    head = decode(tokenizer, ids[: reading.position])
    # It is the last anchor that the response has.
    assert head.endswith(prefix) and len(head) == text.rindex(prefix) + len(prefix)
    if reading.label_index is None:
        assert reading.reason is not None
        return
    label = reader.bound.anchors[0].labels[reading.label_index]
    assert reading.reason is None and tuple(ids[reading.position : reading.position + len(label)]) == label


def read_by_regex(text: str, ended: bool, gap: str) -> str | bool | None:
    """The digit that the last anchor is followed by; None: something else; False: no score to read. For plain texts
    only: digits, a, b, blanks, points. gap: what must stand between "is" and the digit."""
    anchor = ANCHOR.rstrip()
    prefix = anchor if gap else ANCHOR
    if not ended and text.endswith((anchor, prefix)):
        return False
    at = text.rfind(prefix)
    if at < 0:
        return False
    found = re.match(rf"{gap}([1-5])(?![0-9ab])(?![.,][0-9])", text[at + len(prefix) :])
    return found[1] if found else None


@FUZZ
@given(
    KINDS,
    st.lists(st.sampled_from([ANCHOR, ANCHOR + "4", "3", "7", "a", "b", " ", ".", ",", "\n"]), max_size=12),
    st.booleans(),
)
def test_plain_texts_are_read_as_a_regular_expression_reads_them(kind: str, parts: list[str], ended: bool) -> None:
    # Without the merges: there the tokens of a digit are those that the scale has.
    tokenizer = merged_tokenizer() if kind == "merged" else spaced_tokenizer()
    text = "".join(parts)
    ids = tokenizer.encode(text, add_special_tokens=False)
    reading = reader_of(tokenizer).read([*ids, *([EOS] if ended else [])])
    expected = read_by_regex(text, ended, " " if kind == "merged" else "")
    if expected is False:
        assert reading.position is None
    else:
        assert reading.position is not None
        assert reading.label_index == (None if expected is None else int(str(expected)) - 1)


@FUZZ
@given(KINDS, st.binary(max_size=24), st.integers(1, 5))
def test_broken_characters_before_the_anchor_do_not_move_the_score(kind: str, noise: bytes, score: int) -> None:
    """Bytes that are no UTF-8, a token each: the decoded text then does not grow with every token."""
    tokenizer, reader = tokenizer_and_reader(kind)
    before = [tokenizer.ids[bytes([byte])] for byte in noise]
    ids = [*before, *tokenizer.encode(f"{ANCHOR}{score}", add_special_tokens=False)]
    reading = reader.read([*ids, EOS])
    assert (reading.label_index, reading.position) == (score - 1, len(ids) - 1)


# -- the trie ------------------------------------------------------------------------------------------

LABELS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), min_size=2, max_size=7, unique=True
).map(tuple)


def begins(tokens: Sequence[int], start: Sequence[int]) -> bool:
    return tuple(tokens[: len(start)]) == tuple(start)


@FUZZ
@given(LABELS, st.lists(st.integers(0, 3), max_size=5))
def test_a_match_is_the_longest_label_that_the_tokens_begin_with(
    labels: tuple[tuple[int, ...], ...], ids: list[int]
) -> None:
    found = TokenTrie(labels).match(ids)
    fits = [label for label in labels if begins(ids, label)]
    assert found.label == (labels.index(max(fits, key=len)) if fits else None)
    assert found.cut == any(begins(label, ids) and len(label) > len(ids) for label in labels)


@FUZZ
@given(LABELS)
def test_branches_pass_every_inner_node_and_no_fewer_could(labels: tuple[tuple[int, ...], ...]) -> None:
    trie = TokenTrie(labels)
    inner = {label[:n] for label in labels for n in range(len(label))}
    assert set(trie.prefixes) == inner and len(trie.prefixes) == len(inner)
    assert all(any(passes(branch, prefix) for branch in trie.branches) for prefix in inner - {()})
    # Inner nodes that no other one goes on from: each needs a branch of its own.
    assert len(trie.branches) == sum(not any(begins(o, p) and o != p for o in inner) for p in inner if p)


@FUZZ
@given(LABELS, st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 2**31 - 1))
def test_the_labels_probabilities_are_those_of_all_responses_counted(
    labels: tuple[tuple[int, ...], ...], written: list[int], seed: int
) -> None:
    """A random language of three tokens: every continuation of three tokens is enumerated, and counts for the longest
    label that it begins with."""
    generator = torch.Generator().manual_seed(seed)

    @cache
    def logprobs(prefix: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(0).tolist())

    rows = ScoreRows.of(TokenTrie(labels), written, 0)
    table = torch.full(rows.token_ids.shape, -math.inf, dtype=torch.float64)
    for row in range(len(table)):
        at = logprobs(tuple(rows.prefix(row, written)))
        for column, token in enumerate(rows.token_ids[row].tolist()):
            if token >= 0:
                table[row, column] = at[token]
    counted = dict.fromkeys(labels, 0.0)
    for response in itertools.product(range(3), repeat=3):
        fits = [label for label in labels if begins(response, label)]
        if fits:
            counted[max(fits, key=len)] += math.exp(sum(logprobs(response[:n])[response[n]] for n in range(3)))
    got = rows.label_logprobs(table)[0].exp().tolist()
    # 1 - q of a label that always goes on is kept above the dtype's epsilon.
    assert got == pytest.approx(list(counted.values()), rel=1e-9, abs=1e-12)
