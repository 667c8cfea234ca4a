"""Where actors land, on simulated nodes with logical GPUs: GPUs are a number to Ray. One cluster; its nodes change."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray import PlacementGroupID
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group

from real_openrlhf.common.device import Device
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.schema import Config
from real_openrlhf.run import placement
from real_openrlhf.run.placement import COLOCATED_SHARE, Bundle, PlacementError, Request, release, reserve
from real_openrlhf.run.ray_groups import _remote
from real_openrlhf.run.specs import placement_requests
from tests.helpers.placement_probe import Probe
from tests.helpers.recipes import RECIPES, Recipe

pytestmark = pytest.mark.integration
CUDA = Device(name="cuda", dtype_name="bf16")
GPU = {"GPU": 1.0, "CPU": 1.0}
# CPUs of a node by its GPUs: one for each actor that may take its GPU, and one to spare.
CPUS = {2: 3, 4: 9, 8: 17}


@dataclass
class Nodes:
    """The nodes of a cluster, which `become` changes; its head has neither CPUs nor GPUs for actors."""

    cluster: Cluster
    running: list[tuple[int, Any]] = field(default_factory=list)

    def become(self, *gpus: int) -> None:
        missing = Counter(gpus)
        for count, node in list(self.running):
            if missing[count] > 0:
                missing[count] -= 1
            else:
                self.cluster.remove_node(node)
                self.running.remove((count, node))
        for count in missing.elements():
            node = self.cluster.add_node(wait=False, num_cpus=CPUS[count], num_gpus=count)
            self.running.append((count, node))
        deadline = time.monotonic() + 60
        while self.known() != sorted(gpus):
            assert time.monotonic() < deadline, f"Ray knows of nodes with {self.known()} GPUs"
            time.sleep(0.1)

    @staticmethod
    def known() -> list[int]:
        """GPUs of each live node whose resources are free."""
        free = ray._private.state.available_resources_per_node()
        alive = [node for node in ray.nodes() if node["Alive"] and "GPU" in node["Resources"]]
        return sorted(int(free.get(node["NodeID"], {}).get("GPU", 0)) for node in alive)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield Nodes(cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def two_nodes(nodes: Nodes) -> None:
    nodes.become(2, 2)


@pytest.fixture(autouse=True)
def every_group_is_given_back(nodes: Nodes) -> Iterator[None]:
    """Also after a test that failed, so that the next one finds all GPUs free."""
    yield
    for found in ray.util.placement_group_table().values():
        group = PlacementGroup(PlacementGroupID(bytes.fromhex(found["placement_group_id"])))
        ray.util.remove_placement_group(group)


def places(actors: list[Any]) -> list[tuple[str, tuple[int, ...]]]:
    return ray.get([actor.where.remote() for actor in actors], timeout=300)


def start(bundle: Bundle, share: float | None = 1.0) -> Any:
    return _remote(Probe, bundle, CUDA, {}, share).remote()


def wide(name: str, engines: int) -> Request:
    return Request(name=name, bundles=(GPU,) * (2 * engines), width=2)


def test_colocated_ranks_and_engines_share_gpus(two_nodes: None) -> None:
    kinds = reserve([Request(name="policy+rollout", bundles=(GPU,) * 4)], 60)
    assert kinds["policy"] == kinds["rollout"]
    shared = kinds["policy"]
    engines, ranks = ([start(bundle, COLOCATED_SHARE) for bundle in shared] for _ in range(2))
    assert places(engines) == places(ranks)
    assert len(set(places(ranks))) == 4 and all(len(gpus) == 1 for _, gpus in places(ranks))
    # Ranks of a node follow each other.
    nodes = [node for node, _ in places(ranks)]
    assert nodes == [bundle.node for bundle in shared] and nodes[0] == nodes[1] != nodes[2] == nodes[3]
    for actor in (*engines, *ranks):
        ray.kill(actor)


def test_apart_each_has_a_gpu_of_its_own(two_nodes: None) -> None:
    apart = reserve([Request(name=name, bundles=(GPU,) * 2) for name in ("policy", "rollout")], 60)
    alone = [start(bundle) for kind in apart.values() for bundle in kind]
    assert len(set(places(alone))) == 4
    for actor in alone:
        ray.kill(actor)


@pytest.mark.parametrize("per_node", [None, 1])
def test_two_runs_in_one_process_ask_for_the_same_kind(two_nodes: None, per_node: int | None) -> None:
    requests = [Request(name="rollout", bundles=(GPU,) * 2, per_node=per_node)]
    kept, other = reserve(requests, 60)["rollout"], reserve(requests, 60)["rollout"]
    assert {bundle.group.id for bundle in kept}.isdisjoint(bundle.group.id for bundle in other)


def test_a_wide_engine_has_a_group_on_one_node(two_nodes: None) -> None:
    # Colocated: an engine's actor takes no GPU, a worker of vLLM's and a rank of the policy fit on each bundle.
    shared = reserve([wide("policy+rollout", 2)], 60)["rollout"]
    assert [bundle.index for bundle in shared] == [0, 1, 0, 1]
    actors = []
    for pair in (shared[:2], shared[2:]):
        assert pair[0].group.id == pair[1].group.id
        engine = start(pair[0], None)
        workers, ranks = ([start(bundle, COLOCATED_SHARE) for bundle in pair] for _ in range(2))
        (node, gpus), *_ = places([engine])
        assert gpus == () and [place[0] for place in places(workers)] == [node, node]
        assert places(workers) == places(ranks) and len(set(places(workers))) == 2
        actors += [engine, *workers, *ranks]
    assert shared[0].node != shared[2].node
    for actor in actors:
        ray.kill(actor)


def test_a_wide_engine_gets_its_node_before_the_policy_is_spread(two_nodes: None) -> None:
    # Two ranks and an engine of two GPUs: on 2 x 2 GPUs each gets a separate node, whichever is named first.
    kinds = reserve([Request(name="policy", bundles=(GPU,) * 2), wide("rollout", 1)], 60)
    assert len({bundle.node for bundle in kinds["rollout"]}) == 1
    assert {b.node for b in kinds["policy"]}.isdisjoint(b.node for b in kinds["rollout"])

    # Who comes later finds no room, and says who asked and what there is; what it did get, it gives back.
    with pytest.raises(PlacementError, match=r"late: 2 x .* was not placed within 3 s .*Nodes: ") as caught:
        reserve([Request(name="late", bundles=(GPU,) * 2)], 3)
    assert str(caught.value).count("3 CPU (1 free), 2 GPU (0 free)") == 2


def test_a_pair_that_no_node_has_room_for_is_refused_in_time(two_nodes: None) -> None:
    taken = placement_group([GPU] * 2, strategy="STRICT_SPREAD")
    assert taken.wait(60)
    # A GPU is free on each node; by their totals the nodes could hold the pair.
    with pytest.raises(PlacementError, match=r"rollout: 1 x 2 x .* was not placed within 3 s") as caught:
        reserve([wide("rollout", 1)], 3)
    assert str(caught.value).count("2 GPU (1 free)") == 2


def nodes_of(places: Sequence[Bundle]) -> list[str]:
    return [place.node for place in places]


def test_ranks_lie_on_nodes_as_the_flags_say(two_nodes: None) -> None:
    # One rank on each node, next to an engine: Ray by itself packs both ranks onto one.
    kinds = reserve(
        [Request(name="policy", bundles=(GPU,) * 2, per_node=1), Request(name="rollout", bundles=(GPU,) * 2)], 60
    )
    assert len(set(nodes_of(kinds["policy"]))) == 2 == len(set(nodes_of(kinds["rollout"])))
    actors = [start(place) for kind in kinds.values() for place in kind]
    assert len(set(places(actors))) == 4
    for actor in actors:
        ray.kill(actor)


def test_ranks_of_a_node_share_a_bundle_and_have_gpus_of_their_own(two_nodes: None) -> None:
    ranks = reserve([Request(name="policy", bundles=(GPU,) * 4, per_node=2)], 60)["policy"]
    assert [rank.index for rank in ranks] in ([0, 0, 1, 1], [1, 1, 0, 0])
    actors = [start(rank) for rank in ranks]
    found = places(actors)
    assert [node for node, _ in found] == nodes_of(ranks) and len(set(found)) == 4
    assert all(len(gpus) == 1 for _, gpus in found)
    for actor in actors:
        ray.kill(actor)


def test_where_the_free_nodes_do_not_allow_that_each_rank_gets_any_node(
    two_nodes: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_SETTLE_S", 1.0)
    three = [Request(name="policy", bundles=(GPU,) * 3, per_node=3)]
    ranks = reserve(three, 60)
    assert sorted(Counter(nodes_of(ranks["policy"])).values()) == [1, 2]
    release(ranks)
    assert "3 x (1 CPU, 1 GPU), PACK, all on one node where there is room: the free nodes do not allow" in caplog.text
    caplog.clear()
    taken = placement_group([GPU] * 2, strategy="STRICT_SPREAD")
    assert taken.wait(60)
    # By its total a node could hold both ranks; now one GPU is free on each.
    ranks = reserve([Request(name="policy", bundles=(GPU,) * 2, per_node=2)], 60)
    assert len(set(nodes_of(ranks["policy"]))) == 2
    assert "the free nodes do not allow that, each rank gets any node" in caplog.text


# -- the recipes of examples/ -----------------------------------------------------------------------------------------


def config_of(recipe: Recipe) -> Config:
    return parse_args(
        [*recipe.flags(), "--actor.model_name_or_path", "m", "--data.prompt_dataset", "d", "--eval.dataset", "e"]
    )


def check_places(config: Config, kinds: dict[str, list[Bundle]]) -> None:
    """Ranks lie on nodes as the flags say, and follow each other; an engine's workers are in a group, on one node."""
    policy, width = kinds["policy"], config.vllm.tensor_parallel_size
    assert len(policy) == config.ranks and len(kinds["rollout"]) == config.vllm.num_engines * width
    per_node = config.actor.num_gpus_per_node
    shares = [nodes_of(policy[i : i + per_node]) for i in range(0, len(policy), per_node)]
    assert len(shares) == config.actor.num_nodes == len({share[0] for share in shares})
    assert all(len(set(share)) == 1 for share in shares)
    engines = [*kinds["rollout"], *kinds.get("evaluator", [])]
    for engine in (engines[i : i + width] for i in range(0, len(engines), width)):
        assert len({(place.node, place.group.id) for place in engine}) == 1
        assert [place.index for place in engine] == list(range(engine[0].index, engine[0].index + width))
    if config.train.colocate_all:
        assert kinds["policy"] == kinds["rollout"]


