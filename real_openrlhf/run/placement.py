"""Which node each actor runs on: placement groups per kind of actor, each reserved completely, within a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from real_openrlhf.common.errors import RunError

logger = logging.getLogger(__name__)


# The share of a bundle that a rank takes, and an engine, where both share the bundle. OpenRLHF's number.
COLOCATED_SHARE = 0.2
# Name of the request for rollout engines that share no bundles.
ROLLOUT = "rollout"


class PlacementError(RunError):
    """The cluster cannot hold the actors, or did not make room for them in time."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The resource bundles that one kind of actor asks Ray for.

    name   the kind of actor, or several that share the bundles, as in "policy+rollout"
    width  so many bundles in a row must be on one node, those of one engine; None: each may be on any node
    """

    name: str
    bundles: tuple[dict[str, float], ...]
    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and (self.width < 1 or len(self.bundles) % self.width):
            raise ValueError(f"{len(self.bundles)} bundles cannot be groups of {self.width}")

    @property
    def groups(self) -> list[tuple[dict[str, float], ...]]:
        """The bundles of each placement group."""
        width = self.width or len(self.bundles)
        return [self.bundles[i : i + width] for i in range(0, len(self.bundles), width)]

    @property
    def on_one_node(self) -> bool:
        return self.width is not None

    @property
    def strategy(self) -> str:
        """Ray's name for the placement strategy."""
        return "STRICT_PACK" if self.on_one_node else "PACK"

    def __str__(self) -> str:
        kinds = {tuple(sorted(b.items())) for b in self.bundles}
        shape = " / ".join(", ".join(f"{count:g} {name}" for name, count in kind) for kind in sorted(kinds))
        count = f"{len(self.bundles)}" if self.width is None else f"{len(self.groups)} x {self.width}"
        return f"{self.name}: {count} x ({shape}), {self.strategy}"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A reserved bundle: its placement group, its index there, and the id of its node."""

    group: PlacementGroup
    index: int
    node: str


def check_fits(requests: Sequence[Request], nodes: Sequence[dict[str, float]]) -> None:
    """Refuse at once what can never fit: PlacementError.

    Every bundle must fit on some node, and all bundles into the sum of the nodes. Of a STRICT_PACK request, every
    group must fit on some node, and there may be no more groups than the nodes can hold.
    nodes: total resources of each live node.
    """
    for request in requests:
        if request.on_one_node:
            _check_groups(request, requests, nodes)
        for bundle in request.bundles:
            if not any(_times(node, bundle) for node in nodes):
                raise PlacementError(_report(f"no node can hold one bundle of {request}", requests, nodes))
    for kind in sorted({k for r in requests for b in r.bundles for k in b}):
        asked = sum(b.get(kind, 0.0) for r in requests for b in r.bundles)
        there = sum(node.get(kind, 0.0) for node in nodes)
        if asked > there + 1e-9:
            raise PlacementError(_report(f"{asked:g} {kind} asked for, the cluster has {there:g}", requests, nodes))


def _check_groups(request: Request, requests: Sequence[Request], nodes: Sequence[dict[str, float]]) -> None:
    groups = [_sum(group) for group in request.groups]
    for group in groups:
        if not any(_times(node, group) for node in nodes):
            n = request.width or len(request.bundles)
            raise PlacementError(
                _report(
                    f"no node can hold the {n} bundles of an engine of {request} (--vllm.tensor_parallel_size)",
                    requests,
                    nodes,
                )
            )
    room = sum(max(_times(node, group) for group in groups) for node in nodes) if groups else 0
    if room < len(groups):
        raise PlacementError(
            _report(
                f"{len(groups)} engines asked for, each on one node; the nodes have room for {room}",
                requests,
                nodes,
            )
        )


def _sum(bundles: Sequence[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(b.get(kind, 0.0) for b in bundles) for kind in {k for b in bundles for k in b}}


def _times(node: dict[str, float], bundle: dict[str, float]) -> int:
    """How often the bundle fits on the node."""
    return min((int((node.get(kind, 0.0) + 1e-9) // count) for kind, count in bundle.items() if count), default=1)


def reserve(requests: Sequence[Request], timeout_s: float) -> dict[str, list[Bundle]]:
    """Reserve every group, or raise PlacementError naming what was asked for and what each node has.

    Returns the bundles of each kind of actor: those of one node follow each other, those of a group keep their order,
    and kinds that share bundles have the same ones. Rank i runs on the i-th bundle of this list, since Ray's own
    numbering is arbitrary.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_fits(requests, nodes)
    deadline = time.monotonic() + timeout_s
    made: dict[str, list[PlacementGroup]] = {request.name: [] for request in requests}
    # Groups that need one node are placed first. The rest waits until they have their places: it fits anywhere.
    for request in sorted(requests, key=lambda r: not r.on_one_node):
        # Ray refuses a second group of one name.
        made[request.name] = [
            placement_group(list(bundles), strategy=request.strategy, name=f"{request.name}_{i}")
            for i, bundles in enumerate(request.groups)
        ]
        if not all(group.wait(max(0.1, deadline - time.monotonic())) for group in made[request.name]):
            free = [_cpus_and_gpus(node) for node in available_resources_per_node().values()]
            for group in (group for groups in made.values() for group in groups):
                remove_placement_group(group)
            raise PlacementError(
                _report(
                    f"{request} was not placed within {timeout_s:g} s (--ray.placement_timeout); free now: {free}",
                    requests,
                    nodes,
                )
            )
        logger.info("placed %s", request)
    return {kind: by_node(_bundles(groups)) for name, groups in made.items() for kind in name.split("+")}


def release(places: Mapping[str, Sequence[Bundle]]) -> None:
    """Give back what `reserve` reserved. Actors that still run there end."""
    for group in {bundle.group.id: bundle.group for bundles in places.values() for bundle in bundles}.values():
        remove_placement_group(group)


def by_node(bundles: Sequence[Bundle]) -> list[Bundle]:
    """Sorted so that bundles of one node follow each other; nodes in the order of their first bundle."""
    first = {bundle.node: i for i, bundle in reversed(list(enumerate(bundles)))}
    return sorted(bundles, key=lambda bundle: first[bundle.node])


def _bundles(groups: Sequence[PlacementGroup]) -> list[Bundle]:
    found = []
    for group in groups:
        nodes = placement_group_table(group)["bundles_to_node_id"]
        found += [Bundle(group=group, index=index, node=nodes[index]) for index in sorted(nodes)]
    return found


def _cpus_and_gpus(node: dict[str, float]) -> dict[str, float]:
    return {kind: node[kind] for kind in ("CPU", "GPU") if kind in node}


def _report(what: str, requests: Sequence[Request], nodes: Sequence[dict[str, float]]) -> str:
    asked = "; ".join(str(r) for r in requests)
    return f"{what}. Asked for: {asked}. Nodes: {[_cpus_and_gpus(node) for node in nodes]}"
