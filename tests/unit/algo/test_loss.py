from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.algo.batch import Row, collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.target import Target
from real_openrlhf.algo.types import Denominators, LossInputs, LossOutputs, Targets
from tests.helpers.algo_factory import TinyPolicy, grad_of, inputs_of, make_inputs, random_groups

SCALE = ScoreScale.parse("1-3")
HALF = math.log(0.5)


def leaf(rows: list[list[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype, requires_grad=True)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def denominators(rollouts: float = 1, actions: float = 1, responses: float = 1) -> Denominators:
    return Denominators(rollouts=rollouts, action_tokens=actions, response_tokens=responses)


def run(
    inputs: LossInputs, counts: Denominators | None = None, *, loss_scale: float = 1.0, **options: Any
) -> LossOutputs:
    return policy_loss(
        inputs, options=LossOptions(**options), denominators=counts or denominators(), loss_scale=loss_scale
    )


# Two rollouts; the first writes 2 tokens and a score, the second, unreadable, 3 tokens.
def example(**fields: Any) -> LossInputs:
    cot_mask = torch.tensor([[True, True, False], [True, True, True]])
    score_mask = torch.tensor([[False, False, True], [False, False, False]])
    defaults = {
        "readable": torch.tensor([True, False]),
        "cot_mask": cot_mask,
        "score_mask": score_mask,
        "cot": vector(0.5, -1.0),
        "score": vector(2.0, 0.0),
        "squared_error": vector(3.0, 5.0),
        "likelihood": vector(0.25, 5.0),
        "targets": Targets.repeat(Target(value=2.5, low=1, high=2, weight=0.5), 2),
    }
    return make_inputs(
        leaf([[-1.0, -2.0, -0.5], [-0.1, -0.2, -0.3]]),
        torch.tensor([[0.1, 0.2, 0.5], [1, 1, 1]], dtype=torch.float64).log(),
        **(defaults | fields),
    )


class TestByHand:
    # E = 0.1 + 0.4 + 1.5 = 2.0; (2 - 2.5)^2 = 0.25
    likelihood = 0.5 * math.log(0.2) + 0.5 * math.log(0.5)

    def test_token_sum(self) -> None:
        out = run(example(), denominators(rollouts=4, actions=100, responses=100))
        assert out.terms["cot"].item() == pytest.approx(-(0.5 * -3.0 + 2.0 * -0.5 - 1.0 * -0.6) / 4)
        assert out.terms["squared_error"].item() == pytest.approx(3.0 * 0.25 / 4)
        assert out.terms["likelihood"].item() == pytest.approx(-0.25 * self.likelihood / 4)
        assert set(out.terms) == {"cot", "squared_error", "likelihood"}
        assert out.loss.item() == pytest.approx(sum(t.item() for t in out.terms.values()))

    def test_token_mean_divides_term_1_alone_by_action_tokens(self) -> None:
        out = run(example(), denominators(rollouts=4, actions=6, responses=100), aggregation="token_mean")
        assert out.terms["cot"].item() == pytest.approx(-(-1.5 - 1.0 + 0.6) / 6)
        assert out.terms["squared_error"].item() == pytest.approx(0.75 / 4)

    def test_loss_scale(self) -> None:
        plain, scaled = run(example()), run(example(), loss_scale=6.0)
        assert scaled.loss.item() == pytest.approx(6 * plain.loss.item())
        assert scaled.terms["cot"].item() == plain.terms["cot"].item()

    def test_renormalise(self) -> None:
        out = run(example(), renormalise=True)
        assert out.terms["squared_error"].item() == pytest.approx(0.0, abs=1e-12)  # E = 2.0 / 0.8
        expected = -0.25 * 0.5 * (math.log(0.25) + math.log(0.625))
        assert out.terms["likelihood"].item() == pytest.approx(expected)

    def test_gradient_of_term_1(self) -> None:
        inputs = example()
        run(inputs, denominators(rollouts=2)).loss.backward()
        assert grad_of(inputs.token_logprobs).tolist() == [[-0.25, -0.25, -1.0], [0.5, 0.5, 0.5]]

    def test_kl_and_entropy(self) -> None:
        ref = vector(-1.5, -2.0, -0.5, -0.1, 0.9, -0.3).view(2, 3)
        entropy = leaf([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        inputs = example(ref_logprobs=ref, entropy=entropy)
        counts = denominators(rollouts=4, actions=100, responses=6)
        k3 = (math.exp(-0.5) - 1 + 0.5) + (math.exp(1.1) - 1 - 1.1)
        for aggregation, divisor in (("token_sum", 4), ("token_mean", 6)):
            out = run(inputs, counts, aggregation=aggregation, kl_coef=0.1, entropy_coef=0.01)
            assert out.terms["kl"].item() == pytest.approx(0.1 * k3 / divisor)
            assert out.terms["entropy"].item() == pytest.approx(-0.01 * 21 / divisor)
            assert out.loss.item() == pytest.approx(sum(t.item() for t in out.terms.values()))
        assert out.sums["kl"] == pytest.approx(k3) and out.sums["entropy"] == pytest.approx(21)
        k1 = run(inputs, counts, kl_coef=1.0, kl_estimator="k1").terms["kl"].item()
        assert k1 == pytest.approx((0.5 - 1.1) / 4)
        k2 = run(inputs, counts, kl_coef=1.0, kl_estimator="k2").terms["kl"].item()
        assert k2 == pytest.approx((0.125 + 0.605) / 4)

    def test_kl_is_importance_weighted_only_off_policy(self) -> None:
        rollout = vector(-1.5, -2.0, -0.5, -0.1, -0.2, -0.3).view(2, 3)
        for ratio, weight in (("on_policy", 1.0), ("clip", math.exp(0.5)), ("none", math.exp(0.5))):
            inputs = example(cot=vector(0, 0), score=vector(0, 0), ref_logprobs=rollout - 0.5, rollout_logprobs=rollout)
            run(inputs, kl_coef=0.1, ratio=ratio).loss.backward()
            expected = [0.1 * 1.0 * weight, *[0.1 * 0.5] * 5]
            assert grad_of(inputs.token_logprobs).flatten().tolist() == pytest.approx(expected)

    def test_entropy_is_logged_without_a_bonus(self) -> None:
        out = run(example(entropy=torch.ones(2, 3)))
        assert "entropy" not in out.terms and out.sums["entropy"] == 6

    def test_sums(self) -> None:
        rollout = vector(-1.0, -2.5, -0.5, -0.1, -0.2, -0.2).view(2, 3)
        sums = run(example(rollout_logprobs=rollout)).sums
        assert sums["readable"] == 1
        assert sums["expected_score"] == pytest.approx(2.0)
        assert sums["expected_error"] == pytest.approx(0.5)
        assert sums["mass"] == pytest.approx(0.8)
        assert sums["logprob_difference"] == pytest.approx(0.6)
        assert sums["logprob_difference_max"] == pytest.approx(0.5)
        assert sums["rollout_kl"] == pytest.approx((math.exp(0.5) - 1.5) + (math.exp(-0.1) - 0.9))


class TestClippedRatio:
    @pytest.mark.parametrize("coefficient", [1.5, -1.5])
    def test_against_ppo_by_hand(self, coefficient: float) -> None:
        log_ratios = [-3.0, -0.5, -0.1, 0.0, 0.1, 0.3, 2.0]
        new = leaf([[-4.0 + x for x in log_ratios] + [-1.0]])
        old = torch.full((1, 8), -4.0, dtype=torch.float64)
        inputs = make_inputs(new, torch.full((1, 3), HALF), cot=vector(coefficient), rollout_logprobs=old)
        out = run(inputs, ratio="clip", clip_low=0.2, clip_high=0.28)
        out.loss.backward()
        value, gradient, clipped = 0.0, [], 0
        for x in log_ratios:
            ratio = math.exp(x)
            free, bounded = ratio * coefficient, min(max(ratio, 0.8), 1.28) * coefficient
            value -= min(free, bounded)
            gradient.append(-free if free <= bounded else 0.0)
            clipped += bounded < free
        assert out.loss.item() == pytest.approx(value)
        assert grad_of(new)[0].tolist() == pytest.approx([*gradient, 0.0])
        assert out.sums["clipped"] == clipped == 2

    def test_score_token_is_clipped_by_its_own_ratio(self) -> None:
        new, old = leaf([[-1.0, -1.0]]), vector(-1.0, -2.0).view(1, 2)
        inputs = make_inputs(new, torch.full((1, 3), HALF), score=vector(1.0), rollout_logprobs=old)
        assert run(inputs, ratio="clip").loss.item() == pytest.approx(-1.2)

    def test_equals_the_plain_gradient_on_policy(self) -> None:
        gradients = []
        for ratio in ("on_policy", "clip", "none"):
            inputs = example()
            inputs = dataclasses.replace(inputs, rollout_logprobs=inputs.token_logprobs.detach())
            run(inputs, ratio=ratio).loss.backward()
            gradients.append(grad_of(inputs.token_logprobs))
        assert torch.allclose(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])

    def test_far_off_policy_stays_finite(self) -> None:
        inputs = make_inputs(
            leaf([[-1.0, -1.0]]),
            torch.full((1, 3), HALF),
            cot=vector(-1.0),
            rollout_logprobs=torch.full((1, 2), -500.0),
        )
        out = run(inputs, ratio="clip")
        out.loss.backward()
        assert torch.isfinite(out.loss) and torch.isfinite(grad_of(inputs.token_logprobs)).all()


class TestTruncatedImportanceSampling:
    def inputs(self) -> LossInputs:
        # log-ratios: 1, -0.5 on the chain of thought, 3 on the score token
        rollout = vector(-2.0, -1.5, -3.5, -0.1, -0.2, -0.3).view(2, 3)
        labels = leaf([[0.1, 0.2, 0.5], [1, 1, 1]])
        return dataclasses.replace(example(rollout_logprobs=rollout), label_logprobs=labels.log())

    @pytest.mark.parametrize("cap", [2.0, 100.0])
    def test_per_token_on_term_1_product_on_term_2(self, cap: float) -> None:
        out = run(self.inputs(), tis_cap=cap)
        w = [min(cap, math.exp(1.0)), math.exp(-0.5), min(cap, math.exp(3.0))]
        term_1 = 0.5 * (w[0] * -1.0 + w[1] * -2.0) + 2.0 * w[2] * -0.5 - 1.0 * -0.6
        assert out.terms["cot"].item() == pytest.approx(-term_1)
        # The product over the chain of thought alone, truncated once: exp(1 - 0.5) < 2.
        assert out.terms["squared_error"].item() == pytest.approx(3.0 * 0.25 * math.exp(0.5))
        assert out.terms["likelihood"].item() == pytest.approx(-0.25 * TestByHand.likelihood * math.exp(0.5))

    def test_product_is_truncated(self) -> None:
        out = run(self.inputs(), tis_cap=1.2)
        assert out.terms["squared_error"].item() == pytest.approx(3.0 * 0.25 * 1.2)

    def test_weights_are_detached(self) -> None:
        inputs = self.inputs()
        run(inputs, tis_cap=2.0).loss.backward()
        # Only the log-prob itself has a gradient: weights times coefficients, and nothing from Term 2.
        expected = [-0.5 * 2.0, -0.5 * math.exp(-0.5), -2.0 * 2.0, 1.0, 1.0, 1.0]
        assert grad_of(inputs.token_logprobs).flatten().tolist() == pytest.approx(expected)

    def test_not_on_top_of_the_clipped_ratio(self) -> None:
        with_cap, without = run(self.inputs(), ratio="clip", tis_cap=2.0), run(self.inputs(), ratio="clip")
        assert with_cap.loss.item() == without.loss.item()
        assert without.terms["squared_error"].item() == pytest.approx(0.75)

    @pytest.mark.parametrize("options", [{"tis_cap": 2.0}, {"ratio": "clip"}])
    def test_needs_log_probs_of_the_rollout(self, options: dict[str, Any]) -> None:
        assert LossOptions(**options).needs_rollout_logprobs
        with pytest.raises(ValueError, match="need rollout_logprobs"):
            run(example(), **options)


def slow_loss(x: LossInputs, o: LossOptions, d: Denominators) -> float:
    """The same loss, one float at a time."""

    def at(t: Tensor | None, *i: int) -> float:
        assert t is not None
        return t[i].item()

    term_1 = term_2 = kl = entropy = 0.0
    for n in range(x.token_logprobs.shape[0]):
        product = 0.0
        for t in range(x.token_logprobs.shape[1]):
            if not x.response_mask[n, t]:
                continue
            lp, old = at(x.token_logprobs.detach(), n, t), at(x.rollout_logprobs, n, t)
            c = at(x.cot, n) if x.cot_mask[n, t] else at(x.score, n) if x.score_mask[n, t] else 0.0
            product += lp - old if x.cot_mask[n, t] else 0.0
            ratio = math.exp(lp - old)
            if o.ratio == "clip":
                term_1 += min(ratio * c, min(max(ratio, 1 - o.clip_low), 1 + o.clip_high) * c)
            else:
                term_1 += c * lp * (1.0 if o.tis_cap is None else min(o.tis_cap, ratio))
            gap = lp - at(x.ref_logprobs, n, t)
            estimate = {"k1": gap, "k2": gap**2 / 2, "k3": math.exp(-gap) - 1 + gap}[o.kl_estimator]
            kl += max(-10.0, min(10.0, estimate))
            entropy += at(x.entropy, n, t)
        if x.readable[n]:
            p = [math.exp(float(v)) for v in x.label_logprobs[n].detach()]
            p = [v / sum(p) for v in p] if o.renormalise else p
            w = at(x.targets.weight, n)
            likelihood = (1 - w) * math.log(p[int(x.targets.low[n])]) + w * math.log(p[int(x.targets.high[n])])
            error = sum(float(v) * q for v, q in zip(x.values, p)) - at(x.targets.value, n)
            weight = 1.0 if o.tis_cap is None or o.ratio == "clip" else min(o.tis_cap, math.exp(product))
            term_2 += weight * (at(x.squared_error, n) * error**2 - at(x.likelihood, n) * likelihood)
    token_sum = o.aggregation == "token_sum"
    actions, responses = (d.rollouts, d.rollouts) if token_sum else (d.action_tokens, d.response_tokens)
    return -term_1 / actions + term_2 / d.rollouts + (o.kl_coef * kl - o.entropy_coef * entropy) / responses


CHOICES: tuple[list[Any], ...] = (
    ["token_sum", "token_mean"],
    ["on_policy", "clip", "none"],
    [None, 1.3],
    ["k1", "k2", "k3"],
)
EVERY_OPTION = [
    LossOptions(
        aggregation=aggregation, ratio=ratio, tis_cap=cap, kl_coef=0.2, kl_estimator=estimator, entropy_coef=0.05,
        renormalise=estimator == "k2",
    )
    for aggregation, ratio, cap, estimator in itertools.product(*CHOICES)
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_against_one_float_at_a_time(seed: int) -> None:
    rows = rows_of(random_groups(seed, 3, 4, SCALE))
    counts = denominators_of(rows, trains_score_token=True)
    batch = collate(rows)
    for options in EVERY_OPTION:
        inputs = inputs_of(TinyPolicy(), batch, SCALE.tensor())
        out = policy_loss(inputs, options=options, denominators=counts)
        assert out.loss.item() == pytest.approx(slow_loss(inputs, options, counts), abs=1e-9), options


def gradients(policy: torch.nn.Module) -> list[Tensor]:
    return [grad_of(p).clone() for p in policy.parameters()]


@pytest.mark.parametrize("options", EVERY_OPTION[::7], ids=lambda o: f"{o.aggregation}-{o.ratio}-{o.tis_cap}")
@pytest.mark.parametrize("sizes", [[1] * 12, [2, 1, 9]], ids=str)
def test_micro_batches_add_up(options: LossOptions, sizes: list[int]) -> None:
    rows = rows_of(random_groups(3, 3, 4, SCALE))
    counts = denominators_of(rows, trains_score_token=True)
    whole, split = TinyPolicy(), TinyPolicy()
    out = policy_loss(inputs_of(whole, collate(rows), SCALE.tensor()), options=options, denominators=counts)
    out.loss.backward()
    loss, sums, start = 0.0, dict.fromkeys(out.sums, 0.0), 0
    for size in sizes:
        batch = collate(rows[start : start + size])
        part = policy_loss(inputs_of(split, batch, SCALE.tensor()), options=options, denominators=counts)
        part.loss.backward()
        loss, start = loss + part.loss.item(), start + size
        sums = {k: max(v, part.sums[k]) if k.endswith("_max") else v + part.sums[k] for k, v in sums.items()}
    assert start == len(rows)
    assert loss == pytest.approx(out.loss.item(), abs=1e-12)
    assert sums == pytest.approx(out.sums, abs=1e-5)
    for a, b in zip(gradients(whole), gradients(split)):
        assert torch.allclose(a, b, atol=1e-12)


def shifted(inputs: LossInputs, left: int, right: int, fill: float) -> LossInputs:
    """The same rollouts between `left` and `right` columns of padding that hold `fill`."""

    def pad(tensor: Tensor | None) -> Tensor | None:
        value = 0 if tensor is None or tensor.dtype == torch.bool else fill
        return None if tensor is None else torch.nn.functional.pad(tensor, (left, right), value=value)

    names = ("token_logprobs", "cot_mask", "score_mask", "response_mask", "rollout_logprobs", "ref_logprobs", "entropy")
    padded: dict[str, Any] = {name: pad(getattr(inputs, name)) for name in names}
    return dataclasses.replace(inputs, **padded)


@pytest.mark.parametrize("options", EVERY_OPTION[::7], ids=lambda o: f"{o.aggregation}-{o.ratio}-{o.tis_cap}")
@pytest.mark.parametrize("fill", [-math.inf, math.nan, 1e30])
def test_padding_has_no_influence(options: LossOptions, fill: float) -> None:
    rows = rows_of(random_groups(4, 2, 4, SCALE))
    counts = denominators_of(rows, trains_score_token=True)
    batch = collate(rows)
    results = []
    for left, right, value in ((0, 0, 0.0), (3, 0, fill), (0, 2, fill), (1, 4, fill)):
        policy = TinyPolicy()
        inputs = shifted(inputs_of(policy, batch, SCALE.tensor()), left, right, value)
        if left or right:  # what the batch's own padding and unreadable rows hold must not matter either
            inputs = dataclasses.replace(
                inputs,
                token_logprobs=inputs.token_logprobs.masked_fill(~inputs.response_mask, value),
                label_logprobs=inputs.label_logprobs.masked_fill(~inputs.readable[:, None], value),
            )
        out = policy_loss(inputs, options=options, denominators=counts)
        out.loss.backward()
        results.append((out.loss.item(), out.sums, gradients(policy)))
    for loss, sums, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-12)
        assert sums == pytest.approx(results[0][1])
        for a, b in zip(grads, results[0][2]):
            assert torch.allclose(a, b, atol=1e-12)


def test_rollouts_together_and_alone() -> None:
    rows = rows_of(random_groups(5, 3, 2, SCALE))
    counts = denominators_of(rows, trains_score_token=True)

    def loss_of(some: list[Row]) -> float:
        inputs = inputs_of(TinyPolicy(), collate(some), SCALE.tensor())
        return policy_loss(inputs, options=LossOptions(), denominators=counts).loss.item()

    assert loss_of(rows) == pytest.approx(sum(loss_of([row]) for row in rows), abs=1e-12)


@pytest.mark.parametrize("options", EVERY_OPTION[::7], ids=lambda o: f"{o.aggregation}-{o.ratio}-{o.tis_cap}")
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("zero", [False, True], ids=["counts", "no counts"])
def test_all_masked(options: LossOptions, width: int, zero: bool) -> None:
    tokens, labels = leaf([[-1.0] * width] * 2), leaf([[HALF] * 3] * 2)
    mask = torch.zeros(2, width, dtype=torch.bool)
    ones = vector(1.0, 1.0)
    inputs = make_inputs(
        tokens, labels, readable=torch.tensor([False, False]), cot_mask=mask, score_mask=mask, response_mask=mask,
        cot=ones, score=ones, squared_error=ones, likelihood=ones, entropy=leaf([[1.0] * width] * 2),
        rollout_logprobs=torch.full((2, width), -2.0), ref_logprobs=torch.full((2, width), -3.0),
    )  # fmt: skip
    counts = denominators(0, 0, 0) if zero else denominators(2, 0, 0)
    out = policy_loss(inputs, options=options, denominators=counts)
    assert out.loss.item() == 0 and out.loss.requires_grad
    out.loss.backward()
    for tensor in (tokens, labels):
        assert tensor.grad is not None and not tensor.grad.any()
    assert all(math.isfinite(v) for v in out.sums.values())


def test_all_invalid_still_trains_term_1() -> None:
    inputs = example(readable=torch.tensor([False, False]), score_mask=torch.zeros(2, 3, dtype=torch.bool))
    out = run(inputs)
    assert out.terms["squared_error"].item() == out.terms["likelihood"].item() == 0
    assert out.terms["cot"].item() == pytest.approx(-(0.5 * -3.0 + 0.6))
    out.loss.backward()
    assert torch.isfinite(grad_of(inputs.token_logprobs)).all()


@pytest.mark.parametrize("coefficient", [0.7, 0.0])
def test_one_token_batch(coefficient: float) -> None:
    # A response that is nothing but a score: no chain of thought, Term 1 is exactly 0.
    tokens, labels = leaf([[-1.0]]), leaf([[0.2, 0.2, 0.4]])
    inputs = make_inputs(
        tokens,
        labels.log(),
        cot=vector(5.0),
        squared_error=vector(coefficient),
        rollout_logprobs=vector(-9.0).view(1, 1),
    )
    for options in ({}, {"ratio": "clip"}, {"tis_cap": 2.0}):
        out = run(inputs, **options)
        assert out.terms["cot"].item() == 0
        assert out.loss.item() == pytest.approx(coefficient * (1.8 - 2.0) ** 2)
    out.loss.backward()
    assert grad_of(tokens).tolist() == [[0.0]]
    assert torch.isfinite(grad_of(labels)).all()


def test_bf16_is_computed_in_fp32() -> None:
    exact = example()
    narrow = dataclasses.replace(
        exact,
        token_logprobs=exact.token_logprobs.detach().bfloat16().requires_grad_(),
        label_logprobs=exact.label_logprobs.detach().bfloat16().requires_grad_(),
        ref_logprobs=torch.full((2, 3), -1.0, dtype=torch.bfloat16),
    )
    out = run(narrow, kl_coef=0.1)
    assert out.loss.dtype == torch.float32
    wide = dataclasses.replace(
        narrow, token_logprobs=narrow.token_logprobs.double(), label_logprobs=narrow.label_logprobs.double()
    )
    assert run(wide, kl_coef=0.1).loss.dtype == torch.float64
    assert out.loss.item() == pytest.approx(run(wide, kl_coef=0.1).loss.item(), abs=1e-5)
    out.loss.backward()
    assert (
        grad_of(narrow.token_logprobs).dtype == torch.bfloat16 and torch.isfinite(grad_of(narrow.token_logprobs)).all()
    )


def test_bf16_policy_runs_and_agrees() -> None:
    rows = rows_of(random_groups(6, 3, 4, SCALE))
    counts = denominators_of(rows, trains_score_token=True)
    batch = collate(rows)
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        policy = TinyPolicy(dtype=dtype)
        out = policy_loss(inputs_of(policy, batch, SCALE.tensor()), options=LossOptions(), denominators=counts)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        assert all(torch.isfinite(g).all() for g in gradients(policy))
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != losses[1]
