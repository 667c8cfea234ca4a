"""The baselines: coefficients by hand, and the mean of each estimator against the exact gradient of its objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.algo.objectives import OBJECTIVES, make_objective
from real_openrlhf.algo.objectives.jepo import JepoObjective
from real_openrlhf.algo.objectives.mse_rl import MseRlObjective
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.objectives.standard_rl import StandardRlObjective
from real_openrlhf.algo.objectives.term1_only import Term1OnlyObjective
from real_openrlhf.algo.objectives.term2_only import Term2OnlyObjective
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import GroupScores
from tests.unit.algo.objectives.test_objectives import SETTINGS
from tests.unit.algo.test_exactness import Enumeration, enumerate_all, mean_gradient, tuples

SCALE = ScoreScale.parse("1-3")
PLAIN: dict[str, Any] = {"standardise": False, "clip": None, "tolerance": 0.0}


def scores(
    sampled: list[int], readable: list[bool], label: float, probs: list[list[float]] | None = None
) -> GroupScores:
    rows = probs or [[0.2, 0.3, 0.4]] * len(sampled)
    return GroupScores(
        values=SCALE.tensor(),
        label_logprobs=torch.tensor(rows, dtype=torch.float64).log(),
        readable=torch.tensor(readable),
        sampled=torch.tensor(sampled),
        target=SCALE.target(label),
    )


# -- by hand ---------------------------------------------------------------------------------------------


def test_accuracy_is_the_reward_of_standard_rl() -> None:
    # Written: 1, 3, off the scale, nothing. Half way between 2 and 3 either is right.
    group = scores([0, 2, -1, -1], [True, True, True, False], 2.5)
    got = StandardRlObjective(invalid_penalty=0.5, **PLAIN)(group)
    assert got.rewards.tolist() == [0, 1, 0, -0.5]
    raw = [r - (0.5 - r) / 3 for r in (0, 1, 0, -0.5)]
    assert got.cot.tolist() == pytest.approx(raw) and got.score.tolist() == got.cot.tolist()
    assert got.squared_error.tolist() == got.likelihood.tolist() == [0] * 4
    assert StandardRlObjective()(scores([1, 1], [True, True], 2.0)).zero_variance


def test_the_squared_error_of_the_written_score() -> None:
    got = MseRlObjective(invalid_penalty=0.5, **PLAIN)(scores([0, 2, -1, -1], [True, True, True, False], 2.5))
    # The worst of 0, 1 and 3 is 0: 2.5 away.
    assert got.rewards.tolist() == [-2.25, -0.25, -6.25, -6.75]
    assert got.score.tolist() == got.cot.tolist() and got.likelihood.tolist() == [0] * 4


def test_one_term_of_real_alone() -> None:
    group = scores([0, 2, 1], [True, True, False], 2.5, [[0.2, 0.3, 0.4], [0.1, 0.1, 0.7], [1.0, 1.0, 1.0]])
    real = RealObjective(lam=0.3, beta=1.0, invalid_penalty=1.0)(group)
    first = Term1OnlyObjective(lam=0.3, invalid_penalty=1.0)(group)
    assert first.cot.tolist() == real.cot.tolist() and first.rewards.tolist() == real.rewards.tolist()
    assert first.squared_error.tolist() == first.likelihood.tolist() == [0] * 3
    second = Term2OnlyObjective(lam=0.3, invalid_penalty=1.0)(group)
    assert second.squared_error.tolist() == real.squared_error.tolist() == [1, 1, 0]
    assert second.likelihood.tolist() == real.likelihood.tolist() == pytest.approx([0.3, 0.3, 0])
    assert second.rewards.tolist() == real.rewards.tolist() and second.cot.tolist() == [0] * 3
    # It learns without advantages; only a group that cannot be read teaches it nothing.
    assert not second.zero_variance
    assert Term2OnlyObjective()(scores([-1, -1], [False, False], 2.0)).zero_variance


def test_the_bound_of_jepo() -> None:
    probs = [[0.2, 0.3, 0.4], [0.1, 0.6, 0.2], [1.0, 1.0, 1.0]]
    got = JepoObjective(**PLAIN)(scores([0, 1, -1], [True, True, False], 2.0, probs))
    p = [0.3, 0.6, 1e-6]
    bound = math.log(sum(p) / 3)
    others = [math.log((sum(p) - q) / 2) for q in p]
    assert got.cot.tolist() == pytest.approx([3 * (bound - other) for other in others])
    assert got.likelihood.tolist() == pytest.approx([3 * 0.3 / sum(p), 3 * 0.6 / sum(p), 0])
    assert got.rewards.tolist() == pytest.approx([math.log(q) for q in p])
    assert JepoObjective()(scores([0, 1], [True, True], 2.0)).zero_variance
    assert JepoObjective(clip=0.5)(scores([0, 1, -1], [True, True, False], 2.0, probs)).cot.abs().max() == 0.5
    with pytest.raises(ValueError, match="at least 2"):
        JepoObjective()(scores([0], [True], 2.0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_garbage_in_unreadable_rows_is_not_looked_at(name: str) -> None:
    objective = make_objective(name, {**SETTINGS, "answer_reward": "logprob", "clip": 1.0})
    rows = [[0.2, 0.3, 0.4], [0.1, 0.6, 0.2], [1.0, 1.0, 1.0]]
    clean = objective(scores([0, 1, -1], [True, True, False], 2.0, rows))
    dirty = objective(scores([0, 1, -1], [True, True, False], 2.0, [*rows[:2], [math.nan] * 3]))
    for part in ("cot", "score", "squared_error", "likelihood", "rewards"):
        assert getattr(dirty, part).tolist() == getattr(clean, part).tolist()
        assert bool(torch.isfinite(getattr(dirty, part)).all())


# -- by exact enumeration --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("1-3", 2.0, 2), ("1,2,10", 4.0, 3)], ids=["1-3", "1,2,10"])
def world(request: pytest.FixtureRequest) -> Enumeration:
    scale, label, length = request.param
    return enumerate_all(ScoreScale.parse(scale), label, length)


def written(world: Enumeration) -> list[float | None]:
    return [None if (i := r.reading.label_index) is None else world.scale.values[i] for r in world.rollouts]


def gradient_of(world: Enumeration, objective: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(-objective, world.policy.logits, retain_graph=True)
    return gradient


def agree(got: Tensor, truth: Tensor) -> None:
    assert truth.abs().max() > 0.005
    assert float((got - truth).abs().max()) < 1e-9


def test_standard_rl_is_the_gradient_of_accuracy(world: Enumeration) -> None:
    nearest = min(abs(v - world.label) for v in world.scale.values)
    rewards = [0.0 if v is None else float(abs(v - world.label) <= nearest + 1e-12) for v in written(world)]
    truth = gradient_of(world, sum(p * r for p, r in zip(world.probs, rewards)))  # type: ignore[arg-type]
    agree(mean_gradient(world, 2, StandardRlObjective(**PLAIN)), truth)  # type: ignore[arg-type]


def test_mse_rl_is_the_gradient_of_the_written_scores_error(world: Enumeration) -> None:
    worst = max((v - world.label) ** 2 for v in (0.0, *world.scale.values))
    rewards = [-worst if v is None else -((v - world.label) ** 2) for v in written(world)]
    truth = gradient_of(world, sum(p * r for p, r in zip(world.probs, rewards)))  # type: ignore[arg-type]
    agree(mean_gradient(world, 2, MseRlObjective(**PLAIN)), truth)  # type: ignore[arg-type]


def likelihoods(world: Enumeration) -> list[Tensor]:
    """log pi(y | x, c) of every response, by the labels' probabilities; 1e-6 where nothing can be read."""
    target = world.scale.target(world.label)
    floor = torch.tensor(math.log(1e-6), dtype=torch.float64)
    return [
        (1 - target.weight) * labels[target.low] + target.weight * labels[target.high] if r.reading.readable else floor
        for r, labels in zip(world.rollouts, world.label_logprobs)
    ]


