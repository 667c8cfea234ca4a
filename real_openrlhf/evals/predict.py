"""Makes predictions for prompts with human labels; used by `evaluate` and by the evaluator of a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.evals.predictions import Prediction, SampledFeedback
from real_openrlhf.judge.scoring import average, score_given, score_prompts
from real_openrlhf.judge.types import JudgeBackend, Judgement


def predict(
    backend: JudgeBackend,
    benchmark: str,
    prompts: Sequence[Prompt],
    groups: Sequence[str],
    sampling: Sampling,
    *,
    reader: ScoreReader,
    renormalise: bool,
    force: bool,
) -> list[Prediction]:
    """One prediction per prompt, in order, each the average of sampling.n samples. groups: their Prediction.group."""
    judged = score_prompts(backend, prompts, sampling, reader=reader, renormalise=renormalise, force=force)
    scale = reader.bound.scale
    return [
        prediction(benchmark, prompt, group, judgements, scale)
        for prompt, group, judgements in zip(prompts, groups, judged, strict=True)
    ]


def predict_given(
    backend: JudgeBackend,
    earlier: Sequence[Prediction],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    reader: ScoreReader,
    renormalise: bool,
) -> list[Prediction]:
    """Earlier predictions with their scores read again by this backend, after the same feedback.

    earlier: predictions of the prompts, in their order. A generation without a score position cannot be read again and
    is left out; a prediction without any other generation stays as it is.
    """
    jobs = [
        (i, sample.token_ids[: sample.position])
        for i, prediction in enumerate(earlier)
        for sample in prediction.samples
        if sample.position is not None
    ]
    feedback = [ids for _, ids in jobs]
    read = score_given(
        backend, [prompts[i] for i, _ in jobs], feedback, sampling, reader=reader, renormalise=renormalise
    )
    found: dict[int, list[Judgement]] = {}
    for (i, _), judged in zip(jobs, read):
        found.setdefault(i, []).append(judged)
    return [
        prediction(p.benchmark, prompts[i], p.group, found[i], reader.bound.scale) if i in found else p
        for i, p in enumerate(earlier)
    ]


def prediction(
    benchmark: str, prompt: Prompt, group: str, judgements: Sequence[Judgement], scale: ScoreScale
) -> Prediction:
    """The prediction made of one prompt's judgements."""
    score = average(judgements, scale)
    distribution = None if score.distribution is None else tuple(score.distribution[label] for label in scale.labels)
    return Prediction(
        benchmark=benchmark,
        row=prompt.row,
        group=group,
        label=prompt.label,
        expected=score.score,
        decoded=score.decoded,
        distribution=distribution,
        mass=score.mass,
        entropy=score.entropy,
        reason=score.reason,
        samples=tuple(_sample(judgement) for judgement in judgements),
    )


def _sample(judgement: Judgement) -> SampledFeedback:
    logprobs = judgement.label_logprobs
    return SampledFeedback(
        feedback=judgement.feedback,
        token_ids=judgement.token_ids,
        position=judgement.position,
        distribution=None if logprobs is None else tuple(None if v is None else math.exp(v) for v in logprobs),
        expected=judgement.expected,
        decoded=judgement.decoded,
        reason=judgement.reason,
        forced=judgement.forced,
        n_generated=judgement.n_generated,
    )
