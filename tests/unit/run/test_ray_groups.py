"""The adapters between the controller and Ray, on handles that answer at once: who is called, when, with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf")
pytest.importorskip("vllm")

from real_openrlhf.actors.sync.cuda_ipc import Unpaired
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.types import Group, TrainGroup
from real_openrlhf.common.device import IPC_ELSE_GLOO, Device
from real_openrlhf.config.guard_flags import GuardConfig
from real_openrlhf.controller.controller import Controller
from real_openrlhf.controller.guards import Guards
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import PromptStream
from real_openrlhf.run import ray_groups as remote
from real_openrlhf.run.placement import Bundle
from real_openrlhf.run.ray_groups import RayPolicyGroup, RayRolloutGroup, RayWeightSync, on_one_host
from tests.unit.controller.test_controller import SCALE, SETTINGS, World, prompts

CUDA = Device(name="cuda", dtype_name="bf16")
PROBES = [[3, 4, 5], [6, 7]]
LOGPROBS = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]


@dataclass(frozen=True)
class Spec:
    """What the groups read of an engine's and of a policy's spec."""

    seed: int = 7
    tensor_parallel_size: int = 1
    enable_sleep: bool = False
    path: str = "model"
    ranks_per_node: int = 2
    args: Any = None


@dataclass
class Cluster:
    """All actors of a run; `calls` has every method call with the actor's name."""

    engines: list[Engine] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    calls: list[tuple[str, ...]] = field(default_factory=list)
    options: list[tuple[str, int, float | None]] = field(default_factory=list)
    world: World = field(default_factory=World)

    def order(self) -> list[tuple[str, ...]]:
        """The calls, the same call on several actors once."""
        return [call for i, call in enumerate(self.calls) if i == 0 or call != self.calls[i - 1]]


