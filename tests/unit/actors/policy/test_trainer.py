"""The trainer on a small torch module: what is computed how often, gradients, and metrics that are true means."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.actors.policy.finite import LargestGradient
from real_openrlhf.actors.policy.logprob_head import LogprobHead, Request
from real_openrlhf.actors.policy.model import PolicyOutputs, outputs_of
from real_openrlhf.actors.policy.trainer import RealTrainer
from real_openrlhf.algo.batch import RealBatch, Row, rows_of
from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.common.device import Device
from tests.helpers.algo_factory import TinyPolicy, plain_rows, random_groups

SCALE = ScoreScale.parse("1-3")  # tokens 1, 2, 3
VALUES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
TEMPERATURE = 0.8
GROUPS = random_groups(seed=11, n_groups=6, k=2, scale=SCALE)  # 12 rollouts


class TinyActor(TinyPolicy):
    temperature = TEMPERATURE

    def __init__(self) -> None:
        super().__init__()
        self.output = LogprobHead(*self.head.shape, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.output.weight.copy_(self.head.T)
        del self.head
        self.seen: list[list[tuple[int, ...]]] = []
        self.n_tokens: list[int] = []

    def logits(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        mask = mask[..., None].to(self.embed.dtype)
        seen = (self.embed[input_ids] * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)
        return self.output(torch.tanh(seen))

    def network(self, input_ids: Tensor, position_ids: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """Packed: each token's mean runs over the prompt and its own rollout."""
        sums = []
        for group in request.layout.groups:
            vectors = self.embed[input_ids[0, group.start : group.end]].split([group.prompt, *group.responses])
            prompt = vectors[0].cumsum(0)
            sums += [prompt, *(prompt[-1] + own.cumsum(0) for own in vectors[1:])]
        hidden = torch.tanh(torch.cat(sums) / (position_ids[0, :, None] + 1))
        return self.output(hidden[request.logit_index], request)

    def without_deepspeed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(  # type: ignore[override]
        self, batch: RealBatch, *, entropy_grad: bool = False, moments: bool = False
    ) -> PolicyOutputs:
        ids, mask, _ = plain_rows(batch)
        self.seen.append([tuple(row[real].tolist()) for row, real in zip(ids, mask)])
        self.n_tokens.append(len(batch.token_ids))
        return outputs_of(
            self.network, batch, temperature=TEMPERATURE, max_bytes=2000, entropy_grad=entropy_grad, moments=moments
        )