def test_term_2_alone_is_the_mean_gradient_of_the_reward(world: Enumeration) -> None:
    values, total = world.scale.tensor(), torch.zeros((), dtype=torch.float64)
    for rollout, prob, labels, log in zip(world.rollouts, world.probs, world.label_logprobs, likelihoods(world)):
        if rollout.reading.readable:
            error = ((values * labels.exp()).sum() - world.label) ** 2
            total = total + prob.detach() * (0.7 * log - error)
    agree(mean_gradient(world, 2, Term2OnlyObjective(lam=0.7)), gradient_of(world, total))  # type: ignore[arg-type]


def test_jepo_is_the_gradient_of_its_bound(world: Enumeration) -> None:
    logs, total = torch.stack(likelihoods(world)), torch.zeros((), dtype=torch.float64)
    probs = torch.stack(world.probs)
    for chosen, multiplicity in tuples(len(probs), 2):
        rows = list(chosen)
        bound = logs[rows].logsumexp(0) - math.log(2)
        total = total + multiplicity * probs[rows].prod() * bound
    agree(mean_gradient(world, 2, JepoObjective(**PLAIN)), gradient_of(world, total))  # type: ignore[arg-type]


def test_the_bound_lies_below_the_marginal_likelihood(world: Enumeration) -> None:
    logs, probs = torch.stack(likelihoods(world)).detach(), torch.stack(world.probs).detach()
    bound = sum(
        m * float(probs[list(c)].prod() * (logs[list(c)].logsumexp(0) - math.log(2))) for c, m in tuples(len(probs), 2)
    )
    assert float((probs * logs).sum()) < bound < math.log(float((probs * logs.exp()).sum()))
