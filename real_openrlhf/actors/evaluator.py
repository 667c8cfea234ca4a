"""The evaluator: judges the held-out set on whatever engines it is given, and computes the metrics."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from real_openrlhf.actors.protocols import EvalReport, Sampling
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.score_stats import expected_score
from real_openrlhf.algo.types import Group, Rollout
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.evals.metrics import judge_metrics

logger = logging.getLogger(__name__)


class Generator(Protocol):
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]: ...


@dataclass(frozen=True, kw_only=True)
class EvaluatorSpec:
    """output_dir: predictions go to <output_dir>/eval/step_<version>.jsonl."""

    prompts: tuple[Prompt, ...]
    scale: ScoreScale
    sampling: Sampling
    renormalise: bool
    output_dir: str
    n_samples: int = 4


class EvaluatorActor:
    """Plain class; lives in its own Ray actor. With n > 1 samples, E[score] is averaged over the readable ones."""

    def __init__(self, spec: EvaluatorSpec, generator: Generator) -> None:
        self.spec = spec
        self.generator = generator
        self.history: dict[int, dict[str, float | None]] = {}

    def evaluate(self, version: int) -> EvalReport:
        """Judge every prompt; results are stamped with the weight version that was asked for."""
        groups = self.generator.generate(self.spec.prompts, self.spec.sampling)
        if [group.row for group in groups] != [prompt.row for prompt in self.spec.prompts]:
            raise RuntimeError(
                f"{len(self.spec.prompts)} prompts were sent, {len(groups)} groups came back, or in another order"
            )
        stale = {group.weight_version for group in groups} - {version}
        if stale:
            raise RuntimeError(f"evaluation of weight version {version} was answered with versions {sorted(stale)}")
        rows = [self._judge(prompt, group) for prompt, group in zip(self.spec.prompts, groups)]
        metrics = judge_metrics(
            [row["expected"] for row in rows], [row["decoded"] for row in rows], [row["label"] for row in rows]
        )
        readable = [row["mass"] for row in rows if row["mass"] is not None]
        metrics["mass"] = sum(readable) / len(readable) if readable else None
        self._write(version, rows)
        self.history[version] = metrics
        return EvalReport(version=version, metrics=metrics, samples=rows[: self.spec.n_samples])

    def _judge(self, prompt: Prompt, group: Group) -> dict[str, Any]:
        """One row: the means over the group's readable rollouts; None where there is none, never a guess."""
        scored = [self._score(r) for r in group.rollouts if r.reading.readable]
        decoded = [
            self.spec.scale.values[r.reading.label_index] for r in group.rollouts if r.reading.label_index is not None
        ]
        first = group.rollouts[0]
        return {
            "row": prompt.row,
            "label": prompt.label,
            "expected": _mean([s["expected"] for s in scored]),
            "decoded": _mean(decoded),
            "mass": _mean([s["mass"] for s in scored]),
            "distribution": self._score(first)["distribution"] if first.reading.readable else None,
            "reason": first.reading.reason,
            "text": first.text,
        }

    def _score(self, rollout: Rollout) -> dict[str, Any]:
        logprobs = rollout.score_rows.label_logprobs(rollout.score_logprobs)[0].double()
        expected = expected_score(logprobs, self.spec.scale.tensor(), renormalise=self.spec.renormalise)
        probs = logprobs.exp()
        return {"expected": float(expected), "mass": float(probs.sum()), "distribution": probs.tolist()}

    def _write(self, version: int, rows: list[dict[str, Any]]) -> None:
        folder = Path(self.spec.output_dir) / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{version}.jsonl"
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, path)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # JSON has string keys only.
        self.history = {int(version): dict(metrics) for version, metrics in state["history"].items()}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