class Strategy:
    """One rank of `world_size`; all ranks hold the same rows."""

    device = Device(name="cpu", dtype_name="fp32")

    def __init__(self, args: Any, world_size: int) -> None:
        self.args, self.world_size = args, world_size
        self.most_elsewhere = 0.0
        self.boundaries: list[bool] = []
        self.backwards = 0
        self.gradients: list[list[Tensor]] = []

    def mark_boundary(self, model: Any, *, last: bool) -> None:
        self.boundaries.append(last)

    def backward(self, loss: Tensor, model: Any, optimizer: Any = None) -> None:
        self.backwards += 1
        # DeepSpeed's mean over ranks with the same gradient is that gradient.
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str) -> None:
        self.gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def skip_step(self, model: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = None

    def sum_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        return {name: value * self.world_size for name, value in values.items()}

    def add_over_ranks(self, tensor: Tensor) -> Tensor:
        return tensor * self.world_size

    def max_over_ranks(self, value: float) -> float:
        return max(value, self.most_elsewhere)

    def get_grad_norm(self, model: Any) -> float:
        return float(torch.cat([g.flatten() for g in self.gradients[-1]]).norm())


def trainer(
    *,
    micro: int = 3,
    per_update: int = 12,
    epochs: int = 1,
    lr: float = 0.0,
    options: LossOptions | None = None,
    entropy_coef: float | None = None,
    norm_steps: int = 0,
    world_size: int = 1,
    max_tokens: int = 10**6,
    at_parameters: bool = False,
) -> RealTrainer:
    args = SimpleNamespace(
        train=SimpleNamespace(
            max_epochs=epochs,
            micro_batch_size=micro,
            max_tokens_per_gpu=max_tokens,
            batch_size=per_update * world_size,
            seed=3,
        ),
        actor=SimpleNamespace(entropy_coef=entropy_coef),
    )
    actor = TinyActor()
    optimizer = torch.optim.SGD(actor.parameters(), lr=lr)
    return RealTrainer(
        Strategy(args, world_size),  # type: ignore[arg-type]
        actor,  # type: ignore[arg-type]
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        values=VALUES,
        options=options or LossOptions(entropy_coef=entropy_coef or 0.0),
        trains_score_token=True,
        term_grad_norm_steps=norm_steps,
        norms_at_parameters=at_parameters,
    )


def sequences(groups: list[TrainGroup]) -> Counter[tuple[int, ...]]:
    rows = rows_of(groups)
    return Counter((*row.group.group.prompt_ids.tolist(), *row.rollout.token_ids.tolist()) for row in rows)


# -- an independent computation: each rollout on its own, in float64, terms written out ------------------


def logits_of(actor: TinyActor, row: Row) -> Tensor:
    prompt, response = row.group.group.prompt_ids, row.rollout.token_ids
    ids = torch.cat([prompt, response])[None]
    return actor.logits(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(prompt) - 1 : -1]


def terms_of(logits: Tensor, row: Row, options: LossOptions) -> dict[str, Tensor]:
    """Each term of one rollout before division; ratio "clip" as in PPO, written token by token."""
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    response, position = row.rollout.token_ids, row.rollout.reading.position
    coefficients, target = row.group.coefficients, row.group.target
    tokens = logprobs.gather(1, response[:, None])[:, 0]
    surrogate = tokens.new_zeros(())
    for t in range(len(response) if position is None else position + 1):
        a = (coefficients.score if t == position else coefficients.cot)[row.index].float().double()
        if options.ratio == "clip":
            ratio = (tokens[t] - row.rollout.logprobs[t].double()).exp()
            bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
            surrogate = surrogate + torch.minimum(ratio * a, bounded * a)
        else:
            surrogate = surrogate + a * tokens[t]
    terms = {"cot": -surrogate, "entropy": -options.entropy_coef * -(logprobs.exp() * logprobs).sum()}
    terms["squared_error"] = terms["likelihood"] = tokens.new_zeros(())
    if position is not None:
        labels = logprobs[position, 1:4]
        y, w = target.value, target.weight
        terms["squared_error"] = coefficients.squared_error[row.index].float() * (labels.exp() @ VALUES - y) ** 2
        likelihood = (1 - w) * labels[target.low] + w * labels[target.high]
        terms["likelihood"] = -coefficients.likelihood[row.index].float() * likelihood
    if row.group.ref_logprobs is not None:
        gap = (tokens - row.group.ref_logprobs[row.index].double()).detach()
        value = ((-gap).exp() - 1 + gap).clamp(max=10)  # as the estimates are bounded
        terms["kl"] = options.kl_coef * (value + gap * (tokens - tokens.detach())).sum()
    return terms


def reference(
    rows: list[Row], actor: TinyActor, options: LossOptions
) -> tuple[dict[str, float], list[Tensor], dict[str, float]]:
    """Value of each term, gradient of their sum by parameter, and gradient norm of each term at the logits."""
    logits = [logits_of(actor, row) for row in rows]
    per_row = [terms_of(x, row, options) for x, row in zip(logits, rows)]
    terms = {name: torch.stack([p[name] for p in per_row]).mean() for name in per_row[0]}
    gradient = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(actor.parameters()), retain_graph=True)
    norms = {}
    for name, term in terms.items():
        parts = torch.autograd.grad(term, logits, retain_graph=True, allow_unused=True)
        norms[name] = sum(float(g.square().sum()) for g in parts if g is not None) ** 0.5
    return {name: float(t.detach()) for name, t in terms.items()}, list(gradient), norms


# -- how often what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(("per_update", "sizes"), [(12, [12]), (6, [6, 6]), (5, [5, 5, 2]), (99, [12])])
def test_one_forward_and_one_backward_per_rollout_and_epoch(
    per_update: int, sizes: list[int], epochs: int, micro: int
) -> None:
    run = trainer(micro=micro, per_update=per_update, epochs=epochs)
    run.ppo_train(GROUPS)
    strategy: Any = run.strategy
    assert run.n_forwards == run.n_backwards == 12 * epochs == sum(len(batch) for batch in run.actor.seen)
    assert run.n_updates == len(strategy.gradients) == len(sizes) * epochs
    assert strategy.backwards == len(run.actor.seen)
    assert all(len(batch) <= micro for batch in run.actor.seen)
    # One boundary per update, at its last micro-batch; every rollout once per epoch.
    rollouts, found = 0, []
    for batch, last in zip(run.actor.seen, strategy.boundaries, strict=True):
        rollouts += len(batch)
        if last:
            found.append(rollouts)
            rollouts = 0
    assert found == sizes * epochs and rollouts == 0
    per_epoch = len(run.actor.seen) // epochs
    for epoch in range(epochs):
        batches = run.actor.seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(s for batch in batches for s in batch) == sequences(GROUPS)


