"""One rank of the real policy actor (DeepSpeed, gloo) on fixed groups; run as a separate process.

python -m tests.helpers.policy_worker FOLDER OUT --stage 2 --rank 0 --world 1 --port 29500
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, TrainGroup, group_scores
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.openrlhf_args import to_openrlhf_args
from real_openrlhf.config.schema import LoraConfig
from tests.helpers.algo_factory import make_rollout

SCALE = ScoreScale.parse("1-5")
# A large epsilon: where a gradient is rounding noise, Adam would turn the noise into a full step.
LORA_ALPHA = 8
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


def receive(actor: Any) -> dict[str, Tensor]:
    """Push the policy's weights to an engine, which is a thread of rank 0; what arrived. Nothing may change by it."""
    from real_openrlhf.actors.sync.transfer import SyncGroup, free_port, receive_bucket

    plan, arrived = actor.weight_plan(), {}
    before = local_weights(actor)

    def engine(port: int) -> None:
        group = SyncGroup.create("127.0.0.1", port, 1, 2, "gloo", 60)
        for bucket in plan:
            arrived.update(receive_bucket(group, bucket))

    if actor._rank == 0:
        port = free_port()
        thread = threading.Thread(target=engine, args=(port,))
        thread.start()
        actor.join_sync_group("127.0.0.1", port, 2, "gloo", 60)
    actor.send_weights(plan)
    if actor._rank == 0:
        thread.join()
    assert all(a.equal(b) for a, b in zip(before, local_weights(actor), strict=True)), "the sync moved the weights"
    return arrived


def receive_by_ipc(actor: Any) -> dict[str, Tensor]:
    """The same by CUDA IPC: every rank has a GPU, which is an anonymous file, and an engine on it, a thread."""
    from real_openrlhf.actors.sync import transfer as weight_transfer
    from real_openrlhf.actors.sync.transfer import SyncGroup, free_port, receive_buckets
    from tests.helpers.memfd_memory import MemfdMemory

    rank, world = actor._rank, actor._world_size
    weight_transfer.CudaMemory = lambda device: MemfdMemory(f"GPU {rank}")  # type: ignore[assignment,misc]
    port = [free_port()]
    torch.distributed.broadcast_object_list(port, src=0)
    plan, arrived = actor.weight_plan(), {}
    largest = max(bucket.nbytes for bucket in plan)

    def engine() -> None:
        here = torch.device("cpu")
        group = SyncGroup.create("127.0.0.1", port[0], world + rank, 2 * world, "ipc", 60, device=here)
        for _, weights in receive_buckets(group, plan):
            arrived.update({name: view.clone() for name, view in weights})

    thread = threading.Thread(target=engine)
    thread.start()
    actor.join_sync_group("127.0.0.1", port[0], 2 * world, "ipc", 60, largest)
    assert not actor._sync_group.idle
    actor.send_weights(plan)
    thread.join()
    return arrived


