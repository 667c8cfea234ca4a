"""The only place where classes become Ray actors. Groups of actor handles here fit the controller's Protocols."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from real_openrlhf.actors.engine.spec import EngineSpec
from real_openrlhf.actors.policy.spec import PolicySpec
from real_openrlhf.actors.sync.agreement import check_agreement, mean_change, sync_ranks, timed
from real_openrlhf.actors.sync.cuda_ipc import Unpaired, gpu_of, host_of, pair
from real_openrlhf.actors.sync.transfer import to_wire
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.types import Group, TrainGroup
from real_openrlhf.common.atomic_folder import atomic_folder
from real_openrlhf.common.device import IPC_ELSE_GLOO, Device
from real_openrlhf.controller.protocols import SyncReport
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.run.engine_handles import EngineHandles, generate_on
from real_openrlhf.run.evaluator_handle import RayEvaluator
from real_openrlhf.run.lazy_actor import lazy_actor
from real_openrlhf.run.placement import Bundle
from real_openrlhf.run.waiting import finished_requests, wait_for

if TYPE_CHECKING:
    from real_openrlhf.evals.evaluator import EvaluatorSpec

logger = logging.getLogger(__name__)

# The driver imports neither vLLM nor DeepSpeed; tests/unit/run/test_lazy_actor.py compares the names with the classes.
_ENGINE = lazy_actor(
    "real_openrlhf.actors.engine.rollout_engine:RolloutEngine",
    methods=(),
    coroutines=(
        *("ready", "generate", "prompt_logprobs", "init_sync_group", "sync_hosts", "receive_weights", "sync_version"),
        *("sleep", "wake_up", "reset_prefix_cache", "finished_requests", "in_flight", "shutdown"),
    ),
)
_RANK = ("get_master_addr_port", "build", "counts", "reference_logprobs")
_REFERENCE = lazy_actor("real_openrlhf.actors.policy.reference_actor:ReferenceActor", methods=_RANK)
_POLICY = lazy_actor(
    "real_openrlhf.actors.policy.policy_actor:RealPolicyActor",
    methods=(
        *_RANK,
        *("train", "token_logprobs", "save_model", "save_checkpoint", "load_checkpoint", "sees"),
        *("offload_states", "reload_states"),
        *("free_port", "weight_plan", "sync_host", "join_sync_group", "send_weights"),
    ),
)
_EVALUATOR = lazy_actor(
    "real_openrlhf.evals.evaluator:EvaluatorActor", methods=("evaluate", "state_dict", "load_state_dict")
)


def _remote(cls: type, bundle: Bundle, device: Device, env: dict[str, str], share: float | None = 1.0) -> Any:
    """cls as a Ray actor on one bundle.

    share: the share of the bundle's resources that the actor takes. None: it takes nothing, because an engine of
    several GPUs starts worker processes that take the resources.
    """
    options: dict[str, Any] = dict(
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=bundle.group,
            placement_group_bundle_index=bundle.index,
            placement_group_capture_child_tasks=True,
        ),
        runtime_env={"env_vars": env},
        max_restarts=0,
    )
    options.update({"num_cpus": 0, "num_gpus": 0} if share is None else device.actor_options(share))
    return ray.remote(cls).options(**options)


class RayRolloutGroup:
    """Several engines, used as one: prompts are distributed (`generate_on`), results come back in order.

    group: bundles from `placement.reserve`, one per worker; the bundles of one engine are in one placement group.
    share: how much of each bundle a worker takes; below 1 where engines share bundles with policy ranks
    (`placement.COLOCATED_SHARE`).
    """

    actor: type = _ENGINE

    def __init__(
        self,
        spec: EngineSpec,
        *,
        n_engines: int,
        group: Sequence[Bundle],
        device: Device,
        env: dict[str, str],
        share: float = 1.0,
        call_timeout_s: float | None = None,
    ) -> None:
        self.width = width = spec.tensor_parallel_size
        self.sleeps = spec.enable_sleep
        self.call_timeout_s = call_timeout_s

        def start(i: int) -> Any:
            mine = group[i * width : (i + 1) * width]
            bundles = [bundle.index for bundle in mine] if width > 1 else None
            actor = _remote(self.actor, mine[0], device, env, None if bundles else share)
            return actor.remote(replace(spec, seed=spec.seed + i), bundle_indices=bundles, num_gpus=share)

        self.engines = [start(i) for i in range(n_engines)]

    def ready(self) -> list[Any]:
        """Refs that resolve once the engines have started."""
        return [engine.ready.remote() for engine in self.engines]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        def wait(refs: list[Any]) -> list[Any]:
            return wait_for(refs, "rollouts", self.call_timeout_s, lambda: finished_requests(self.engines))

        return generate_on(self.engines, prompts, sampling, wait)

    def sleep(self) -> None:
        wait_for(self.fall_asleep(), "engines that go to sleep", self.call_timeout_s)

    def fall_asleep(self) -> list[Any]:
        """Refs that resolve once the engines have started and freed their memory; none if engines never sleep."""
        return [engine.sleep.remote() for engine in self.engines] if self.sleeps else []

    def wake_up(self, tag: str) -> list[Any]:
        """Refs that resolve once the memory is back. tag: "weights" or "kv_cache". None if engines never sleep."""
        return [engine.wake_up.remote([tag]) for engine in self.engines] if self.sleeps else []

    def shutdown(self) -> None:
        wait_for([engine.shutdown.remote() for engine in self.engines], "the engines' end", self.call_timeout_s)


class _Ranks:
    """The ranks of one DeepSpeed model, used as one.

    group: bundles from `placement.reserve`, one per rank.
    share: how much of its bundle a rank takes; below 1 where ranks share bundles with engines.
    """

    actor: type

    def __init__(
        self,
        spec: PolicySpec,
        *,
        n_ranks: int,
        group: Sequence[Bundle],
        device: Device,
        env: dict[str, str],
        share: float = 1.0,
        after: Sequence[Any] = (),
        call_timeout_s: float | None = None,
    ) -> None:
        """after: refs that must resolve before a rank uses its GPU; its process already starts and imports before."""
        self.spec = spec
        self.call_timeout_s = call_timeout_s
        env = {**env, **device.trainer_env(spec.ranks_per_node, adam_offload=bool(spec.args.ds.adam_offload))}

        def start(rank: int, address: str | None, port: int | None) -> Any:
            return _remote(self.actor, group[rank], device, env, share).remote(n_ranks, rank, address, port)

        first = start(0, None, None)
        self.ranks = [first]
        if n_ranks > 1:
            address, port = ray.get(first.get_master_addr_port.remote())
            self.ranks += [start(rank, address, port) for rank in range(1, n_ranks)]
        self._built = self.call("build", spec, *after)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call one method on every rank; returns the refs."""
        return [getattr(rank, method).remote(*args) for rank in self.ranks]

    def on_all(self, method: str, *args: Any) -> list[Any]:
        """Call one method on every rank; returns the results, by rank."""
        return wait_for(self.call(method, *args), f"{method} of {type(self).__name__}", self.call_timeout_s)

    def ready(self) -> list[Any]:
        return self._built

    def end(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)

    def counts(self) -> list[dict[str, int]]:
        return self.on_all("counts")

    def reference_logprobs(self, groups: Sequence[TrainGroup]) -> list[tuple[Tensor, ...]]:
        return [found for share in self._shared("reference_logprobs", groups) for found in share]

    def _shared(self, method: str, groups: Sequence[TrainGroup]) -> list[Any]:
        """Call one method on every rank, each with its contiguous share of the groups; returns results by rank."""
        n = len(self.ranks)
        if len(groups) % n:
            raise ValueError(f"{len(groups)} groups cannot be shared evenly by {n} ranks")
        share = len(groups) // n
        shares = [list(groups[i * share : (i + 1) * share]) for i in range(n)]
        refs = [getattr(rank, method).remote(mine) for rank, mine in zip(self.ranks, shares)]
        return wait_for(refs, f"{method} of {type(self).__name__}", self.call_timeout_s)