def test_mini_batches_are_groups_drawn_anew_per_epoch_and_call_and_alike_on_every_rank() -> None:
    def drawn() -> list[list[tuple[int, ...]]]:
        run = trainer(micro=8, per_update=6, epochs=2)
        run.ppo_train(GROUPS)
        run.ppo_train(GROUPS)
        return [sorted(batch) for batch in run.actor.seen]

    first = drawn()
    assert first == drawn()
    assert len({tuple(first[i]) for i in (0, 2, 4, 6)}) == 4
    for batch in first:
        members = [group for group in GROUPS if sequences([group]) <= Counter(batch)]
        assert sum((sequences([group]) for group in members), Counter()) == Counter(batch)


def test_prompts_are_shared_within_the_token_budget() -> None:
    prompts = [g.group.prompt_ids.numel() for g in GROUPS]
    responses = sum(r.token_ids.numel() for g in GROUPS for r in g.group.rollouts)
    run = trainer(micro=12)
    run.ppo_train(GROUPS)
    assert run.actor.n_tokens == [sum(prompts) + responses]
    budget = max(n + sum(r.token_ids.numel() for r in g.group.rollouts) for n, g in zip(prompts, GROUPS))
    run = trainer(micro=12, max_tokens=budget)
    run.ppo_train(GROUPS)
    assert max(run.actor.n_tokens) <= budget and sum(run.actor.n_tokens) == sum(prompts) + responses
    run = trainer(micro=1)
    run.ppo_train(GROUPS)
    assert sum(run.actor.n_tokens) == 2 * sum(prompts) + responses


def test_every_rank_runs_as_many_forwards_as_the_one_that_needs_most() -> None:
    want = reference(rows_of(GROUPS), TinyActor(), LossOptions())[1]
    run = trainer(micro=12)
    strategy: Any = run.strategy
    strategy.most_elsewhere = 9.0
    run.ppo_train(GROUPS)
    assert strategy.backwards == len(run.actor.seen) == 9 and run.n_forwards == 12
    assert strategy.boundaries == [False] * 8 + [True]
    for mine, theirs in zip(strategy.gradients[0], want):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


