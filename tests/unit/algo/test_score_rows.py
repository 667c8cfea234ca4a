from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from real_openrlhf.algo.label_trie import LabelTrie, TokenTrie
from real_openrlhf.algo.score_rows import Branch, ScoreRows
from tests.helpers.algo_factory import grad_of


def test_single_and_empty() -> None:
    rows = ScoreRows.single(4, [7, 3, 9])
    assert (rows.rollout.tolist(), rows.node.tolist(), rows.position.tolist()) == ([0], [0], [4])
    assert rows.token_ids.tolist() == [[7, 3, 9]]
    assert rows.trie.is_flat
    table = torch.tensor([[-1.0, -2.0, -3.0]])
    assert torch.equal(rows.label_logprobs(table), table)
    empty = ScoreRows.empty(3)
    assert torch.equal(empty.label_logprobs(torch.zeros(0, 3)), torch.zeros(1, 3))


def test_gather_in_fp32_from_bf16_at_temperature() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(2, 50) * 5).bfloat16()
    rows = ScoreRows.cat([ScoreRows.single(0, [3, 1, 49]), ScoreRows.single(2, [3, 1, 49])])
    got = rows.gather(logits, temperature=0.7)
    expected = (logits.double() / 0.7).log_softmax(-1)[:, [3, 1, 49]]
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, atol=1e-5)
    # What computing in bf16 would have given is visibly something else.
    assert not torch.allclose((logits / 0.7).log_softmax(-1)[:, [3, 1, 49]].double(), expected, atol=1e-3)
    assert rows.gather(logits.double()).dtype == torch.float64


