"""Which groups are kept, how batches are filled, and that no prompt is lost or doubled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group
from real_openrlhf.controller.dynamic_sampling import CannotFill, Collected, collect, keeps
from real_openrlhf.controller.rollout_stats import group_accuracy
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import PromptStream, StreamExhausted
from tests.helpers.algo_factory import make_group, make_rollout

SCALE = ScoreScale.parse("1-5")


def group(labels: Sequence[int | None], *, label: float = 3.0, row: int = 0) -> Group:
    """One rollout per label index; None: no score. Index 2 is the score 3."""
    rollouts = [
        make_rollout([9, 1], n_labels=5) if i is None else make_rollout([9, 1], position=1, label=i, n_labels=5)
        for i in labels
    ]
    return make_group([1], rollouts, label=label, row=row)


@pytest.mark.parametrize(
    ("label", "labels", "share"),
    [
        (3.0, [2, 2, 2, 2], 1.0),
        (3.0, [2, 1, 3, 2], 0.5),
        (3.0, [0, 1, 3, 4], 0.0),
        (3.0, [None, 2, None, None], 0.25),
        (3.0, [None, None], 0.0),
        (3.4, [2, 3, 2, 4], 0.5),
        (3.6, [2, 3, 2, 4], 0.25),
        (3.5, [2, 3, 2, 4], 0.75),  # a tie: both neighbours are right
        (3.5, [2, 3], 1.0),
        (1.0, [0, 0, 1], 2 / 3),
        (5.0, [4, 3, 2], 1 / 3),
    ],
)
def test_accuracy(label: float, labels: list[int | None], share: float) -> None:
    assert group_accuracy(group(labels, label=label), SCALE) == pytest.approx(share)


def test_an_off_scale_score_is_wrong() -> None:
    rollouts = [make_rollout([9, 1], position=1, n_labels=5), make_rollout([9, 1], position=1, label=2, n_labels=5)]
    assert group_accuracy(make_group([1], rollouts, label=3.0), SCALE) == 0.5


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("partial", [0.25, 0.5, 0.75]),
        ("some_right", [0.25, 0.5, 0.75, 1.0]),
        ("some_wrong", [0.0, 0.25, 0.5, 0.75]),
        ("all", [0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_keep_modes(keep: Any, kept: list[float]) -> None:
    assert [a for a in (0.0, 0.25, 0.5, 0.75, 1.0) if keeps(keep, a)] == kept


def stream(n: int = 40, num_episodes: int | None = None, shuffle: bool = False) -> PromptStream:
    prompts = [Prompt(token_ids=(i,), label=3.0, row=i, text="") for i in range(n)]
    return PromptStream(prompts, seed=3, num_episodes=num_episodes, shuffle=shuffle)


class Engine:
    """A prompt passes ("partial") when `passes(row)`; else all its rollouts are wrong."""

    def __init__(self, passes: Callable[[int], bool]) -> None:
        self.passes = passes
        self.waves: list[list[int]] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Group]:
        self.waves.append([p.row for p in prompts])
        return [group([2, 1] if self.passes(p.row) else [1, 1], row=p.row) for p in prompts]


def run(source: PromptStream, engine: Engine, **changes: Any) -> Collected:
    options: dict[str, Any] = dict(batch_size=8, multiple_of=2, keep="partial", refill=True, max_refills=4)
    return collect(source, engine, SCALE, **(options | changes))


def rows(groups: Sequence[Group]) -> list[int]:
    return [g.row for g in groups]


def test_one_wave_when_all_pass() -> None:
    source, engine = stream(), Engine(lambda row: True)
    result = run(source, engine)
    assert rows(result.kept) == rows(result.sampled) == list(range(8)) and result.waves == 1
    assert result.pass_rate == 1.0
    assert rows_of(source.take(3)) == [8, 9, 10]


def rows_of(prompts: Sequence[Prompt]) -> list[int]:
    return [p.row for p in prompts]


def test_a_refill_draws_for_the_pass_rate_seen() -> None:
    # 6 of 8 pass: 2 are missing at rate 3/4 -> ceil(8/3) = 3 more; of rows 8, 9, 10 all pass, one goes back.
    source, engine = stream(), Engine(lambda row: row not in (0, 1))
    result = run(source, engine)
    assert [len(wave) for wave in engine.waves] == [8, 3]
    assert rows(result.kept) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert len(result.sampled) == 11 and result.waves == 2 and result.pass_rate == pytest.approx(8 / 11)
    assert rows_of(source.take(3)) == [10, 11, 12]


def test_a_refill_is_never_larger_than_a_batch_nor_drawn_for_less_than_a_quarter() -> None:
    # Nothing passes at first: for 8 missing at the lowest rate 32 would be drawn, a batch is the limit.
    source, engine = stream(80), Engine(lambda row: row >= 16)
    result = run(source, engine)
    assert [len(wave) for wave in engine.waves] == [8, 8, 8] and rows(result.kept) == list(range(16, 24))
    # 7 of 8: one is missing at rate 7/8 -> 2. Then 7 of 10: -> ceil(1 / 0.7) = 2.
    source, engine = stream(), Engine(lambda row: row not in (0, 8, 9))
    run(source, engine)
    assert [len(wave) for wave in engine.waves] == [8, 2, 2]
    # 1 of 2: -> 2; 1 of 4: -> 4 but no more than the batch of 2; 1 of 6 counts as a quarter: -> 2.
    source, engine = stream(), Engine(lambda row: row in (0, 6))
    run(source, engine, batch_size=2)
    assert [len(wave) for wave in engine.waves] == [2, 2, 2, 2]
    # 63 of 256 lies below a quarter, the last one is drawn for at 1/4.
    source, engine = stream(400), Engine(lambda row: row % 5 == 0)
    run(source, engine, batch_size=64, max_refills=9)
    kept = seen = 0
    for wave in engine.waves:
        assert len(wave) == min(64, -(-(64 - kept) // max(kept / seen if seen else 1.0, 0.25)))
        kept, seen = kept + sum(row % 5 == 0 for row in wave), seen + len(wave)


def test_excess_prompts_come_first_next_time_and_are_sampled_anew() -> None:
    source, engine = stream(), Engine(lambda row: row != 0)
    first = run(source, engine, batch_size=4)  # wave of 4, one fails; ceil(1 / .75) = 2 more, one too many
    assert engine.waves == [[0, 1, 2, 3], [4, 5]] and rows(first.kept) == [1, 2, 3, 4]
    second = run(source, engine, batch_size=4)
    assert engine.waves[2] == [5, 6, 7, 8] and rows(second.kept) == [5, 6, 7, 8]


@pytest.mark.parametrize("refill", [True, False])
def test_no_prompt_is_lost_or_doubled_over_an_epoch(refill: bool) -> None:
    source, engine = stream(60, num_episodes=1, shuffle=True), Engine(lambda row: row % 5 < 3)
    trained: list[int] = []
    while True:
        try:
            batch = run(source, engine, batch_size=6, multiple_of=2, refill=refill, max_refills=20)
        except StreamExhausted:
            break
        trained += rows(batch.kept)
    left = rows_of(source.take(source.remaining or 0))
    failed = {row for wave in engine.waves for row in wave if row % 5 >= 3}
    assert max(Counter(trained).values()) == 1 and all(row % 5 < 3 for row in trained)
    # What was trained on, what failed, and what remains: every prompt, once, but for failures that went back.
    assert Counter(trained) + Counter(left) + Counter(failed - set(left)) == Counter(range(60))


def test_a_saved_stream_goes_on_with_the_returned_prompts() -> None:
    source, engine = stream(), Engine(lambda row: row != 0)
    run(source, engine, batch_size=4)
    state = json.loads(json.dumps(source.state_dict()))
    other = stream()
    other.load_state_dict(state)
    assert rows_of(other.take(6)) == rows_of(source.take(6)) == [5, 6, 7, 8, 9, 10]


def test_a_prompt_twice_in_one_wave() -> None:
    # Three prompts, a batch of four: the epoch ends inside the wave.
    source, engine = stream(3), Engine(lambda row: row != 1)
    result = run(source, engine, batch_size=4)
    assert engine.waves == [[0, 1, 2, 0], [1, 2]] and rows(result.kept) == [0, 2, 0, 2]
    assert rows_of(source.take(3)) == [0, 1, 2]


@pytest.mark.parametrize(("ranks", "kept"), [(1, 7), (2, 6), (3, 6), (4, 4), (5, 5), (7, 7)])
def test_without_refill_the_batch_is_cut_to_the_ranks_and_the_rest_goes_back(ranks: int, kept: int) -> None:
    source, engine = stream(), Engine(lambda row: row not in (2, 4, 5))
    result = run(source, engine, batch_size=10, multiple_of=ranks, refill=False)
    passed = [0, 1, 3, 6, 7, 8, 9]
    assert rows(result.kept) == passed[:kept] and len(result.sampled) == 10 and result.waves == 1
    assert rows_of(source.take(8))[: 7 - kept] == passed[kept:]


def test_keep_all_takes_every_group() -> None:
    source, engine = stream(), Engine(lambda row: False)
    assert rows(run(source, engine, keep="all", refill=False).kept) == list(range(8))


def test_cannot_fill_says_how_many_there_were() -> None:
    def generate(prompts: Sequence[Prompt]) -> list[Group]:
        # Of every eight: 5 all wrong, 2 all right, 1 partly.
        kinds = [[1, 1]] * 5 + [[2, 2]] * 2 + [[1, 2]]
        return [group(kinds[p.row % 8], row=p.row) for p in prompts]

    options: dict[str, Any] = dict(batch_size=8, multiple_of=2, keep="partial", refill=True, max_refills=2)
    with pytest.raises(CannotFill) as caught:
        collect(stream(), generate, SCALE, **options)
    message = str(caught.value)
    assert "kept 3 of 24 groups in 3 generation waves, 8 are needed" in message
    assert "15 groups have no right rollout, 6 have only right ones (--real.keep_groups partial)" in message
    assert all(flag in message for flag in ("--real.max_refills", "some_right", "some_wrong"))


@pytest.mark.parametrize("passing", [0, 1])
def test_without_refill_too_few_for_the_ranks_is_an_error(passing: int) -> None:
    with pytest.raises(CannotFill, match=f"kept {passing} of 8 groups in 1 generation waves"):
        run(stream(), Engine(lambda row: row < passing), refill=False)


def test_max_refills_counts_waves_after_the_first() -> None:
    engine = Engine(lambda row: False)
    with pytest.raises(CannotFill):
        run(stream(), engine, max_refills=3)
    assert len(engine.waves) == 4


def test_when_the_prompts_end_within_a_step_all_of_it_goes_back() -> None:
    source, engine = stream(10, num_episodes=1), Engine(lambda row: row % 2 == 0)
    with pytest.raises(StreamExhausted):
        run(source, engine)
    assert source.remaining == 10 and sorted(rows_of(source.take(10))) == list(range(10))


def test_engines_that_lose_or_reorder_groups_are_noticed() -> None:
    engine = Engine(lambda row: True)
    for broken in (lambda prompts: engine(prompts)[1:], lambda prompts: engine(prompts)[::-1]):
        with pytest.raises(RuntimeError, match="8 prompts were sent"):
            collect(stream(), broken, SCALE, batch_size=8, multiple_of=1, keep="all", refill=False, max_refills=0)
