"""Every watch is provoked, stays silent on a healthy run, and says what would help."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.guard_flags import SIGNS, STOPPING, WATCHES, GuardConfig
from real_openrlhf.controller.guards import Alarm, Guards
from real_openrlhf.evals.change import Change

FLAGS = GuardConfig(window=4, warn_steps=2, stop_steps=5, stop_evaluations=3)
HEALTHY: dict[str, float | None] = {
    "score/mass": 0.99,
    "reward/sampled_mean": -2.0,
    "score/expected_std": 0.8,
    "length/truncated_share": 0.02,
    "length/cot": 20.0,
    "rollouts/entropy": 0.3,
    "invalid/rate": 0.05,
    "rollout_gap/logprob_mean": 0.01,
    "sync/policy_moved": 1e-4,
    "advantage/zero_variance_share": 0.1,
    "feedback/repeated": 0.02,
    "feedback/copied": 0.1,
    "feedback/mentions": 0.2,
    "score/label_distance": 0.3,
    "logit_grad_norm/cot": 0.1,
    "logit_grad_norm/squared_error": 0.04,
    "logit_grad_norm/likelihood": 0.02,
}


def guards(**changes: Any) -> Guards:
    return Guards(replace(FLAGS, **changes), scale_range=4.0)


def healthy(step: int) -> dict[str, float | None]:
    """A little noise, and slow improvement."""
    noise = random.Random(step).uniform(-0.1, 0.1)
    return {**HEALTHY, "reward/sampled_mean": -2.0 + 0.01 * step + noise, "length/cot": 20.0 + noise}


def run(watch: Guards, steps: Iterable[dict[str, float | None]]) -> list[tuple[int, Alarm]]:
    return [(n, alarm) for n, metrics in enumerate(steps, start=1) for alarm in watch.step(metrics)]


def then(n: int, **fault: float | None) -> list[dict[str, float | None]]:
    """10 healthy steps, then n with a fault."""
    steps = [healthy(i) for i in range(10)]
    return steps + [{**healthy(10), **{name.replace("__", "/"): value for name, value in fault.items()}}] * n


FAULTS: dict[str, tuple[dict[str, float], str]] = {
    "mass": ({"score__mass": 0.5}, r"mass on the scale fell from 0.990 to 0.\d+.*--real.beta 1.*--guard.mass_drop"),
    "reward": ({"reward__sampled_mean": -4.0}, r"mean reward fell from -1.9\d+ to -\d.*--guard.reward_errors"),
    "scores": ({"score__expected_std": 0.01}, r"collapsed to one value: .*0.8000.*--guard.min_spread"),
    "length": (
        {"length__truncated_share": 0.9},
        r"truncated at the token limit \(the start: 2%\).*--rollout.max_new_tokens",
    ),
    "entropy": ({"rollouts__entropy": 0.001}, r"fell from 0.3000 to 0.0\d+ nats.*--actor.entropy_coef"),
    "invalid": (
        {"invalid__rate": 0.95},
        r"\d\d% of the rollouts have no readable score \(the start: 5%\).*--real.anchor",
    ),
    "gap": ({"rollout_gap__logprob_mean": 0.9}, r"differ by 0.\d+ nats .*start: 0.010.*is_correction_level token"),
    "still": ({"sync__policy_moved": 0.0}, r"by 0.0e\+00 per token: the weights do not move. Raise --actor.adam.lr"),
    "dead": (
        {"advantage__zero_variance_share": 1.0},
        r"In \d+% of the groups all rewards are equal \(the start: 10%\).*--rollout.n_samples_per_prompt",
    ),
    "repeated": ({"feedback__repeated": 0.9}, r"repeats itself: \d\d% .*the start: 2%.*--guard.repeated_rise"),
    "copied": ({"feedback__copied": 1.0}, r"copies the prompt: \d\d% .*the start: 10%.*--guard.copied_rise"),
    "mentions": (
        {"feedback__mentions": 0.0},
        r"no longer speaks of the response .*\+\d.\d% more .*the start: \+20.0%.*--guard.min_mentions",
    ),
    "labels": (
        {"score__label_distance": 1.5},
        r"are \d.\d\d apart .*the start: 0.30; Wasserstein.*--guard.label_distance_rise",
    ),
    "terms": ({"logit_grad_norm__cot": 10.0}, r"Term 1 is 167 times that of Term 2 at the logits.*--real.beta"),
}


def test_every_watch_has_its_provocation() -> None:
    assert {*FAULTS, "evaluation"} == set(WATCHES)


@pytest.mark.parametrize("watch", FAULTS)
def test_a_fault_warns_then_stops(watch: str) -> None:
    fault, message = FAULTS[watch]
    alarms = run(guards(stop=tuple(WATCHES)), then(30, **fault))
    assert {alarm.watch for _, alarm in alarms} == {watch}
    (first, warning), *later = alarms
    assert not warning.stops and "Seen for 2 steps in a row." in warning.message
    assert re.search(message, warning.message), warning.message
    # Warned once, then from the fifth step in a row on there is reason to stop.
    assert [n - first for n, alarm in later if alarm.stops] == list(range(3, 3 + len(later)))


@pytest.mark.parametrize("watch", FAULTS)
def test_only_the_named_watches_stop(watch: str) -> None:
    alarms = run(guards(stop=("none",)), then(30, **FAULTS[watch][0]))
    assert [alarm.stops for _, alarm in alarms] == [False]
    stopped = run(guards(), then(30, **FAULTS[watch][0]))
    assert any(alarm.stops for _, alarm in stopped) == (watch in STOPPING) == (watch not in SIGNS)


OFF: dict[str, dict[str, Any]] = {
    "mass": {"mass_drop": None},
    "reward": {"reward_errors": None},
    "scores": {"min_spread": None},
    "length": {"max_truncated": None},
    "entropy": {"min_entropy": None},
    "invalid": {"max_invalid": None},
    "gap": {"max_gap": None},
    "still": {"min_move": None},
    "dead": {"max_dead": None},
    "repeated": {"repeated_rise": None},
    "copied": {"copied_rise": None},
    "mentions": {"min_mentions": None},
    "labels": {"label_distance_rise": None},
    "terms": {"max_term_ratio": None},
}


@pytest.mark.parametrize("watch", FAULTS)
def test_a_watch_can_be_switched_off(watch: str) -> None:
    assert run(guards(**OFF[watch]), then(30, **FAULTS[watch][0])) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_silent(seed: int) -> None:
    """Also one whose reward neither rises nor falls, in spite of its noise."""
    rng = random.Random(seed)
    steps = [
        {**HEALTHY, "reward/sampled_mean": -2.0 + rng.gauss(0, 0.3), "score/mass": 0.99 - abs(rng.gauss(0, 0.01))}
        for _ in range(200)
    ]
    assert run(Guards(GuardConfig(), scale_range=4.0), steps) == []


def test_what_feedback_never_mentioned_cannot_be_lost() -> None:
    """Noise around 0 at the start, and a little of it at the end."""
    steps = [{**HEALTHY, "feedback/mentions": 0.01 * (-1) ** i} for i in range(20)]
    assert run(guards(), [*steps, *[{**HEALTHY, "feedback/mentions": -0.05}] * 20]) == []


def test_distances_to_the_labels_count_in_shares_of_the_scale() -> None:
    """A tenth of 1-5 is 0.4: more than that above 0.3 is a fault, but not where the scale is 10 wide."""
    steps = then(20, score__label_distance=0.72)
    assert {alarm.watch for _, alarm in run(guards(), steps)} == {"labels"}
    assert run(guards(), then(20, score__label_distance=0.68)) == []
    assert run(Guards(FLAGS, scale_range=10.0), steps) == []


def test_a_fault_that_passes_is_forgotten() -> None:
    steps = [*then(2, score__mass=0.5), *[healthy(i) for i in range(8)], *[{**healthy(1), "score/mass": 0.5}] * 2]
    assert all(not alarm.stops for _, alarm in run(guards(stop_steps=6), steps))


def test_norms_that_are_measured_now_and_then_stand_for_the_steps_between() -> None:
    """Every tenth step: the first fault is seen at step 10, the warning is due ten steps later, not a hundred."""
    lopsided = {"logit_grad_norm/cot": 900.0, "logit_grad_norm/squared_error": 1.0, "logit_grad_norm/likelihood": 1.0}
    nothing = dict.fromkeys(lopsided)
    steps = [{**healthy(i), **(nothing if i % 10 else lopsided)} for i in range(1, 71)]
    alarms = run(Guards(GuardConfig(stop=("terms",)), scale_range=4.0), steps)
    (first, warning), (last, stop), *_ = alarms
    assert (first, last) == (20, 60) and not warning.stops and stop.stops
    assert "Seen for 11 steps in a row." in warning.message and "Seen for 51 steps" in stop.message


def test_feedback_without_a_token() -> None:
    alarms = run(guards(), then(10, length__cot=0.0))
    assert alarms and "without feedback Term 1 has nothing to train" in alarms[0][1].message


def test_undefined_metrics_are_no_fault_and_do_not_count() -> None:
    nothing: dict[str, float | None] = dict.fromkeys(HEALTHY)
    assert run(guards(), [nothing] * 30) == []
    assert run(guards(), [*[healthy(i) for i in range(10)], *[nothing] * 30]) == []


@pytest.mark.parametrize(
    ("norms", "ratio"),
    [
        ({"logit_grad_norm/cot": 1e-4, "logit_grad_norm/squared_error": 0.5, "logit_grad_norm/likelihood": 0.5}, 10000),
        ({"param_grad_norm/term1": 6.0, "param_grad_norm/term2": 0.05}, 120),
        # At the parameters they are in balance, and that is where they count.
        ({"logit_grad_norm/cot": 10.0, "param_grad_norm/term1": 6.0, "param_grad_norm/term2": 2.0}, None),
        # A term that is switched off, or a batch without advantage, is no imbalance.
        ({"logit_grad_norm/squared_error": 0.0, "logit_grad_norm/likelihood": 0.0}, None),
        ({"logit_grad_norm/cot": 0.0}, None),
    ],
)
def test_the_ratio_of_the_terms(norms: dict[str, float | None], ratio: int | None) -> None:
    alarms = run(guards(), [{**HEALTHY, **norms}] * 3)
    assert [f" {ratio} times" in alarm.message for _, alarm in alarms] == ([] if ratio is None else [True])


def test_steps_without_norms_neither_count_nor_forgive() -> None:
    off = {"logit_grad_norm/cot": 10.0}
    without = {name: value for name, value in HEALTHY.items() if not name.startswith("logit_grad_norm/")}
    alarms = run(guards(), [{**HEALTHY, **off}, without, without, {**HEALTHY, **off}])
    assert [n for n, _ in alarms] == [4]


# -- evaluations ---------------------------------------------------------------------------------------

BETTER = Change(difference=0.1, low=0.02, high=0.2)
UNSURE = Change(difference=-0.1, low=-0.3, high=0.1)
WORSE = Change(difference=-0.2, low=-0.3, high=-0.1)


def judge(watch: Guards, *changes: dict[str, Change], mass: Callable[[int], float] = lambda n: 0.99) -> list[Alarm]:
    return [alarm for n, change in enumerate(changes) for alarm in watch.evaluation({"mass": mass(n)}, change)]


def test_a_worse_evaluation_warns_at_once_and_stops_at_the_third() -> None:
    (first,) = judge(guards(), {}, {"reward": WORSE}, {"reward": WORSE, "expected/pearson": WORSE}, {"reward": BETTER})
    assert first.watch == "evaluation" and not first.stops
    assert "the mean reward fell by 0.200 (95% paired interval 0.100 to 0.300)" in first.message
    assert "--no-guard.evaluation" in first.message
    alarms = judge(guards(), {}, *[{"reward": BETTER, "expected/pearson": WORSE}] * 3)
    assert [alarm.stops for alarm in alarms] == [False, True]
    assert "Pearson of E[score] fell by 0.200" in alarms[1].message and "3 evaluations in a row" in alarms[1].message


@pytest.mark.parametrize("change", [{}, {"reward": BETTER}, {"reward": UNSURE, "expected/pearson": UNSURE}])
def test_an_evaluation_inside_its_interval_is_no_fault(change: dict[str, Change]) -> None:
    assert judge(guards(), {}, *[change] * 9) == []
    assert judge(guards(evaluation=False), {}, *[{"reward": WORSE}] * 9) == []


def test_a_reward_that_training_does_not_maximise_may_fall() -> None:
    other = Guards(FLAGS, scale_range=4.0, held_out_reward=False)
    assert judge(other, {}, *[{"reward": WORSE}] * 9) == []
    (alarm,) = judge(other, {}, {"reward": WORSE, "expected/pearson": WORSE})
    assert "Pearson" in alarm.message and "reward" not in alarm.message


def test_held_out_mass_that_falls() -> None:
    alarms = judge(guards(), *[{}] * 4, mass=lambda n: 0.998 if n == 0 else 0.9)
    assert [(alarm.watch, alarm.stops) for alarm in alarms] == [("mass", False), ("mass", True)]
    assert "of held-out prompts fell from 0.998 to 0.900" in alarms[0].message
    assert judge(guards(), *[{}] * 4, mass=lambda n: 0.998 - 0.01 * n) == []


# -- state and flags -----------------------------------------------------------------------------------


def test_a_resumed_watch_says_what_the_unbroken_one_says() -> None:
    steps = then(12, score__mass=0.5, rollouts__entropy=0.001)
    whole = guards()
    expected = run(whole, steps)
    for cut in range(1, len(steps)):
        first, second = guards(), guards()
        found = run(first, steps[:cut])
        first.evaluation({"mass": 0.9}, {})
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found += [(n + cut, alarm) for n, alarm in run(second, steps[cut:])]
        assert found == expected
        assert second.evaluation({"mass": 0.5}, {})[0].watch == "mass"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": ("none", "mass")}, "--guard.stop is none or a list of watches"),
        ({"stop": ("masses",)}, "--guard.stop must be one or more values, each one of mass, reward"),
        ({"stop_steps": 1}, "--guard.stop_steps must be at least --guard.warn_steps 2, got 1"),
        ({"max_term_ratio": 1.0}, "--guard.max_term_ratio must be a number > 1"),
    ],
)
def test_flags_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        guards(**changes)
