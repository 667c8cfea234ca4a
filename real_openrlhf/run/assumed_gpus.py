"""--assume_gpus: a dry run on a laptop plans for GPUs that this machine does not have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from real_openrlhf.common.cards import RATES, Card
from real_openrlhf.config.flags import ConfigError

if TYPE_CHECKING:
    from real_openrlhf.run.placement import Request

_FORM = re.compile(
    r"(?:(?P<nodes>\d+)x)?(?P<gpus>\d+)x(?:(?P<name>[a-z][\w ]*)-)?(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>gi?b)",
    re.IGNORECASE,
)
# CPU cores are not what a plan for GPUs is about.
_CORES = 1e6


@dataclass(frozen=True, kw_only=True)
class AssumedGpus:
    """memory: bytes of each GPU. name: as in `cards.RATES`, for expected times; None: not said."""

    nodes: int
    gpus_per_node: int
    memory: int
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> AssumedGpus:
        """ "2x8x80GB" (nodes, GPUs of each, memory of each GPU), "8x80GB" (one node) or "8xA100-80GB".

        Raises ConfigError for another form, and for a GPU of which no rates are known.

        >>> AssumedGpus.parse("8x80GB")
        AssumedGpus(nodes=1, gpus_per_node=8, memory=80000000000, name=None)
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or not int(match["nodes"] or 1) or not int(match["gpus"]) or not float(match["size"]):
            raise ConfigError(
                f"--assume_gpus {text!r}: write GPUSxMEMORY, as 8x80GB, with nodes 2x8x80GB, or with the GPU's name "
                "8xA100-80GB"
            )
        known = {name.lower(): name for name in RATES}
        if match["name"] and match["name"].lower() not in known:
            raise ConfigError(
                f"--assume_gpus {text!r}: no rates are known of {match['name']}; known are {', '.join(RATES)}, and "
                "without a name any memory will do"
            )
        unit = 1 << 30 if match["unit"].lower() == "gib" else 10**9
        return cls(
            nodes=int(match["nodes"] or 1),
            gpus_per_node=int(match["gpus"]),
            memory=round(float(match["size"]) * unit),
            name=known[match["name"].lower()] if match["name"] else None,
        )

    def __str__(self) -> str:
        kind = f" ({self.name})" if self.name else ""
        return f"{self.nodes} node(s) x {self.gpus_per_node} GPU(s) of {self.memory / 1e9:g} GB{kind}"

    @property
    def cards(self) -> tuple[Card, ...]:
        return (Card(name=self.name or "GPUs without a name", capability=(9, 0), memory=self.memory, driver="unknown"),)

    def check_places(self, requests: Sequence[Request]) -> list[str]:
        """Warnings about ranks that cannot lie on nodes as the flags say; ConfigError where Ray has no place for them.

        Memory and time are planned for nodes as the flags say.
        """
        # Here: it imports Ray, and the form of the flag is checked before that.
        from real_openrlhf.run.placement import PlacementError, check_fits, nodes_can_be_shared_out

        nodes = [{"GPU": float(self.gpus_per_node), "CPU": _CORES}] * self.nodes
        try:
            check_fits(requests, nodes)
        except PlacementError as error:
            raise ConfigError(f"--assume_gpus: {self}: {str(error).partition(' Nodes: ')[0]}") from error
        if nodes_can_be_shared_out(requests, nodes):
            return []
        wishes = "; ".join(str(request) for request in requests if request.per_node is not None)
        return [
            f"--assume_gpus: {self}: there is no such room next to the other actors, so ranks lie on other nodes than "
            f"memory and time are planned for ({wishes})"
        ]
