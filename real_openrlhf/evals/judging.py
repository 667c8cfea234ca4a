"""Runs a judge over benchmarks: what identifies an evaluation, and a loop that can be resumed."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig

from real_openrlhf.checkpoint.compat import model_config_sha256, tokenizer_sha256
from real_openrlhf.common.progress_bar import BAR_FORMAT
from real_openrlhf.evals.benchmarks import Benchmark
from real_openrlhf.evals.predict import predict, predict_given
from real_openrlhf.evals.predictions import EvaluationError, Prediction, PredictionStore
from real_openrlhf.evals.report import PREDICTIONS, load_run
from real_openrlhf.export.fingerprint import weights_sha256
from real_openrlhf.judge.backends import TRANSFORMERS
from real_openrlhf.judge.judge import Judge

logger = logging.getLogger(__name__)


def identity_of(
    model: str, judge: Judge, benchmarks: Sequence[Benchmark], *, server: bool, feedback_of: Path | None = None
) -> dict[str, Any]:
    """What must be the same to resume an evaluation; `evals.report.settings_of` reads it too."""
    settings, sampling = judge.settings, judge.sampling
    return {
        "model": name_of(model),
        "model_sha256": model_config_sha256(AutoConfig.from_pretrained(model, trust_remote_code=False).to_dict()),
        "weights_sha256": weights_sha256(model),
        "tokenizer_sha256": tokenizer_sha256(judge.tokenizer),
        "backend": "server" if server else "transformers" if judge.backend_name == TRANSFORMERS else "in process",
        "scale": str(settings.scale),
        "anchors": list(settings.anchors),
        "template_sha256": settings.template.sha256,
        "renormalise": settings.renormalise,
        "force": judge.force,
        "sampling": {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
        },
        "feedback_sha256": None if feedback_of is None else _sha256(feedback_of / PREDICTIONS),
        "benchmarks": {
            b.name: {
                "rows": len(b.prompts),
                "sha256": b.sha256,
                **({} if b.pair_mode is None else {"pair_mode": b.pair_mode}),
            }
            for b in benchmarks
        },
    }


def name_of(model: str) -> str:
    """A hub id as it is; a folder's name, or its parent's for the "model" of a training run."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def earlier_predictions(folder: Path, benchmarks: Sequence[Benchmark]) -> dict[tuple[str, int], Prediction]:
    """The predictions of --feedback_of. EvaluationError unless they have every row of the benchmarks and its label."""
    found = {p.key: p for p in load_run(folder).predictions}
    for benchmark in benchmarks:
        for prompt in benchmark.prompts:
            prediction = found.get((benchmark.name, prompt.row))
            if prediction is None or prediction.label != prompt.label:
                raise EvaluationError(
                    f"--feedback_of {folder}: row {prompt.row} of {benchmark.name} is missing there, or has another "
                    "label; give the same benchmarks"
                )
    return found


def largest_difference(store: PredictionStore, earlier: Mapping[tuple[str, int], Prediction]) -> str:
    """A sentence that says how much the scores after the same feedback differ."""
    pairs = [(p.expected, earlier[key].expected) for key, p in store.done.items()]
    gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return f"E[score] of the same feedback differs by at most {max(gaps, default=0.0):.2e} over {len(gaps)} rows"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of the rows that one command judged, without the engine's start. A judgement may have several samples."""

    judgements: int
    generated_tokens: int
    seconds: float

    def to_json(self) -> dict[str, float]:
        return {
            **asdict(self),
            "judgements_per_second": self.judgements / self.seconds,
            "generated_tokens_per_second": self.generated_tokens / self.seconds,
        }

    def __str__(self) -> str:
        found = self.to_json()
        return (
            f"{self.judgements} rows judged in {self.seconds:.1f} s: {found['judgements_per_second']:.2f} "
            f"judgements/s, {found['generated_tokens_per_second']:.0f} generated tokens/s"
        )


def judge_all(
    judge: Judge,
    benchmarks: Sequence[Benchmark],
    path: Path,
    identity: Mapping[str, Any],
    *,
    batch_size: int,
    earlier: Mapping[tuple[str, int], Prediction] | None = None,
    locked: bool = False,
) -> tuple[PredictionStore, Speed | None]:
    """Judge the rows that are not in the file yet; each batch is written when it is judged.

    earlier: see `predict_given`. locked: see `PredictionStore`. Speed: None when all rows were judged before.
    """
    store = PredictionStore(path, identity, locked=locked)
    total = sum(len(b.prompts) for b in benchmarks)
    if store.done:
        logger.info("%s holds %d of %d judgements; continuing", path, len(store.done), total)
    if len(store.done) < total:
        _ = judge.backend  # started first: neither the progress bar's rate nor the speed includes it
    before = set(store.done)
    began = time.perf_counter()
    with tqdm(
        total=total,
        initial=len(store.done),
        desc="judged",
        unit=" judgements",
        bar_format=BAR_FORMAT,
        dynamic_ncols=True,
        file=sys.stderr,
    ) as bar:
        for benchmark in benchmarks:
            left = [
                (prompt, group)
                for prompt, group in zip(benchmark.prompts, benchmark.groups)
                if (benchmark.name, prompt.row) not in store.done
            ]
            bar.set_postfix_str(benchmark.name)
            for start in range(0, len(left), batch_size):
                prompts, groups = zip(*left[start : start + batch_size])
                options: dict[str, Any] = dict(reader=judge.reader, renormalise=judge.settings.renormalise)
                if earlier is None:
                    named = (judge.backend, benchmark.name, prompts, groups, judge.sampling)
                    store.append(predict(*named, force=judge.force, **options))
                else:
                    given = [earlier[benchmark.name, prompt.row] for prompt in prompts]
                    store.append(predict_given(judge.backend, given, prompts, judge.sampling, **options))
                bar.update(len(prompts))
    seconds = time.perf_counter() - began
    store.close()
    new = [prediction for key, prediction in store.done.items() if key not in before]
    tokens = sum(sample.n_generated for prediction in new for sample in prediction.samples)
    return store, Speed(judgements=len(new), generated_tokens=tokens, seconds=seconds) if new else None
