"""--assume_gpus: a dry run on a laptop plans for GPUs that this machine does not have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from real_openrlhf.common.cards import Card
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.run.placement import PlacementError, Request, check_fits

_FORM = re.compile(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)\s*(gi?b)", re.IGNORECASE)
# So many that CPU cores never limit a plan for GPUs.
_CORES = 1e6


@dataclass(frozen=True, kw_only=True)
class AssumedGpus:
    """memory: bytes of each GPU."""

    nodes: int
    gpus_per_node: int
    memory: int

    @classmethod
    def parse(cls, text: str) -> AssumedGpus:
        """ "2x8x80GB" (nodes, GPUs per node, memory of each GPU) or "8x80GB" (one node). ConfigError for other forms.

        >>> AssumedGpus.parse("8x80GB")
        AssumedGpus(nodes=1, gpus_per_node=8, memory=80000000000)
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or not int(match[1] or 1) or not int(match[2]) or not float(match[3]):
            raise ConfigError(f"--assume_gpus {text!r}: write GPUSxMEMORY, as 8x80GB, or with nodes 2x8x80GB")
        unit = 1 << 30 if match[4].lower() == "gib" else 10**9
        return cls(nodes=int(match[1] or 1), gpus_per_node=int(match[2]), memory=round(float(match[3]) * unit))

    def __str__(self) -> str:
        return f"{self.nodes} node(s) x {self.gpus_per_node} GPU(s) of {self.memory / 1e9:g} GB"

    @property
    def cards(self) -> tuple[Card, ...]:
        return (Card(name="assumed", capability=(9, 0), memory=self.memory, driver="unknown"),)

    def check_places(self, requests: Sequence[Request]) -> None:
        """ConfigError where Ray could not place the actors on these nodes."""
        nodes = [{"GPU": float(self.gpus_per_node), "CPU": _CORES}] * self.nodes
        try:
            check_fits(requests, nodes)
        except PlacementError as error:
            raise ConfigError(f"--assume_gpus: {self}: {str(error).partition(' Nodes: ')[0]}") from error
