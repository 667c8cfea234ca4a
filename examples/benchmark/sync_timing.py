"""How long a weight sync takes: this project's and stock OpenRLHF's broadcast, in turns, in one run.

    python -m examples.benchmark.sync_timing --model DIR --output FILE --repeats 5

There are one policy and two engines: one for this project, one for OpenRLHF's WorkerWrap. Before every sync the
policy's weights change, and after it engine and policy must agree on the log-probs of the same text, else the run
stops, so that a sync that moved nothing is not timed. Seconds are those of the transfer alone, from the driver's call
to its return; groups are formed before, checks come after. The order changes from repeat to repeat; a first round of
each warms up and does not count. The output is {"real": [s], "real_gloo": [s], "openrlhf": [s], "facts": {...}}.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import ray
import torch

from real_openrlhf.actors.engine.spec import EngineSpec
from real_openrlhf.actors.policy.spec import PolicySpec
from real_openrlhf.actors.sync.agreement import check_agreement, timed
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.device import Device
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.openrlhf_args import to_openrlhf_args
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.run.placement import Request, reserve
from real_openrlhf.run.ray_session import passed_environment, ray_session

if TYPE_CHECKING:
    from real_openrlhf.run.ray_groups import RayPolicyGroup, RayRolloutGroup

logger = logging.getLogger("sync_timing")

CHANGE = 1.001  # every weight is multiplied by this before each sync
MAX_LEN = 256
BUCKET_MB = build_config({}).sync.bucket_mb


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """join: form the group, not timed. sync: version -> seconds of one transfer. engines: which get the weights."""

    join: Callable[[], None]
    sync: Callable[[int], float]
    engines: list[Any]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder with a tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket_mb", type=int, default=BUCKET_MB, help="as --sync.bucket_mb of training")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


def policy_spec(model: str, device: Device, bucket_mb: int) -> PolicySpec:
    config = build_config({"actor.model_name_or_path": model, "ckpt.output_dir": "unused", "ds.zero_stage": 2})
    return PolicySpec(
        path=model,
        args=to_openrlhf_args(config, device_dtype=device.dtype_name, attn="auto", sync_backend="gloo"),
        device=device,
        attn_implementation="auto",
        ranks_per_node=1,
        values=ScoreScale.parse("1-5").values,
        options=LossOptions(),
        trains_score_token=False,
        term_grad_norm_steps=0,
        norms_at_parameters=False,
        max_steps=1,
        bucket_bytes=bucket_mb * 2**20,
        logits_mb=64,
    )


def start(model: str, bucket_mb: int) -> tuple[RayPolicyGroup, RayRolloutGroup, RayRolloutGroup]:
    """Start policy, this project's engine and OpenRLHF's, in parallel."""
    from examples.benchmark.sync_actors import StockEngine, StockPolicy
    from real_openrlhf.run.ray_groups import RayPolicyGroup, RayRolloutGroup

    class Policy(RayPolicyGroup):
        actor = StockPolicy

    class StockRollouts(RayRolloutGroup):
        actor = StockEngine

    device = Device.resolve("cpu")
    bound = bind_scale(ScoreScale.parse("1-5"), load_tokenizer(model), ["Score: "])
    spec = EngineSpec(model=model, device=device, bound=bound, max_model_len=MAX_LEN)
    groups = reserve([Request(name=n, bundles=(device.bundle(),)) for n in ("policy", "real", "openrlhf")], 60.0)
    # OpenRLHF sets this too: its calls have torch dtypes as arguments.
    env = {**passed_environment(), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    place: dict[str, Any] = dict(device=device, env=env)
    engines = RayRolloutGroup(spec, n_engines=1, group=groups["real"], **place)
    stock = StockRollouts(spec, n_engines=1, group=groups["openrlhf"], **place)
    policy = Policy(policy_spec(model, device, bucket_mb), n_ranks=1, group=groups["policy"], **place)
    ray.get([*policy.ready(), *engines.ready(), *stock.ready()])
    return policy, engines, stock


def contestants(
    policy: RayPolicyGroup, engines: RayRolloutGroup, stock: RayRolloutGroup, probes: list[list[int]]
) -> dict[str, Contestant]:
    from real_openrlhf.run.ray_groups import RayWeightSync

    tolerance = policy.spec.device.sync_tolerance

    def ours(backend: str) -> Contestant:
        made: list[RayWeightSync] = []

        def join() -> None:
            made[:] = [
                RayWeightSync(
                    policy, [engines], probes=probes, deadline_s=120.0, max_mean_difference=tolerance, backend=backend
                )
            ]

        return Contestant(join=join, sync=lambda version: made[0].sync(version).seconds, engines=engines.engines)

    def broadcast(version: int) -> float:
        with timed() as clock:
            ray.get(policy.call("broadcast_stock"))
        return clock.seconds

    ray.get(policy.call("join_stock", stock.engines))
    theirs = Contestant(join=lambda: None, sync=broadcast, engines=stock.engines)
    return {"real": ours("shared_memory"), "real_gloo": ours("gloo"), "openrlhf": theirs}


def one_sync(policy: RayPolicyGroup, contestant: Contestant, probes: list[list[int]]) -> tuple[float, float]:
    """(seconds of the transfer, mean log-prob difference after it); raises StaleWeights when nothing arrived."""
    contestant.join()
    (version,) = ray.get(policy.call("scale_weights", CHANGE))
    mine = ray.get(policy.call("token_logprobs", probes))[0]
    theirs = ray.get([engine.prompt_logprobs.remote(probes) for engine in contestant.engines])
    apart = float((torch.cat(mine) - torch.cat(theirs[0])).abs().mean())
    seconds = contestant.sync(version)
    theirs = ray.get([engine.prompt_logprobs.remote(probes) for engine in contestant.engines])
    mean, _, _ = check_agreement(mine, theirs, version, policy.spec.device.sync_tolerance)
    if not mean < apart / 2:
        raise RuntimeError(f"engine and policy differed by {apart:.2e} before the sync and by {mean:.2e} after it")
    return seconds, mean


def facts(args: argparse.Namespace, policy: RayPolicyGroup) -> dict[str, Any]:
    from examples.benchmark.sync_stock import OVERRIDES

    plan = ray.get(policy.call("weight_plan"))[0]
    return {
        "overrides": OVERRIDES,
        "parameters": sum(bucket.numel for bucket in plan),
        "megabytes": round(sum(bucket.nbytes for bucket in plan) / 1e6, 1),
        "tensors": sum(len(bucket.parameters) for bucket in plan),
        "buckets": len(plan),
        "bucket_mb": args.bucket_mb,
        "repeats": args.repeats,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "policy_threads": ray.get(policy.ready())[0]["threads"],
    }


def write(path: Path, seconds: dict[str, list[float]], known: dict[str, Any]) -> dict[str, Any]:
    """What is known so far; returns medians and ratios."""
    medians = {name: median(values) for name, values in seconds.items()}
    found = {
        "median_seconds": medians,
        "ratio_to_openrlhf": {name: round(value / medians["openrlhf"], 4) for name, value in medians.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**seconds, "facts": {**known, **found}}, indent=2) + "\n", encoding="utf-8")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(5, 400, (2, 48), generator=generator).tolist()
    found: dict[str, Any] = {}
    with ray_session("local", num_cpus=None, needed_cpus=3.0):
        policy, engines, stock = start(str(Path(args.model).resolve()), args.bucket_mb)
        known = facts(args, policy)
        for line in known["overrides"]:
            logger.info("override: %s", line)
        rows = list(contestants(policy, engines, stock, probes).items())
        seconds: dict[str, list[float]] = {name: [] for name, _ in rows}
        largest = {name: 0.0 for name, _ in rows}
        for repeat in range(args.repeats + 1):
            turn = repeat % len(rows)
            for name, contestant in rows[turn:] + rows[:turn]:
                took, mean = one_sync(policy, contestant, probes)
                logger.info("repeat %d: %s %.3f s, then %.1e apart", repeat, name, took, mean)
                largest[name] = max(mean, largest[name])
                if repeat:
                    seconds[name].append(round(took, 4))
            if repeat:
                found = write(args.output, seconds, {**known, "mean_logprob_difference": largest})
        engines.shutdown()
        stock.shutdown()
    sys.stdout.write(f"{json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
