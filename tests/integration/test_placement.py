"""Where actors land, on a Ray cluster of two nodes with two logical GPUs each: GPUs are a number to Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import PlacementGroupID
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group

from real_openrlhf.common.device import Device
from real_openrlhf.run.placement import COLOCATED_SHARE, Bundle, PlacementError, Request, reserve
from real_openrlhf.run.ray_groups import _remote
from tests.helpers.placement_probe import Probe

pytestmark = pytest.mark.integration
CUDA = Device(name="cuda", dtype_name="bf16")
GPU = {"GPU": 1.0, "CPU": 1.0}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    node = {"num_cpus": 3, "num_gpus": 2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(autouse=True)
def every_group_is_given_back(two_nodes: None) -> Iterator[None]:
    """Also after a test that failed, so that the next one finds all GPUs free."""
    yield
    for found in ray.util.placement_group_table().values():
        group = PlacementGroup(PlacementGroupID(bytes.fromhex(found["placement_group_id"])))
        ray.util.remove_placement_group(group)


def places(actors: list[Any]) -> list[tuple[str, tuple[int, ...]]]:
    return ray.get([actor.where.remote() for actor in actors], timeout=120)


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
    with pytest.raises(PlacementError, match=r"late: 2 x .* was not placed within 3 s .*; free now: ") as caught:
        reserve([Request(name="late", bundles=(GPU,) * 2)], 3)
    assert "Nodes: [{'CPU': 3.0, 'GPU': 2.0}, {'CPU': 3.0, 'GPU': 2.0}]" in str(caught.value)


def test_a_pair_that_no_node_has_room_for_is_refused_in_time(two_nodes: None) -> None:
    taken = placement_group([GPU] * 2, strategy="STRICT_SPREAD")
    assert taken.wait(60)
    # A GPU is free on each node; by their totals the nodes could hold the pair.
    with pytest.raises(PlacementError, match=r"rollout: 1 x 2 x .* was not placed within 3 s") as caught:
        reserve([wide("rollout", 1)], 3)
    free = str(caught.value).partition("free now: ")[2]
    assert free.startswith("[{") and free.count("'GPU': 1.0") == 2
