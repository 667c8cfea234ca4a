"""Which node each actor runs on: placement groups per kind of actor, each reserved completely, within a deadline."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from real_openrlhf.common.errors import RunError

logger = logging.getLogger(__name__)


# The share of a bundle that a rank takes, and an engine, where both share the bundle. OpenRLHF's number.
COLOCATED_SHARE = 0.2
# Seconds in which nodes become free enough to be shared out as the flags say, as after a run that has just ended; and
# again in which Ray then places that.
_SETTLE_S = 30.0
# Name of the request for rollout engines that share no bundles.
ROLLOUT = "rollout"

Resources = Mapping[str, float]


class PlacementError(RunError):
    """The cluster cannot hold the actors, or did not make room for them in time."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The resource bundles that one kind of actor asks Ray for.

    name      the kind of actor, or several that share the bundles, as in "policy+rollout"
    width     so many bundles in a row must be on one node, those of one engine; None: each may be on any node
    per_node  so many bundles in a row are put on one node, as long as the free nodes can hold that; else only width
              counts. The next so many are on another node, unless ranks and engines share the bundles. None: nothing
              of the kind
    """

    name: str
    bundles: tuple[dict[str, float], ...]
    width: int | None = None
    per_node: int | None = None

    def __post_init__(self) -> None:
        for count in (self.width, self.per_node):
            if count is not None and (count < 1 or len(self.bundles) % count):
                raise ValueError(f"{len(self.bundles)} bundles cannot be groups of {count}")
        if self.per_node is not None and self.per_node % (self.width or 1):
            raise ValueError(f"engines of {self.width} bundles do not share out the {self.per_node} of a node")

    @property
    def shared(self) -> bool:
        """Whether several kinds of actors share the bundles. vLLM takes a bundle of its own for each worker."""
        return "+" in self.name

    @property
    def groups(self) -> list[tuple[dict[str, float], ...]]:
        """The bundles of each placement group."""
        return self._parts(self.width or len(self.bundles))

    @property
    def node_shares(self) -> list[tuple[dict[str, float], ...]]:
        """What each node holds where per_node is met."""
        return self._parts(self.per_node or 1)

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
        wish = ""
        if self.per_node is not None and self.per_node > 1:
            nodes = len(self.bundles) // self.per_node
            wish = f", {self.per_node} on each of {nodes} nodes" if nodes > 1 else ", all on one node"
            wish += " where there is room"
        return f"{self.name}: {count} x ({shape}), {self.strategy}{wish}"

    def _parts(self, size: int) -> list[tuple[dict[str, float], ...]]:
        return [self.bundles[i : i + size] for i in range(0, len(self.bundles), size)]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A place that is reserved for one actor: placement group, index of the bundle there, id of the node.

    Ranks whose places are given by the node share one bundle of Ray's.
    """

    group: PlacementGroup
    index: int
    node: str


# -- counting: before anything is asked of Ray ------------------------------------------------------------------------


def check_fits(requests: Sequence[Request], nodes: Sequence[Resources]) -> None:
    """Refuse at once what can never fit: PlacementError.

    Every bundle must fit on some node, and all bundles into the sum of the nodes. Of STRICT_PACK requests, every
    group must fit on some node, and there may be no more groups, of all requests together, than the nodes can hold.
    nodes: total resources of each live node.
    """
    for request in requests:
        if request.on_one_node:
            _check_widest(request, requests, nodes)
        for bundle in request.bundles:
            if not any(_times(node, bundle) for node in nodes):
                raise PlacementError(_report(f"no node can hold one bundle of {request}", requests, nodes))
    for kind in sorted({k for r in requests for b in r.bundles for k in b}):
        asked = sum(b.get(kind, 0.0) for r in requests for b in r.bundles)
        there = sum(node.get(kind, 0.0) for node in nodes)
        if asked > there + 1e-9:
            raise PlacementError(_report(f"{asked:g} {kind} asked for, the cluster has {there:g}", requests, nodes))
    _check_groups(requests, nodes)


def _check_widest(request: Request, requests: Sequence[Request], nodes: Sequence[Resources]) -> None:
    for group in request.groups:
        if not any(_times(node, _sum(group)) for node in nodes):
            what = f"no node can hold the {len(group)} bundles of an engine of {request} (--vllm.tensor_parallel_size)"
            raise PlacementError(_report(what, requests, nodes))