class RayReferenceGroup(_Ranks):
    """The reference policy: the model that training began with."""

    actor = _REFERENCE


class RayPolicyGroup(_Ranks):
    """The policy. With LoRA it is its own reference too."""

    actor = _POLICY

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        with self._states_on_gpu():
            return self._shared("train", groups)[0]

    @contextmanager
    def _states_on_gpu(self) -> Iterator[None]:
        """Inside, optimizer states and gradient buffers are on the GPU; --ds.enable_sleep moves them off afterwards."""
        sleeps = bool(self.spec.args.ds.enable_sleep)
        if sleeps:
            self.on_all("reload_states")
        yield
        if sleeps:
            self.on_all("offload_states")

    def save_model(self, path: str, complete: Callable[[Path], None]) -> None:
        with atomic_folder(path) as folder:
            self.on_all("save_model", str(folder), self.spec.path)
            complete(folder)

    def save_checkpoint(self, path: str) -> None:
        """OSError when a rank's shard is not visible here: it wrote to a disk that is not shared."""
        self.on_all("save_checkpoint", path)
        away = [rank for rank in range(len(self.ranks)) if not (Path(path) / f"rank_{rank}.pt").is_file()]
        if away:
            raise OSError(
                f"the shards of ranks {away} are not in {path}: checkpoints need a file system that all nodes share"
            )

    def sees(self, path: str) -> list[bool]:
        """By rank: whether its node has the file."""
        return self.on_all("sees", path)

    def load_checkpoint(self, path: str) -> None:
        with self._states_on_gpu():
            self.on_all("load_checkpoint", path)


def on_one_host(policy: RayPolicyGroup, groups: Sequence[RayRolloutGroup]) -> bool:
    """Whether policy rank 0 and all engine workers can map each other's memory."""
    workers = [engine.sync_hosts.remote() for group in groups for engine in group.engines]
    sender, *found = ray.get([policy.ranks[0].sync_host.remote(), *workers])
    return {host_of(place) for places in found for place in places} <= {host_of(sender)}


