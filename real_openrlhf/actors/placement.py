"""Where actors go: one placement group per kind of actor, reserved whole, with a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from real_openrlhf.errors import RunError

logger = logging.getLogger(__name__)


# Of its bundle, what a rank or an engine takes where both share it; OpenRLHF's number.
COLOCATED_SHARE = 0.2


class PlacementError(RunError):
    """The cluster cannot hold what was asked for, or did not in time."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One placement group: its bundles, and Ray's strategy ("PACK", "STRICT_PACK", "SPREAD").

    name: the kind of actors in it, or several that share its bundles, as in "policy+rollout".
    """

    name: str
    bundles: tuple[dict[str, float], ...]
    strategy: str = "PACK"

    def __str__(self) -> str:
        kinds = {tuple(sorted(b.items())) for b in self.bundles}
        shape = " / ".join(", ".join(f"{count:g} {name}" for name, count in kind) for kind in sorted(kinds))
        return f"{self.name}: {len(self.bundles)} x ({shape}), {self.strategy}"


def check_fits(requests: Sequence[Request], nodes: Sequence[dict[str, float]]) -> None:
    """Refuse at once what can never fit: every bundle on some node, all bundles in the sum of nodes.

    nodes: total resources of each live node.
    """
    for request in requests:
        for bundle in request.bundles:
            if not any(all(node.get(k, 0.0) >= v for k, v in bundle.items()) for node in nodes):
                raise PlacementError(_report(f"no node can hold one bundle of {request}", requests, nodes))
    for kind in sorted({k for r in requests for b in r.bundles for k in b}):
        asked = sum(b.get(kind, 0.0) for r in requests for b in r.bundles)
        there = sum(node.get(kind, 0.0) for node in nodes)
        if asked > there + 1e-9:
            raise PlacementError(_report(f"{asked:g} {kind} asked for, the cluster has {there:g}", requests, nodes))


def reserve(requests: Sequence[Request], timeout_s: float) -> dict[str, PlacementGroup]:
    """Reserve every group, or raise PlacementError naming what was asked for and what exists.

    Returns the group of each kind of actor; kinds that share bundles have the same one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_fits(requests, nodes)
    groups = {r.name: placement_group(list(r.bundles), strategy=r.strategy, name=r.name) for r in requests}
    deadline = time.monotonic() + timeout_s
    for request in requests:
        if not groups[request.name].wait(max(0.1, deadline - time.monotonic())):
            for group in groups.values():
                remove_placement_group(group)
            free = ray.available_resources()
            shown = {k: v for k, v in free.items() if k in ("CPU", "GPU")}
            raise PlacementError(
                _report(
                    f"{request} was not placed within {timeout_s:g} s (--ray.placement_timeout); free now: {shown}",
                    requests,
                    nodes,
                )
            )
        logger.info("placed %s", request)
    return {kind: group for name, group in groups.items() for kind in name.split("+")}


def _report(what: str, requests: Sequence[Request], nodes: Sequence[dict[str, float]]) -> str:
    shown = [{k: v for k, v in node.items() if k in ("CPU", "GPU")} for node in nodes]
    asked = "; ".join(str(r) for r in requests)
    return f"{what}. Asked for: {asked}. Nodes: {shown}"
