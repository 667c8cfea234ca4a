"""The evaluator of a training run: judges held-out benchmarks on the engines that it is given.

It scores as `python -m real_openrlhf.evaluate` does.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from real_openrlhf.algo.bound_scale import decode
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import Group
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.evals import change
from real_openrlhf.evals.benchmarks import Benchmark
from real_openrlhf.evals.change import EvalReport
from real_openrlhf.evals.objective import RewardSettings, mean_reward
from real_openrlhf.evals.predict import predict
from real_openrlhf.evals.predictions import Prediction
from real_openrlhf.evals.results import REWARD, Settings, average_metrics, flat_metrics

logger = logging.getLogger(__name__)
# Characters of a prompt's end that are kept with its prediction.
PROMPT_TAIL = 400


class Generator(Protocol):
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]: ...


@dataclass(frozen=True, kw_only=True)
class EvaluatorSpec:
    """
    benchmarks   one or several; see `EvaluatorActor.evaluate` for the names of their metrics
    reward       settings of the run's reward, whose mean over the held-out prompts is a metric too
    force        append the anchor once to a response without a score
    output_dir   predictions are written to <output_dir>/eval/step_<version>.jsonl
    n_samples    how many judgements per benchmark are returned for people to read
    plots        draw `evals.plots` into <output_dir>/eval/step_<version>/
    """

    benchmarks: tuple[Benchmark, ...]
    reader: ScoreReader
    sampling: Sampling
    renormalise: bool
    reward: RewardSettings
    output_dir: str
    force: bool = False
    n_samples: int = 4
    plots: bool = False


class EvaluatorActor:
    """A plain class that runs in a Ray actor. With n > 1 samples, scores are averaged over those that have one."""

    def __init__(self, spec: EvaluatorSpec, generator: Generator) -> None:
        self.spec = spec
        self.generator = generator
        # The judgements of the run's first evaluation, with which later ones are compared.
        self.start: dict[str, list[change.Judged]] | None = None

    def evaluate(self, version: int) -> EvalReport:
        """Judge every prompt. RuntimeError if an engine answers with another version of the weights.

        One benchmark: the metrics of `evals.results.flat_metrics`. Several: the same, averaged over the benchmarks
        (counts are summed), and each benchmark's own with "<name>/" in front.
        """
        start = time.perf_counter()
        spec, settings = self.spec, Settings(scale=self.spec.reader.bound.scale, renormalise=self.spec.renormalise)
        engines = _OfVersion(self.generator, version)
        judged = {
            b.name: predict(
                engines,
                b.name,
                b.prompts,
                b.groups,
                spec.sampling,
                reader=spec.reader,
                renormalise=spec.renormalise,
                force=spec.force,
            )
            for b in spec.benchmarks
        }
        tables = {
            name: {**flat_metrics(rows, settings), REWARD: mean_reward(rows, settings.scale, spec.reward)}
            for name, rows in judged.items()
        }
        metrics = average_metrics(list(tables.values()))
        if len(tables) > 1:
            metrics |= {f"{name}/{key}": value for name, table in tables.items() for key, value in table.items()}
        judgements = change.judgements_of(judged, settings.scale, spec.reward)
        rows = {
            b.name: [
                {**self._row(p), "reward": j.reward, "prompt_tail": prompt.text[-PROMPT_TAIL:]}
                for p, j, prompt in zip(judged[b.name], judgements[b.name], b.prompts, strict=True)
            ]
            for b in spec.benchmarks
        }
        self._write(version, [row for benchmark in rows.values() for row in benchmark])
        report = EvalReport(
            version=version,
            metrics=metrics,
            changes={} if self.start is None else change.changes(self.start, judgements),
            samples=[row for benchmark in rows.values() for row in benchmark[: spec.n_samples]],
            plots=self._plot(version, judged, settings) if spec.plots else {},
            seconds=time.perf_counter() - start,
        )
        self.start = self.start or judgements
        return report

    def _row(self, prediction: Prediction) -> dict[str, Any]:
        """A prediction as it is written to the file: means over its samples, and the first sample's text."""
        first = prediction.samples[0]
        return {
            "benchmark": prediction.benchmark,
            "row": prediction.row,
            "group": prediction.group,
            "label": prediction.label,
            "expected": prediction.expected,
            "decoded": prediction.decoded,
            "mass": prediction.mass,
            "distribution": None if prediction.distribution is None else list(prediction.distribution),
            "forced": prediction.forced_share,
            "reason": first.reason,
            "text": decode(self.spec.reader.tokenizer, first.token_ids),
        }

    def _write(self, version: int, rows: list[dict[str, Any]]) -> None:
        folder = Path(self.spec.output_dir) / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"step_{version}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _plot(self, version: int, judged: dict[str, list[Prediction]], settings: Settings) -> dict[str, str]:
        from real_openrlhf.evals.plots import write_benchmark_plots

        folder = Path(self.spec.output_dir) / "eval" / f"step_{version}"
        try:
            paths = write_benchmark_plots(folder, [p for rows in judged.values() for p in rows], settings)
        except Exception:
            # A plot that fails must not end the run.
            logger.exception("the plots of evaluation %d could not be drawn", version)
            return {}
        return {path.stem: str(path) for path in paths}

    def state_dict(self) -> dict[str, Any]:
        return {"start": None if self.start is None else change.to_json(self.start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Checkpoints of earlier versions do not have it.
        self.start = change.from_json(state["start"]) if state.get("start") else None


class _OfVersion:
    """The engines; raises RuntimeError if they answer with another version of the weights."""

    def __init__(self, generator: Generator, version: int) -> None:
        self.generator, self.version = generator, version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        groups = self.generator.generate(prompts, sampling)
        stale = {group.weight_version for group in groups} - {self.version}
        if stale:
            raise RuntimeError(
                f"evaluation of weight version {self.version} was answered with versions {sorted(stale)}"
            )
        return groups
