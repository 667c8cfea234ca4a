"""The warm-up's loop on fakes: what is trained on, when engines get weights, what is logged and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from real_openrlhf.algo.objectives.supervised import SftObjective
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, TrainGroup, group_scores
from real_openrlhf.common.errors import RunError
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.loop import Stopped
from real_openrlhf.controller.protocols import SyncReport
from real_openrlhf.controller.warmup import WarmupController, WarmupSettings
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import PromptStream
from real_openrlhf.evals.change import EvalReport
from tests.helpers.algo_factory import make_rollout

SCALE = ScoreScale.parse("1-3")
SETTINGS = WarmupSettings(total_steps=4, batch_size=2, eval_steps=2, eval_beside=False, logging_steps=1)


class World:
    """Every fake, and what happened in order."""

    def __init__(
        self, skips: Callable[[int], bool] = lambda step: False, scores: Sequence[float] = (0.1, 0.3, 0.2)
    ) -> None:
        self.events: list[Any] = []
        self.trained: list[list[int]] = []
        self.logs: list[tuple[int, str, Mapping[str, Any]]] = []
        self.skips = skips
        self.kept: list[int] = []
        self.warnings: list[str] = []
        self.scores = iter(scores)
        self.asleep = True

    # policy
    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        self.events.append("train")
        self.trained.append([g.group.row for g in groups])
        if self.skips(len(self.trained)):
            return {"policy/updates": 0.0, "policy/skipped_updates": 1.0, "skipped/loss": 1.0}
        return {
            "loss/cot": 1.0,
            "loss/squared_error": 0.0,
            "loss/likelihood": 0.0,
            "loss/total": 1.0,
            "policy/grad_norm": 1.0,
            "policy/clipped_share": 0.0,
        }

    def save_model(self, path: str, complete: Callable[[Path], None]) -> None:
        self.events.append(f"export {Path(path).name}")
        Path(path).mkdir(parents=True)
        complete(Path(path))

    def save_checkpoint(self, path: str) -> None: ...

    def load_checkpoint(self, path: str) -> None: ...

    # weight sync, evaluator, engines
    def sync(self, version: int) -> SyncReport:
        self.asleep = False
        self.events.append(f"sync {version}")
        return SyncReport(
            version=version, seconds=0.1, check_seconds=0.1, mean_difference=0.0, max_difference=0.0, n_tokens=3
        )

    def start(self, version: int) -> None:
        assert not self.asleep
        self.events.append(f"judge {version}")
        self.version = version

    def result(self, watch: Any = None) -> EvalReport:
        self.events.append("result")
        metrics = {"expected/pearson": next(self.scores)}
        return EvalReport(version=self.version, seconds=1.0, metrics=metrics, changes={}, samples=[], plots={})

    def sleep(self) -> None:
        self.asleep = True
        self.events.append("sleep")

    def generate(self, *args: Any) -> list[Group]:
        raise AssertionError("nothing is sampled in a warm-up")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    # log and progress
    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        self.logs.append((step, phase, metrics))

    def log_samples(self, *args: Any) -> None: ...

    def log_evaluation(self, *args: Any) -> None: ...

    def page(self, *, last: bool = False) -> None: ...

    def warn(self, step: int, watch: str, message: str) -> None:
        self.warnings.append(f"{step} {watch}: {message}")

    def keep_batch(self, step: int, groups: Sequence[TrainGroup], metrics: Mapping[str, Any]) -> str:
        self.kept.append(step)
        assert [g.group.row for g in groups] == self.trained[-1] and metrics["skipped/loss"] == 1.0
        return f"its batch is in {step}"

    def step(self, *args: Any) -> None: ...

    def judged(self, *args: Any) -> None: ...

    def evaluated(self, *args: Any) -> None: ...


def group_of(prompt: Prompt) -> TrainGroup:
    rollout = replace(make_rollout([4, 2, 0], position=1, label=1), logprobs=None)
    group = Group(prompt_ids=torch.tensor([5]), label=2.0, rollouts=(rollout,), row=prompt.row, weight_version=0)
    target = SCALE.target(2.0)
    return TrainGroup(
        group=group, target=target, coefficients=SftObjective()(group_scores(group, SCALE.tensor(), target))
    )


def controller(
    world: World, tmp_path: Path, settings: WarmupSettings = SETTINGS, *, judged: bool = True, **more: Any
) -> WarmupController:
    prompts = [Prompt(token_ids=(5,), label=2.0, row=i, text="") for i in range(6)]
    return WarmupController(
        settings,
        prompts=PromptStream(prompts, seed=1, num_episodes=2),
        group_of=group_of,
        policy=world,
        engines=world if judged else None,
        weight_sync=world if judged else None,
        evaluator=world if judged else None,
        export=JudgeExport(world, tmp_path / "model", metric="expected/pearson" if judged else None),
        log=world,
        progress=world,
        **more,
    )


def test_engines_get_the_weights_before_each_evaluation_and_at_no_other_time(tmp_path: Path) -> None:
    world = World()
    controller(world, tmp_path).fit()
    assert world.events == [
        *("sync 0", "judge 0", "result", "export best_step_0", "sleep"),
        *("train", "train", "sync 2", "judge 2", "result", "export best_step_2", "sleep"),
        *("train", "train", "sync 4", "judge 4", "result", "sleep"),
    ]
    assert (tmp_path / "model").is_dir() and not list(tmp_path.glob("best_*"))


def test_without_evaluation_nothing_is_synced_and_the_last_weights_are_exported(tmp_path: Path) -> None:
    world = World()
    controller(world, tmp_path, judged=False).fit()
    assert world.events == ["train"] * 4 + ["export model"]
    assert {phase for _, phase, _ in world.logs} == {"train"}


@pytest.mark.parametrize(
    ("scores", "trained"),
    [
        # Better, not better, better: the count begins again; then two in a row that are no better.
        ((0.1, 0.3, 0.2, 0.4, 0.4, 0.1, 0.9, 0.9), 10),
        ((0.5, 0.4, 0.3, 0.9), 4),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 12),
    ],
)
def test_it_ends_when_validation_has_stopped_improving(tmp_path: Path, scores: tuple[float, ...], trained: int) -> None:
    world = World(scores=scores)
    settings = replace(SETTINGS, total_steps=12, batch_size=1, patience=2)
    controller(world, tmp_path, settings).fit()
    assert len(world.trained) == trained
    best = 2 * scores.index(max(scores[: trained // 2 + 1]))
    assert [event for event in world.events if event.startswith("export")][-1] == f"export best_step_{best}"


def test_every_row_is_trained_on_once_per_episode(tmp_path: Path) -> None:
    world = World()
    controller(world, tmp_path, replace(SETTINGS, total_steps=6, eval_steps=-1), judged=False).fit()
    rows = [row for batch in world.trained for row in batch]
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6)) and rows[:6] != rows[6:]


def test_metrics_bear_the_names_of_what_they_are(tmp_path: Path) -> None:
    world = World()
    controller(world, tmp_path, replace(SETTINGS, logging_steps=2, eval_steps=-1), judged=False).fit()
    logged = {step: metrics for step, phase, metrics in world.logs if phase == "train"}
    assert set(logged) == {2, 4}
    assert logged[2]["loss/cross_entropy"] == 1.0
    assert not {"loss/cot", "loss/likelihood", "policy/clipped_share"} & set(logged[2])
    # Two steps of two rows, a prompt of one token and a response of three each.
    seconds = logged[4]["seconds/train"]
    assert logged[4]["speed/trained_tokens_per_second"] == pytest.approx(16 / max(seconds, 1e-9))


def test_a_skipped_update_is_kept_and_several_in_a_row_end_the_run(tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_skipped=2)
    world = World(skips=lambda step: step in (2, 4))
    controller(world, tmp_path / "a", settings, judged=False).fit()
    assert world.kept == [2, 4] and len(world.trained) == 4
    said = "the loss is NaN or infinite: the update was skipped, the weights are as before; its batch is in"
    assert world.warnings == [f"{step} finite: {said} {step}." for step in (2, 4)]

    world = World(skips=lambda step: step >= 2)
    with pytest.raises(RunError, match=r"step 3: .* 2 steps in a row \(--real.max_skipped\).*lower --actor.adam.lr"):
        controller(world, tmp_path / "b", settings, judged=False).fit()
    assert world.kept == [2, 3] and len(world.trained) == 3


def test_it_goes_on_where_a_signal_stopped_it(tmp_path: Path) -> None:
    unbroken, first, second = World(), World(), World()
    controller(unbroken, tmp_path / "a", judged=False).fit()
    stopped = controller(
        first, tmp_path / "b", judged=False, stop_requested=lambda: "SIGTERM" if len(first.trained) == 3 else None
    )
    with pytest.raises(Stopped, match="SIGTERM: stopped after step 3"):
        stopped.fit()
    resumed = controller(second, tmp_path / "b", judged=False)
    for name, part in resumed.checkpointed_parts().items():
        part.load_state_dict(stopped.checkpointed_parts()[name].state_dict())
    resumed.fit()
    assert first.trained + second.trained == unbroken.trained