def _check_groups(requests: Sequence[Request], nodes: Sequence[Resources]) -> None:
    """Engines of one size, rollout engines and the evaluator's, compete for the same nodes."""
    sizes: dict[tuple[tuple[str, float], ...], int] = {}
    for group in (group for request in requests if request.on_one_node for group in request.groups):
        size = tuple(sorted(_sum(group).items()))
        sizes[size] = sizes.get(size, 0) + 1
    for size, count in sizes.items():
        room = sum(_times(node, dict(size)) for node in nodes)
        if room < count:
            shape = ", ".join(f"{number:g} {kind}" for kind, number in size)
            what = f"{count} engines asked for, each on one node ({shape}); the nodes have room for {room}"
            raise PlacementError(_report(what, requests, nodes))


def nodes_can_be_shared_out(requests: Sequence[Request], free: Sequence[Resources]) -> bool:
    """Whether every per_node can be met beside all other requests, on nodes with these free resources.

    Larger parts first, each on the fullest node that holds it, as Ray does: a plain attempt. Where it fails, another
    order might do; then ranks are placed one by one, which always works if anything does.
    """
    parts = []
    for request in requests:
        apart = request.per_node is not None and not request.shared
        by_groups = request.per_node is None and request.on_one_node
        sizes = request.groups if by_groups else request.node_shares
        parts += [(_sum(size), request.name if apart else None) for size in sizes]
    parts.sort(key=lambda part: -sum(part[0].values()))
    rooms = [dict(node) for node in free]
    used: dict[str, set[int]] = {}
    for size, apart_from in parts:
        taken = used.setdefault(apart_from, set()) if apart_from is not None else set()
        fitting = [i for i, room in enumerate(rooms) if i not in taken and _times(room, size)]
        if not fitting:
            return False
        chosen = min(fitting, key=lambda i: sum(rooms[i].get(kind, 0.0) for kind in size))
        rooms[chosen] = {kind: count - size.get(kind, 0.0) for kind, count in rooms[chosen].items()}
        if apart_from is not None:
            taken.add(chosen)
    return True


def _sum(bundles: Sequence[Resources]) -> dict[str, float]:
    return {kind: sum(b.get(kind, 0.0) for b in bundles) for kind in {k for b in bundles for k in b}}


