"""The estimator's mean is the gradient of the objective: every response and every K-tuple enumerated.

A tabular policy (one row of logits per prefix) over a handful of tokens writes responses of at most
three tokens; its score ends them: one token after the anchor, or two where "10" may follow "1". In
float64 the probability-weighted mean of the gradient of `policy_loss`, with coefficients from
`RealObjective`, is compared with the gradient of J = -E[r], r = -(E[score] - y)^2 + lambda log pi(y)
where a score can be read, the floor elsewhere.

The anchor itself is given no probability within the score: there, "the last anchor counts" would let
the sampled score tokens decide about readability, and they are no action of Term 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.algo.batch import Row, collate
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import (
    NO_ANCHOR,
    OFF_SCALE,
    TRUNCATED,
    Coefficients,
    Denominators,
    Group,
    LossInputs,
    Rollout,
    Targets,
    TrainGroup,
    group_scores,
)
from tests.helpers.algo_factory import PieceTokenizer

EOS, ANCHOR, WORD, FIRST_LABEL = 0, 1, 2, 3
EXACT: dict[str, Any] = {"beta": 1.0, "standardise": False, "clip": None, "tolerance": 0.0}


class TabularPolicy:
    """extra: how far labels that are written by force reach beyond the longest response."""

    def __init__(self, scale: ScoreScale, max_length: int, seed: int = 0) -> None:
        words = ["a"] if all(len(label) == 1 for label in scale.labels) else []
        self.tokenizer = PieceTokenizer(["<eos>", "Score:", *words, *dict.fromkeys("".join(scale.labels))])
        self.bound = bind_scale(scale, self.tokenizer, ["Score:"])
        self.size = len(self.tokenizer.pieces)
        self.max_length = max_length
        generator = torch.Generator().manual_seed(seed)
        lengths = range(max_length + self.bound.extra_tokens)
        prefixes = [p for n in lengths for p in itertools.product(range(1, self.size), repeat=n)]
        self.row = {p: i for i, p in enumerate(prefixes)}
        self.logits = torch.randn(len(prefixes), self.size, generator=generator, dtype=torch.float64) * 1.5
        self.logits[:, ANCHOR] += 2.0
        self.logits.requires_grad_()

    def masked_logits(self) -> Tensor:
        """[prefixes, V]; no anchor follows an anchor."""
        after = torch.tensor([ANCHOR in p for p in self.row])
        forbidden = after[:, None] & (torch.arange(self.size) == ANCHOR)
        return self.logits.masked_fill(forbidden, -math.inf)

    def score_is_drawn(self, response: tuple[int, ...]) -> bool:
        """The score is complete, or something that is none was written."""
        if ANCHOR not in response[:-1]:
            return False
        written = self.tokenizer.decode(response[response.index(ANCHOR) + 1 :])
        return not any(label.startswith(written) and label != written for label in self.bound.scale.labels)

    def responses(self) -> list[tuple[int, ...]]:
        done: list[tuple[int, ...]] = []
        open_: list[tuple[int, ...]] = [()]
        while open_:
            prefix = open_.pop()
            for token in range(self.size):
                if ANCHOR in prefix and token == ANCHOR:
                    continue
                response = (*prefix, token)
                ends = token == EOS or self.score_is_drawn(response) or len(response) == self.max_length
                (done if ends else open_).append(response)
        return done


@dataclass
class Enumeration:
    """All responses as rollouts, and for each: log pi of its tokens [T] and of the labels, with grad."""

    policy: TabularPolicy
    scale: ScoreScale
    label: float
    rollouts: list[Rollout]
    token_logprobs: list[Tensor]
    label_logprobs: list[Tensor]

    @property
    def probs(self) -> list[Tensor]:
        return [t.sum().exp() for t in self.token_logprobs]


def enumerate_all(scale: ScoreScale, label: float, max_length: int) -> Enumeration:
    policy = TabularPolicy(scale, max_length)
    reader = ScoreReader.build(policy.bound, policy.tokenizer, {EOS})
    table = policy.masked_logits()
    logprobs = table.log_softmax(-1)
    result = Enumeration(policy, scale, label, [], [], [])
    for response in policy.responses():
        rows = [policy.row[response[:n]] for n in range(len(response))]
        reading = reader.read(response)
        if reading.position is None:
            score_rows, logits = ScoreRows.empty(len(scale)), table[:0]
        else:
            score_rows = ScoreRows.of(policy.bound.anchors[0].trie, response, reading.position)
            read_after = [tuple(score_rows.prefix(r, response)) for r in range(len(score_rows.node))]
            logits = table[[policy.row[p] for p in read_after]]
        read = score_rows.gather(logits)
        taken = logprobs[rows, list(response)]
        result.rollouts.append(
            Rollout(
                token_ids=torch.tensor(response),
                logprobs=taken.detach(),
                reading=reading,
                score_rows=score_rows,
                score_logprobs=read.detach(),
                finish_reason="stop",
            )
        )
        result.token_logprobs.append(taken)
        result.label_logprobs.append(score_rows.label_logprobs(read)[0])
    return result


def labels_by_enumeration(world: Enumeration, response: tuple[int, ...]) -> Tensor:
    """[S] probabilities after the chain of thought: the next tokens written out, the longest label counts."""
    policy, labels = world.policy, world.scale.labels
    probs = policy.masked_logits().softmax(-1)
    cot = response[: response.index(ANCHOR) + 1]
    totals = [torch.zeros((), dtype=torch.float64) for _ in labels]
    width = max(len(label) for label in labels)
    for tokens in itertools.product(range(policy.size), repeat=width):
        if EOS in tokens[:-1] or ANCHOR in tokens[:-1]:
            continue  # no label begins so
        p = torch.ones((), dtype=torch.float64)
        for n, token in enumerate(tokens):
            p = p * probs[policy.row[(*cot, *tokens[:n])], token]
        text = policy.tokenizer.decode(tokens)
        match = max((s for s in labels if text.startswith(s)), key=len, default=None)
        if match is not None:
            totals[labels.index(match)] = totals[labels.index(match)] + p
    return torch.stack(totals)


def true_gradient(world: Enumeration, lam: float, penalty: float) -> Tensor:
    """Autograd of J through the exact sum, written without the package's rewards and losses."""
    values = world.scale.tensor()
    y, total = world.label, torch.zeros((), dtype=torch.float64)
    floor = -max((v - y) ** 2 for v in [0.0, *world.scale.values]) + lam * math.log(1e-6) - penalty
    for rollout, prob in zip(world.rollouts, world.probs):
        if rollout.reading.position is None:
            reward: Tensor | float = floor
        else:
            labels = labels_by_enumeration(world, tuple(rollout.token_ids.tolist())).log()
            below = max(i for i, v in enumerate(world.scale.values) if v <= y)
            likelihood = labels[below]
            if world.scale.values[below] != y:
                width = world.scale.values[below + 1] - world.scale.values[below]
                w = (y - world.scale.values[below]) / width
                likelihood = (1 - w) * labels[below] + w * labels[below + 1]
            reward = -(((values * labels.exp()).sum() - y) ** 2) + lam * likelihood
        total = total - prob * reward
    (gradient,) = torch.autograd.grad(total, world.policy.logits, retain_graph=True)
    return gradient


