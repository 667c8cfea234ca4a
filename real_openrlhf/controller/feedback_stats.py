"""Does the feedback of a batch still judge? Repetition, copies of the prompt, and whether it speaks of what is judged.

All of it is counted in tokens, so it needs no words, and no text. Pure functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from real_openrlhf.algo.types import Group

# Tokens in a row: fewer repeat in any text, and so many are copied by chance in hardly any.
REPEATED = 4
COPIED = 8


def feedback_metrics(
    groups: Sequence[Group], judged: Callable[[int], Sequence[int] | None] = lambda row: None
) -> dict[str, float | None]:
    """Of all feedback of a batch; a value is None where there is none that is long enough.

    judged  row of a prompt -> the tokens of the response that it asks to judge; None: not known, and the whole prompt
            takes its place

    repeated        share of the runs of 4 tokens that the same feedback has had before
    copied          share of the tokens within runs of 8 tokens that the prompt has as well
    mentioned       mean share of a feedback's different tokens that the judged response has
    mentioned_other the same, of the other prompts' responses: what feedback shares with any of them
    mentions        the difference of the two. It is 0 on average where feedback does not depend on what is judged.
    """
    runs = repeats = tokens = copies = 0
    own: list[float] = []
    other: list[float] = []
    subjects = [frozenset(_subject(group, judged)) for group in groups]
    count = Counter(token for subject in subjects for token in subject)
    for group, subject in zip(groups, subjects):
        copied = _runs(group.prompt_ids, COPIED)
        for rollout in group.rollouts:
            feedback = rollout.token_ids[: rollout.cot_length]
            found = _runs(feedback, REPEATED)
            runs += found.numel()
            repeats += found.numel() - found.unique().numel()
            tokens += feedback.numel()
            copies += int(_covered(torch.isin(_runs(feedback, COPIED), copied), COPIED).sum())
            different = frozenset(feedback.tolist())
            if different and len(groups) > 1:
                mine = len(different & subject)
                all_ = sum(map(count.__getitem__, different))
                own.append(mine / len(different))
                other.append((all_ - mine) / (len(groups) - 1) / len(different))
    mentioned, elsewhere = _mean(own), _mean(other)
    return {
        "feedback/repeated": repeats / runs if runs else None,
        "feedback/copied": copies / tokens if tokens else None,
        "feedback/mentioned": mentioned,
        "feedback/mentioned_other": elsewhere,
        "feedback/mentions": None if mentioned is None or elsewhere is None else mentioned - elsewhere,
    }


def _subject(group: Group, judged: Callable[[int], Sequence[int] | None]) -> Sequence[int]:
    known = judged(group.row)
    return group.prompt_ids.tolist() if known is None else known


def _runs(ids: Tensor, n: int) -> Tensor:
    """[T - n + 1] int64, a number for every n tokens in a row; none for fewer. Equal runs have equal numbers.

    Different runs do but for a chance below 2**-40: random weights, sums modulo 2**64, ids below 2**24.
    """
    if ids.numel() < n:
        return torch.zeros(0, dtype=torch.int64)
    seeded = torch.Generator().manual_seed(n)
    weights = torch.randint(-(2**63), 2**63 - 1, (n,), generator=seeded, dtype=torch.int64)
    return (ids.long().unfold(0, n, 1) * weights).sum(1)


def _covered(hits: Tensor, n: int) -> Tensor:
    """[T] bool: the tokens within a run that hits. hits: [T - n + 1] bool."""
    if not hits.numel():
        return hits
    covered = torch.zeros(hits.numel() + n - 1, dtype=torch.bool)
    for shift in range(n):
        covered[shift : shift + hits.numel()] |= hits
    return covered


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
