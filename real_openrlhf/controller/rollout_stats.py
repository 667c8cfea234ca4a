"""What a batch of rollouts looks like, as flat metrics and as judgements to read. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.score_stats import ScoreStats, score_stats
from real_openrlhf.algo.types import REASONS, Group, Targets, TrainGroup, count_reasons, group_scores
from real_openrlhf.controller.feedback_stats import feedback_metrics

Metrics = dict[str, float | None]


def rollout_metrics(
    groups: Sequence[Group],
    train_groups: Sequence[TrainGroup],
    scale: ScoreScale,
    *,
    renormalise: bool = False,
    judged: Callable[[int], Sequence[int] | None] = lambda row: None,
) -> Metrics:
    """Statistics of one batch, over rollouts unless the name says groups. Standard deviations are the population's.

    groups        all groups that were sampled (score/, invalid/, length/, feedback/, accuracy/, label/)
    train_groups  those that are trained on (reward/, advantage/); with dynamic sampling they may be fewer
    judged        row -> the tokens of the judged response, if they are known (`feedback_stats`)

    A value is None where it is undefined: no readable rollout, no train group.
    Raises ValueError without groups, and ScaleError for a label off the scale.
    """
    if not groups:
        raise ValueError("rollout_metrics needs at least one group")
    return {
        "rollouts/groups": float(len(groups)),
        "rollouts/count": float(sum(len(group) for group in groups)),
        "rollouts/tokens": float(sum(r.token_ids.numel() for group in groups for r in group.rollouts)),
        "rollouts/entropy": _entropy(groups),
        **_label_metrics(groups),
        **_reward_metrics(train_groups),
        **_score_metrics(groups, scale, renormalise),
        **_invalid_metrics(groups),
        **_length_metrics(groups),
        **feedback_metrics(groups, judged),
        **_accuracy_metrics(groups, scale),
    }


def _entropy(groups: Sequence[Group]) -> float | None:
    """Mean of -log p over the sampled tokens, nats: an unbiased estimate of the entropy per token at top_p 1."""
    logprobs = torch.cat([r.logprobs.double() for group in groups for r in group.rollouts if r.logprobs is not None])
    # Tokens that were given, not sampled, have NaN.
    return _mean(-logprobs[~logprobs.isnan()])


def group_accuracy(group: Group, scale: ScoreScale) -> float:
    """Share of the group's rollouts whose decoded score is nearest to the label (dynamic sampling's measure)."""
    target = scale.target(group.label)
    right = sum(scale.is_correct(r.reading.label_index, target) for r in group.rollouts)
    return right / len(group)


def _reward_metrics(train_groups: Sequence[TrainGroup]) -> Metrics:
    coefficients = [t.coefficients for t in train_groups]
    empty = torch.zeros(0, dtype=torch.float64)
    rewards = torch.cat([empty, *(c.rewards.double() for c in coefficients)])
    advantages = torch.cat([empty, *(c.advantages.double() for c in coefficients)])
    n = len(coefficients)
    return {
        **_spread("reward", rewards),
        **_spread("advantage", advantages),
        "reward/floored_count": float(sum(c.floored for c in coefficients)) if n else None,
        "advantage/abs_mean": _mean(advantages.abs()),
        "advantage/zero_variance_share": sum(c.zero_variance for c in coefficients) / n if n else None,
    }


def _score_metrics(groups: Sequence[Group], scale: ScoreScale, renormalise: bool) -> Metrics:
    expected, mass, labels = [], [], []
    for group in groups:
        stats, readable = _group_stats(group, scale, renormalise)
        expected.append(stats.expected[readable])
        mass.append(stats.mass[readable])
        labels.append(torch.full((int(readable.sum()),), group.label, dtype=torch.float64))
    error = torch.cat(expected) - torch.cat(labels)
    masses = torch.cat(mass)
    return {
        "score/expected": _mean(torch.cat(expected)),
        "score/expected_std": float(torch.cat(expected).std(correction=0)) if error.numel() else None,
        "score/label_distance": _distance(torch.cat(expected), torch.cat(labels)),
        "score/error": _mean(error),
        "score/abs_error": _mean(error.abs()),
        "score/squared_error": _mean(error.square()),
        "score/mass": _mean(masses),
        "score/mass_min": float(masses.min()) if masses.numel() else None,
        "score/readable_share": error.numel() / sum(len(group) for group in groups),
    }


def _distance(one: Tensor, two: Tensor) -> float | None:
    """Wasserstein distance in units of the scale: how far one set of values has to be moved to become the other."""
    return float(wasserstein_distance(one.numpy(), two.numpy())) if one.numel() else None


def _label_metrics(groups: Sequence[Group]) -> Metrics:
    labels = torch.tensor([group.label for group in groups], dtype=torch.float64)
    return {"label/mean": float(labels.mean()), "label/std": float(labels.std(correction=0))}


def _invalid_metrics(groups: Sequence[Group]) -> Metrics:
    """invalid/rate counts rollouts without a score position; "off_scale" ones have a position and are not in it."""
    total = sum(len(group) for group in groups)
    invalid = sum(not r.reading.readable for group in groups for r in group.rollouts)
    counts = count_reasons(groups)
    metrics: Metrics = {"invalid/rate": invalid / total, "invalid/count": float(invalid)}
    for reason in REASONS:
        metrics[f"invalid/{reason}"] = counts[reason] / total
        metrics[f"invalid/{reason}_count"] = float(counts[reason])
    return metrics


def _length_metrics(groups: Sequence[Group]) -> Metrics:
    rollouts = [r for group in groups for r in group.rollouts]
    cot = [r.cot_length for r in rollouts]
    return {
        "length/cot": sum(cot) / len(cot),
        "length/cot_min": float(min(cot)),
        "length/cot_max": float(max(cot)),
        "length/response": sum(r.token_ids.numel() for r in rollouts) / len(rollouts),
        "length/truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }


def _accuracy_metrics(groups: Sequence[Group], scale: ScoreScale) -> Metrics:
    accuracies = [group_accuracy(group, scale) for group in groups]
    n = len(groups)
    return {
        "accuracy/mean": sum(a * len(g) for a, g in zip(accuracies, groups)) / sum(len(g) for g in groups),
        "accuracy/groups_none": sum(a == 0 for a in accuracies) / n,
        "accuracy/groups_some": sum(0 < a < 1 for a in accuracies) / n,
        "accuracy/groups_all": sum(a == 1 for a in accuracies) / n,
    }


def judgement_samples(
    groups: Sequence[Group],
    train_groups: Sequence[TrainGroup],
    n: int,
    scale: ScoreScale,
    *,
    decode: Callable[[list[int]], str] | None = None,
    prompt_tokens: int = 64,
    renormalise: bool = False,
) -> list[dict[str, Any]]:
    """At most n judgements for samples.jsonl, from as many groups as possible.

    decode turns prompt ids into text; without it the prompt is left out. prompt_tokens: how many tokens of the
    prompt's end are shown. In the result, "distribution" maps each label to its probability over the full vocabulary.
    A value is None where there is no score; reward and advantage are None where the group was filtered out.
    """
    trained = {id(t.group): t for t in train_groups}
    picks = [(group, i) for i in range(max((len(g) for g in groups), default=0)) for group in groups if i < len(group)]
    samples = []
    for group, index in picks[: max(n, 0)]:
        rollout = group.rollouts[index]
        stats, readable = _group_stats(group, scale, renormalise)
        is_readable = bool(readable[index])
        probs = group_scores(group, scale.tensor(), scale.target(group.label)).label_logprobs[index].double().exp()
        train_group = trained.get(id(group))
        decoded = rollout.reading.label_index
        samples.append(
            {
                "row": group.row,
                "rollout": index,
                "prompt_tail": decode(group.prompt_ids[-prompt_tokens:].tolist()) if decode and prompt_tokens else None,
                "text": rollout.text,
                "label": group.label,
                "expected": float(stats.expected[index]) if is_readable else None,
                "decoded": None if decoded is None else scale.values[decoded],
                "distribution": dict(zip(scale.labels, probs.tolist())) if is_readable else None,
                "mass": float(stats.mass[index]) if is_readable else None,
                "reward": None if train_group is None else float(train_group.coefficients.rewards[index]),
                "advantage": None if train_group is None else float(train_group.coefficients.advantages[index]),
                "reason": rollout.reading.reason,
                "finish_reason": rollout.finish_reason,
                "weight_version": group.weight_version,
            }
        )
    return samples


def _group_stats(group: Group, scale: ScoreScale, renormalise: bool) -> tuple[ScoreStats, Tensor]:
    """Stats [K] in float64, and which rollouts are readable; the others' stats mean nothing."""
    target = scale.target(group.label)
    scores = group_scores(group, scale.tensor(), target)
    stats = score_stats(
        scores.label_logprobs.double(),
        scores.values,
        Targets.repeat(target, len(group)),
        renormalise=renormalise,
    )
    return stats, scores.readable


def _spread(name: str, values: Tensor) -> Metrics:
    some = values.numel() > 0
    return {
        f"{name}/mean": _mean(values),
        f"{name}/std": float(values.std(correction=0)) if some else None,
        f"{name}/min": float(values.min()) if some else None,
        f"{name}/max": float(values.max()) if some else None,
    }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None
