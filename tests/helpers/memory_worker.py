"""What one rank of the real policy actor holds, tensor by tensor; run as a process of its own.

python -m tests.helpers.memory_worker FOLDER --stage 2 --dtype bf16 --rank 0 --world 1 --port 29500
Prints a JSON object: bytes by kind, and `resident`, what the process has in memory for them, files left out.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.openrlhf_args import to_openrlhf_args
from real_openrlhf.config.schema import LoraConfig
from tests.helpers.policy_worker import SCALE, make_groups


def nbytes(tensors: Iterable[Any]) -> int:
    """Of the storages, each once; numbers of a single element (Adam's step) are left out."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, Tensor) and t.numel() > 1
    }
    return sum(storages.values())


def resident() -> int:
    """Bytes of this process in memory, without pages of files: those of a checkpoint may stay, and can be dropped."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def weights_of(network: Any) -> list[Tensor]:
    return [getattr(p, "ds_tensor", p.data) for p in network.parameters()]


def gradients_of(optimizer: Any, network: Any) -> list[Tensor]:
    """As they lie when the last backward pass of an update is through."""
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:
        return [flat]
    averaged = getattr(optimizer, "averaged_gradients", None)
    if averaged:
        return [g for group in averaged.values() for g in group]
    return [p.grad for p in network.parameters() if p.grad is not None]


def states_of(optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Master weights and Adam's moments."""
    inner = getattr(optimizer, "optimizer", optimizer)
    moments = [t for state in inner.state.values() for t in state.values()]
    # ZeRO 3 takes them out of the groups.
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    masters = flat if flat is not None else [p for group in inner.param_groups for p in group["params"]]
    return masters, moments


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--adam_offload", action="store_true")
    args = parser.parse_args()

    from real_openrlhf.actors.policy.policy_actor import RealPolicyActor
    from real_openrlhf.actors.policy.spec import PolicySpec
    from real_openrlhf.common.device import Device

    config = build_config(
        {
            "actor.model_name_or_path": args.folder,
            "ds.zero_stage": args.stage,
            "ds.adam_offload": args.adam_offload,
            "rollout.batch_size": 4,
            "rollout.n_samples_per_prompt": 4,
            "train.micro_batch_size": 3,
            "ckpt.output_dir": args.folder,
        }
    )
    actor = RealPolicyActor(args.world, args.rank, "127.0.0.1", args.port)
    spec = PolicySpec(
        path=args.folder,
        args=to_openrlhf_args(config, device_dtype=args.dtype, attn="eager", sync_backend="gloo"),
        device=Device(name="cpu", dtype_name=args.dtype),
        attn_implementation="eager",
        ranks_per_node=args.world,
        values=SCALE.values,
        options=LossOptions(),
        trains_score_token=False,
        term_grad_norm_steps=0,
        norms_at_parameters=False,
        max_steps=10,
        bucket_bytes=2**14,
        logits_mb=64,
        lora=LoraConfig(rank=args.lora),
        seed=42,
    )
    begin = resident()
    actor.build(spec)
    optimizer, network = actor.actor_optim, actor.actor.model.module
    found: dict[str, Any] = {}
    step = actor.trainer.strategy.optimizer_step

    def look(*more: Any, **named: Any) -> None:
        found["gradients"] = nbytes(gradients_of(optimizer, network))
        found["buckets"] = nbytes(bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values())
        gc.collect()
        found["resident"] = resident() - begin
        step(*more, **named)

    actor.trainer.strategy.optimizer_step = look
    groups = make_groups(network.config.vocab_size)
    share = len(groups) // args.world
    mine = groups[args.rank * share : (args.rank + 1) * share]
    actor.train(mine)
    actor.train(mine)  # Adam's moments are there from the first step on
    masters, moments = states_of(optimizer)
    gc.collect()
    weights = weights_of(network)
    lying = {t.untyped_storage().data_ptr() for t in weights}
    found["weights"] = nbytes(weights)
    found["masters"] = nbytes(m for m in masters if m.untyped_storage().data_ptr() not in lying)
    found["moments"] = nbytes(moments)
    found["optimizer"] = type(optimizer).__name__
    print(json.dumps(found))


if __name__ == "__main__":
    main()