def test_cat_numbers_rollouts_through_and_skips_the_unreadable() -> None:
    parts = [ScoreRows.single(5, [1, 2]), ScoreRows.empty(2), ScoreRows.single(0, [2, 1])]
    rows = ScoreRows.cat([ScoreRows.cat(parts[:2]), parts[2], ScoreRows.empty(2)])
    assert rows.n_rollouts == 4
    assert rows.rollout.tolist() == [0, 2]
    assert rows.position.tolist() == [5, 0]
    got = rows.label_logprobs(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    assert got.tolist() == [[-1, -2], [0, 0], [-3, -4], [0, 0]]
    moved = rows.to("cpu")
    assert moved.n_rollouts == 4 and torch.equal(moved.token_ids, rows.token_ids)


def test_all_unreadable_keeps_a_shape() -> None:
    rows = ScoreRows.cat([ScoreRows.empty(3), ScoreRows.empty(3)])
    logits = torch.randn(0, 10, requires_grad=True)
    assert rows.label_logprobs(rows.gather(logits)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_padding_candidates_have_no_probability() -> None:
    rows = ScoreRows(
        rollout=torch.tensor([0]),
        node=torch.tensor([0]),
        sequence=torch.tensor([0]),
        position=torch.tensor([0]),
        token_ids=torch.tensor([[2, -1]]),
        n_rollouts=1,
        trie=LabelTrie.flat(2),
    )
    logits = torch.randn(1, 4, requires_grad=True)
    got = rows.gather(logits)
    assert got[0, 1] == float("-inf")
    got.exp().sum().backward()
    assert torch.isfinite(grad_of(logits)).all()


# A toy model over the tokens "0", "1", "2", "x": a distribution for every prefix.
TOKENS = "012x"


def toy_logits(prefix: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum((TOKENS.index(c) + 1) * 5**i for i, c in enumerate(prefix)))
    return torch.randn(len(TOKENS), generator=generator, dtype=torch.float64)


def rows_for(labels: list[str], response: str = "x", position: int = 0) -> tuple[ScoreRows, torch.Tensor]:
    """The score rows of a response, and the toy model's logits after its chain of thought."""
    trie = TokenTrie(tuple(tuple(TOKENS.index(c) for c in label) for label in labels))
    tokens = [TOKENS.index(c) for c in response]
    rows = ScoreRows.of(trie, tokens, position)
    prefixes = ["".join(TOKENS[t] for t in rows.prefix(r, tokens)[position:]) for r in range(len(rows.node))]
    return rows, torch.stack([toy_logits(prefix) for prefix in prefixes])


def enumerate_labels(labels: list[str]) -> tuple[list[float], float]:
    """Probability of each label, and of nothing on the scale, by writing strings of 4 tokens out in full.

    A string reads as the longest label that it starts with.
    """
    probs, other = dict.fromkeys(labels, 0.0), 0.0
    for string in map("".join, itertools.product(TOKENS, repeat=4)):
        p = 1.0
        for n in range(4):
            p *= float(toy_logits(string[:n]).softmax(-1)[TOKENS.index(string[n])])
        match = max((label for label in labels if string.startswith(label)), key=len, default=None)
        if match is None:
            other += p
        else:
            probs[match] += p
    return list(probs.values()), other


SCALES = [
    ["1", "2", "10"],
    ["10", "100"],
    ["1", "10", "100"],
    ["1", "100"],  # no label "10" in between: "10x" is still a "1"
    ["1", "2"],
    ["11", "12", "21"],
    ["1", "10", "12", "1201", "2"],
    ["xx", "x", "x1", "x12", "0"],
]


@pytest.mark.parametrize("labels", SCALES, ids=",".join)
def test_label_probabilities_against_enumeration(labels: list[str]) -> None:
    rows, logits = rows_for(labels)
    got = rows.label_logprobs(rows.gather(logits)).exp()[0]
    probs, other = enumerate_labels(labels)
    assert got.tolist() == pytest.approx(probs, abs=1e-12)
    assert float(got.sum()) <= 1
    assert float(got.sum()) + other == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("labels", SCALES, ids=",".join)
def test_whatever_was_written_the_labels_are_the_same(labels: list[str]) -> None:
    """Each node is read once: in the response where it passes the node, else in as few branches as do."""
    expected = enumerate_labels(labels)[0]
    inner = {label[:n] for label in labels for n in range(len(label))}
    for written in map("".join, (s for n in (1, 2, 3) for s in itertools.product(TOKENS, repeat=n))):
        rows, logits = rows_for(labels, response="2x" + written, position=2)
        assert rows.label_logprobs(rows.gather(logits)).exp()[0].tolist() == pytest.approx(expected, abs=1e-12)
        passed = {p for p in inner if written.startswith(p) and len(written) > len(p)}
        assert int((rows.sequence == 0).sum()) == len(passed) == len(inner) - len(rows.forced)
        ends = {p for p in inner - passed if not any(q.startswith(p) and q != p for q in inner)}
        assert len(rows.branches) == len(ends)


def test_rows_by_hand() -> None:
    """The example of the docstring: node 1 is read after a "1" that the response did not write."""
    trie = TokenTrie(((1,), (2,), (1, 0)))
    rows = ScoreRows.of(trie, [7, 9, 2], 2)
    assert (rows.node.tolist(), rows.sequence.tolist(), rows.position.tolist()) == ([0, 1], [0, 1], [2, 3])
    assert rows.token_ids.tolist() == [[1, 2], [0, -1]]
    assert rows.branches == (Branch(rollout=0, position=2, token_ids=(1, 0)),)
    assert rows.forced == [1]
    assert (rows.prefix(0, [7, 9, 2]), rows.prefix(1, [7, 9, 2])) == ([7, 9], [7, 9, 1])
    assert rows.branches[0].sequence(torch.tensor([7, 9, 2])).tolist() == [7, 9, 1, 0]
    table = torch.tensor([[0.5, 0.3], [0.4, 0.0]], dtype=torch.float64).log()
    assert rows.label_logprobs(table).exp()[0].tolist() == pytest.approx([0.5 * 0.6, 0.3, 0.5 * 0.4])
    # A response that wrote "1" and continued passes both nodes; one that ended right after it does not.
    assert ScoreRows.of(trie, [7, 9, 1, 5], 2).branches == ()
    assert ScoreRows.of(trie, [7, 9, 1], 2).sequence.tolist() == [0, 1]


def test_a_gap_by_hand() -> None:
    rows = ScoreRows.of(TokenTrie(((1,), (1, 0, 0))), [1, 0, 0], 0)
    assert rows.branches == ()
    table = torch.tensor([[0.5], [0.4], [0.5]], dtype=torch.float64).log()
    assert rows.label_logprobs(table).exp()[0].tolist() == pytest.approx([0.5 * (1 - 0.4 * 0.5), 0.1])


def test_a_scale_of_single_tokens_has_one_row_and_no_branch() -> None:
    trie = TokenTrie(((7,), (3,), (9,)))
    for response in ([1, 3, 0], [1, 5]):
        rows, single = ScoreRows.of(trie, response, 1), ScoreRows.single(1, [7, 3, 9])
        assert all(
            torch.equal(getattr(rows, n), getattr(single, n))
            for n in ("rollout", "node", "sequence", "position", "token_ids")
        )
        assert rows.branches == () and rows.forced == [] and rows.trie.is_flat


def test_cat_numbers_branches_behind_all_responses() -> None:
    trie = TokenTrie(((1,), (1, 0), (2,), (2, 0)))
    parts = [
        ScoreRows.empty(4),  # knows neither the trie nor its width
        ScoreRows.of(trie, [7, 2, 5], 1),
        ScoreRows.of(trie, [5], 0),
        ScoreRows.of(trie, [2, 0], 0),
    ]
    for rows in (ScoreRows.cat(parts), ScoreRows.cat([ScoreRows.cat(parts[:2]), ScoreRows.cat(parts[2:])])):
        assert rows.n_rollouts == 4 and rows.rollout.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert rows.node.tolist() == [0, 1, 2] * 3
        assert rows.sequence.tolist() == [1, 4, 1, 2, 5, 6, 3, 7, 3]
        assert [(b.rollout, b.position, b.token_ids) for b in rows.branches] == [
            (1, 1, (1, 0)),
            (2, 0, (1, 0)),
            (2, 0, (2, 0)),
            (3, 0, (1, 0)),
        ]
        assert not rows.trie.is_flat
    table = torch.full((9, 2), -1.0)
    assert rows.label_logprobs(table)[0].tolist() == [0, 0, 0, 0]


def test_trie_gradient_and_missing_rollouts() -> None:
    rows, logits = rows_for(["1", "2", "10"])
    both = ScoreRows.cat([ScoreRows.empty(3), rows])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: both.label_logprobs(both.gather(x)), logits)
    assert both.label_logprobs(both.gather(logits))[0].tolist() == [0, 0, 0]


def test_a_certain_continuation_leaves_finite_numbers() -> None:
    rows, _ = rows_for(["1", "2", "10"])
    logits = torch.zeros(2, 4, requires_grad=True)
    with torch.no_grad():
        logits[1, 0] = 60.0  # "1" is followed by "0" for certain
    got = rows.label_logprobs(rows.gather(logits))[0]
    assert torch.isfinite(got).all() and got[0] < -15
    got.sum().backward()
    assert torch.isfinite(grad_of(logits)).all()


def test_trie_refuses_a_rollout_with_half_its_rows() -> None:
    rows, logits = rows_for(["1", "2", "10"])
    half = dataclasses.replace(
        rows,
        **{n: getattr(rows, n)[:1] for n in ("rollout", "node", "sequence", "position", "token_ids")},
    )
    with pytest.raises(ValueError, match="each of the 2 inner nodes"):
        half.label_logprobs(half.gather(logits[:1]))