# -- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(ratio="clip"), LossOptions(entropy_coef=0.3)])
def test_the_gradient_does_not_depend_on_micro_batches_and_is_right(options: LossOptions) -> None:
    want = reference(rows_of(GROUPS), TinyActor(), options)[1]
    for micro in (1, 3, 8):
        run = trainer(micro=micro, options=options, entropy_coef=options.entropy_coef or None)
        metrics = run.ppo_train(GROUPS)
        (got,) = run.strategy.gradients
        for mine, theirs in zip(got, want):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
        assert metrics["policy/grad_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in want]).norm()))


def test_the_loss_is_scaled_so_that_the_mean_over_ranks_is_the_global_gradient() -> None:
    want = reference(rows_of(GROUPS), TinyActor(), LossOptions())[1]
    run = trainer(world_size=2)
    metrics = run.ppo_train(GROUPS)
    for mine, theirs in zip(run.strategy.gradients[0], want):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    alone = trainer().ppo_train(GROUPS)
    assert {k: pytest.approx(v) for k, v in alone.items()} == metrics


def test_updates_follow_one_another() -> None:
    """The second update starts from the weights of the first, at the schedule's second learning rate."""
    options = LossOptions(ratio="clip")
    run = trainer(per_update=12, epochs=2, lr=0.5, options=options)
    metrics = run.ppo_train(GROUPS)
    actor = TinyActor()
    for lr in (0.5, 0.25):
        gradient = reference(rows_of(GROUPS), actor, options)[1]
        with torch.no_grad():
            for parameter, g in zip(actor.parameters(), gradient):
                parameter.sub_(lr * g)
    for mine, theirs in zip(run.actor.parameters(), actor.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert metrics["policy/lr"] == 0.25 and metrics["policy/updates"] == 2.0


# -- metrics ----------------------------------------------------------------------------------------------


def true_means(rows: list[Row], actor: TinyActor) -> dict[str, float]:
    expected, errors, masses, gaps, k3, entropies = [], [], [], [], [], []
    for row in rows:
        with torch.no_grad():
            logprobs = (logits_of(actor, row) / TEMPERATURE).log_softmax(-1)
        tokens = logprobs.gather(1, row.rollout.token_ids[:, None])[:, 0]
        difference = tokens - row.rollout.logprobs.double()
        gaps += difference.abs().tolist()
        k3 += (difference.exp() - 1 - difference).tolist()
        entropies += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
        if row.rollout.reading.position is not None:
            probs = logprobs[row.rollout.reading.position, 1:4].exp()
            expected.append(float(probs @ VALUES))
            errors.append(abs(expected[-1] - row.group.target.value))
            masses.append(float(probs.sum()))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "policy/expected_score": mean(expected),
        "policy/abs_error": mean(errors),
        "policy/mass": mean(masses),
        "policy/entropy": mean(entropies),
        "rollout_gap/logprob_mean": mean(gaps),
        "rollout_gap/kl": mean(k3),
        "rollout_gap/logprob_max": max(gaps),
    }


@pytest.mark.parametrize("micro", [1, 5, 12])
def test_metrics_of_one_update_are_true_means(micro: int) -> None:
    rows = rows_of(GROUPS)
    assert 2 <= sum(row.rollout.reading.position is None for row in rows) <= 10
    metrics = trainer(micro=micro).ppo_train(GROUPS)
    for name, value in true_means(rows, TinyActor()).items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    terms, _, _ = reference(rows, TinyActor(), LossOptions())
    for name in ("cot", "squared_error", "likelihood"):
        assert metrics[f"loss/{name}"] == pytest.approx(terms[name], rel=1e-6)
    assert metrics["loss/total"] == pytest.approx(sum(terms.values()), rel=1e-6)
    assert metrics["policy/clipped_share"] == 0.0


@pytest.mark.parametrize("epochs", [1, 3])
def test_metrics_over_unequal_updates_are_means_over_rollouts_not_over_updates(epochs: int) -> None:
    # Updates of 5, 5 and 2 rollouts with different shares of readable ones; the weights stay as they are.
    run = trainer(per_update=5, epochs=epochs, micro=2)
    metrics = run.ppo_train(GROUPS)
    want = true_means(rows_of(GROUPS), TinyActor())
    for name in ("policy/expected_score", "policy/abs_error", "policy/mass", "policy/entropy"):
        assert metrics[name] == pytest.approx(want[name], rel=1e-5), name
    assert metrics["policy/updates"] == 3.0 * epochs


def test_the_gap_to_the_rollouts_is_that_of_the_first_update() -> None:
    run = trainer(epochs=3, lr=2.0)
    metrics = run.ppo_train(GROUPS)
    want = true_means(rows_of(GROUPS), TinyActor())
    for name in ("rollout_gap/logprob_mean", "rollout_gap/kl", "rollout_gap/logprob_max"):
        assert metrics[name] == pytest.approx(want[name], rel=1e-5), name
    assert metrics["policy/expected_score"] != pytest.approx(want["policy/expected_score"], rel=1e-3)


def test_the_clipped_share_is_over_action_tokens() -> None:
    options = LossOptions(ratio="clip", clip_low=0.2, clip_high=0.3)
    actor, clipped, actions = TinyActor(), 0, 0
    rows = rows_of(GROUPS)
    for row in rows:
        tokens = (logits_of(actor, row) / TEMPERATURE).log_softmax(-1).gather(1, row.rollout.token_ids[:, None])[:, 0]
        ratio = (tokens - row.rollout.logprobs.double()).exp()
        cot, score = (c[row.index] for c in (row.group.coefficients.cot, row.group.coefficients.score))
        for t in range(row.rollout.cot_length + row.rollout.reading.readable):
            a = cot if t < row.rollout.cot_length else score
            clipped += int(ratio[t] > 1.3 if a > 0 else ratio[t] < 0.8)
            actions += 1
    assert 0 < clipped < actions
    assert trainer(options=options).ppo_train(GROUPS)["policy/clipped_share"] == pytest.approx(clipped / actions)


@pytest.mark.parametrize("micro", [1, 5, 12])
@pytest.mark.parametrize("entropy_coef", [None, 0.2])
def test_gradient_norms_of_the_terms_at_the_logits(micro: int, entropy_coef: float | None) -> None:
    options = LossOptions(entropy_coef=entropy_coef or 0.0)
    _, gradient, norms = reference(rows_of(GROUPS), TinyActor(), options)
    run = trainer(micro=micro, norm_steps=1, entropy_coef=entropy_coef)
    metrics = run.ppo_train(GROUPS)
    names = ["cot", "squared_error", "likelihood", *(["entropy"] if entropy_coef else [])]
    assert {k for k in metrics if k.startswith("logit_grad_norm/")} == {f"logit_grad_norm/{n}" for n in names}
    for name in names:
        assert metrics[f"logit_grad_norm/{name}"] == pytest.approx(norms[name], rel=1e-5), name
        assert norms[name] > 0
    # Asking for them changes neither the update nor the count of forwards.
    for mine, theirs in zip(run.strategy.gradients[0], gradient):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert run.n_forwards == run.n_backwards == 12


def test_gradient_norms_are_logged_every_so_many_calls() -> None:
    def has_norms(run: RealTrainer) -> list[bool]:
        return [any("logit_grad_norm" in k for k in run.ppo_train(GROUPS)) for _ in range(5)]

    assert has_norms(trainer(norm_steps=2)) == [True, False, True, False, True]
    assert has_norms(trainer(norm_steps=0)) == [False] * 5


@pytest.mark.parametrize("micro", [1, 3, 12])
@pytest.mark.parametrize("world_size", [1, 2])
def test_norms_at_the_parameters_are_those_of_each_terms_own_gradient(micro: int, world_size: int) -> None:
    actor, rows = TinyActor(), rows_of(GROUPS)
    parts = [terms_of(logits_of(actor, row), row, LossOptions()) for row in rows]
    losses = {"term1": [p["cot"] for p in parts], "term2": [p["squared_error"] + p["likelihood"] for p in parts]}
    flat = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(torch.stack(loss).mean(), list(actor.parameters()), retain_graph=True)
        flat[name] = torch.cat([g.flatten() for g in gradients])
    run = trainer(micro=micro, norm_steps=2, at_parameters=True, world_size=world_size, lr=0.1)
    plain = trainer(micro=micro, norm_steps=2, world_size=world_size, lr=0.1)
    metrics, without = run.ppo_train(GROUPS), plain.ppo_train(GROUPS)
    for name, gradient in flat.items():
        assert metrics[f"param_grad_norm/{name}"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    cosine = float(torch.cosine_similarity(flat["term1"], flat["term2"], dim=0))
    assert abs(cosine) > 0.005 and metrics["param_grad_norm/cosine"] == pytest.approx(cosine, rel=1e-4)
    # Looking changes nothing.
    assert {k: v for k, v in metrics.items() if not k.startswith("param_grad_norm/")} == without
    for a, b in zip(run.strategy.gradients, plain.strategy.gradients, strict=True):  # type: ignore[attr-defined]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(name.startswith("param_grad_norm/") for name in run.ppo_train(GROUPS))


def test_a_batch_without_any_score_trains_on_its_text_alone() -> None:
    groups = [
        g
        for g in random_groups(seed=5, n_groups=40, k=2, scale=SCALE)
        if not any(r.reading.readable for r in g.group.rollouts)
    ]
    assert groups
    metrics = trainer().ppo_train(groups)
    assert metrics["policy/mass"] == 0.0 and metrics["loss/squared_error"] == 0.0
    assert metrics["policy/grad_norm"] > 0


@pytest.mark.parametrize("micro", [1, 5, 12])
def test_the_kl_to_a_reference(micro: int) -> None:
    draws = torch.Generator().manual_seed(8)
    groups = [
        replace(g, ref_logprobs=tuple(-2 * torch.rand(len(r.token_ids), generator=draws) for r in g.group.rollouts))
        for g in GROUPS
    ]
    options = LossOptions(kl_coef=0.3)
    values, gradient, norms = reference(rows_of(groups), TinyActor(), options)
    run = trainer(micro=micro, options=options, norm_steps=1)
    metrics = run.ppo_train(groups)
    assert metrics["loss/kl"] == pytest.approx(values["kl"], rel=1e-6) and values["kl"] > 0
    assert metrics["loss/total"] == pytest.approx(sum(values.values()), rel=1e-6)
    assert metrics["logit_grad_norm/kl"] == pytest.approx(norms["kl"], rel=1e-5)
    for mine, theirs in zip(run.strategy.gradients[0], gradient):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    # Per token: the loss is divided by rollouts.
    tokens = sum(r.token_ids.numel() for g in groups for r in g.group.rollouts)
    assert metrics["policy/kl"] == pytest.approx(values["kl"] / 0.3 * 12 / tokens, rel=1e-6)


def test_a_kl_without_reference_logprobs_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        trainer(options=LossOptions(kl_coef=0.3)).ppo_train(GROUPS)


# -- numbers that are not finite -----------------------------------------------------------------------------


def spoiled(part: str, value: float) -> list[TrainGroup]:
    """The groups, with one number of the second one replaced."""
    group = GROUPS[1]
    if part == "coefficient":
        cot = group.coefficients.cot.clone()
        cot[0] = value
        bad = replace(group, coefficients=replace(group.coefficients, cot=cot))
    else:
        rollouts = list(group.group.rollouts)
        where = next(i for i, r in enumerate(rollouts) if r.score_logprobs.numel())
        numbers = getattr(rollouts[where], part).clone()
        numbers.view(-1)[0] = value
        rollouts[where] = replace(rollouts[where], **{part: numbers})
        bad = replace(group, group=replace(group.group, rollouts=tuple(rollouts)))
    return [GROUPS[0], bad, *GROUPS[2:]]


@pytest.mark.parametrize(
    ("part", "value", "steps"),
    [
        ("logprobs", float("nan"), 0),
        ("logprobs", float("-inf"), 0),
        ("score_logprobs", float("nan"), 0),
        ("score_logprobs", float("-inf"), 1),
        ("coefficient", float("inf"), 0),
    ],
)
def test_rollouts_that_are_not_finite_change_nothing(part: str, value: float, steps: int) -> None:
    made = trainer(lr=0.1)
    before = [p.detach().clone() for p in made.actor.parameters()]
    metrics = made.ppo_train(spoiled(part, value))
    same = all(torch.equal(a, b) for a, b in zip(before, made.actor.parameters()))
    assert same == (steps == 0) and made.n_updates == steps and made.n_calls == 1
    assert metrics["policy/skipped_updates"] == 1 - steps and metrics.get("skipped/rollouts", 0.0) == 1 - steps
    assert metrics["policy/updates"] == steps and ("loss/total" in metrics) == bool(steps)
    # The next batch is trained on as ever, with the learning rate that the skipped one would have had.
    metrics = made.ppo_train(GROUPS)
    assert metrics["policy/skipped_updates"] == 0 and "skipped/rollouts" not in metrics
    assert metrics["policy/lr"] == pytest.approx(0.1 * 0.5**steps)


def test_one_update_of_several_is_skipped() -> None:
    """Metrics are those of the updates that were made."""
    made = trainer(per_update=4, lr=0.0)
    metrics = made.ppo_train(spoiled("logprobs", float("nan")))
    assert (metrics["policy/updates"], metrics["policy/skipped_updates"]) == (2.0, 1.0)
    assert metrics["loss/total"] == metrics["loss/total"] and made.n_updates == 2


@pytest.mark.parametrize(("reason", "place"), [("loss", "forward"), ("gradients", "backward")])
def test_a_loss_or_gradient_that_is_not_finite_is_no_step(reason: str, place: str) -> None:
    made = trainer(lr=0.1, micro=3)
    before = [p.detach().clone() for p in made.actor.parameters()]
    if place == "forward":
        made.actor.output.weight.data[1, 0] = float("inf")  # type: ignore[union-attr,index]
        before = [p.detach().clone() for p in made.actor.parameters()]
    else:
        # Finite forward, infinite backward, in the first micro-batch alone; hooks run in the order they were made.
        once = iter([True])
        made.gradient = LargestGradient([])
        for parameter in made.actor.parameters():
            parameter.register_hook(lambda g: g * float("inf") if next(once, False) else g)
        made.gradient = LargestGradient(made.actor.parameters())
    metrics = made.ppo_train(GROUPS)
    assert metrics == {"policy/updates": 0.0, f"skipped/{reason}": 1.0, "policy/skipped_updates": 1.0}
    assert all(torch.equal(a, b) for a, b in zip(before, made.actor.parameters()))
    assert all(p.grad is None for p in made.actor.parameters())


def test_the_largest_gradient() -> None:
    """Against the maximum over all of autograd's gradients."""
    parameters = [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.ones(1))]
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    largest = LargestGradient([*parameters, frozen])
    assert largest.finite
    (parameters[0] ** 2).sum().backward()
    (parameters[1] * 3).sum().backward()
    assert largest._largest is not None and float(largest._largest) == 4.0 and largest.finite
    (parameters[1] * float("nan")).sum().backward()
    (parameters[1] * 3).sum().backward()
    assert not largest.finite
    largest.reset()
    assert largest.finite
