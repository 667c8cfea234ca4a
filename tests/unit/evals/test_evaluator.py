"""The evaluator on hand-made groups: rows, files, metrics, and nothing made up."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import Group, Rollout
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.evals.benchmarks import Benchmark
from real_openrlhf.evals.evaluator import EvaluatorActor, EvaluatorSpec
from real_openrlhf.evals.metrics import judge_metrics
from real_openrlhf.evals.objective import RewardSettings
from real_openrlhf.evals.results import metric_names
from tests.helpers.algo_factory import make_rollout, merged_tokenizer, reader_of
from tests.helpers.tokenizers import word_tokenizer

TOKENIZER = merged_tokenizer()
READER = reader_of(TOKENIZER, "1-3")
REWARD_SETTINGS = RewardSettings(lam=1.0, answer_reward="logprob", invalid_penalty=0.0, renormalise=False)
SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, max_new_tokens=4, seed=3)


def scored(probs: Sequence[float], label: int | None, letter: str) -> Rollout:
    scores = torch.tensor([list(probs)]).log()
    return make_rollout([TOKENIZER.id(letter), TOKENIZER.id("1")], position=1, label=label, score_logprobs=scores)


def unscored(letter: str = "x") -> Rollout:
    return make_rollout([TOKENIZER.id(letter)] * 2, reason="truncated")


ROLLOUTS: list[list[Rollout]] = [
    [scored([0.5, 0.25, 0.25], 0, "a"), scored([0.0, 0.25, 0.75], 2, "b")],  # E 1.75 and 2.75
    [unscored("c"), scored([0.25, 0.25, 0.25], 1, "d")],  # E 1.5, mass 0.75
    [unscored("e"), unscored("f")],
    [scored([0.0, 0.5, 0.0], None, "g"), scored([0.0, 0.0, 1.0], 2, "h")],  # off the scale, and 3
]
LABELS = [2.0, 1.0, 3.0, 2.5]
EXPECTED = [2.25, 1.5, None, 2.0]
DECODED = [2.0, 2.0, None, 3.0]


class Generator:
    def __init__(self, rollouts: Sequence[Sequence[Rollout]] = ROLLOUTS, version: int = 4, order: int = 1) -> None:
        self.rollouts, self.version, self.order = rollouts, version, order
        self.asked: list[tuple[Any, Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.asked.append((prompts, sampling))
        groups = [
            Group(
                prompt_ids=torch.tensor(p.token_ids),
                label=p.label,
                rollouts=tuple(rollouts),
                row=p.row,
                weight_version=self.version,
            )
            for p, rollouts in zip(prompts, self.rollouts)
        ]
        return groups[:: self.order]


def actor(folder: Path, generator: Generator | None = None, **changes: Any) -> EvaluatorActor:
    spec = EvaluatorSpec(
        benchmarks=(benchmark("flask"),),
        reader=READER,
        sampling=SAMPLING,
        renormalise=False,
        reward=REWARD_SETTINGS,
        output_dir=str(folder),
        n_samples=2,
    )
    return EvaluatorActor(replace(spec, **changes), generator or Generator())


def benchmark(name: str, labels: Sequence[float] = LABELS) -> Benchmark:
    prompts = tuple(
        Prompt(token_ids=(1, 2), label=y, row=10 + i, text="x" * 500 + f"judge {i}") for i, y in enumerate(labels)
    )
    groups = tuple("abcd"[: len(labels)])
    return Benchmark(name=name, source="x", prompts=prompts, groups=groups, sha256="")


def written(folder: Path, version: int = 4) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "eval" / f"step_{version}.jsonl").read_text().splitlines()]


def test_rows_are_means_over_readable_rollouts_and_none_without_any(tmp_path: Path) -> None:
    actor(tmp_path).evaluate(4)
    rows = written(tmp_path)
    assert [row["row"] for row in rows] == [10, 11, 12, 13] and [row["label"] for row in rows] == LABELS
    assert [row["expected"] for row in rows] == [None if e is None else pytest.approx(e) for e in EXPECTED]
    assert [row["decoded"] for row in rows] == DECODED
    assert [row["mass"] for row in rows] == [pytest.approx(1.0), pytest.approx(0.75), None, pytest.approx(0.75)]
    assert rows[0]["distribution"] == pytest.approx([0.25, 0.25, 0.5]) and rows[2]["distribution"] is None
    assert rows[1]["distribution"] == pytest.approx([0.25, 0.25, 0.25])
    # Text and reason are those of the first rollout.
    assert [row["text"] for row in rows] == ["a1", "cc", "ee", "g1"]
    assert [row["prompt_tail"] for row in rows] == ["x" * 393 + f"judge {i}" for i in range(4)]
    assert [row["reason"] for row in rows] == [None, "truncated", "truncated", "off_scale"]
    assert [row["group"] for row in rows] == ["a", "b", "c", "d"] and {row["benchmark"] for row in rows} == {"flask"}


def test_metrics_are_those_of_the_rows(tmp_path: Path) -> None:
    evaluator = actor(tmp_path)
    report = evaluator.evaluate(4)
    want = judge_metrics(EXPECTED, DECODED, LABELS)
    del want["invalid_rate"]
    assert {k: report.metrics[k] for k in want} == {
        k: None if v is None else pytest.approx(v, rel=1e-6) for k, v in want.items()
    }
    assert sorted(report.metrics) == sorted(metric_names(["flask"]))
    assert report.metrics["mass"] == pytest.approx(2.5 / 3)
    # A share of the generations, not of the rows.
    assert report.metrics["invalid_rate"] == 3 / 8 and report.metrics["forced_rate"] == 0
    assert report.metrics["expected/n"] == 3
    assert report.metrics["expected/mae"] == pytest.approx((0.25 + 0.5 + 0.5) / 3)
    assert report.version == 4 and report.samples == written(tmp_path)[:2]


def test_the_objective_on_held_out_prompts(tmp_path: Path) -> None:
    """-(E - y)^2 + lambda log p(y) by hand; what cannot be read gets the floor, as in training."""
    tiny, quarter, floor = math.log(torch.finfo(torch.float32).tiny), math.log(0.25), math.log(1e-6)
    rewards = [
        (-(0.25**2) + quarter, -(0.75**2) + quarter),
        (-(2.0**2) + floor, -(0.5**2) + quarter),
        (-(3.0**2) + floor, -(3.0**2) + floor),
        # Label 2.5 lies between two scores; the first has probability 0 of one of them, the second of the other.
        (-(1.5**2) + (math.log(0.5) + tiny) / 2, -(0.5**2) + tiny / 2),
    ]
    want = sum(sum(pair) / 2 for pair in rewards) / 4
    assert actor(tmp_path).evaluate(4).metrics["reward"] == pytest.approx(want, rel=1e-6)
    # Other settings: the answer's probability, half as much, and a penalty.
    settings = RewardSettings(lam=0.5, answer_reward="prob", invalid_penalty=7.0, renormalise=False)
    only = {"benchmarks": (benchmark("flask", LABELS[1:2]),), "reward": settings}
    got = actor(tmp_path / "more", Generator(ROLLOUTS[1:2]), **only).evaluate(4).metrics["reward"]
    assert got == pytest.approx((-(2.0**2) - 7.0 + 0.5e-6 - 0.5**2 + 0.5 * 0.25) / 2, rel=1e-6)


def test_nothing_readable_gives_none_and_no_guess(tmp_path: Path) -> None:
    metrics = actor(tmp_path, Generator([[unscored(), unscored()]] * 4)).evaluate(4).metrics
    assert metrics["mass"] is None and metrics["expected/pearson"] is None and metrics["expected/mae"] is None
    assert metrics["invalid_rate"] == 1.0 and metrics["n"] == 4 and metrics["expected/n"] == 0
    assert all(row["expected"] is None and row["decoded"] is None for row in written(tmp_path))


def test_renormalised(tmp_path: Path) -> None:
    actor(tmp_path, renormalise=True).evaluate(4)
    rows = written(tmp_path)
    assert [row["expected"] for row in rows] == [pytest.approx(2.25), pytest.approx(2.0), None, pytest.approx(2.5)]
    # The mass stays that of the full vocabulary.
    assert rows[1]["mass"] == pytest.approx(0.75)


def test_prompts_and_sampling_are_passed_on(tmp_path: Path) -> None:
    generator = Generator()
    evaluator = actor(tmp_path, generator)
    evaluator.evaluate(4)
    assert generator.asked == [(evaluator.spec.benchmarks[0].prompts, SAMPLING)]


@pytest.mark.parametrize("version", [3, 5])
def test_answers_of_other_weights_are_refused(tmp_path: Path, version: int) -> None:
    evaluator = actor(tmp_path)
    with pytest.raises(RuntimeError, match=rf"weight version {version} was answered with versions \[4\]"):
        evaluator.evaluate(version)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("generator", [Generator(ROLLOUTS[:3]), Generator(order=-1)])
def test_lost_or_reordered_groups_are_refused(tmp_path: Path, generator: Generator) -> None:
    with pytest.raises(RuntimeError, match="4 prompts of 2 samples were sent"):
        actor(tmp_path, generator).evaluate(4)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = actor(tmp_path)
    evaluator.evaluate(4)
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["step_4.jsonl"]
    before = (tmp_path / "eval" / "step_4.jsonl").read_text()

    seen: list[str] = []

    def replaced(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        seen.append(Path(source).read_text())
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", replaced)
    evaluator.spec = replace(evaluator.spec, renormalise=True)
    with pytest.raises(OSError, match="no space"):
        evaluator.evaluate(4)
    # All rows were written before the move, and the old file stayed as it was.
    assert len(seen[0].splitlines()) == 4 and seen[0] != before
    assert (tmp_path / "eval" / "step_4.jsonl").read_text() == before


def test_several_benchmarks_have_their_own_metrics_and_their_average(tmp_path: Path) -> None:
    class ByBenchmark(Generator):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            self.rollouts = ROLLOUTS if len(prompts) == 4 else ROLLOUTS[:2]
            return super().generate(prompts, sampling)

    both = (benchmark("flask"), benchmark("mt_bench", [1.0, 3.0]))
    report = actor(tmp_path, ByBenchmark(), benchmarks=both, n_samples=1).evaluate(4)
    metrics = report.metrics
    assert sorted(metrics) == sorted(metric_names(["flask", "mt_bench"]))
    assert metrics["flask/expected/mae"] == pytest.approx((0.25 + 0.5 + 0.5) / 3)
    assert metrics["mt_bench/expected/mae"] == pytest.approx((1.25 + 1.5) / 2)
    assert metrics["expected/mae"] == pytest.approx((1.25 / 3 + 2.75 / 2) / 2)
    assert (metrics["n"], metrics["flask/n"], metrics["mt_bench/n"]) == (6, 4, 2)
    rows = written(tmp_path)
    assert [(row["benchmark"], row["row"]) for row in rows][3:] == [("flask", 13), ("mt_bench", 10), ("mt_bench", 11)]
    assert [(row["benchmark"], row["row"]) for row in report.samples] == [("flask", 10), ("mt_bench", 10)]


def test_a_forced_anchor_is_a_second_request_of_the_same_version(tmp_path: Path) -> None:
    class Forced(Generator):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            if prompts[0].given_ids:
                self.rollouts = [[scored([0.0, 0.0, 1.0], 2, "z")]] * len(prompts)
            return super().generate(prompts, sampling)

    generator = Forced()
    metrics = actor(tmp_path, generator, force=True).evaluate(4).metrics
    given = [prompt.given_ids for prompts, _ in generator.asked[1:] for prompt in prompts]
    assert len(given) == 3 and all(TOKENIZER.decode(ids).endswith("So the overall score is") for ids in given)
    assert metrics["invalid_rate"] == 0 and metrics["forced_rate"] == 3 / 8 and metrics["expected/n"] == 4


def test_plots_are_drawn_on_request_and_never_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = actor(tmp_path, plots=True).evaluate(4)
    assert set(report.plots) == {"flask_scatter", "flask_reliability", "flask_confusion"}
    assert all(
        Path(path).parent == tmp_path / "eval" / "step_4" and Path(path).is_file() for path in report.plots.values()
    )
    monkeypatch.setattr("real_openrlhf.evals.plots.scatter", lambda *_: 1 / 0)
    assert actor(tmp_path, plots=True).evaluate(4).plots == {}


def test_the_spec_travels_to_another_process(tmp_path: Path) -> None:
    from ray import cloudpickle

    spec = replace(actor(tmp_path).spec, reader=ScoreReader.build(READER.bound, word_tokenizer(), {0}))
    again = cloudpickle.loads(cloudpickle.dumps(spec))
    assert again.benchmarks == spec.benchmarks and again.reader.bound == spec.reader.bound


def test_later_evaluations_are_compared_with_the_first_also_after_a_resume(tmp_path: Path) -> None:
    generator = Generator(version=0)
    evaluator = actor(tmp_path, generator)
    first = evaluator.evaluate(0)
    assert first.changes == {}
    generator.rollouts, generator.version = [ROLLOUTS[0], ROLLOUTS[1], [scored([0, 0, 1], 2, "z")] * 2, ROLLOUTS[3]], 5
    after = evaluator.evaluate(5)
    gain = after.metrics["reward"] - first.metrics["reward"]  # type: ignore[operator]
    assert gain > 1 and after.changes["reward"].difference == pytest.approx(gain)
    resumed = actor(tmp_path, generator)
    resumed.load_state_dict(json.loads(json.dumps(evaluator.state_dict())))
    assert resumed.evaluate(5).changes == after.changes
    old = actor(tmp_path, generator)
    old.load_state_dict({"history": {}})  # of a version that did not compare
    assert old.evaluate(5).changes == {} and old.evaluate(5).changes["reward"].difference == 0
