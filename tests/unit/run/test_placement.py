"""What can never fit is refused at once, with what was asked for and what there is."""

from __future__ import annotations

from typing import Any

import pytest

from real_openrlhf.run.placement import (
    Bundle,
    PlacementError,
    Request,
    by_node,
    check_fits,
    nodes_can_be_shared_out,
)

GPU = {"GPU": 1.0, "CPU": 1.0}
CPU = {"CPU": 1.0}


def node(cpus: float, gpus: float = 0.0, **other: float) -> dict[str, float]:
    return {"CPU": cpus, "memory": 1e10, **({"GPU": gpus} if gpus else {}), **other}


@pytest.mark.parametrize(
    ("requests", "nodes"),
    [
        ([Request(name="policy", bundles=(CPU,) * 2)], [node(2)]),
        ([Request(name="policy", bundles=(CPU,)), Request(name="rollout", bundles=(CPU,))], [node(1), node(1)]),
        ([Request(name="policy", bundles=(GPU,) * 8)], [node(16, 4), node(16, 4)]),
        ([Request(name="policy", bundles=({"CPU": 0.1},) * 10)], [node(1)]),  # 0.1 * 10 > 1 in floats
        ([], [node(1)]),
        ([Request(name="rollout", bundles=(GPU,) * 6, width=2)], [node(8, 2), node(8, 5)]),
        ([Request(name="engine", bundles=(GPU,) * 4, width=4)], [node(8, 1), node(8, 4)]),
    ],
)
def test_what_fits(requests: list[Request], nodes: list[dict[str, float]]) -> None:
    check_fits(requests, nodes)


def test_a_bundle_that_no_node_can_hold() -> None:
    requests = [
        Request(name="policy", bundles=(CPU,)),
        Request(name="rollout", bundles=({"GPU": 1.0, "CPU": 4.0},) * 2),
    ]
    # The sums would do: 2 GPUs and 9 CPUs.
    nodes = [node(3, 2), node(20)]
    with pytest.raises(PlacementError) as caught:
        check_fits(requests, nodes)
    message = str(caught.value)
    assert message.startswith("no node can hold one bundle of rollout: 2 x (4 CPU, 1 GPU), PACK")
    assert "Asked for: policy: 1 x (1 CPU), PACK; rollout: 2 x" in message
    assert message.endswith("Nodes: 3 CPU, 2 GPU; 20 CPU, 0 GPU")


def test_gpus_on_a_cluster_without_any() -> None:
    with pytest.raises(PlacementError, match="no node can hold one bundle of policy"):
        check_fits([Request(name="policy", bundles=(GPU,))], [node(64)])


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([node(64, 3)], "4 GPU asked for, the cluster has 3"),
        ([node(2, 2), node(1, 2)], "4 CPU asked for, the cluster has 3"),
    ],
)
def test_a_sum_that_is_too_large(nodes: list[dict[str, float]], says: str) -> None:
    requests = [Request(name="policy", bundles=(GPU,) * 2), Request(name="rollout", bundles=(GPU,) * 2)]
    with pytest.raises(PlacementError, match=says) as caught:
        check_fits(requests, nodes)
    assert "policy: 2 x (1 CPU, 1 GPU), PACK; rollout: 2 x (1 CPU, 1 GPU), PACK" in str(caught.value)


def test_other_resources_count_too() -> None:
    request = Request(name="policy", bundles=({"CPU": 1.0, "special": 1.0},) * 2)
    check_fits([request], [node(4, special=2)])
    with pytest.raises(PlacementError, match="2 special asked for, the cluster has 1"):
        check_fits([request], [node(4, special=1)])


def test_no_nodes() -> None:
    with pytest.raises(PlacementError, match=r"no node can hold .* Nodes: none$"):
        check_fits([Request(name="policy", bundles=(CPU,))], [])


def test_different_bundles_are_all_shown() -> None:
    request = Request(name="mixed", bundles=(CPU, GPU, CPU))
    assert str(request) == "mixed: 3 x (1 CPU / 1 CPU, 1 GPU), PACK"


def test_engines_of_several_gpus_need_them_on_one_node() -> None:
    wide = Request(name="rollout", bundles=(GPU,) * 4, width=4)
    assert str(wide) == "rollout: 1 x 4 x (1 CPU, 1 GPU), STRICT_PACK"
    with pytest.raises(
        PlacementError, match=r"no node can hold the 4 bundles of an engine .*tensor_parallel_size"
    ) as e:
        check_fits([wide], [node(8, 3), node(8, 3)])
    assert str(e.value).endswith("Nodes: 8 CPU, 3 GPU; 8 CPU, 3 GPU")
    # Three GPUs on each of two nodes: 6 in all, but a pair on each node only.
    pairs = Request(name="rollout", bundles=(GPU,) * 6, width=2)
    with pytest.raises(PlacementError, match=r"3 engines asked for, each on one node .* room for 2"):
        check_fits([pairs], [node(8, 3), node(8, 3)])
    # Enough GPUs, not enough CPUs.
    with pytest.raises(PlacementError, match="room for 2"):
        check_fits([pairs], [node(3, 8), node(3, 8)])


