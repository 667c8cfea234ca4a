"""The example's task and report, by hand."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.judge_prompt import JudgeTemplate

FOLDER = Path(__file__).parents[3] / "examples/judge_as_reward"


def load(name: str) -> ModuleType:
    """By path: other examples have modules of the same names."""
    spec = importlib.util.spec_from_file_location(f"judge_as_reward_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


task = load("task")


@pytest.fixture(scope="module")
def report() -> ModuleType:
    before, path = sys.modules.get("task"), list(sys.path)
    sys.modules["task"] = task  # its own, whatever other examples have loaded
    try:
        return load("report")
    finally:
        sys.path[:] = path
        if before is None:
            del sys.modules["task"]
        else:
            sys.modules["task"] = before


def test_the_rule() -> None:
    for answer, wanted in (("long red", 3), ("clear long calm", 5), ("clear rude", 3), ("rude cold vague", 1), ("", 3)):
        assert task.quality(answer) == wanted
    assert task.feedback("clear long rude") == "because clear up rude down" and task.feedback("red") == "because none"


def test_the_files(tmp_path: Path) -> None:
    task.write_files(tmp_path, seed=0, n_sft=200, n_judge=400, n_policy=5)
    words = set((tmp_path / "words.txt").read_text().split())
    rows = {path.stem: [json.loads(line) for line in path.open()] for path in tmp_path.glob("*.jsonl")}
    assert {name: len(found) for name, found in rows.items()} == {
        "judge": 400,
        "judge_sft": 200,
        "policy": 5,
        "policy_sft": 200,
    }
    for found in rows.values():
        assert set(" ".join(str(value) for row in found for value in row.values()).split()) <= words
    # Labels are the rule's, but for raters that are one off in a fifth of the cases.
    off = [
        row["label"] - task.quality(row["prompt"].partition(" answer ")[2].removesuffix(" judge"))
        for row in rows["judge"]
    ]
    assert set(off) <= {-1, 0, 1} and 0.1 < sum(map(abs, off)) / len(off) < 0.3
    # The judge sees the form that its training had.
    template = JudgeTemplate.load(FOLDER / "template.txt")
    text = template.render(instruction="tell of sea moon", response="clear red")
    assert text == "tell of sea moon answer clear red judge"
    assert all(row["prompt"].startswith("tell of ") and row["prompt"].endswith(" judge") for row in rows["judge_sft"])
    assert ScoreScale.parse("1-5").labels == tuple("12345") and task.ANCHOR == "score "
    again = random.Random(3)
    assert task.make_answer(again) != task.make_answer(again)


LINE = (
    "(PPOTrainer pid=7) INFO x.py:1] ✨ Global step {}: {{'policy_loss': -0.5, 'rollout/reward_mean': {}, 'kl': nan}}\n"
)


def test_the_report_reads_openrlhfs_log(report: ModuleType) -> None:
    log = "noise\n" + LINE.format(2, "1e-1") + LINE.format(1, "-3.25") + "(PPOTrainer pid=7) more\n"
    assert report.read_steps(log) == [
        {"step": 1, "rollout/reward_mean": -3.25, "policy_loss": -0.5},
        {"step": 2, "rollout/reward_mean": 0.1, "policy_loss": -0.5},
    ]
    for bad in ("", "✨ Global step 1: {'policy_loss': 1.0}"):
        with pytest.raises(ValueError, match="rollout/reward_mean"):
            report.read_steps(bad)
    assert report.ends([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == (3, 8)


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.name)
def test_the_results_say_that_the_reward_rose(report: ModuleType, path: Path) -> None:
    result = json.loads(path.read_text())
    rewards = [step["rollout/reward_mean"] for step in result["steps"]]
    assert report.ends(rewards) == pytest.approx((result["reward"]["first_5_steps"], result["reward"]["last_5_steps"]))
    assert result["reward"]["last_5_steps"] > result["reward"]["first_5_steps"]
    assert result["quality_by_the_rule"]["after"] > result["quality_by_the_rule"]["before"]