def tuples(n: int, k: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """All K-tuples of n responses: as ordered tuples where few, else as multisets with their multiplicity."""
    if n**k <= 2000:
        yield from ((t, 1) for t in itertools.product(range(n), repeat=k))
        return
    for t in itertools.combinations_with_replacement(range(n), k):
        counts = [len(list(g)) for _, g in itertools.groupby(t)]
        yield t, math.factorial(k) // math.prod(math.factorial(c) for c in counts)


def coefficients_of(world: Enumeration, chosen: tuple[int, ...], objective: RealObjective) -> Coefficients:
    group = Group(
        prompt_ids=torch.tensor([WORD]),
        label=world.label,
        rollouts=tuple(world.rollouts[i] for i in chosen),
        row=0,
        weight_version=0,
    )
    return objective(group_scores(group, world.scale.tensor(), world.scale.target(world.label)))


def loss_of(
    world: Enumeration, rows: list[int], coefficients: dict[str, Tensor], k: int, *, term_1: bool = True
) -> Tensor:
    """The loss of these responses [N] under coefficients [N], divided by K; masks as the trainer gets them."""
    n, target = len(world.rollouts), world.scale.target(world.label)
    nothing = torch.zeros(n, dtype=torch.float64)
    zeros: dict[str, Any] = dict.fromkeys((*NAMES, "rewards", "advantages"), nothing)
    unused = Coefficients(**zeros, zero_variance=False)
    group = Group(prompt_ids=torch.tensor([WORD]), label=0.0, rollouts=tuple(world.rollouts), row=0, weight_version=0)
    carrier = TrainGroup(group=group, target=target, coefficients=unused)
    batch = collate([Row(group=carrier, index=i) for i in range(n)])
    width = batch.response_ids.shape[1]
    token_logprobs = torch.stack([torch.nn.functional.pad(t, (0, width - len(t))) for t in world.token_logprobs])
    inputs = LossInputs(
        token_logprobs=token_logprobs[rows],
        label_logprobs=torch.stack(world.label_logprobs)[rows],
        readable=batch.readable[rows],
        cot_mask=batch.cot_mask[rows],
        score_mask=batch.score_mask[rows],
        response_mask=batch.response_mask[rows],
        targets=Targets.repeat(target, len(rows)),
        values=world.scale.tensor(),
        **coefficients,
    )
    denominators = Denominators(rollouts=k, action_tokens=1, response_tokens=1)
    out = policy_loss(inputs, options=LossOptions(aggregation="token_sum"), denominators=denominators)
    return out.loss if term_1 else out.loss - out.terms["cot"]


NAMES = ("cot", "score", "squared_error", "likelihood")


def mean_gradient(world: Enumeration, k: int, objective: RealObjective, *, term_1: bool = True) -> Tensor:
    """Every tuple through the objective; the loss, linear in the coefficients, takes them times the probability."""
    probs = [float(p.detach()) for p in world.probs]
    rows: list[int] = []
    weighted: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    mass = 0.0
    for chosen, multiplicity in tuples(len(probs), k):
        coefficients = coefficients_of(world, chosen, objective)
        weight = multiplicity * math.prod(probs[i] for i in chosen)
        mass += weight
        rows += chosen
        for name in NAMES:
            weighted[name].append(weight * getattr(coefficients, name))
    assert mass == pytest.approx(1.0, abs=1e-12)
    loss = loss_of(world, rows, {name: torch.cat(parts) for name, parts in weighted.items()}, k, term_1=term_1)
    (gradient,) = torch.autograd.grad(loss, world.policy.logits, retain_graph=True)
    return gradient


# scale, label, longest response, K, lambda, penalty
CASES = [
    ("1-3", 2.3, 2, 2, 1.0, 0.0),
    ("1,3", 2.5, 3, 2, 0.4, 1.5),
    ("1,3", 1.0, 2, 3, 1.0, 0.0),
    ("1,2,10", 4.0, 3, 2, 0.6, 0.5),  # "10" is the tokens "1", "0"
]


@dataclass
class Case:
    world: Enumeration
    k: int
    lam: float
    penalty: float


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}_y{c[1]:g}_T{c[2]}_K{c[3]}")
def case(request: pytest.FixtureRequest) -> Case:
    scale, label, length, k, lam, penalty = request.param
    return Case(enumerate_all(ScoreScale.parse(scale), label, length), k, lam, penalty)


