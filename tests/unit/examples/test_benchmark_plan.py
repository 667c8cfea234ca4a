"""What the benchmark measures, in which order, and what it leaves out."""

from __future__ import annotations

import pytest

from examples.benchmark.bench import middle
from examples.benchmark.flops import Shape, executed
from examples.benchmark.models import SPECS, WORDS
from examples.benchmark.plan import (
    AUTHORS,
    CENTRE,
    FULL,
    REAL,
    SMALL,
    STOCK,
    Estimates,
    Item,
    Round,
    WeightSync,
    fit,
    full_plan,
    small_plan,
)

PLAN = full_plan("large", "narrow")
SHAPE = Shape(vocabulary=100, hidden=8, intermediate=16, layers=2, heads=2, kv_heads=2, head_dim=4)


def rounds(plan: list[Item], **wanted: object) -> list[Round]:
    found = [item for item in plan if isinstance(item, Round)]
    return [item for item in found if all(getattr(item, name) == value for name, value in wanted.items())]


def test_the_centre_comes_first_three_times_with_turns_taken_in_rotation() -> None:
    for model in ("large", "narrow"):
        centre = rounds(PLAN, model=model, point=CENTRE, purpose="time")
        assert [item.contestants for item in centre] == [
            (REAL, STOCK, AUTHORS),
            (STOCK, AUTHORS, REAL),
            (AUTHORS, REAL, STOCK),
        ]
        assert {(item.prompt, item.response, item.samples) for item in centre} == {(1024, 128, 16)}
    assert PLAN[:3] == rounds(PLAN, model="large", point=CENTRE, purpose="time")
    assert middle(PLAN) == 3


def test_one_factor_at_a_time() -> None:
    points = FULL.points()
    assert set(points) == {"P=256", "P=512", "P=2048", "R=64", "R=256", "K=4", "K=8"}
    for name, sizes in points.items():
        changed = {key for key, value in FULL.centre().items() if sizes[key] != value}
        assert len(changed) == 1, name
        letter, _, value = name.partition("=")
        assert sizes[{"P": "prompt", "R": "response", "K": "samples"}[letter]] == int(value)
    for contestant in (REAL, STOCK, AUTHORS):
        measured = {
            item.point for item in rounds(PLAN, model="narrow", purpose="time") if contestant in item.contestants
        }
        assert measured == {CENTRE, *points}, contestant


def test_plain_contestants_are_always_paired_with_this_project() -> None:
    for item in rounds(PLAN, purpose="time"):
        assert REAL in item.contestants


def test_micro_batches() -> None:
    (centre, *_) = rounds(PLAN, purpose="time")
    assert [centre.case(name).micro_batch for name in (REAL, STOCK, AUTHORS)] == [16, 2, 2]
    for item in rounds(PLAN, purpose="memory"):
        assert item.alone
        assert {item.case(name).micro_batch for name in item.contestants} == {item.samples}
        assert item.case(REAL).gradient_checkpointing == (item.samples == 16)


def test_every_round_has_a_name_of_its_own() -> None:
    for plan in (PLAN, small_plan("tiny")):
        names = [item.name for item in plan]
        assert len(set(names)) == len(names)


def test_the_small_plan_has_everybody_everywhere() -> None:
    plan = small_plan("tiny")
    assert all(sorted(item.contestants) == sorted((REAL, STOCK, AUTHORS)) for item in rounds(plan))
    assert {item.point for item in rounds(plan, purpose="time")} == {CENTRE, *SMALL.points()}
    assert not [item for item in plan if isinstance(item, WeightSync)]


def test_what_fits_is_kept_in_order_and_the_rest_is_named() -> None:
    costs = dict(zip((item.name for item in PLAN), [50, 40, 30, 20, 10] + [7] * len(PLAN)))
    kept, dropped = fit(PLAN, 100, lambda item, running: costs[item.name])
    # 50 + 40; 30 and 20 do not fit any more, 10 does.
    assert [item.name for item in kept] == [PLAN[0].name, PLAN[1].name, PLAN[4].name]
    assert sum(costs[item.name] for item in kept) <= 100
    assert sorted(item.name for item in [*kept, *dropped]) == sorted(item.name for item in PLAN)
    assert fit(PLAN, 0, lambda item, running: 1.0) == ([], PLAN)
    assert fit(PLAN, len(PLAN), lambda item, running: 1.0) == (PLAN, [])


def test_starts_are_paid_once_per_stretch_of_a_model() -> None:
    centre = rounds(PLAN, model="large", point=CENTRE, purpose="time")
    alone = rounds(PLAN, model="large", purpose="memory", point="K=4")[0]
    narrow = rounds(PLAN, model="narrow", purpose="time")
    seen = []
    fit(
        [centre[0], centre[1], narrow[0], alone, narrow[3]], 100, lambda item, running: seen.append(set(running)) or 1.0
    )
    large_workers = {("large", name) for name in (REAL, STOCK, AUTHORS)}
    assert seen == [set(), large_workers, large_workers, {("narrow", name) for _, name in large_workers}, set()]


def test_estimates_follow_the_largest_step_measured() -> None:
    estimates = Estimates(shapes={"large": SHAPE}, rate=1e6, start=30.0)
    centre = rounds(PLAN, model="large", purpose="time")[0]
    case = centre.case(STOCK)
    flops = executed(SHAPE, STOCK, case)
    assert estimates.step("large", STOCK, case) == flops / 1e6
    estimates.observe("large", STOCK, case, 50.0)
    small = rounds(small_plan("large"))[0].case(STOCK)
    estimates.observe("large", STOCK, small, 1000.0)  # slow, but small: not what others are judged by
    assert estimates.step("large", STOCK, case) == pytest.approx(50.0)
    estimates.observe("large", STOCK, case, 60.0)
    assert estimates.step("large", STOCK, case) == pytest.approx(60.0)


def test_a_round_costs_the_starts_that_it_needs() -> None:
    estimates = Estimates(shapes={"large": SHAPE}, rate=1e30, start=30.0)
    centre = rounds(PLAN, model="large", purpose="time")[0]
    alone = rounds(PLAN, model="large", purpose="memory", point="K=4")[0]
    everybody = {("large", name) for name in (REAL, STOCK, AUTHORS)}
    assert estimates.item(centre) == pytest.approx(90.0)
    assert estimates.item(centre, everybody) == pytest.approx(0.0)
    assert estimates.item(alone, everybody) == pytest.approx(90.0)
    estimates.observe_start("large", AUTHORS, 12.0)
    assert estimates.item(centre, {("large", REAL)}) == pytest.approx(42.0)
    assert estimates.item(WeightSync(model="large", seconds=77.0)) == 77.0


def test_made_up_models() -> None:
    assert SPECS["narrow"].vocabulary == 151_936
    for spec in SPECS.values():
        assert len(WORDS) < spec.vocabulary and spec.heads % spec.kv_heads == 0
