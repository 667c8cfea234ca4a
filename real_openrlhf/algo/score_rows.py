"""The rows of logits at which scores are read, and how labels' log-probs come out of them.

A label of one token is read from one row. A label of several tokens ("10", "Very good") is a path
through a trie of tokens: its probability is the product over the path times one minus the
probability of continuing into a longer label of the scale. The carrier below holds any number of
rows per rollout, one per inner node of the trie that was read; a scale of single tokens is the
trie with one inner node, and its labels are simply the row's candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.algo.dtypes import upcast


@dataclass(frozen=True, kw_only=True)
class LabelTrie:
    """The shape of the label trie; the token ids themselves stand in the rows.

    path  [S, M] int64: which child of node m label s takes, -1 where its path does not pass m
    stop  [S] int64: the inner node at which label s ends and a longer label goes on, -1 if none does

    Example, labels "1", "2", "10" as tokens [1], [2], [1, 0]: node 0 has the children 1 and 2,
    node 1 (after "1") has the child 0. path = [[0, -1], [1, -1], [0, 0]], stop = [1, -1, -1].
    """

    path: Tensor
    stop: Tensor

    @classmethod
    def flat(cls, n_labels: int) -> LabelTrie:
        """The trie of n single-token labels."""
        return cls(path=torch.arange(n_labels)[:, None], stop=torch.full((n_labels,), -1))

    @property
    def is_flat(self) -> bool:
        return self.path.shape[1] == 1 and bool((self.stop < 0).all())


@dataclass(frozen=True, kw_only=True)
class ScoreRows:
    """R score rows of n_rollouts rollouts.

    rollout    [R] int64: which rollout the row belongs to
    node       [R] int64: which inner node of the trie the row stands at (0: the score position)
    position   [R] int64: index into the response of the token that the row predicts
    token_ids  [R, C] int64: the candidate tokens, the children of the node; -1 is padding
    """

    rollout: Tensor
    node: Tensor
    position: Tensor
    token_ids: Tensor
    n_rollouts: int
    trie: LabelTrie

    @classmethod
    def single(cls, position: int, token_ids: Sequence[int]) -> ScoreRows:
        """The row of one rollout whose labels are single tokens."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(
            rollout=zero,
            node=zero,
            position=torch.tensor([position]),
            token_ids=torch.tensor([list(token_ids)]),
            n_rollouts=1,
            trie=LabelTrie.flat(len(token_ids)),
        )

    @classmethod
    def empty(cls, n_labels: int) -> ScoreRows:
        """No row: the rollout's score cannot be read."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            rollout=none,
            node=none,
            position=none,
            token_ids=torch.zeros(0, n_labels, dtype=torch.int64),
            n_rollouts=1,
            trie=LabelTrie.flat(n_labels),
        )

    @classmethod
    def cat(cls, parts: Sequence[ScoreRows]) -> ScoreRows:
        """The rows of several carriers as one; rollouts are numbered through."""
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.n_rollouts)
        return cls(
            rollout=torch.cat([part.rollout + offset for part, offset in zip(parts, offsets)]),
            node=torch.cat([part.node for part in parts]),
            position=torch.cat([part.position for part in parts]),
            token_ids=torch.cat([part.token_ids for part in parts]),
            n_rollouts=offsets[-1],
            trie=parts[0].trie,
        )

    def to(self, device: torch.device | str) -> ScoreRows:
        return ScoreRows(
            rollout=self.rollout.to(device),
            node=self.node.to(device),
            position=self.position.to(device),
            token_ids=self.token_ids.to(device),
            n_rollouts=self.n_rollouts,
            trie=LabelTrie(path=self.trie.path.to(device), stop=self.trie.stop.to(device)),
        )

    def gather(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probs of the candidates from the rows' logits, in fp32 (or wider) at the given temperature.

        logits [R, V] of any float dtype -> [R, C] float32 (float64 for float64), -inf at padding.
        """
        logits = upcast(logits) / temperature
        logprobs = logits.gather(1, self.token_ids.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)
        return logprobs.masked_fill(self.token_ids < 0, float("-inf"))

    def label_logprobs(self, token_logprobs: Tensor) -> Tensor:
        """[R, C] log-probs of the candidates -> [n_rollouts, S] log-probs of the labels.

        Rollouts without rows get 0 throughout; `readable` tells them apart. Differentiable.
        A rollout that has a row needs one for every inner node of the trie: ValueError otherwise.
        """
        n_nodes = self.trie.path.shape[1]
        table = token_logprobs.new_zeros(self.n_rollouts, n_nodes, token_logprobs.shape[1])
        table = table.index_put((self.rollout, self.node), token_logprobs)
        if self.trie.is_flat:
            return table[:, 0]
        rows = torch.zeros(self.n_rollouts, n_nodes, dtype=torch.bool, device=table.device)
        rows[self.rollout, self.node] = True
        has_rows = rows.any(1)
        if bool((rows.any(1) != rows.all(1)).any()):
            raise ValueError(f"a readable rollout needs a row for each of the {n_nodes} inner nodes of the label trie")
        on_path = self.trie.path >= 0  # [S, M]
        steps = table.gather(2, self.trie.path.clamp(min=0).T[None].expand(self.n_rollouts, -1, -1))
        total = steps.masked_fill(~on_path.T[None], 0.0).sum(1)  # [N, S]
        longer = table.exp().sum(2).clamp(max=1 - 1e-7)  # [N, M] probability of going on at a node
        stops = torch.log1p(-longer)[:, self.trie.stop.clamp(min=0)]  # [N, S]
        total = total + torch.where(self.trie.stop >= 0, stops, torch.zeros_like(stops))
        return torch.where(has_rows[:, None], total, torch.zeros_like(total))