def test_rollout_engines_and_the_evaluators_compete_for_nodes() -> None:
    engines = Request(name="rollout", bundles=(GPU,) * 4, width=2)
    evaluator = Request(name="evaluator", bundles=(GPU,) * 2, width=2)
    # Each request alone fits, and so does the sum of six GPUs, but a node of three has room for one pair.
    nodes = [node(8, 3, **{"node:__internal_head__": 1.0, "node:10.0.0.1": 1.0}), node(8, 3, **{"node:10.0.0.2": 1.0})]
    for alone in (engines, evaluator):
        check_fits([alone], nodes)
    with pytest.raises(PlacementError, match=r"3 engines asked for, each on one node \(2 CPU, 2 GPU\);.* for 2") as e:
        check_fits([engines, evaluator], nodes)
    assert str(e.value).endswith("Nodes: 10.0.0.1: 8 CPU, 3 GPU; 10.0.0.2: 8 CPU, 3 GPU")


def test_bundles_that_are_no_whole_groups() -> None:
    with pytest.raises(ValueError, match="5 bundles cannot be groups of 2"):
        Request(name="rollout", bundles=(GPU,) * 5, width=2)
    with pytest.raises(ValueError, match="5 bundles cannot be groups of 2"):
        Request(name="policy", bundles=(GPU,) * 5, per_node=2)
    with pytest.raises(ValueError, match="engines of 4 bundles do not share out the 6 of a node"):
        Request(name="policy+rollout", bundles=(GPU,) * 12, per_node=6, width=4)


def test_what_a_request_says_of_nodes() -> None:
    assert str(Request(name="policy", bundles=(CPU,), per_node=1)) == "policy: 1 x (1 CPU), PACK"
    one = Request(name="policy", bundles=(GPU,) * 8, per_node=8)
    assert str(one) == "policy: 8 x (1 CPU, 1 GPU), PACK, all on one node where there is room"
    two = Request(name="policy", bundles=(GPU,) * 8, per_node=4)
    assert str(two) == "policy: 8 x (1 CPU, 1 GPU), PACK, 4 on each of 2 nodes where there is room"
    assert two.node_shares == [(GPU,) * 4] * 2
    shared = Request(name="policy+rollout", bundles=(GPU,) * 4, width=2, per_node=4)
    assert str(shared) == "policy+rollout: 2 x 2 x (1 CPU, 1 GPU), STRICT_PACK, all on one node where there is room"


def policy(ranks: int, per_node: int) -> Request:
    return Request(name="policy", bundles=(GPU,) * ranks, per_node=per_node)


def pairs(count: int, name: str = "rollout") -> Request:
    return Request(name=name, bundles=(GPU,) * (2 * count), width=2)


@pytest.mark.parametrize(
    ("requests", "gpus", "can"),
    [
        ([policy(8, 8), pairs(3), pairs(1, "evaluator")], (8, 8), True),
        ([policy(12, 6), pairs(1), pairs(1, "evaluator")], (8, 8), True),
        # Five ranks leave three GPUs on each node: room for one pair on each, not for three.
        ([policy(10, 5), pairs(3)], (8, 8), False),
        ([policy(8, 8), pairs(4)], (8, 4, 4), True),
        # Only one node has eight GPUs.
        ([policy(16, 8)], (8, 4, 4), False),
        # The smallest node that does takes the policy, and leaves the large one to the engine.
        ([policy(4, 4), Request(name="rollout", bundles=(GPU,) * 8, width=8)], (8, 4), True),
        # Two shares of a policy never lie on one node.
        ([policy(4, 2)], (8,), False),
        ([policy(4, 2), Request(name="reference", bundles=(GPU,) * 4, per_node=2)], (4, 4), True),
        # A fitting node that is the last single GPU for others does not help.
        ([policy(4, 4), Request(name="rollout", bundles=(GPU,) * 5)], (4, 4), False),
        # Where ranks and engines share bundles, two shares may lie on one node.
        ([Request(name="policy+rollout", bundles=(GPU,) * 4, width=2, per_node=2)], (4,), True),
        ([Request(name="policy+rollout", bundles=(GPU,) * 16, width=2, per_node=8)], (8, 4, 8), True),
        ([Request(name="policy+rollout", bundles=(GPU,) * 8, width=2, per_node=8)], (4, 4), False),
        ([], (8,), True),
    ],
)
def test_ranks_lie_on_nodes_as_the_flags_say_if_that_can_be(
    requests: list[Request], gpus: tuple[int, ...], can: bool
) -> None:
    assert nodes_can_be_shared_out(requests, [node(64, count) for count in gpus]) is can


def test_cpus_are_counted_on_each_node_too() -> None:
    assert not nodes_can_be_shared_out([policy(8, 8)], [node(4, 8), node(4, 8)])
    assert nodes_can_be_shared_out([policy(8, 4)], [node(4, 8), node(4, 8)])


def test_bundles_of_a_node_stand_beside_each_other() -> None:
    group: Any = None
    nodes = ["c", "a", "b", "c", "a", "b"]
    ordered = by_node([Bundle(group=group, index=i, node=name) for i, name in enumerate(nodes)])
    # Bundle 0's node is first, and a node's bundles keep their order.
    assert [(b.index, b.node) for b in ordered] == [(0, "c"), (3, "c"), (1, "a"), (4, "a"), (2, "b"), (5, "b")]
    assert by_node([]) == []
