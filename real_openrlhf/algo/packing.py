"""Which rollouts share a forward pass, and where they are in its row of tokens.

A micro-batch is one row of tokens without padding,

    [ prompt 1 | rollout | rollout | ... | prompt 2 | rollout | ... ]

in which every rollout attends to its prompt and to itself, so that a prompt is computed once for all of
its rollouts in the row. For every rollout, position ids continue from the end of the prompt. Branches of
score rows come after the rollouts of their group, as further rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from real_openrlhf.algo.types import Rollout, TrainGroup


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rollout with its prompt and coefficients: an index into a TrainGroup, not a copy."""

    group: TrainGroup
    index: int

    @property
    def rollout(self) -> Rollout:
        return self.group.group.rollouts[self.index]

    @property
    def length(self) -> int:
        """Tokens of the response."""
        return self.rollout.token_ids.numel()

    @property
    def n_tokens(self) -> int:
        """Tokens that the network reads for it after the prompt: the response, and the branches of its score rows."""
        return self.length + sum(b.position + len(b.token_ids) for b in self.rollout.score_rows.branches)


@dataclass(frozen=True, kw_only=True)
class PackedGroup:
    """A prompt and the rollouts after it: where the prompt starts in the row, and all lengths in tokens."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def end_of_prompt(self) -> int:
        return self.start + self.prompt

    @property
    def end(self) -> int:
        return self.end_of_prompt + sum(self.responses)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and rollout together."""
        return self.prompt + max(self.responses, default=0)


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """Where the packed groups are in a row of n_tokens tokens; they follow one another without gaps.

    Example, a prompt of 3 tokens with rollouts of 2 and 1, then a prompt of 2 with a rollout of 1:
    starts 0 and 6, responses (2, 1) and (1,), n_tokens 9, position ids [0 1 2 | 3 4 | 3 | 0 1 | 2].
    """

    groups: tuple[PackedGroup, ...]

    @property
    def n_tokens(self) -> int:
        return self.groups[-1].end if self.groups else 0


def rows_of(groups: Sequence[TrainGroup]) -> list[Row]:
    """The rollouts of all groups, group after group."""
    return [Row(group=g, index=i) for g in groups for i in range(len(g.group))]


def shared(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows in runs that belong to one group and so share its prompt."""
    for _, part in groupby(rows, key=lambda row: id(row.group)):
        yield list(part)


def n_tokens(rows: Sequence[Row]) -> int:
    """Number of tokens of a micro-batch, each prompt counted once."""
    return sum(part[0].group.group.prompt_ids.numel() + sum(r.n_tokens for r in part) for part in shared(rows))


def layout_of(lengths: Sequence[tuple[int, Sequence[int]]]) -> PromptLayout:
    """The layout of groups, each given by the lengths of its prompt and of its rollouts."""
    groups, start = [], 0
    for prompt, responses in lengths:
        groups.append(PackedGroup(start=start, prompt=prompt, responses=tuple(responses)))
        start = groups[-1].end
    return PromptLayout(groups=tuple(groups))


def micro_batches(rows: Sequence[Row], *, max_rollouts: int, max_tokens: int) -> list[list[Row]]:
    """Divide the rows into few micro-batches, each of at most max_rollouts rollouts and max_tokens tokens.

    A group is split only where it alone exceeds a bound; then each part computes the prompt again. A
    single rollout above max_tokens becomes a micro-batch alone. The rows may come in any order.
    """
    by_group: dict[int, list[Row]] = {}
    for row in rows:
        by_group.setdefault(id(row.group), []).append(row)
    parts = []
    for group in by_group.values():
        prompt = group[0].group.group.prompt_ids.numel()
        parts += _fill([([r], r.n_tokens) for r in group], max_rollouts, max_tokens - prompt)
    return _fill([(part, n_tokens(part)) for part in parts], max_rollouts, max_tokens)


def spread(batches: list[list[Row]], n: int) -> list[list[Row]]:
    """The same rows in n micro-batches: the largest ones are halved, between groups if they have several.

    All ranks must run equally many forward and backward passes, since each pass is a collective
    operation when parameters or gradients are sharded. ValueError with fewer rows than n.
    """
    if sum(len(b) for b in batches) < n:
        raise ValueError(f"{sum(len(b) for b in batches)} rollouts cannot make {n} micro-batches")
    batches = list(batches)
    while len(batches) < n:
        largest = batches.pop(max((i for i, b in enumerate(batches) if len(b) > 1), key=lambda i: n_tokens(batches[i])))
        parts = list(shared(largest))
        if len(parts) == 1:
            parts = [[row] for row in largest]
        middle = len(parts) // 2
        batches += [[row for part in half for row in part] for half in (parts[:middle], parts[middle:])]
    return batches


def _fill(parts: Sequence[tuple[list[Row], int]], max_rollouts: int, max_tokens: int) -> list[list[Row]]:
    """Bin packing by first fit, longest parts first. parts: rows, and their number of tokens."""
    bins: list[list[Row]] = []
    tokens: list[int] = []
    for part, size in sorted(parts, key=lambda x: x[1], reverse=True):
        for i, rows in enumerate(bins):
            if len(rows) + len(part) <= max_rollouts and tokens[i] + size <= max_tokens:
                rows.extend(part)
                tokens[i] += size
                break
        else:
            bins.append(list(part))
            tokens.append(size)
    return bins
