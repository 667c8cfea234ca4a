"""One rank of the real policy actor (DeepSpeed, gloo) on fixed groups; run as a process of its own.

python -m tests.helpers.policy_worker FOLDER OUT --stage 2 --rank 0 --world 1 --port 29500
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.objectives import RealObjective
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, TrainGroup, group_scores
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.openrlhf_args import to_openrlhf_args
from tests.helpers.algo_factory import make_rollout

SCALE = ScoreScale.parse("1-5")
# A large epsilon: where a gradient is rounding noise, Adam would turn the noise into a full step.
LEARNING_RATE, WEIGHT_DECAY, EPSILON, MAX_NORM, UPDATES = 1e-2, 0.1, 1e-4, 0.5, 3


def make_groups(vocabulary: int, seed: int = 3) -> list[TrainGroup]:
    """Four groups of four rollouts: ragged, one group without any score, one rollout invalid."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (n,), generator=generator)

    groups = []
    for index in range(4):
        rollouts = []
        for k in range(4):
            length = int(torch.randint(3, 9, (1,), generator=generator))
            readable = not (index == 3 or k == 3)
            rollouts.append(
                make_rollout(
                    ids(length).tolist(),
                    position=length - 2 if readable else None,
                    label=k % 5 if readable else None,
                    n_labels=5,
                    score_logprobs=torch.randn(1, 5, generator=generator).log_softmax(-1) if readable else None,
                )
            )
        group = Group(
            prompt_ids=ids(4 + 3 * index), label=1.5 + index, rollouts=tuple(rollouts), row=index, weight_version=0
        )
        target = SCALE.target(group.label)
        coefficients = RealObjective(beta=1.0)(group_scores(group, SCALE.tensor(), target))
        groups.append(TrainGroup(group=group, target=target, coefficients=coefficients))
    return groups


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--micro", type=int, default=3)
    args = parser.parse_args()

    from real_openrlhf.actors.device import Device
    from real_openrlhf.actors.policy_actor import PolicySpec, RealPolicyActor

    config = build_config(
        {
            "actor.model_name_or_path": args.folder,
            "actor.adam.lr": LEARNING_RATE,
            "actor.adam.weight_decay": WEIGHT_DECAY,
            "actor.adam.eps": EPSILON,
            "actor.max_norm": MAX_NORM,
            "ds.zero_stage": args.stage,
            "rollout.batch_size": 4,
            "rollout.n_samples_per_prompt": 4,
            "train.micro_batch_size": args.micro,
            "ckpt.output_dir": args.out,
        }
    )
    device = Device.resolve("cpu")
    actor = RealPolicyActor(args.world, args.rank, "127.0.0.1", args.port)
    spec = PolicySpec(
        path=args.folder,
        args=to_openrlhf_args(config, device_dtype="fp32", attn="eager", sync_backend="gloo"),
        device=device,
        attn_implementation="eager",
        ranks_per_node=args.world,
        values=SCALE.values,
        options=LossOptions(),
        trains_score_token=False,
        term_grad_norm_steps=1,
        max_steps=10,
        bucket_bytes=2**20,
        logits_mb=64,
    )
    actor.build(spec)
    torch.set_num_threads(1)
    groups = make_groups(actor.actor.model.module.config.vocab_size)
    share = len(groups) // args.world
    mine = groups[args.rank * share : (args.rank + 1) * share]
    metrics = [actor.train(mine) for _ in range(UPDATES)]
    probe = actor.token_logprobs([[3, 4, 5, 6, 7], [8, 9, 3]])
    actor.save_model(str(Path(args.out) / "model"), args.folder)
    if args.rank == 0:
        record = {
            "metrics": metrics,
            "counts": actor.counts(),
            "version": actor.weight_version,
            "probe": [p.tolist() for p in probe],
        }
        (Path(args.out) / "record.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
