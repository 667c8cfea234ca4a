from __future__ import annotations

import pytest

from real_openrlhf.algo.label_trie import LabelMatch, LabelTrie, TokenTrie

TEN = TokenTrie(((1,), (2,), (1, 0)))  # "1", "2", "10" in digits
HALVES = TokenTrie(((1,), (1, 9, 5), (2,), (2, 9, 5), (3,)))  # "1", "1.5", "2", "2.5", "3"; 9 is "."
GAP = TokenTrie(((1, 0, 0), (1,), (7, 8), (7, 9)))  # "100", "1", "Very good", "Very bad"


def test_shape_of_the_docstring() -> None:
    assert TEN.prefixes == ((), (1,)) and TEN.children == ((1, 2), (0,))
    assert TEN.shape.path.tolist() == [[0, -1], [1, -1], [0, 0]]
    assert TEN.shape.longer.tolist() == [[0, 2]]
    assert not TEN.is_flat and not TEN.shape.is_flat


def test_shape_with_chains() -> None:
    assert HALVES.prefixes == ((), (1,), (2,), (1, 9), (2, 9))
    assert HALVES.children == ((1, 2, 3), (9,), (9,), (5,), (5,))
    assert HALVES.shape.path.tolist() == [
        [0, -1, -1, -1, -1],
        [0, 0, -1, 0, -1],
        [1, -1, -1, -1, -1],
        [1, -1, 0, -1, 0],
        [2, -1, -1, -1, -1],
    ]
    assert HALVES.shape.longer.tolist() == [[0, 1], [2, 3]]


def test_only_the_next_longer_label_is_paired() -> None:
    assert TokenTrie(((1,), (1, 0), (1, 0, 0), (1, 2))).shape.longer.tolist() == [[0, 1], [1, 2], [0, 3]]
    assert GAP.shape.longer.tolist() == [[1, 0]]


def test_flat() -> None:
    trie = TokenTrie(((5,), (3,), (9,)))
    assert trie.is_flat and trie.prefixes == ((),) and trie.children == ((5, 3, 9),) and trie.branches == ()
    assert trie.shape.same_shape(LabelTrie.flat(3)) and trie.shape.is_flat
    assert not trie.shape.same_shape(LabelTrie.flat(4)) and not trie.shape.same_shape(TEN.shape)


def test_branches_pass_every_inner_node_and_are_few() -> None:
    assert TEN.branches == ((1, 0),)
    assert HALVES.branches == ((1, 9, 5), (2, 9, 5))
    assert GAP.branches == ((7, 8), (1, 0, 0))
    assert HALVES.branches_for([2, 4]) == ((2, 9, 5),)
    assert HALVES.branches_for([]) == ()


@pytest.mark.parametrize(
    ("trie", "tokens", "label", "cut"),
    [
        (TEN, (1, 0, 4), 2, False),
        (TEN, (1, 0), 2, False),
        (TEN, (1, 4), 0, False),
        (TEN, (1,), 0, True),
        (TEN, (2,), 1, False),
        (TEN, (0,), None, False),
        (TEN, (), None, True),
        (HALVES, (1, 9, 5), 1, False),
        (HALVES, (1, 9, 7), 0, False),
        (HALVES, (1, 9), 0, True),
        (GAP, (1, 0, 7), 1, False),
        (GAP, (7, 9, 1), 3, False),
        (GAP, (7, 1), None, False),
    ],
)
def test_match(trie: TokenTrie, tokens: tuple[int, ...], label: int | None, cut: bool) -> None:
    assert trie.match(tokens) == LabelMatch(label=label, cut=cut)
