"""What `real_openrlhf.patch` adds to an OpenRLHF run: the settings of both terms, and what they need of OpenRLHF's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.algo.choices import Aggregation, Ratio
from real_openrlhf.dropin.loss import RealPolicyLoss
from real_openrlhf.dropin.settings import DropInError, RealSettings

# The agent that OpenRLHF's engines load; they are then told the settings.
AGENT_FILE = str(Path(__file__).with_name("agent.py"))
# Estimators that give a rollout one advantage; "gae" and "reinforce" differ between its tokens.
ESTIMATORS = ("rloo", "group_norm", "dr_grpo", "reinforce_baseline", "flash_reinforce")
# OpenRLHF's settings of its PolicyLoss that RealPolicyLoss does not have, and their defaults.
_NO_PART = {
    "actor.policy_loss_type": "ppo",
    "actor.dual_clip": None,
    "actor.loss_agg_mode": "token-mean",
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """See `RealPolicyLoss`; the bounds of the ratio are OpenRLHF's own (--actor.eps_clip)."""

    settings: RealSettings
    beta: float = 1.0
    aggregation: Aggregation = "token_sum"
    ratio: Ratio = "clip"
    tis_cap: float | None = None

    def loss(self, clip_low: float = 0.2, clip_high: float = 0.2) -> RealPolicyLoss:
        return RealPolicyLoss(
            self.settings,
            beta=self.beta,
            aggregation=self.aggregation,
            ratio=self.ratio,
            clip_eps_low=clip_low,
            clip_eps_high=clip_high,
            tis_cap=self.tis_cap,
        )


def check_arguments(args: Any, terms: Terms) -> list[str]:
    """Whether REAL's terms can be trained with these arguments of openrlhf.cli.train_ppo_ray, before anything starts.

    Raises DropInError for what cannot be; returns what differs from the paper, for the log.
    """
    _refuse(args, terms)
    notes = [
        f"--{name} {_get(args, name)} plays no part; see --real.aggregation and --real.ratio"
        for name, default in _NO_PART.items()
        if _get(args, name) != default
    ]
    if args.algo.advantage.estimator != "group_norm" or tuple(args.reward.clip_range) != (-1, 1):
        notes.append(
            "the paper's advantages are those of --algo.advantage.estimator group_norm --reward.clip_range -1 1"
        )
    if not args.algo.dynamic_filtering_enable:
        notes.append("the paper samples dynamically: --algo.dynamic_filtering_enable")
    return notes


def _refuse(args: Any, terms: Terms) -> None:
    estimator, level = args.algo.advantage.estimator, args.algo.advantage.is_correction_level
    if args.reward.remote_url or (args.train.agent_func_path or AGENT_FILE) != AGENT_FILE:
        raise DropInError(
            "with --real.* the reward is REAL's: leave out --reward.remote_url and --train.agent_func_path"
        )
    if not args.data.label_key:
        raise DropInError("--data.label_key: REAL needs the column with the human score")
    if estimator not in ESTIMATORS:
        raise DropInError(
            f"--algo.advantage.estimator {estimator}: REAL has one advantage per rollout and no critic; use one of "
            f"{', '.join(ESTIMATORS)}"
        )
    if args.algo.kl.init_coef > 0 and not args.algo.kl.use_loss:
        raise DropInError(
            f"--algo.kl.init_coef {args.algo.kl.init_coef:g} puts a KL into the reward, token by token, and REAL has "
            "one advantage per rollout: add --algo.kl.use_loss, or --algo.kl.init_coef 0"
        )
    if args.rollout.top_p != 1:
        raise DropInError(f"--rollout.top_p {args.rollout.top_p:g}: the engine's log-probs are not those of a cut-off")
    if level == "off" and args.rollout.temperature != 1:
        raise DropInError(
            f"--rollout.temperature {args.rollout.temperature:g} needs --algo.advantage.is_correction_level token: "
            "only then do OpenRLHF's engines return the log-probs of that temperature"
        )
    if args.eval.dataset and args.eval.temperature not in (0, args.rollout.temperature):
        raise DropInError(
            f"--eval.temperature {args.eval.temperature:g}: the engine's log-probs are those of "
            f"{args.rollout.temperature:g}; use that, or 0"
        )
    if terms.tis_cap is not None and level == "off":
        raise DropInError("--real.tis_cap needs the engine's log-probs: --algo.advantage.is_correction_level token")
    for name, most in (("ds.ring_attn_size", 1), ("ds.tensor_parallel_size", 1), ("data.max_images_per_prompt", 0)):
        if _get(args, name) > most:
            raise DropInError(f"--{name} {_get(args, name)}: REAL's terms need whole sequences of text, at most {most}")


def check_cpu_arguments(args: Any) -> None:
    """DropInError for arguments of openrlhf.cli.train_ppo_ray that `on_cpu` has nothing for."""
    if args.ds.packing_samples or args.train.dynamic_batch_enable:
        raise DropInError("--real.device cpu: packed rows need flash-attn's kernels; leave out --ds.packing_samples")
    if args.ds.adam_offload or args.ds.enable_sleep or args.vllm.enable_sleep or args.train.colocate_all:
        raise DropInError(
            "--real.device cpu: there is no GPU memory to save; leave out --ds.adam_offload, --ds.enable_sleep, "
            "--vllm.enable_sleep and --train.colocate_all"
        )
    if args.algo.advantage.estimator == "gae" or not (args.reward.remote_url or args.train.agent_func_path):
        raise DropInError(
            "--real.device cpu: critics and reward models are not supported; use --reward.remote_url or "
            "--train.agent_func_path, and another --algo.advantage.estimator than gae"
        )
    if args.train.enable_ema or args.vllm.tensor_parallel_size > 1:
        raise DropInError("--real.device cpu: leave out --train.enable_ema and --vllm.tensor_parallel_size")


def _get(args: Any, name: str) -> Any:
    for part in name.split("."):
        args = getattr(args, part)
    return args