def _times(node: Resources, bundle: Resources) -> int:
    """How often the bundle fits on the node."""
    return min((int((node.get(kind, 0.0) + 1e-9) // count) for kind, count in bundle.items() if count), default=1)


# -- asking Ray -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The placement groups of a request.

    by_node: per_node is met. Ranks of a node take their parts of one large bundle there; where ranks and engines share
    bundles, each node has a group.
    """

    request: Request
    by_node: bool

    @property
    def size(self) -> int:
        """Actors that must get one node together."""
        return (self.request.per_node or 1) if self.by_node else (self.request.width or 1)

    def make(self) -> list[PlacementGroup]:
        request = self.request
        # Ray refuses a second group of one name, also beside kept engines of another run.
        made = uuid.uuid4().hex[:8]
        if self.by_node and not request.shared:
            shares = [_sum(share) for share in request.node_shares]
            return [placement_group(shares, strategy="STRICT_SPREAD", name=f"{request.name}_{made}")]
        groups, strategy = request.groups, request.strategy
        if self.by_node:
            groups, strategy = request.node_shares, "STRICT_PACK"
        return [
            placement_group(list(bundles), strategy=strategy, name=f"{request.name}_{i}_{made}")
            for i, bundles in enumerate(groups)
        ]

    def places(self, groups: Sequence[PlacementGroup]) -> list[Bundle]:
        found, each = [], self.size if self.by_node and not self.request.shared else 1
        for group in groups:
            nodes = placement_group_table(group)["bundles_to_node_id"]
            for index in sorted(nodes):
                found += [Bundle(group=group, index=index, node=nodes[index])] * each
        return by_node(found)


def reserve(requests: Sequence[Request], timeout_s: float) -> dict[str, list[Bundle]]:
    """Reserve every group, or raise PlacementError naming what was asked for and what each node has.

    Returns the places of each kind of actor: those of one node follow each other, those of a group keep their order,
    and kinds that share bundles have the same ones. Rank i runs on the i-th place of this list, since Ray's own
    numbering is arbitrary.
    """
    check_fits(requests, _nodes_now()[0])
    deadline = time.monotonic() + timeout_s
    if _become_free(requests, min(deadline, time.monotonic() + _SETTLE_S)):
        try:
            return _placed(requests, True, min(deadline, time.monotonic() + _SETTLE_S), timeout_s)
        except PlacementError:
            logger.info("not placed as it was counted, within %g s", _SETTLE_S)
    for request in requests:
        if request.per_node is not None and request.per_node > 1:
            logger.warning("%s: the free nodes do not allow that, each rank gets any node", request)
    return _placed(requests, False, deadline, timeout_s)


def _become_free(requests: Sequence[Request], deadline: float) -> bool:
    """Wait until the nodes can be shared out; False if that is not asked for, can never be, or is not in time."""
    nodes, free = _nodes_now()
    if all(request.per_node is None for request in requests) or not nodes_can_be_shared_out(requests, nodes):
        return False
    while not nodes_can_be_shared_out(requests, free):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        _, free = _nodes_now()
    return True


def _placed(requests: Sequence[Request], by_nodes: bool, deadline: float, timeout_s: float) -> dict[str, list[Bundle]]:
    asked = [_Asked(request=request, by_node=by_nodes and request.per_node is not None) for request in requests]
    made: dict[str, list[PlacementGroup]] = {}
    # What needs the most room on one node is placed first. The rest waits until that has its places: it fits anywhere.
    for ask in sorted(asked, key=lambda ask: (-ask.size, not ask.request.on_one_node)):
        groups = made[ask.request.name] = ask.make()
        if not all(group.wait(max(0.1, deadline - time.monotonic())) for group in groups):
            nodes, free = _nodes_now()
            for group in (group for groups in made.values() for group in groups):
                remove_placement_group(group)
            what = f"{ask.request} was not placed within {timeout_s:g} s (--ray.placement_timeout)"
            raise PlacementError(_report(what, requests, nodes, free))
        logger.info("placed %s", ask.request)
    return {kind: ask.places(made[ask.request.name]) for ask in asked for kind in ask.request.name.split("+")}


def release(places: Mapping[str, Sequence[Bundle]]) -> None:
    """Give back what `reserve` reserved. Actors that still run there end."""
    for group in {bundle.group.id: bundle.group for bundles in places.values() for bundle in bundles}.values():
        remove_placement_group(group)


def by_node(bundles: Sequence[Bundle]) -> list[Bundle]:
    """Sorted so that bundles of one node follow each other; nodes in the order of their first bundle."""
    first = {bundle.node: i for i, bundle in reversed(list(enumerate(bundles)))}
    return sorted(bundles, key=lambda bundle: first[bundle.node])


# -- messages ---------------------------------------------------------------------------------------------------------


def _nodes_now() -> tuple[list[Resources], list[Resources]]:
    """Total and free resources of each live node."""
    free = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in nodes], [free.get(node["NodeID"], {}) for node in nodes]


def _report(
    what: str, requests: Sequence[Request], nodes: Sequence[Resources], free: Sequence[Resources] | None = None
) -> str:
    asked = "; ".join(str(r) for r in requests)
    kinds = {kind for request in requests for bundle in request.bundles for kind in bundle}
    shown = [_node_text(node, kinds, free[i] if free else None) for i, node in enumerate(nodes)]
    return f"{what}. Asked for: {asked}. Nodes: {'; '.join(shown) or 'none'}"


def _node_text(node: Resources, kinds: set[str], free: Resources | None) -> str:
    """ "10.0.0.1: 64 CPU (60 free), 8 GPU (0 free)"; the address if Ray has it."""
    address = next((k.removeprefix("node:") for k in node if k.startswith("node:") and not k.startswith("node:__")), "")
    shown = [
        f"{node.get(kind, 0.0):g} {kind}" + (f" ({free.get(kind, 0.0):g} free)" if free is not None else "")
        for kind in sorted({*kinds, "CPU", "GPU"} if "GPU" in node else {*kinds, "CPU"})
    ]
    return f"{address}: {', '.join(shown)}" if address else ", ".join(shown)
