"""Which charts a page shows, in which order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from real_openrlhf.controller.report.charts import Chart, Line

_BENCHMARK = re.compile(r"eval/([^/]+)/reward")

HELD_OUT = (
    Chart(title="Reward of REAL", lines={"eval/reward": "mean reward"}, watches=("evaluation",)),
    Chart(
        title="Correlation with the labels",
        lines={
            "eval/expected/pearson": "Pearson of E[score]",
            "eval/expected/spearman": "Spearman of E[score]",
            "eval/decoded/pearson": "Pearson of the written score",
        },
        watches=("evaluation",),
    ),
    Chart(
        title="Error of E[score]",
        lines={"eval/expected/rmse": "RMSE", "eval/expected/mae": "MAE", "eval/expected/ece": "ECE"},
    ),
    Chart(
        title="Mass and missing scores",
        lines={
            "eval/mass": "mass on the scale",
            "eval/invalid_rate": "without a score",
            "eval/forced_rate": "anchor forced",
            "eval/undecoded_rate": "no written score",
        },
        about="Mass that falls: the network writes other tokens where the score belongs.",
        watches=("mass",),
    ),
)

TRAINING = (
    Chart(
        title="Reward of the rollouts",
        lines={"reward/mean": "trained on", "reward/sampled_mean": "all sampled"},
        bands={"reward/mean": "reward/std"},
        about="Band: standard deviation.",
        watches=("reward",),
    ),
    Chart(
        title="Loss terms",
        lines={
            "loss/cot": "Term 1",
            "loss/cross_entropy": "cross-entropy",
            "loss/squared_error": "squared error",
            "loss/likelihood": "likelihood",
            "loss/kl": "KL",
            "loss/entropy": "entropy",
        },
        about="The value of Term 1 says nothing about progress: its gradient trains.",
    ),
    Chart(
        title="Gradient norm of each term, at the logits",
        lines={
            "logit_grad_norm/cot": "Term 1",
            "logit_grad_norm/cross_entropy": "cross-entropy",
            "logit_grad_norm/squared_error": "squared error",
            "logit_grad_norm/likelihood": "likelihood",
            "logit_grad_norm/kl": "KL",
            "logit_grad_norm/entropy": "entropy",
        },
        log=True,
        watches=("terms",),
    ),
    Chart(
        title="Gradient norm of each term, at the parameters",
        lines={"param_grad_norm/term1": "Term 1", "param_grad_norm/term2": "Term 2"},
        log=True,
        watches=("terms",),
    ),
    Chart(
        title="Gradient norm and skipped updates",
        lines={"policy/grad_norm": "norm before clipping", "policy/skipped_updates": "skipped updates"},
        log=True,
        watches=("finite",),
    ),
    Chart(title="Learning rate", lines={"policy/lr": "learning rate"}),
    Chart(
        title="Advantages",
        lines={"advantage/abs_mean": "mean size", "advantage/zero_variance_share": "groups with equal rewards"},
        about="Where all groups have equal rewards, Term 1 learns nothing.",
        watches=("dead",),
    ),
    Chart(
        title="Written score is right",
        lines={
            "accuracy/mean": "rollouts",
            "accuracy/groups_none": "groups: none",
            "accuracy/groups_some": "groups: some",
            "accuracy/groups_all": "groups: all",
        },
    ),
)

STILL_JUDGING = (
    Chart(
        title="Length in tokens",
        lines={"length/response": "response", "length/cot": "feedback"},
        about="Feedback that grows or goes away while the reward rises.",
        watches=("length",),
    ),
    Chart(
        title="Invalid and truncated responses",
        lines={
            "invalid/rate": "without a score",
            "invalid/no_anchor": "no anchor",
            "invalid/off_scale": "off the scale",
            "length/truncated_share": "truncated",
        },
        watches=("invalid", "length"),
    ),
    Chart(
        title="Repetition and copies",
        lines={"feedback/repeated": "runs of 4 tokens again", "feedback/copied": "tokens copied from the prompt"},
        about="Feedback that repeats itself or the prompt says nothing.",
        watches=("repeated", "copied"),
    ),
    Chart(
        title="Speaks of the response that it judges",
        lines={
            "feedback/mentioned": "tokens shared with it",
            "feedback/mentioned_other": "with other prompts'",
            "feedback/mentions": "difference",
        },
        about="A difference of 0: feedback no longer depends on what is judged.",
        watches=("mentions",),
    ),
    Chart(
        title="E[score] and labels of the rollouts",
        lines={"score/expected": "E[score]", "label/mean": "labels"},
        bands={"score/expected": "score/expected_std", "label/mean": "label/std"},
        about="Bands: standard deviation. Scores that move away from the labels, or become one value.",
        watches=("scores", "labels"),
    ),
    Chart(
        title="Distance of the scores from the labels",
        lines={"score/label_distance": "Wasserstein distance", "score/abs_error": "mean |E[score] − label|"},
        watches=("labels",),
    ),
    Chart(
        title="Mass on the scale",
        lines={"score/mass": "mean", "score/mass_min": "minimum"},
        watches=("mass",),
    ),
    Chart(
        title="Entropy per token",
        lines={"rollouts/entropy": "nats"},
        about="Near 0, rollouts of a prompt are all alike.",
        watches=("entropy",),
    ),
)

DRIFT = (
    Chart(
        title="Engine against policy: sampled tokens",
        lines={
            "rollout_gap/logprob_mean": "mean difference of log-probs",
            "rollout_gap/logprob_max": "largest",
            "rollout_gap/kl": "KL",
        },
        log=True,
        watches=("gap",),
    ),
    Chart(
        title="Engine against policy: after the sync",
        lines={"sync/logprob_mean": "mean difference of log-probs", "sync/logprob_max": "largest"},
        log=True,
    ),
    Chart(
        title="How far the policy moves",
        lines={"sync/policy_moved": "by a step", "policy/kl": "KL to the reference"},
        log=True,
        about="Per token, in nats. 0: the learning rate does nothing.",
        watches=("still",),
    ),
    Chart(
        title="Off-policy",
        lines={"policy/clipped_share": "tokens at the ratio's bound", "rollouts/age": "age of the rollouts"},
    ),
)

SPEED = (
    Chart(
        title="Tokens per second",
        lines={
            "speed/tokens_per_second": "whole step",
            "speed/generated_tokens_per_second": "generated",
            "speed/trained_tokens_per_second": "trained",
        },
        log=True,
    ),
)
PHASES = {
    f"seconds/{name}": name for name in ("data", "generate", "advantages", "reference", "train", "sync", "evaluate")
}


def benchmarks_of(evals: Sequence[Line]) -> list[str]:
    """Names of the benchmarks that have metrics of their own: where there are several."""
    found = [m[1] for line in evals for name in line if (m := _BENCHMARK.fullmatch(name))]
    return [name for name in dict.fromkeys(found) if name != "change"]


def by_benchmark(evals: Sequence[Line]) -> tuple[Chart, ...]:
    names = benchmarks_of(evals)
    kinds = {"reward": "Reward of REAL", "expected/pearson": "Pearson of E[score]", "expected/rmse": "RMSE of E[score]"}
    return tuple(
        Chart(title=f"{title}, by benchmark", lines={f"eval/{name}/{metric}": name for name in names})
        for metric, title in kinds.items()
        if names
    )
