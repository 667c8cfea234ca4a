"""The controller on fakes: the order of phases, what it refuses, and what it writes down."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, TrainGroup
from real_openrlhf.common.errors import RunError
from real_openrlhf.config.guard_flags import GuardConfig
from real_openrlhf.controller.controller import Controller, NothingLearned
from real_openrlhf.controller.dynamic_sampling import CannotFill
from real_openrlhf.controller.first_look import ScoresNotThere
from real_openrlhf.controller.guards import Guards, WentWrong
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.loop import NotFinite, Stopped
from real_openrlhf.controller.protocols import SyncReport
from real_openrlhf.controller.settings import ControllerSettings
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import PromptStream
from real_openrlhf.evals.change import Change, EvalReport
from tests.helpers.algo_factory import make_rollout

SCALE = ScoreScale.parse("1-3")
# Probabilities of "1".."3" at the score position, per rollout of a group.
ROWS = [[0.2, 0.5, 0.2], [0.6, 0.2, 0.1], [0.1, 0.3, 0.5]]

SETTINGS = ControllerSettings(
    total_steps=3,
    batch_size=4,
    share_by=2,
    sampling=Sampling(n=3, temperature=1.0, top_p=1.0, max_new_tokens=8),
    seed=5,
    seeded=False,
    keep="partial",
    refill=True,
    max_refills=3,
    eval_steps=-1,
    min_mass=0.05,
    min_readable=0.1,
    dead_steps=0,
    renormalise=False,
    n_samples=2,
    logging_steps=1,
)


def prompts(n: int = 40) -> list[Prompt]:
    return [Prompt(token_ids=(5, 6, 7), label=2.0, row=i, text=str(i)) for i in range(n)]


def partly_right(prompt: Prompt, k: int) -> int | None:
    """The label of the k-th rollout: 1 is right (label 2.0)."""
    return [1, 0, 2][k]


@dataclass
class World:
    """Every fake, and what happened in order."""

    labels: Callable[[Prompt, int], int | None] = partly_right
    same_scores: bool = False
    age: int = 0
    events: list[tuple[Any, ...]] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    trained: list[Sequence[TrainGroup]] = field(default_factory=list)
    logs: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    samples: list[tuple[int, list[Mapping[str, Any]]]] = field(default_factory=list)
    shown: list[tuple[Any, ...]] = field(default_factory=list)
    warnings: list[tuple[int, str, str]] = field(default_factory=list)
    # (step, phase) of what was logged last when the page was written.
    pages: list[tuple[int, str]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    # The metrics of each step's update, and of each evaluation by version.
    trained_metrics: dict[str, float] = field(default_factory=dict)
    evaluation: Callable[[int], tuple[dict[str, float | None], dict[str, Change]]] = lambda version: (
        {"expected/pearson": 0.1 * version, "decoded/pearson": None},
        {},
    )
    version: int = -1
    asleep: bool = False
    evaluating: int | None = None
    # Version, and the last event before its result was asked for.
    results: list[tuple[int, str]] = field(default_factory=list)
    evaluations: list[tuple[int, list[Mapping[str, Any]], Mapping[str, str]]] = field(default_factory=list)

    # rollouts
    def generate(self, wanted: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        assert not self.asleep
        self.events.append(("generate", len(wanted)))
        self.samplings.append(sampling)
        groups = []
        for prompt in wanted:
            rollouts = []
            for k in range(sampling.n):
                label = self.labels(prompt, k)
                if label is None:
                    rollouts.append(make_rollout([4, 4, 4]))
                    continue
                row = ROWS[0 if self.same_scores else k]
                scores = torch.tensor([row]).log()
                rollouts.append(make_rollout([4, 4, label + 1, 0], position=2, label=label, score_logprobs=scores))
            groups.append(
                Group(
                    prompt_ids=torch.tensor(prompt.token_ids),
                    label=prompt.label,
                    rollouts=tuple(rollouts),
                    row=prompt.row,
                    weight_version=self.version - self.age,
                )
            )
        return groups

    def sleep(self) -> None:
        self.events.append(("sleep",))
        self.asleep = True

    # policy
    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        self.events.append(("train", len(groups)))
        self.trained.append(groups)
        return {"loss/total": 0.5, "policy/grad_norm": 2.0, **self.trained_metrics}

    def save_model(self, path: str, complete: Any = None) -> None:
        self.events.append(("save", path))

    # reference
    def reference_logprobs(self, groups: Sequence[TrainGroup]) -> list[tuple[torch.Tensor, ...]]:
        self.events.append(("reference", len(groups)))
        return [
            tuple(torch.full((r.token_ids.numel(),), -float(g.group.row)) for r in g.group.rollouts) for g in groups
        ]

    # sync
    def sync(self, version: int) -> SyncReport:
        assert self.evaluating is None
        self.events.append(("sync", version))
        self.version = version
        self.asleep = False
        return SyncReport(
            version=version, seconds=1.5, check_seconds=0.25, mean_difference=1e-5, max_difference=1e-4, n_tokens=9
        )

    # evaluator
    def start(self, version: int) -> None:
        assert self.evaluating is None and version == self.version and not self.asleep
        self.events.append(("evaluate", version))
        self.evaluating = version

    def result(self, watch: Callable[[int, int], None] | None = None) -> EvalReport:
        assert self.evaluating is not None
        if watch is not None:
            watch(1, 2)
        version, self.evaluating = self.evaluating, None
        self.results.append((version, self.events[-1][0]))
        metrics, changes = self.evaluation(version)
        return EvalReport(
            version=version, metrics=metrics, changes=changes, samples=[{"row": 7}], plots={"a": "a.png"}, seconds=2.5
        )

    # log
    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        self.logs.append((step, phase, dict(metrics)))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self.samples.append((step, list(samples)))

    def log_evaluation(self, step: int, samples: Sequence[Mapping[str, Any]], plots: Mapping[str, str]) -> None:
        self.evaluations.append((step, list(samples), plots))

    def page(self, *, last: bool = False) -> None:
        self.pages.append(self.logs[-1][:2])

    def warn(self, step: int, watch: str, message: str) -> None:
        self.warnings.append((step, watch, message))

    def keep_batch(self, step: int, groups: Sequence[TrainGroup], metrics: Mapping[str, Any]) -> str:
        self.kept.append(step)
        assert groups is self.trained[-1] or list(groups) == list(self.trained[-1])
        return "kept"

    # progress
    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.shown.append(("step", step))

    def judged(self, step: int, done: int, total: int) -> None:
        self.shown.append(("judged", step, done, total))

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.shown.append(("evaluated", step))

    # both RolloutGroup, PolicyGroup and Evaluator
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def controller(
    world: World,
    *,
    n_prompts: int = 40,
    evaluate: bool = True,
    kl: bool = False,
    guard: GuardConfig | None = None,
    metric: str | None = None,
    folder: str = "out/model",
    **changes: Any,
) -> Controller:
    return Controller(
        replace(SETTINGS, **changes),
        scale=SCALE,
        objective=RealObjective(),
        prompts=PromptStream(prompts(n_prompts), seed=0, num_episodes=1),
        rollouts=world,
        policy=world,
        weight_sync=world,
        evaluator=world if evaluate else None,
        reference=world if kl else None,
        guards=Guards(guard or GuardConfig(), scale_range=2.0),
        export=JudgeExport(world, folder, metric=metric),
        log=world,
        progress=world,
        decode=lambda ids: f"<{len(ids)} ids>",
    )


def step_events(n: int, size: int = 4) -> list[tuple[Any, ...]]:
    return [("generate", size), ("sleep",), ("train", size), ("sync", n)]


def test_phases_in_order() -> None:
    world = World()
    metrics = controller(world).fit()
    assert world.events == [
        *(("sync", 0), ("evaluate", 0)),
        *step_events(1),
        *step_events(2),
        *step_events(3),
        *(("evaluate", 3), ("save", "out/model")),
    ]
    assert metrics == {"expected/pearson": pytest.approx(0.3), "decoded/pearson": None}


@pytest.mark.parametrize("every", [1, 2])
def test_the_time_to_the_first_update_is_logged_once(every: int) -> None:
    world = World()
    run = controller(world, logging_steps=every)
    seconds = iter([17.0])
    run.since_command = lambda: next(seconds)  # a second call would fail
    run.fit()
    logged = [metrics.get("seconds/first_step") for _, phase, metrics in world.logs if phase == "train"]
    assert logged == [17.0, *[None] * (3 // every - 1)]


def test_the_reference_comes_before_the_updates_and_its_logprobs_go_to_the_policy() -> None:
    world = World()
    controller(world, kl=True, total_steps=1).fit()
    assert world.events[2:7] == [("generate", 4), ("sleep",), ("reference", 4), ("train", 4), ("sync", 1)]
    for group in world.trained[0]:
        assert group.ref_logprobs is not None
        assert [logprobs.tolist() for logprobs in group.ref_logprobs] == [[-float(group.group.row)] * 4] * 3
    (train,) = (metrics for _, phase, metrics in world.logs if phase == "train")
    assert "seconds/reference" in train


def test_without_a_kl_there_is_no_reference() -> None:
    world = World()
    controller(world, total_steps=1).fit()
    assert all(group.ref_logprobs is None for group in world.trained[0])
    assert not any("seconds/reference" in metrics for _, _, metrics in world.logs)


@pytest.mark.parametrize(("every", "at"), [(-1, [0, 5]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5])])
def test_evaluation_every_so_often_and_never_twice_at_a_step(every: int, at: list[int]) -> None:
    world = World()
    controller(world, total_steps=5, eval_steps=every).fit()
    assert [event[1] for event in world.events if event[0] == "evaluate"] == at
    assert [step for step, phase, _ in world.logs if phase == "eval"] == at
    assert [event[1] for event in world.shown if event[0] == "evaluated"] == at
    # How far each of them is goes to the progress at its own step.
    assert [event[1:] for event in world.shown if event[0] == "judged"] == [(step, 1, 2) for step in at]


def test_an_evaluator_with_its_own_engine_judges_beside_the_next_step() -> None:
    world = World()
    metrics = controller(world, eval_steps=1, eval_beside=True).fit()
    # The result of step v is asked for after step v + 1 was trained, before its weights are sent; the last one at once.
    assert world.results == [(0, "train"), (1, "train"), (2, "train"), (3, "evaluate")]
    assert [e for e in world.events if e[0] in ("train", "sync", "evaluate")] == [
        *(("sync", 0), ("evaluate", 0)),
        *(event for n in (1, 2, 3) for event in (("train", 4), ("sync", n), ("evaluate", n))),
    ]
    # It is logged at the step whose weights it judged, in the order of the steps.
    evaluations = [(step, m["weight_version"]) for step, phase, m in world.logs if phase == "eval"]
    assert evaluations == [(n, n) for n in range(4)]
    assert [step for step, _, _ in world.logs] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [step for step, _, _ in world.evaluations] == [0, 1, 2, 3]
    assert metrics["expected/pearson"] == pytest.approx(0.3)


@pytest.mark.parametrize(("uses", "every", "waited"), [(True, 9, [0, 1, 2, 3]), (False, 2, [0, 2, 3]), (False, 9, [3])])
def test_a_checkpoint_waits_for_its_evaluation(uses: bool, every: int, waited: list[int]) -> None:
    world, saved = World(), []

    class Saver:
        uses_evaluations = uses

        def is_due(self, step: int, evaluation: Any) -> bool:
            return step % every == 0

        def save(self, step: int, evaluation: Any = None) -> bool:
            assert world.evaluating is None
            saved.append((step, evaluation))
            return True

    run = controller(world, eval_steps=1, eval_beside=True)
    run.fit(Saver())
    assert [v for v, event in world.results if event == "evaluate"] == [w for w in waited if w > 0]
    assert [step for step, _ in saved] == [step for step in (1, 2, 3) if step % every == 0]
    assert all(evaluation["expected/pearson"] == pytest.approx(0.1 * step) for step, evaluation in saved)


def test_a_signal_waits_for_the_evaluation() -> None:
    world = World()
    run = controller(world, eval_steps=1, eval_beside=True)
    run.stop_requested = lambda: "SIGTERM" if run.step_number == 2 else None
    with pytest.raises(Stopped):
        run.fit()
    assert world.evaluating is None and run.last_eval["expected/pearson"] == pytest.approx(0.2)


def test_total_steps_0_evaluates_and_saves_only() -> None:
    world = World()
    controller(world, total_steps=0).fit()
    assert world.events == [("sync", 0), ("evaluate", 0), ("save", "out/model")]


def test_without_an_evaluator() -> None:
    world = World()
    assert controller(world, evaluate=False, total_steps=1, eval_steps=1).fit() == {}
    assert world.events == [("sync", 0), *step_events(1), ("save", "out/model")]


def test_the_end_of_the_prompts_ends_the_run_cleanly() -> None:
    world = World()
    run = controller(world, n_prompts=10, total_steps=9)
    run.fit()
    assert run.step_number == 2
    assert world.events[-2:] == [("evaluate", 2), ("save", "out/model")]
    assert isinstance(run.prompts, PromptStream) and run.prompts.remaining == 2


def test_prompts_that_never_fill_a_batch_are_an_error_not_an_empty_run() -> None:
    world = World(labels=lambda prompt, k: 0 if prompt.row % 2 else partly_right(prompt, k))
    run = controller(world, n_prompts=5, max_refills=9)
    with pytest.raises(CannotFill, match=r"before the first batch was full.*--train.num_episodes 1 over 5 prompts"):
        run.fit()
    assert ("save", "out/model") not in world.events
    assert isinstance(run.prompts, PromptStream) and run.prompts.remaining == 5


@pytest.mark.parametrize("age", [1, -1])
def test_rollouts_of_other_weights_are_refused(age: int) -> None:
    world = World(age=age)
    with pytest.raises(RuntimeError, match=rf"rollouts of step 0 come from weight versions \[{-age}\]"):
        controller(world).fit()
    assert "train" not in [event[0] for event in world.events]


def test_dead_steps_in_a_row_stop_the_run() -> None:
    world = World(same_scores=True)
    with pytest.raises(NothingLearned, match=r"3 steps in a row.*--rollout.temperature.*--real.dead_steps"):
        controller(world, total_steps=8, dead_steps=3).fit()
    assert [(step, watch) for step, watch, _ in world.warnings] == [(1, "dead")]
    assert "stops at 3 (--real.dead_steps)" in world.warnings[0][2]
    assert [event for event in world.events if event[0] == "train"] == [("train", 4)] * 3
    assert [step for step, phase, _ in world.logs if phase == "train"] == [1, 2, 3]


def test_skipped_updates_are_counted_kept_and_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    skipped = {"policy/skipped_updates": 1.0, "skipped/rollouts": 1.0}
    world = World(trained_metrics=skipped)
    run = controller(world, total_steps=8, max_skipped=3)
    run._sync()
    run.step()
    run.step()
    assert run.skipped_steps == 2
    later = controller(World(), total_steps=8, max_skipped=3)
    later.load_state_dict(run.state_dict())
    assert later.skipped_steps == 2
    world.trained_metrics = {"policy/skipped_updates": 0.0}
    run.step()
    assert run.skipped_steps == 0 and world.kept == [1, 2]
    world.trained_metrics = skipped
    with pytest.raises(NotFinite, match=r"step 6: log-probs of engine or reference, or rewards, are NaN .* 3 steps"):
        run.fit()
    assert world.kept == [1, 2, 4, 5, 6]
    assert [(step, watch) for step, watch, _ in world.warnings if watch == "finite"] == [
        (step, "finite") for step in (1, 2, 4, 5, 6)
    ]
    # The step is logged before the run ends.
    assert [step for step, phase, _ in world.logs if phase == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_sync_that_finds_the_weights_ruined_keeps_the_batch() -> None:
    world = World()
    run = controller(world)
    run._sync()

    def sync(version: int) -> SyncReport:
        raise RunError("the policy's own log-probs are NaN")

    world.sync = sync  # type: ignore[method-assign]
    with pytest.raises(RunError, match="own log-probs"):
        run.step()
    assert world.kept == [1]


def test_dead_steps_0_never_stops() -> None:
    world = World(same_scores=True)
    controller(world, total_steps=6, dead_steps=0).fit()
    assert world.warnings == []
    assert ("evaluate", 6) in world.events


def test_one_live_step_starts_the_count_of_dead_ones_anew() -> None:
    world = World(same_scores=True)
    run = controller(world, total_steps=8, dead_steps=3)
    run._sync()
    run.step()
    run.step()
    assert run.dead_steps == 2
    world.same_scores = False
    run.step()
    assert run.dead_steps == 0


def test_what_a_prompt_asks_to_judge_is_what_its_feedback_is_held_against() -> None:
    """All feedback is token 4, which the responses of odd rows have; no prompt has it."""
    world = World()
    run = controller(world)
    run.judged = lambda row: (4, 9) if row % 2 else (8, 9)
    run._sync()
    run.step()
    odd = [group.group.row % 2 for group in world.trained[0]]
    ((_, _, metrics),) = world.logs
    assert 0 < sum(odd) < 4 and metrics["feedback/mentioned"] == sum(odd) / 4
    assert metrics["feedback/mentioned_other"] == pytest.approx(sum((sum(odd) - mine) / 3 for mine in odd) / 4)


def test_the_page_is_written_after_evaluations_and_checkpoints() -> None:
    world = World()
    run = controller(world, total_steps=4, eval_steps=2)
    run.fit()
    assert world.pages == [(0, "eval"), (2, "eval"), (4, "eval")]
    run = controller(world := World(), total_steps=3, eval_steps=-1)
    run.fit(Everything(every=2))
    assert world.pages == [(0, "eval"), (2, "train"), (3, "eval")]


@dataclass
class Everything:
    """A saver that saves nothing."""

    every: int
    uses_evaluations: bool = False

    def is_due(self, step: int, evaluation: Any) -> bool:
        return step % self.every == 0

    def save(self, step: int, evaluation: Any = None) -> bool:
        return True


@pytest.mark.parametrize("stop", [("terms",), ("none",)])
def test_a_watch_warns_and_then_stops_the_run_with_its_state_saved(stop: tuple[str, ...]) -> None:
    lopsided = {"logit_grad_norm/cot": 9.0, "logit_grad_norm/squared_error": 0.01, "logit_grad_norm/likelihood": 0.01}
    world, saved = World(trained_metrics=lopsided), []

    class Saver:
        uses_evaluations = False

        def is_due(self, step: int, evaluation: Any) -> bool:
            return True

        def save(self, step: int, evaluation: Any = None) -> bool:
            saved.append(step)
            return True

    run = controller(world, total_steps=6, guard=GuardConfig(warn_steps=2, stop_steps=4, stop=stop))
    saver = Saver()
    if stop == ("none",):
        run.fit(saver)
        assert run.step_number == 6 and [step for step, _, _ in world.warnings] == [2]
        return
    with pytest.raises(WentWrong, match=r"stopped after step 4: The gradient of Term 1 is 450 times.*--guard.stop"):
        run.fit(saver)
    assert [(step, watch) for step, watch, _ in world.warnings] == [(2, "terms"), (4, "terms")]
    assert saved == [1, 2, 3, 4] and ("save", "out/model") not in world.events


def test_a_judge_that_gets_worse_on_held_out_prompts_stops_the_run() -> None:
    worse = Change(difference=-0.2, low=-0.3, high=-0.1)
    world = World(evaluation=lambda version: ({"expected/pearson": 0.5}, {"reward": worse} if version else {}))
    run = controller(world, total_steps=9, eval_steps=1, guard=GuardConfig(stop_evaluations=2))
    with pytest.raises(WentWrong, match=r"after step 2: The judge is worse on held-out prompts than at the start"):
        run.fit()
    evaluations = [m for _, phase, m in world.logs if phase == "eval"]
    assert "eval/change/reward" not in evaluations[0]
    assert [evaluations[1][f"eval/change/reward{end}"] for end in ("", "_low", "_high")] == [-0.2, -0.3, -0.1]


def test_the_last_evaluation_warns_but_stops_nothing_that_has_ended() -> None:
    worse = Change(difference=-0.2, low=-0.3, high=-0.1)
    world = World(evaluation=lambda version: ({"mass": 0.9}, {"reward": worse} if version else {}))
    controller(world, guard=GuardConfig(stop_evaluations=1)).fit()
    assert [(step, watch) for step, watch, _ in world.warnings] == [(3, "evaluation")]
    assert world.events[-1] == ("save", "out/model")


@pytest.mark.parametrize("beside", [False, True])
def test_the_best_judge_is_exported_while_the_policy_has_its_weights(beside: bool, tmp_path: Path) -> None:
    pearson = {0: 0.5, 1: 0.7, 2: 0.6, 3: 0.65}
    world = World(evaluation=lambda version: ({"expected/pearson": pearson[version]}, {}))
    run = controller(world, eval_steps=1, eval_beside=beside, metric="expected/pearson", folder=str(tmp_path / "model"))
    world.save_model = lambda path, complete: (  # type: ignore[method-assign]
        world.events.append(("save", Path(path).name)),
        Path(path).mkdir(),
    )
    run.fit()
    kinds = [event for event in world.events if event[0] in ("train", "save")]
    assert kinds == [("save", "best_step_0"), ("train", 4), ("save", "best_step_1"), ("train", 4), ("train", 4)]
    assert run.export.chosen.step == 1 and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_reward_of_what_dynamic_sampling_drops_is_counted_too() -> None:
    right = partly_right
    world = World(labels=lambda prompt, k: right(prompt, k) if prompt.row % 2 else 1)
    controller(world, total_steps=1).fit()
    (train,) = (m for _, phase, m in world.logs if phase == "train")
    assert train["sampling/groups"] > train["sampling/kept"] == 4.0
    # The fake's score distributions do not depend on what was written: every group has the same rewards.
    assert train["reward/sampled_mean"] == pytest.approx(train["reward/mean"])


def test_metrics_have_the_names_that_users_see() -> None:
    world = World()
    controller(world, total_steps=1).fit()
    assert [(step, phase) for step, phase, _ in world.logs] == [(0, "sync"), (0, "eval"), (1, "train"), (1, "eval")]
    start, first, train, last = (metrics for _, _, metrics in world.logs)
    assert start["sync/logprob_mean"] == 1e-5 and start["sync/logprob_max"] == 1e-4 and "seconds/sync" in start
    assert first["eval/expected/pearson"] == 0.0 and first["eval/decoded/pearson"] is None
    assert first["weight_version"] == 0 and last["weight_version"] == 1
    assert first["seconds/evaluate"] == 2.5 and world.evaluations[0] == (0, [{"row": 7}], {"a": "a.png"})
    assert set(first) == {"eval/expected/pearson", "eval/decoded/pearson", "weight_version", "seconds/evaluate"}
    expected = [sum(v * p for v, p in zip((1, 2, 3), row)) for row in ROWS]
    rewards = [-((e - 2) ** 2) + torch.tensor(row[1]).log().item() for e, row in zip(expected, ROWS)]
    assert train["reward/mean"] == pytest.approx(sum(rewards) / 3, rel=1e-5)
    assert train["score/mass"] == pytest.approx(0.9) and train["invalid/rate"] == 0.0
    assert train["loss/total"] == 0.5 and train["policy/grad_norm"] == 2.0
    assert train["sync/logprob_mean"] == 1e-5 and train["sync/transfer_seconds"] == 1.5
    assert train["sync/check_seconds"] == 0.25
    assert (train["sampling/pass_rate"], train["sampling/waves"]) == (1.0, 1.0)
    assert (train["sampling/groups"], train["sampling/kept"]) == (4.0, 4.0)
    assert {f"seconds/{name}" for name in ("generate", "advantages", "train", "sync")} <= set(train)
    assert "seconds/evaluate" not in train
    # 4 groups of 3 rollouts: 4 tokens each are generated, 3 more of the prompt are trained through.
    # The batch's own clock lies inside the phase's.
    assert 48 / train["seconds/generate"] <= train["speed/generated_tokens_per_second"] < math.inf
    assert train["speed/trained_tokens_per_second"] == pytest.approx(84 / max(train["seconds/train"], 1e-9))
    json.dumps([start, first, train, last])


def test_judgements_are_logged_with_their_advantage() -> None:
    world = World()
    controller(world, total_steps=1).fit()
    ((step, samples),) = world.samples
    assert step == 1 and len(samples) == 2
    assert all(s["advantage"] is not None and s["prompt_tail"] == "<3 ids>" for s in samples)
    assert samples[0]["label"] == 2.0 and samples[0]["decoded"] == 2.0


def test_logging_steps() -> None:
    world = World()
    controller(world, total_steps=5, logging_steps=2).fit()
    assert [step for step, phase, _ in world.logs if phase == "train"] == [2, 4]
    assert [step for step, _ in world.samples] == [2, 4]
    assert [event[1] for event in world.shown if event[0] == "step"] == [1, 2, 3, 4, 5]


def test_the_policy_gets_what_the_objective_made_of_the_kept_groups() -> None:
    world = World(labels=lambda prompt, k: 0 if prompt.row % 4 == 0 else partly_right(prompt, k))
    controller(world, total_steps=2).fit()
    for groups in world.trained:
        assert len(groups) == 4
        for train_group in groups:
            assert train_group.group.row % 4 and train_group.target == SCALE.target(2.0)
            k = torch.tensor(ROWS)
            errors = (k @ torch.tensor([1.0, 2.0, 3.0]) - 2) ** 2
            rewards = -errors + k[:, 1].log()
            torch.testing.assert_close(train_group.coefficients.rewards.float(), rewards)
    metrics = next(m for _, phase, m in world.logs if phase == "train")
    sampled = sum(event[1] for event in world.events[: world.events.index(("train", 4))] if event[0] == "generate")
    assert metrics["sampling/groups"] == sampled and metrics["sampling/pass_rate"] == pytest.approx(4 / sampled)


def test_seeds_differ_between_steps_and_waves_and_repeat_between_runs() -> None:
    def seeds(seeded: bool, seed: int = 5) -> list[int | None]:
        # Every third prompt passes, so that there are several waves per step.
        world = World(labels=lambda prompt, k: partly_right(prompt, k) if prompt.row % 3 == 0 else 0)
        controller(world, seeded=seeded, seed=seed, max_refills=9, n_prompts=90).fit()
        assert len(world.samplings) > 3
        assert all(s == replace(SETTINGS.sampling, seed=s.seed) for s in world.samplings)
        return [s.seed for s in world.samplings]

    mine = seeds(True)
    assert None not in mine and len(set(mine)) == len(mine) and mine == seeds(True)
    assert not set(mine) & set(seeds(True, seed=6))
    assert set(seeds(False)) == {None}


def test_a_judge_that_writes_no_scores_gets_advice_before_any_filter() -> None:
    world = World(labels=lambda prompt, k: None)
    with pytest.raises(ScoresNotThere, match="only 0 of the first 12 rollouts"):
        controller(world).fit()
    assert world.events[-1] == ("generate", 4)


def test_the_first_look_is_only_at_the_very_first_rollouts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = World(labels=lambda prompt, k: partly_right(prompt, k) if prompt.row % 3 == 0 else 0)
    controller(world, max_refills=9, n_prompts=90).fit()
    assert len([r for r in caplog.records if r.message.startswith("first rollouts")]) == 1


def test_state_goes_on_without_a_second_evaluation() -> None:
    world = World()
    first = controller(world, total_steps=2)
    first.fit()
    first.dead_steps = 7
    state = first.state_dict()
    again = World()
    second = controller(again, total_steps=3)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert (second.step_number, second.dead_steps) == (2, 7)
    second.fit()
    assert again.events == [("sync", 2), *step_events(3), ("evaluate", 3), ("save", "out/model")]


def test_a_state_is_a_copy() -> None:
    world = World()
    run = controller(world, total_steps=1)
    run.fit()
    state = run.state_dict()
    run.last_eval["expected/pearson"] = -1.0
    assert state["last_eval"]["expected/pearson"] == pytest.approx(0.1)


# -- one step ahead --------------------------------------------------------------------------------------


class Overlapping(World):
    """Training and the generation of the next batch wait for each other: one after the other they would never end."""

    def __init__(self, steps: int, **fields: Any) -> None:
        super().__init__(**fields)
        self.steps = steps
        self.meeting = threading.Barrier(2, timeout=20)
        self.generating = False

    def generate(self, wanted: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        groups = super().generate(wanted, sampling)
        if len(self.samplings) > 1:
            self.generating = True
            self.meeting.wait()
            time.sleep(0.02)  # longer than training: the controller has to wait
            self.generating = False
        return groups

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        if len(self.trained) + 1 < self.steps:
            self.meeting.wait()
        return super().train(groups)

    def sleep(self) -> None: ...

    def sync(self, version: int) -> SyncReport:
        assert not self.generating, "weights change under generation"
        return super().sync(version)

    def evaluate(self, version: int) -> EvalReport:
        assert not self.generating
        return super().evaluate(version)


def test_one_step_ahead_generates_beside_training_and_never_beside_a_sync() -> None:
    world = Overlapping(steps=4)
    controller(world, one_ahead=True, total_steps=4, eval_steps=1).fit()
    # Beside each other, either may be the first to be noted.
    pairs = [sorted(world.events[i : i + 2]) for i in (3, 7, 11)]
    assert pairs == [[("generate", 4), ("train", 4)]] * 3
    rest = [event for i, event in enumerate(world.events) if i not in (3, 4, 7, 8, 11, 12)]
    turns = [event for n in (1, 2, 3) for event in (("sync", n), ("evaluate", n))]
    last = [("train", 4), ("sync", 4), ("evaluate", 4), ("save", "out/model")]
    assert rest == [("sync", 0), ("evaluate", 0), ("generate", 4), *turns, *last]
    # Every batch once, in order, by the weights before its own step's.
    assert [{g.group.weight_version for g in groups} for groups in world.trained] == [{0}, {0}, {1}, {2}]
    rows = [g.group.row for groups in world.trained for g in groups]
    in_order = PromptStream(prompts(), seed=0, num_episodes=1).take(16)
    assert rows == [p.row for p in in_order]
    ages = [metrics["rollouts/age"] for _, phase, metrics in world.logs if phase == "train"]
    assert ages == [0.0, 1.0, 1.0, 1.0]


def test_one_step_ahead_seeds_a_batch_by_the_step_that_trains_on_it() -> None:
    ahead, together = Overlapping(steps=3), World()
    controller(ahead, one_ahead=True, seeded=True).fit()
    controller(together, seeded=True).fit()
    assert ahead.samplings == together.samplings


def test_synchronous_rollouts_have_no_age() -> None:
    world = World()
    controller(world).fit()
    assert [metrics["rollouts/age"] for _, phase, metrics in world.logs if phase == "train"] == [0.0] * 3


@pytest.mark.parametrize("late", [1, -1])
def test_one_step_ahead_allows_exactly_one_version(late: int) -> None:
    class Late(Overlapping):
        def generate(self, wanted: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            groups = super().generate(wanted, sampling)
            return (
                [replace(g, weight_version=g.weight_version - late) for g in groups]
                if len(self.samplings) > 2
                else groups
            )

    world = Late(steps=4)
    with pytest.raises(RuntimeError, match=rf"rollouts of step 2 come from weight versions \[{1 - late}\], expected 1"):
        controller(world, one_ahead=True, total_steps=4).fit()
    assert len(world.trained) == 2  # what went wrong ahead of step 2 spoils no step before it


class Ahead(World):
    """Engines that do not share GPUs never sleep."""

    def sleep(self) -> None: ...


def test_one_step_ahead_ends_with_the_prompts() -> None:
    world = Ahead()
    run = controller(world, one_ahead=True, n_prompts=10, total_steps=9)
    run.fit()
    assert run.step_number == 2 and len(world.trained) == 2
    assert world.events[-2:] == [("evaluate", 2), ("save", "out/model")]
    assert isinstance(run.prompts, PromptStream) and run.prompts.remaining == 2


def test_a_batch_that_cannot_be_filled_ahead_costs_no_finished_step() -> None:
    world = Ahead(labels=lambda prompt, k: partly_right(prompt, k) if prompt.row in first else 0)
    first = {p.row for p in PromptStream(prompts(), seed=0, num_episodes=1).take(4)}
    with pytest.raises(CannotFill, match="generation waves"):
        controller(world, one_ahead=True).fit()
    assert [step for step, phase, _ in world.logs if phase == "train"] == [1]
    assert ("sync", 1) in world.events


def test_stopped_one_step_ahead_and_resumed_trains_on_every_prompt_once() -> None:
    class Saves:
        uses_evaluations = False

        def __init__(self, run: Controller) -> None:
            self.run, self.states = run, {}

        def is_due(self, step: int, evaluation: Any) -> bool:
            return False

        def save(self, step: int, evaluation: Any = None) -> bool:
            self.states = {"controller": self.run.state_dict(), "prompts": self.run.batches.state_dict()}
            return True

    # A quarter of the prompts are not kept, and refills leave some to be put back.
    def labels(prompt: Prompt, k: int) -> int | None:
        return partly_right(prompt, k) if prompt.row % 4 else 0

    world = Ahead(labels=labels)
    run = controller(world, one_ahead=True, total_steps=4, max_refills=9)
    saver = Saves(run)
    run.stop_requested = lambda: "SIGTERM" if run.step_number == 2 else None
    with pytest.raises(Stopped):
        run.fit(saver)
    # At that time, the third batch was ready.
    assert run.batches.state_dict() != run.prompts.state_dict()

    again = Ahead(labels=labels)
    resumed = controller(again, one_ahead=True, total_steps=4, max_refills=9)
    resumed.load_state_dict(saver.states["controller"])
    resumed.batches.load_state_dict(saver.states["prompts"])
    resumed.fit()
    unbroken = Ahead(labels=labels)
    controller(unbroken, one_ahead=True, total_steps=4, max_refills=9).fit()
    rows = [[g.group.row for g in groups] for w in (world, again) for groups in w.trained]
    assert rows == [[g.group.row for g in groups] for groups in unbroken.trained]
    assert len({row for batch in rows for row in batch}) == 16
    # The batch that was thrown away is sampled by the newest weights, the next one is one step ahead again.
    assert [groups[0].group.weight_version for groups in again.trained] == [2, 2]