@pytest.mark.parametrize(
    "gpus", [(8,), (8, 4), pytest.param((8, 4, 8), marks=pytest.mark.slow), (8, 8), (8, 8, 8, 8)], ids=str
)
def test_every_recipe_on_this_cluster(nodes: Nodes, gpus: tuple[int, ...]) -> None:
    nodes.become(*gpus)
    for recipe in RECIPES:
        config = config_of(recipe)
        requests = placement_requests(config, CUDA)
        if gpus.count(8) < recipe.nodes:
            # A node short: refused at once, with what was asked for and what each node has.
            began = time.monotonic()
            with pytest.raises(PlacementError, match=r"16 GPU asked for, the cluster has|have room for 6") as caught:
                reserve(requests, 600)
            assert time.monotonic() - began < 60
            assert str(requests[0]) in str(caught.value) and "17 CPU, 8 GPU" in str(caught.value)
            continue
        kinds = reserve(requests, 60)
        check_places(config, kinds)
        release(kinds)
        while nodes.known() != sorted(gpus):
            time.sleep(0.05)


def recipe_named(name: str) -> Recipe:
    return next(recipe for recipe in RECIPES if str(recipe) == name)


# An actor for every rank, engine and worker: up to 40 processes.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_32b/separate", "qwen3_32b/colocated", "qwen3_8b/config"])
def test_stand_ins_have_the_gpus_that_the_recipe_says(nodes: Nodes, name: str) -> None:
    recipe = recipe_named(name)
    config = config_of(recipe)
    nodes.become(*[8] * recipe.nodes)
    kinds = reserve(placement_requests(config, CUDA), 60)
    colocated, width = config.train.colocate_all, config.vllm.tensor_parallel_size
    share = COLOCATED_SHARE if colocated else 1.0
    engines = [*kinds["rollout"], *kinds.get("evaluator", [])]
    # As ray_groups does: an engine of several GPUs takes none itself, its workers do.
    heads = [start(place, None) for place in engines[::width]] if width > 1 else []
    workers = [start(place, share) for place in engines]
    ranks = [start(place, share) for place in kinds["policy"]]
    at_ranks, at_workers, at_heads = places(ranks), places(workers), places(heads)
    assert [node for node, _ in at_ranks] == nodes_of(kinds["policy"])
    assert all(len(gpus) == 1 for _, gpus in (*at_ranks, *at_workers)) and all(gpus == () for _, gpus in at_heads)
    assert [node for node, _ in at_heads] == [node for node, _ in at_workers[::width]]
    for first in range(0, len(at_workers), width):
        assert len({node for node, _ in at_workers[first : first + width]}) == 1
    everything = set(at_ranks) | set(at_workers)
    assert len(everything) == 8 * recipe.nodes
    if colocated:
        assert at_ranks == at_workers and len(set(at_ranks)) == len(at_ranks)
    else:
        assert set(at_ranks).isdisjoint(at_workers) and len(everything) == len(at_ranks) + len(at_workers)
    for actor in (*heads, *workers, *ranks):
        ray.kill(actor)