def test_the_world_holds_every_kind_of_rollout(case: Case) -> None:
    mass: dict[str | None, float] = {}
    for rollout, prob in zip(case.world.rollouts, case.world.probs):
        mass[rollout.reading.reason] = mass.get(rollout.reading.reason, 0.0) + float(prob.detach())
    assert sum(mass.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(mass[reason] > 0.005 for reason in (None, NO_ANCHOR, TRUNCATED, OFF_SCALE)), mass


def test_label_probabilities_are_those_of_the_policy(case: Case) -> None:
    """The scale has "10"; also where "2" or nothing on the scale was written."""
    for rollout, labels in zip(case.world.rollouts, case.world.label_logprobs):
        if rollout.reading.readable:
            expected = labels_by_enumeration(case.world, tuple(rollout.token_ids.tolist()))
            torch.testing.assert_close(labels.exp(), expected, rtol=0, atol=1e-12)
            assert float(labels.detach().exp().sum()) <= 1


def test_mean_of_the_estimator_is_the_gradient(case: Case) -> None:
    truth = true_gradient(case.world, case.lam, case.penalty)
    got = mean_gradient(case.world, case.k, RealObjective(lam=case.lam, invalid_penalty=case.penalty, **EXACT))
    assert truth.abs().max() > 0.1
    assert float((got - truth).abs().max()) < 1e-9


def test_weighted_coefficients_weigh_the_loss() -> None:
    """What `mean_gradient` rests on: tuples through one call, or each through its own."""
    world = enumerate_all(ScoreScale.parse("1,3"), 2.5, 2)
    chosen = [(0, 5), (7, 7), (3, 19), (11, 2)]
    weights = [0.1, 0.2, 0.3, 0.4]
    parts = [coefficients_of(world, c, RealObjective(**EXACT)) for c in chosen]
    single = [loss_of(world, list(c), {n: getattr(p, n) for n in NAMES}, 2) for c, p in zip(chosen, parts)]
    joined = {n: torch.cat([w * getattr(p, n) for w, p in zip(weights, parts)]) for n in NAMES}
    together = loss_of(world, [i for c in chosen for i in c], joined, 2)
    assert together.item() == pytest.approx(sum(w * x.item() for w, x in zip(weights, single)), abs=1e-12)


def test_the_log_prob_of_the_drawn_score_covers_all_its_tokens() -> None:
    """Rewards on the written label, of the score alone: sum of prob * R * grad log pi is the gradient of E[R]."""
    world = enumerate_all(ScoreScale.parse("1,2,10"), 4.0, 3)
    rewards = torch.tensor(
        [
            [0.3, -1.0, 2.0, 0.0][r.reading.label_index] if r.reading.label_index is not None else 0.1
            for r in world.rollouts
        ],
        dtype=torch.float64,
    )
    assert {r.reading.label_index for r in world.rollouts} == {None, 0, 1, 2}
    probs = torch.stack(world.probs)
    (truth,) = torch.autograd.grad(-(probs * rewards).sum(), world.policy.logits, retain_graph=True)
    weights = probs.detach() * rewards
    nothing = torch.zeros_like(weights)
    coefficients = {"cot": weights, "score": weights, "squared_error": nothing, "likelihood": nothing}
    loss = loss_of(world, list(range(len(world.rollouts))), coefficients, 1)
    (got,) = torch.autograd.grad(loss, world.policy.logits)
    assert truth.abs().max() > 0.01
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def small() -> tuple[Enumeration, Tensor]:
    world = enumerate_all(ScoreScale.parse("1,3"), 2.5, 2)
    return world, true_gradient(world, 1.0, 0.0)


@pytest.mark.parametrize(
    ("options", "term_1", "exact"),
    [
        ({}, True, True),
        ({"beta": 0.0}, True, False),
        ({}, False, False),
        ({"beta": 0.99}, True, False),
        ({"standardise": True}, True, False),
        ({"invalid_penalty": 1.0}, True, False),
    ],
    ids=["exact", "no term 2", "no term 1", "beta 0.99", "standardised", "another floor"],
)
def test_every_part_is_needed(
    small: tuple[Enumeration, Tensor], options: dict[str, Any], term_1: bool, exact: bool
) -> None:
    world, truth = small
    got = mean_gradient(world, 2, RealObjective(**EXACT | options), term_1=term_1)
    difference = float((got - truth).abs().max())
    assert difference < 1e-9 if exact else difference > 1e-4
