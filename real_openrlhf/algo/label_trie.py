"""The labels of a scale as a trie of tokens, and what the probability of a label is.

Definition. After the chain of thought c (and the anchor that ends it) a label s with tokens
s_1 .. s_n has the probability

    p(s) = prod_i pi(s_i | x, c, s_1 .. s_{i-1}) * (1 - q(s)),

where q(s), the probability of going on from s into a longer label of the scale, is the sum over the
next longer labels l (those that begin with s, with no other label in between) of the product over
the rest of l's tokens. p(s) is thus the probability that s is the longest label with which the text
after c begins: "1" and "10" exclude each other, "4." is "4" on a scale with "4.5", and the sum
over the scale is at most 1. What follows a label, end of text or not, plays no part. A scale whose
labels are one token each has q = 0 and one factor: the plain score distribution.

Reading. The trie's inner nodes are the prefixes after which some label goes on; node 0 is the empty
prefix, at the score position. Every p needs the distribution over a node's children at every inner
node. A response passes some of them: those whose prefix it wrote. The others ("1" when "2" was
written) are not passed. Leaving out their labels would bias E[score] and its gradient, so both the
engine and the trainer append their prefix to the chain of thought and read the distribution there
(a forced label): see `real_openrlhf.algo.score_rows.Branch`.

Tokens. A label's tokens are those that the tokenizer gives it right after the anchor. The same
text in other tokens ("10" as one token where the label is "1", "0") has another probability, which
does not count for the label: it is off the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LabelTrie:
    """The shape of the label trie, without token ids; those are in `ScoreRows.token_ids`.

    path    [S, M] int64: which child of node m label s takes, -1 where its path does not pass m
    longer  [Q, 2] int64: pairs (s, l) of a label and a next longer one

    Example, labels "1", "2", "10" as tokens [1], [2], [1, 0]: node 0 has the children 1 and 2,
    node 1 (after "1") has the child 0. path = [[0, -1], [1, -1], [0, 0]], longer = [[0, 2]].
    """

    path: Tensor
    longer: Tensor

    @classmethod
    def flat(cls, n_labels: int) -> LabelTrie:
        """The trie of n single-token labels."""
        return cls(path=torch.arange(n_labels)[:, None], longer=torch.zeros(0, 2, dtype=torch.int64))

    @property
    def is_flat(self) -> bool:
        return self.path.shape[1] == 1

    def to(self, device: torch.device | str) -> LabelTrie:
        return LabelTrie(path=self.path.to(device), longer=self.longer.to(device))

    def same_shape(self, other: LabelTrie) -> bool:
        return torch.equal(self.path, other.path) and torch.equal(self.longer, other.longer)


@dataclass(frozen=True, kw_only=True)
class LabelMatch:
    """Which label the tokens after an anchor are.

    label  the longest label that they begin with; None: none
    cut    they end at an inner node: a longer label might have followed
    """

    label: int | None
    cut: bool


@dataclass(frozen=True)
class TokenTrie:
    """The trie of given labels, each a tuple of one or more tokens, all distinct."""

    labels: tuple[tuple[int, ...], ...]

    @cached_property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The prefixes of the M inner nodes, shorter ones first: node 0 is ()."""
        found = {label[:n]: None for label in self.labels for n in range(len(label))}
        return tuple(sorted(found, key=len))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each inner node, the tokens that follow it, in the order of the labels."""
        found: dict[tuple[int, ...], dict[int, None]] = {prefix: {} for prefix in self.prefixes}
        for label in self.labels:
            for n, token in enumerate(label):
                found[label[:n]][token] = None
        return tuple(tuple(tokens) for tokens in found.values())

    @cached_property
    def shape(self) -> LabelTrie:
        node = {prefix: m for m, prefix in enumerate(self.prefixes)}
        path = torch.full((len(self.labels), len(self.prefixes)), -1, dtype=torch.int64)
        longer = []
        for s, label in enumerate(self.labels):
            for n, token in enumerate(label):
                m = node[label[:n]]
                path[s, m] = self.children[m].index(token)
            shorter = next((label[:n] for n in range(len(label) - 1, 0, -1) if label[:n] in self._index), None)
            if shorter is not None:
                longer.append((self._index[shorter], s))
        return LabelTrie(path=path, longer=torch.tensor(longer, dtype=torch.int64).view(-1, 2))

    @property
    def is_flat(self) -> bool:
        return len(self.prefixes) == 1

    @cached_property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """The fewest prefixes that together pass every inner node, each followed by one more token.

        That token is never read. With it, the last node is a row that predicts a token, as in a response.
        """
        return self.branches_for(range(1, len(self.prefixes)))

    def branches_for(self, nodes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The same as `branches`, for these nodes alone."""
        found: list[tuple[int, ...]] = []
        for m in reversed(nodes):  # the deepest first: they pass the others
            prefix = self.prefixes[m]
            if not any(passes(branch, prefix) for branch in found):
                found.append((*prefix, self.children[m][0]))
        return tuple(reversed(found))

    def match(self, token_ids: Sequence[int]) -> LabelMatch:
        """token_ids: the response from the score position on."""
        label: int | None = None
        prefix: tuple[int, ...] = ()
        for token in token_ids:
            prefix = (*prefix, token)
            label = self._index.get(prefix, label)
            if prefix not in self._inner:
                return LabelMatch(label=label, cut=False)
        return LabelMatch(label=label, cut=True)

    @cached_property
    def _index(self) -> dict[tuple[int, ...], int]:
        return {label: s for s, label in enumerate(self.labels)}

    @cached_property
    def _inner(self) -> frozenset[tuple[int, ...]]:
        return frozenset(self.prefixes)


def passes(token_ids: Sequence[int], prefix: tuple[int, ...]) -> bool:
    """Whether the tokens begin with the prefix and continue after it, so that one of their rows is at that node."""
    return len(token_ids) > len(prefix) and tuple(token_ids[: len(prefix)]) == prefix