class RayWeightSync:
    """Policy -> engines: one call per actor and sync, one broadcast per bucket, then the agreement check.

    backend: from `Device.sync_backend`. With "ipc", an engine worker without a policy rank on its GPU raises
    `cuda_ipc.Unpaired`.
    """

    def __init__(
        self,
        policy: RayPolicyGroup,
        groups: Sequence[RayRolloutGroup],
        *,
        probes: Sequence[Sequence[int]],
        deadline_s: float,
        max_mean_difference: float,
        backend: str,
    ) -> None:
        self.policy = policy
        self.groups = groups
        self.probes = [list(p) for p in probes]
        self.deadline_s = deadline_s
        self.max_mean_difference = max_mean_difference
        # The policy's log-probs of the probes at the last sync.
        self._last: list[Tensor] | None = None
        self.plan = ray.get(policy.call("weight_plan"))[0]
        self.wire = to_wire(self.plan)
        self._join(backend)

    def _engines(self) -> list[Any]:
        return [engine for group in self.groups for engine in group.engines]

    def _join(self, backend: str) -> None:
        if backend in ("ipc", IPC_ELSE_GLOO):
            backend = self._paired(backend)
        # By CUDA IPC all ranks of the policy send, otherwise only the first.
        senders = len(self.policy.ranks) if backend == "ipc" else 1
        largest = max((bucket.nbytes for bucket in self.plan), default=0)
        address, _ = ray.get(self.policy.ranks[0].get_master_addr_port.remote())
        port = ray.get(self.policy.ranks[0].free_port.remote())
        offsets, world = sync_ranks([group.width for group in self.groups for _ in group.engines])
        world += senders - 1
        refs = [
            engine.init_sync_group.remote(address, port, offset + senders - 1, world, backend, self.deadline_s, largest)
            for engine, offset in zip(self._engines(), offsets)
        ]
        refs += self.policy.call("join_sync_group", address, port, world, backend, self.deadline_s, largest)
        self._get(refs, "joining the weight-sync group")

    def _paired(self, backend: str) -> str:
        """ "ipc" if every engine worker shares its GPU with a rank of the policy."""
        workers = ray.get([engine.sync_hosts.remote() for engine in self._engines()])
        ranks = ray.get(self.policy.call("sync_host"))
        try:
            pair([gpu_of(rank) for rank in ranks], [gpu_of(worker) for found in workers for worker in found])
        except Unpaired as reason:
            if backend == "ipc":
                raise
            logger.warning("weights travel by gloo, through the hosts' memory: %s", reason)
            return "gloo"
        logger.info("weights travel by ipc")
        return "ipc"

    def sync(self, version: int) -> SyncReport:
        with timed() as transfer:
            # Engines that slept get back memory for the weights now, and for the KV cache when the sync is done.
            self._wake("weights")
            refs = [engine.receive_weights.remote(self.wire, version) for engine in self._engines()]
            sent = self._get([*self.policy.call("send_weights", self.plan), *refs], f"weight sync {version}")[0]
            if sent != version:
                raise RuntimeError(f"the policy sent version {sent} of its weights, the controller expected {version}")
            self._wake("kv_cache")
        with timed() as check:
            what = f"the check of weight sync {version}"
            mine = self._get(self.policy.call("token_logprobs", self.probes), what)[0]
            theirs = self._get([engine.prompt_logprobs.remote(self.probes) for engine in self._engines()], what)
            mean, largest, tokens = check_agreement(mine, theirs, version, self.max_mean_difference)
        moved, self._last = mean_change(self._last, mine), mine
        return SyncReport(
            moved=moved,
            version=version,
            seconds=transfer.seconds,
            check_seconds=check.seconds,
            mean_difference=mean,
            max_difference=largest,
            n_tokens=tokens,
        )

    def _wake(self, tag: str) -> None:
        self._get([ref for group in self.groups for ref in group.wake_up(tag)], f"waking the engines' {tag}")

    def _get(self, refs: list[Any], what: str) -> list[Any]:
        try:
            return ray.get(refs, timeout=self.deadline_s)
        except ray.exceptions.GetTimeoutError:
            waiting = ray.wait(refs, num_returns=len(refs), timeout=0)[1]
            raise TimeoutError(
                f"{what} did not end within {self.deadline_s:g} s (--sync.deadline); {len(waiting)} of {len(refs)} "
                f"actors are still in it. Last parameter of the plan: {self.plan[-1].parameters[-1].name}"
            ) from None


def start_evaluator(
    spec: EvaluatorSpec, engines: RayRolloutGroup, *, env: dict[str, str], call_timeout_s: float | None = None
) -> RayEvaluator:
    """It only sends prompts and computes metrics: no CPU or GPU is reserved for it."""
    options = dict(num_cpus=0, runtime_env={"env_vars": env}, max_restarts=0)

    def start() -> Any:
        return ray.remote(_EVALUATOR).options(**options).remote(spec, EngineHandles(engines.engines))

    total = sum(len(benchmark.prompts) for benchmark in spec.benchmarks) * spec.sampling.n
    return RayEvaluator(start, engines.engines, total=total, call_timeout_s=call_timeout_s)
