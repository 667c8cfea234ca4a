from __future__ import annotations

import itertools

import pytest
import torch

from real_openrlhf.algo.score_rows import LabelTrie, ScoreRows
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


def build(labels: list[str]) -> tuple[ScoreRows, torch.Tensor]:
    """The rows of every inner node of the labels' trie, and the toy model's logits there."""
    prefixes = sorted({label[:n] for label in labels for n in range(len(label))}, key=lambda p: (len(p), p))
    children = {p: sorted({label[len(p)] for label in labels if label.startswith(p) and label != p}) for p in prefixes}
    width = max(len(c) for c in children.values())
    path = torch.full((len(labels), len(prefixes)), -1)
    for s, label in enumerate(labels):
        for n in range(len(label)):
            path[s, prefixes.index(label[:n])] = children[label[:n]].index(label[n])
    stop = torch.tensor([prefixes.index(label) if label in prefixes else -1 for label in labels])
    ids = [[TOKENS.index(c) for c in children[p]] + [-1] * (width - len(children[p])) for p in prefixes]
    rows = ScoreRows(
        rollout=torch.zeros(len(prefixes), dtype=torch.int64),
        node=torch.arange(len(prefixes)),
        position=torch.arange(len(prefixes)),
        token_ids=torch.tensor(ids),
        n_rollouts=1,
        trie=LabelTrie(path=path, stop=stop),
    )
    return rows, torch.stack([toy_logits(p) for p in prefixes])


def enumerate_labels(labels: list[str]) -> tuple[dict[str, float], float]:
    """Probability of each label, and of nothing on the scale, by sampling strings of 4 tokens out in full.

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
    return probs, other


@pytest.mark.parametrize(
    "labels", [["1", "2", "10"], ["10", "100"], ["1", "10", "100"], ["1", "2"], ["11", "12", "21"], ["1", "10", "12"]]
)
def test_trie_against_enumeration(labels: list[str]) -> None:
    rows, logits = build(labels)
    got = rows.label_logprobs(rows.gather(logits)).exp()[0]
    probs, other = enumerate_labels(labels)
    assert got.tolist() == pytest.approx(list(probs.values()), abs=1e-12)
    assert float(got.sum()) + other == pytest.approx(1.0, abs=1e-12)


def test_trie_of_the_docstring() -> None:
    rows, _ = build(["1", "2", "10"])
    assert rows.trie.path.tolist() == [[0, -1], [1, -1], [0, 0]]
    assert rows.trie.stop.tolist() == [1, -1, -1]
    assert not rows.trie.is_flat


def test_trie_gradient_and_missing_rollouts() -> None:
    rows, logits = build(["1", "2", "10"])
    empty = ScoreRows(
        rollout=rows.rollout[:0],
        node=rows.node[:0],
        position=rows.position[:0],
        token_ids=rows.token_ids[:0],
        n_rollouts=1,
        trie=rows.trie,
    )
    both = ScoreRows.cat([empty, rows])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: both.label_logprobs(both.gather(x)), logits)
    assert both.label_logprobs(both.gather(logits))[0].tolist() == [0, 0, 0]


def test_trie_refuses_a_rollout_with_half_its_rows() -> None:
    rows, logits = build(["1", "2", "10"])
    half = ScoreRows(
        rollout=rows.rollout[:1],
        node=rows.node[:1],
        position=rows.position[:1],
        token_ids=rows.token_ids[:1],
        n_rollouts=1,
        trie=rows.trie,
    )
    with pytest.raises(ValueError, match="each of the 2 inner nodes"):
        half.label_logprobs(half.gather(logits[:1]))
