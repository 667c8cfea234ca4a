"""The rows of logits at which scores are read, and how labels' log-probs are computed from them.

Labels of one token are read from one row. Labels of several tokens are read from one row per inner
node of their trie (defined in `real_openrlhf.algo.label_trie`). Where the response passes the node, the
row is in the response; elsewhere it is in a branch, in which the label is forced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.algo.dtypes import upcast
from real_openrlhf.algo.label_trie import LabelTrie, TokenTrie, passes


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A forced label: the response of `rollout` up to `position`, then token_ids instead of what it wrote.

    It has score rows and nothing else: no Term 1, no KL, no entropy. Its chain of thought is computed once
    more. A scale "1-10" in digits costs one branch for each rollout that wrote neither "1" nor "10"; a scale of
    single tokens costs none. Nothing is read from the last token.
    """

    rollout: int
    position: int
    token_ids: tuple[int, ...]

    def sequence(self, response: Tensor) -> Tensor:
        """[T] response of its rollout -> [position + len(token_ids)] int64, all tokens of the branch."""
        return torch.cat([response[: self.position], response.new_tensor(self.token_ids)])


@dataclass(frozen=True, kw_only=True)
class ScoreRows:
    """R score rows of n_rollouts rollouts.

    rollout    [R] int64: which rollout the row belongs to
    node       [R] int64: which inner node of the trie the row belongs to (0: the score position)
    sequence   [R] int64: the sequence that has the row's logits: a number below n_rollouts is that rollout's
               response, n_rollouts + b is branch b
    position   [R] int64: index into that sequence of the token that the row predicts
    token_ids  [R, C] int64: the candidate tokens, the children of the node; -1 is padding
    branches   the B branches, which name their rollouts by number

    Example, "1", "2", "10" as [1], [2], [1, 0], a response [7, 9, 2] with its score at 2: node 0 is
    read in the response, node 1 in the branch [7, 9, 1, 0]. node [0, 1], sequence [0, 1],
    position [2, 3], token_ids [[1, 2], [0, -1]], branches (Branch(rollout=0, position=2, token_ids=(1, 0)),).
    """

    rollout: Tensor
    node: Tensor
    sequence: Tensor
    position: Tensor
    token_ids: Tensor
    n_rollouts: int
    trie: LabelTrie
    branches: tuple[Branch, ...] = ()

    @classmethod
    def single(cls, position: int, token_ids: Sequence[int]) -> ScoreRows:
        """The row of one rollout whose labels are single tokens."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(
            rollout=zero,
            node=zero,
            sequence=zero,
            position=torch.tensor([position]),
            token_ids=torch.tensor([list(token_ids)]),
            n_rollouts=1,
            trie=LabelTrie.flat(len(token_ids)),
        )

    @classmethod
    def of(cls, trie: TokenTrie, response: Sequence[int], position: int) -> ScoreRows:
        """The rows of one rollout with its score at `position`: one per inner node."""
        if trie.is_flat:
            return cls.single(position, trie.children[0])
        written = response[position:]
        missing = [m for m, prefix in enumerate(trie.prefixes) if not passes(written, prefix)]
        branches = trie.branches_for(missing)
        sequences = [written, *branches]
        width = max(len(tokens) for tokens in trie.children)
        return cls(
            rollout=torch.zeros(len(trie.prefixes), dtype=torch.int64),
            node=torch.arange(len(trie.prefixes)),
            sequence=torch.tensor([next(i for i, s in enumerate(sequences) if passes(s, p)) for p in trie.prefixes]),
            position=torch.tensor([position + len(prefix) for prefix in trie.prefixes]),
            token_ids=torch.tensor([[*tokens, *[-1] * (width - len(tokens))] for tokens in trie.children]),
            n_rollouts=1,
            trie=trie.shape,
            branches=tuple(Branch(rollout=0, position=position, token_ids=b) for b in branches),
        )

    @classmethod
    def empty(cls, n_labels: int) -> ScoreRows:
        """No row: the rollout's score cannot be read."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            rollout=none,
            node=none,
            sequence=none,
            position=none,
            token_ids=torch.zeros(0, n_labels, dtype=torch.int64),
            n_rollouts=1,
            trie=LabelTrie.flat(n_labels),
        )

    @classmethod
    def cat(cls, parts: Sequence[ScoreRows]) -> ScoreRows:
        """Concatenate: rollouts and branches are numbered consecutively."""
        n_rollouts = sum(part.n_rollouts for part in parts)
        rollouts, sequences, before = [], [], 0
        branches: list[Branch] = []
        for part in parts:
            rollouts.append(part.rollout + before)
            in_branch = part.sequence >= part.n_rollouts
            shift = torch.where(in_branch, n_rollouts + len(branches) - part.n_rollouts, before)
            sequences.append(part.sequence + shift)
            branches += [
                Branch(rollout=b.rollout + before, position=b.position, token_ids=b.token_ids) for b in part.branches
            ]
            before += part.n_rollouts
        # The trie is taken from a rollout with a score; the others have only the number of labels.
        read = [part for part in parts if part.rollout.numel()] or [parts[0]]
        return cls(
            rollout=torch.cat(rollouts),
            node=torch.cat([part.node for part in parts]),
            sequence=torch.cat(sequences),
            position=torch.cat([part.position for part in parts]),
            token_ids=torch.cat([part.token_ids for part in read]),
            n_rollouts=n_rollouts,
            trie=read[0].trie,
            branches=tuple(branches),
        )

    @property
    def forced(self) -> list[int]:
        """Indices of the rows that are read in branches."""
        return (self.sequence >= self.n_rollouts).nonzero()[:, 0].tolist()

    def prefix(self, row: int, response: Sequence[int]) -> list[int]:
        """The tokens before the one that the row predicts. response: of the row's rollout."""
        sequence, position = int(self.sequence[row]), int(self.position[row])
        if sequence < self.n_rollouts:
            return list(response[:position])
        branch = self.branches[sequence - self.n_rollouts]
        return [*response[: branch.position], *branch.token_ids][:position]

    def to(self, device: torch.device | str) -> ScoreRows:
        return ScoreRows(
            rollout=self.rollout.to(device),
            node=self.node.to(device),
            sequence=self.sequence.to(device),
            position=self.position.to(device),
            token_ids=self.token_ids.to(device),
            n_rollouts=self.n_rollouts,
            trie=self.trie.to(device),
            branches=self.branches,
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

        Rollouts without rows get 0 throughout; `readable` tells them apart. Differentiable. 1 - q of
        a label that goes on into a longer one is kept above the dtype's epsilon (log-prob -16 in fp32).
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
        if bool((has_rows != rows.all(1)).any()):
            raise ValueError(f"a readable rollout needs a row for each of the {n_nodes} inner nodes of the label trie")
        on_path = self.trie.path >= 0  # [S, M]
        steps = table.gather(2, self.trie.path.clamp(min=0).T[None].expand(self.n_rollouts, -1, -1))  # [N, M, S]
        total = steps.masked_fill(~on_path.T, 0.0).sum(1)  # [N, S]
        label, longer = self.trie.longer.T
        beyond = on_path[longer] & ~on_path[label]  # [Q, M] where the longer label goes on
        going_on = steps[:, :, longer].masked_fill(~beyond.T, 0.0).sum(1).exp()  # [N, Q]
        q = torch.zeros_like(total).index_add(1, label, going_on)
        total = total + torch.log1p(-q.clamp(max=1 - torch.finfo(q.dtype).eps))
        return torch.where(has_rows[:, None], total, 0.0)