class Engine:
    """An engine that notices when it is used at the wrong time."""

    def __init__(self, cluster: Cluster, bundles: list[int] | None, num_gpus: float, seed: int) -> None:
        self.cluster, self.bundles, self.num_gpus, self.seed = cluster, bundles, num_gpus, seed
        self.awake = {"weights", "kv_cache"}
        self.joined: tuple[Any, ...] = ()
        self.hosts = ["a"]

    def sync_hosts(self) -> list[str]:
        return self.hosts

    def sleep(self) -> None:
        self.cluster.calls.append(("sleep",))
        self.awake = set()

    def wake_up(self, tags: list[str]) -> None:
        self.cluster.calls.append(("wake_up", *tags))
        self.awake |= set(tags)

    def init_sync_group(self, *args: Any) -> None:
        self.joined = args

    def receive_weights(self, wire: Any, version: int) -> None:
        assert "weights" in self.awake
        self.cluster.calls.append(("receive_weights",))
        self.cluster.world.version = version

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        assert self.awake == {"weights", "kv_cache"}
        self.cluster.calls.append(("prompt_logprobs",))
        return LOGPROBS

    def generate(self, wanted: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        assert self.awake == {"weights", "kv_cache"}
        self.cluster.calls.append(("generate",))
        return self.cluster.world.generate(wanted, sampling)


class Rank:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.version, self.at_hand = 0, True
        self.joined: tuple[Any, ...] = ()
        self.host = "a"

    def sync_host(self) -> str:
        return self.host

    def get_master_addr_port(self) -> tuple[str, int]:
        return "host", 1

    def free_port(self) -> int:
        return 2

    def build(self, spec: Any, *after: Any) -> dict[str, Any]:
        self.at_hand = not spec.args.ds.enable_sleep
        self.after = after
        return {}

    def weight_plan(self) -> list[Any]:
        return []

    def join_sync_group(self, *args: Any) -> None:
        self.joined = args

    def save_model(self, path: str, tokenizer_path: str) -> None:
        (Path(path) / "weights").write_text(tokenizer_path)

    def reload_states(self) -> None:
        self.cluster.calls.append(("reload_states",))
        self.at_hand = True

    def offload_states(self) -> None:
        self.cluster.calls.append(("offload_states",))
        self.at_hand = False

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        assert self.at_hand
        self.cluster.calls.append(("train",))
        self.version += 1
        return {}

    def load_checkpoint(self, path: str) -> None:
        assert self.at_hand
        self.cluster.calls.append(("load_checkpoint",))

    def send_weights(self, plan: Any) -> int:
        self.cluster.calls.append(("send_weights",))
        return self.version

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        self.cluster.calls.append(("token_logprobs",))
        return LOGPROBS


class Handle:
    """handle.method.remote(...) calls the method."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()

    def place(cls: type, bundle: Bundle, device: Device, env: dict[str, str], share: float | None) -> Any:
        made.options.append((cls.__name__, bundle.index, share))

        def engine(spec: Spec, *, bundle_indices: list[int] | None, num_gpus: float) -> Handle:
            made.engines.append(Engine(made, bundle_indices, num_gpus, spec.seed))
            return Handle(made.engines[-1])

        def rank(*args: Any) -> Handle:
            made.ranks.append(Rank(made))
            return Handle(made.ranks[-1])

        return SimpleNamespace(remote=engine if cls.__name__ == "RolloutEngine" else rank)

    monkeypatch.setattr(remote, "_remote", place)
    monkeypatch.setattr(remote.ray, "get", lambda refs, timeout=None: refs)
    return made


def bundles(n: int, order: Sequence[int] = range(9)) -> list[Bundle]:
    group: Any = None
    return [Bundle(group=group, index=index, node="a") for index in order[:n]]


def rollout_group(**fields: Any) -> Callable[..., RayRolloutGroup]:
    spec: Any = replace(Spec(), **fields)
    # Ray numbers bundles as it likes; here those of one node are 0 and 2, 1 and 3.
    wide = (0, 2, 1, 3) if spec.tensor_parallel_size > 1 else range(9)

    def start(n: int, share: float = 1.0) -> RayRolloutGroup:
        group = bundles(n * spec.tensor_parallel_size, wide)
        return RayRolloutGroup(spec, n_engines=n, group=group, device=CUDA, env={}, share=share)

    return start


def policy_group(n: int, *, sleeps: bool = False, share: float = 1.0) -> RayPolicyGroup:
    spec: Any = replace(Spec(), args=SimpleNamespace(ds=SimpleNamespace(enable_sleep=sleeps, adam_offload=False)))
    return RayPolicyGroup(spec, n_ranks=n, group=bundles(n), device=CUDA, env={}, share=share)


def weight_sync(policy: RayPolicyGroup, groups: list[RayRolloutGroup], backend: str = "nccl") -> RayWeightSync:
    return RayWeightSync(policy, groups, probes=PROBES, deadline_s=9.0, max_mean_difference=1e-3, backend=backend)


def test_engines_of_one_gpu_take_a_bundle_each(cluster: Cluster) -> None:
    rollout_group()(3)
    assert cluster.options == [("RolloutEngine", i, 1.0) for i in range(3)]
    assert [(e.bundles, e.num_gpus, e.seed) for e in cluster.engines] == [
        (None, 1.0, 7),
        (None, 1.0, 8),
        (None, 1.0, 9),
    ]


def test_a_tensor_parallel_engine_takes_the_bundles_of_one_node_by_its_workers(cluster: Cluster) -> None:
    rollout_group(tensor_parallel_size=2)(2, share=0.2)
    # The actor stands on its first bundle and takes nothing of it.
    assert cluster.options == [("RolloutEngine", 0, None), ("RolloutEngine", 1, None)]
    assert [(e.bundles, e.num_gpus) for e in cluster.engines] == [([0, 2], 0.2), ([1, 3], 0.2)]


def test_every_worker_has_a_rank_of_its_own_in_the_sync_group(cluster: Cluster) -> None:
    groups = [rollout_group(tensor_parallel_size=2)(2), rollout_group()(1)]
    weight_sync(policy_group(2), groups, backend="gloo")
    assert [engine.joined[2] for engine in cluster.engines] == [1, 3, 5]
    for actor in (*cluster.engines, *cluster.ranks):
        assert actor.joined[:2] == ("host", 2) and 6 in actor.joined and actor.joined[-3:] == ("gloo", 9.0, 0)


def test_one_host_is_one_for_all_workers(cluster: Cluster) -> None:
    policy, groups = policy_group(2), [rollout_group()(2), rollout_group()(1)]
    assert on_one_host(policy, groups)
    cluster.ranks[1].host = "b"  # the other ranks send nothing
    assert on_one_host(policy, groups)
    cluster.engines[2].hosts = ["a", "b"]
    assert not on_one_host(policy, groups)
    cluster.engines[2].hosts, cluster.ranks[0].host = ["a"], "b"
    assert not on_one_host(policy, groups)
    # What GPU they have does not matter for that.
    cluster.engines[0].hosts, cluster.engines[2].hosts = ["b gpu:A"], ["b gpu:C"]
    cluster.engines[1].hosts, cluster.ranks[0].host = ["b"], "b gpu:B"
    assert on_one_host(policy, groups)


@pytest.mark.parametrize("backend", ["ipc", IPC_ELSE_GLOO])
def test_all_ranks_send_where_every_worker_shares_a_gpu_with_one(cluster: Cluster, backend: str) -> None:
    policy, groups = policy_group(2), [rollout_group(tensor_parallel_size=2)(1)]
    for rank, gpu in zip(cluster.ranks, "AB", strict=True):
        rank.host = f"a gpu:{gpu}"
    cluster.engines[0].hosts = ["a gpu:B", "a gpu:A"]
    weight_sync(policy, groups, backend=backend)
    # Ranks 0 and 1 are the policy's; the workers are 2 and 3 of 4.
    assert cluster.engines[0].joined == ("host", 2, 2, 4, "ipc", 9.0, 0)
    assert [rank.joined for rank in cluster.ranks] == [("host", 2, 4, "ipc", 9.0, 0)] * 2


def test_a_worker_on_a_gpu_of_its_own_takes_all_to_cpu_memory_or_is_named(cluster: Cluster) -> None:
    """As the evaluator's engine is."""
    policy, groups = policy_group(1), [rollout_group()(1), rollout_group()(1)]
    cluster.ranks[0].host, cluster.engines[0].hosts, cluster.engines[1].hosts = "a gpu:A", ["a gpu:A"], ["a gpu:X"]
    weight_sync(policy, groups, backend=IPC_ELSE_GLOO)
    assert [engine.joined for engine in cluster.engines] == [("host", 2, i, 3, "gloo", 9.0, 0) for i in (1, 2)]
    with pytest.raises(Unpaired, match=r"GPUs \['X'\] have no policy rank"):
        weight_sync(policy, groups, backend="ipc")


def test_ranks_start_while_engines_do_and_build_once_those_sleep(cluster: Cluster) -> None:
    rollouts = rollout_group(enable_sleep=True)(2)
    asleep = rollouts.fall_asleep()
    assert len(asleep) == 2 and rollout_group()(1).fall_asleep() == []
    spec: Any = replace(Spec(), args=SimpleNamespace(ds=SimpleNamespace(enable_sleep=False, adam_offload=False)))
    place: dict[str, Any] = dict(n_ranks=2, group=bundles(2), device=CUDA, env={})
    RayPolicyGroup(spec, **place, after=asleep)
    # Ray calls `build` when these have resolved.
    assert [rank.after for rank in cluster.ranks] == [tuple(asleep)] * 2


def test_colocated_engines_and_policy_take_turns(cluster: Cluster) -> None:
    """The calls of a whole run: who sleeps gives its memory up before the other one needs it."""
    rollouts = rollout_group(enable_sleep=True)(2, share=0.2)
    rollouts.sleep()
    policy = policy_group(2, sleeps=True, share=0.2)
    assert cluster.options == [(name, i, 0.2) for name in ("RolloutEngine", "RealPolicyActor") for i in (0, 1)]
    own = rollout_group()(1)  # the evaluator's, on a separate GPU
    sync = weight_sync(policy, [rollouts, own])

    class Evaluates(World):
        def start(self, version: int) -> None:
            cluster.calls.append(("evaluate",))
            assert all(engine.awake == {"weights", "kv_cache"} for engine in cluster.engines)
            self.version = version  # the engines' sync is the cluster's, not this world's
            super().start(version)

    policy.save_model = lambda path, complete: None  # type: ignore[method-assign]
    run = Controller(
        replace(SETTINGS, total_steps=2, eval_steps=1),
        scale=SCALE,
        objective=RealObjective(),
        prompts=PromptStream(prompts(), seed=0, num_episodes=1),
        rollouts=rollouts,
        policy=policy,
        weight_sync=sync,
        evaluator=(watcher := Evaluates()),
        guards=Guards(GuardConfig(), scale_range=2.0),
        export=JudgeExport(policy, "out/model", metric=None),
        log=watcher,
        progress=watcher,
    )
    run.fit()
    synced = [
        *(("wake_up", "weights"), ("send_weights",), ("receive_weights",), ("wake_up", "kv_cache")),
        *(("token_logprobs",), ("prompt_logprobs",), ("evaluate",)),
    ]
    got = cluster.order()
    # Sender and receivers are called together.
    together = [sorted(got[i : i + 2]) for i, call in enumerate(got[:-1]) if call == ("receive_weights",)]
    assert together == [[("receive_weights",), ("send_weights",)]] * 3
    step = [("generate",), ("sleep",), ("reload_states",), ("train",), ("offload_states",), *synced]
    want = [("sleep",), *synced, *step, *step]
    assert [call for call in got if call != ("receive_weights",)] == [c for c in want if c != ("receive_weights",)]
    # The evaluator's engine never slept.
    assert cluster.calls.count(("sleep",)) == 2 * 3 and cluster.calls.count(("wake_up", "weights")) == 2 * 3


def test_an_export_takes_its_place_only_when_it_is_complete(cluster: Cluster, tmp_path: Path) -> None:
    policy, model = policy_group(1), tmp_path / "model"
    policy.save_model(str(model), lambda folder: (folder / "README.md").write_text("card") and None)
    assert {path.name: path.read_text() for path in model.iterdir()} == {"weights": "model", "README.md": "card"}

    def fails(folder: Path) -> None:
        assert (folder / "weights").exists() and not (folder / "README.md").exists()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        policy.save_model(str(model), fails)
    assert (model / "README.md").read_text() == "card" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_sleep_nothing_wakes_or_moves(cluster: Cluster) -> None:
    rollouts, policy = rollout_group()(2), policy_group(2)
    rollouts.sleep()
    weight_sync(policy, [rollouts]).sync(0)
    policy.train([])
    assert {call[0] for call in cluster.calls} == {
        "send_weights",
        "receive_weights",
        "token_logprobs",
        "prompt_logprobs",
        "train",
    }


def test_a_checkpoint_is_loaded_into_states_that_are_at_hand(cluster: Cluster, tmp_path: Path) -> None:
    policy = policy_group(1, sleeps=True)
    policy.load_checkpoint(str(tmp_path))
    assert cluster.calls == [("reload_states",), ("load_checkpoint",), ("offload_states",)]


def test_a_policy_of_another_version_is_refused(cluster: Cluster) -> None:
    sync = weight_sync(policy_group(1), [rollout_group()(1)])
    with pytest.raises(RuntimeError, match="sent version 0 of its weights, the controller expected 4"):
        sync.sync(4)
