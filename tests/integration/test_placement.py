"""Where actors land, on a Ray cluster of two nodes with two logical GPUs each: GPUs are a number to Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from openrlhf.trainer.ray.utils import get_bundle_indices
from ray.cluster_utils import Cluster

from real_openrlhf.actors.device import Device
from real_openrlhf.actors.placement import COLOCATED_SHARE, Request, reserve
from real_openrlhf.actors.remote import _remote
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


def places(actors: list[Any]) -> list[tuple[str, tuple[int, ...]]]:
    return ray.get([actor.where.remote() for actor in actors], timeout=120)


def test_colocated_ranks_and_engines_share_gpus_and_apart_they_do_not(two_nodes: None) -> None:
    groups = reserve([Request(name="policy+rollout", bundles=(GPU,) * 4)], 120)
    assert groups["policy"] is groups["rollout"]
    group = groups["policy"]

    def start(share: float | None, bundle: int) -> Any:
        return _remote(Probe, group, bundle, CUDA, {}, share).remote()

    engines = [start(COLOCATED_SHARE, i) for i in range(4)]
    ranks = [start(COLOCATED_SHARE, i) for i in range(4)]
    assert places(engines) == places(ranks)
    assert len(set(places(ranks))) == 4 and all(len(gpus) == 1 for _, gpus in places(ranks))
    for actor in (*engines, *ranks):
        ray.kill(actor)

    # Tensor parallel: an engine's bundles lie on one node, its actor takes no GPU, a worker of vLLM's fits on each.
    for i in range(2):
        bundles = get_bundle_indices(group, i, 2)
        workers = [start(COLOCATED_SHARE, bundle) for bundle in bundles]
        engine = start(None, bundles[0])
        (node, gpus), *_ = places([engine])
        assert gpus == () and [place[0] for place in places(workers)] == [node, node]
        assert len(set(places(workers))) == 2
    ray.util.remove_placement_group(group)

    apart = reserve([Request(name=name, bundles=(GPU,) * 2) for name in ("policy", "rollout")], 120)
    alone = [_remote(Probe, apart[name], i, CUDA, {}).remote() for name in apart for i in range(2)]
    assert len(set(places(alone))) == 4
