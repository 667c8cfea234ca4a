"""Reference log-probs come back by group, each with the length of its response."""

from __future__ import annotations

import torch

from real_openrlhf.actors.policy.reference_actor import response_logprobs
from real_openrlhf.algo.batch import rows_of
from real_openrlhf.algo.score_scale import ScoreScale
from tests.helpers.algo_factory import random_groups
from tests.unit.actors.policy.test_trainer import TEMPERATURE, logits_of, sequences, trainer

GROUPS = random_groups(seed=4, n_groups=5, k=3, scale=ScoreScale.parse("1-3"))


def test_one_forward_per_rollout_and_the_exact_logprobs() -> None:
    for micro in (1, 4, 15):
        run = trainer(micro=micro)
        actor = run.actor
        found = response_logprobs(actor, GROUPS, run.strategy)
        assert not actor.training
        assert [len(group) for group in found] == [3] * 5
        flat = [logprobs for group in found for logprobs in group]
        for row, logprobs in zip(rows_of(GROUPS), flat, strict=True):
            exact = (logits_of(actor, row) / TEMPERATURE).log_softmax(-1).gather(1, row.rollout.token_ids[:, None])
            torch.testing.assert_close(logprobs.double(), exact[:, 0], rtol=0, atol=1e-6)
            assert logprobs.dtype == torch.float32 and not logprobs.requires_grad
        assert sorted(s for part in actor.seen for s in part) == sorted(sequences(GROUPS).elements())