def local_weights(actor: Any) -> list[Tensor]:
    """Copies of this rank's parameters, or of its shards of them."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in actor.actor.model.module.parameters()]


class _InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def train_on_what_is_not_finite(actor: Any, groups: list[TrainGroup]) -> None:
    """An update of each kind that must be skipped, spoiled on the last rank alone. Nothing may change by it."""
    last = actor._rank == actor._world_size - 1
    trainer, before = actor.trainer, local_weights(actor)
    counted = {name: getattr(trainer, name) for name in ("n_calls", "n_updates", "n_forwards", "n_backwards")}
    rate = actor.actor_scheduler.get_last_lr()

    def first(**changes: Tensor) -> list[TrainGroup]:
        first = groups[0]
        return [replace(first, coefficients=replace(first.coefficients, **changes)), *groups[1:]] if last else groups

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        return (
            (_InfiniteGradient.apply(output[0]), *output[1:])
            if isinstance(output, tuple)
            else (_InfiniteGradient.apply(output))
        )

    likelihood = groups[0].coefficients.likelihood
    for kind, batch in (
        ("rollouts", first(likelihood=torch.full_like(likelihood, float("nan")))),
        ("loss", first(likelihood=torch.full_like(likelihood, 3e38))),
        ("gradients", groups),
    ):
        layer = next(m for n, m in actor.actor.model.module.named_modules() if n.endswith("layers.0"))
        hook = layer.register_forward_hook(spoil) if last and kind == "gradients" else None
        metrics = actor.train(batch)
        if hook is not None:
            hook.remove()
        assert metrics == {"policy/updates": 0.0, f"skipped/{kind}": 1.0, "policy/skipped_updates": 1.0}, metrics
        assert all(a.equal(b) for a, b in zip(before, local_weights(actor), strict=True)), kind
        actor.weight_version -= 1
    assert trainer.n_updates == counted["n_updates"] and actor.actor_scheduler.get_last_lr() == rate
    vars(trainer).update(counted)


def same_logprobs(one: list[tuple[Tensor, ...]], two: list[tuple[Tensor, ...]]) -> bool:
    return all(a.equal(b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


def expect_failure(actor: Any, path: str) -> None:
    """A save that fails on the last rank fails on this one too."""
    from real_openrlhf.actors.policy.shards import ShardError

    try:
        actor.save_checkpoint(path)
    except ShardError as error:
        assert "could not be written" in str(error), error
    else:
        raise AssertionError("the save did not fail")


def fill_disk(actor: Any, path: str) -> None:
    """The same, on the rank whose kernel refuses to write more than a few bytes into a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        expect_failure(actor, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--micro", type=int, default=3)
    parser.add_argument("--lora", type=int, default=0, help="rank of the adapters")
    parser.add_argument("--kl", type=float, default=0.0)
    parser.add_argument("--adam_offload", action="store_true")
    parser.add_argument("--spoil", action="store_true", help="after the first update, some that must be skipped")
    parser.add_argument("--save", help="checkpoint, saved after the first update, once one rank's disk was full")
    parser.add_argument("--load", help="checkpoint of the first update: continue after it")
    args = parser.parse_args()

    from real_openrlhf.actors.policy.policy_actor import RealPolicyActor
    from real_openrlhf.actors.policy.reference_actor import ReferenceActor
    from real_openrlhf.actors.policy.spec import PolicySpec
    from real_openrlhf.common.device import Device

    config = build_config(
        {
            "actor.model_name_or_path": args.folder,
            "actor.adam.lr": LEARNING_RATE,
            "actor.adam.weight_decay": WEIGHT_DECAY,
            "actor.adam.eps": EPSILON,
            "actor.max_norm": MAX_NORM,
            "ds.zero_stage": args.stage,
            "ds.adam_offload": args.adam_offload,
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
        options=LossOptions(kl_coef=args.kl),
        trains_score_token=False,
        term_grad_norm_steps=1,
        norms_at_parameters=False,
        max_steps=10,
        bucket_bytes=2**14,
        logits_mb=64,
        lora=LoraConfig(rank=args.lora, alpha=LORA_ALPHA),
        seed=42,
    )
    facts = actor.build(spec)
    torch.set_num_threads(1)
    groups = make_groups(actor.actor.model.module.config.vocab_size)
    share = len(groups) // args.world
    mine = groups[args.rank * share : (args.rank + 1) * share]
    reference = None
    if args.kl:
        reference = actor
        if not args.lora:
            # In this process and its process group; in a run it has its own.
            reference = ReferenceActor(args.world, args.rank, "127.0.0.1", args.port)
            reference.build(replace(spec, lora=LoraConfig()))
        frozen = reference.reference_logprobs(mine)
        mine = [replace(group, ref_logprobs=logprobs) for group, logprobs in zip(mine, frozen)]
    metrics = []
    if args.load:
        actor.load_checkpoint(args.load)
        assert actor.trainer.n_updates == actor.weight_version == 1
    for update in range(1 if args.load else 0, UPDATES):
        if args.lora and update == UPDATES - 1:
            receive(actor)
            actor.save_checkpoint(str(Path(args.out) / "checkpoint"))
        if args.spoil and update == 1:
            train_on_what_is_not_finite(actor, mine)
        metrics.append(actor.train(mine))
        if args.save and update == 0:
            if args.rank == args.world - 1:
                fill_disk(actor, args.save + ".full")
            else:
                expect_failure(actor, args.save + ".full")
            actor.save_checkpoint(args.save)
    if args.lora:
        # Resumed from the checkpoint, the last update is the same.
        last = local_weights(actor)
        actor.load_checkpoint(str(Path(args.out) / "checkpoint"))
        assert not all(a.equal(b) for a, b in zip(last, local_weights(actor))), "nothing was loaded"
        assert actor.train(mine) == metrics[-1]
        assert all(a.equal(b) for a, b in zip(last, local_weights(actor), strict=True)), "resumed to other weights"
        torch.save(receive(actor), Path(args.out) / f"pushed_{args.rank}.pt")
        torch.save(receive_by_ipc(actor), Path(args.out) / f"pushed_by_ipc_{args.rank}.pt")
    if reference is not None:
        assert same_logprobs(frozen, reference.reference_logprobs(mine)), "the reference moved with the policy"
    random_numbers = torch.rand(4).tolist()
    probe = actor.token_logprobs([[3, 4, 5, 6, 7], [8, 9, 3]])
    actor.save_model(str(Path(args.out) / "model"), args.folder)
    (Path(args.out) / f"random_{args.rank}.json").write_text(json.dumps(random_numbers), encoding="utf-8")
    if args.rank == 0:
        record = {
            "metrics": metrics,
            "counts": actor.counts(),
            "facts": facts,
            "reference_counts": None if reference is None else reference.counts(),
            "version": actor.weight_version,
            "probe": [p.tolist() for p in probe],
        }
        (Path(args.out) / "record.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
