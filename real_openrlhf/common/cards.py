"""This machine's GPUs, and why they cannot be used. Asks nvidia-smi, so that this process gets no CUDA context."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# The least compute capability with bf16 in hardware and torch's flash attention.
BF16_CAPABILITY = (8, 0)
# By the CUDA major version that torch is built for: the oldest driver, and the oldest capability with kernels.
OLDEST_DRIVER = {12: 525, 13: 580}
OLDEST_CAPABILITY = {12: (5, 0), 13: (7, 5)}
_QUERY = "name,compute_cap,memory.total,driver_version"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU. capability: compute capability, such as (9, 0). memory: bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {_dotted(self.capability)})"


def local_cards() -> tuple[Card, ...]:
    """This machine's NVIDIA GPUs. Empty without nvidia-smi, if it fails, or if CUDA_VISIBLE_DEVICES hides all GPUs.

    If CUDA_VISIBLE_DEVICES hides only some GPUs, these are in the list too, so decide by the best card.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return ()
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return parse_cards(answer)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.debug("nvidia-smi does not tell which GPUs are here: %s", error)
        return ()


def parse_cards(answer: str) -> tuple[Card, ...]:
    """Read nvidia-smi's CSV without header and units. Raises ValueError for other forms, such as a MIG slice's."""
    cards = []
    for line in filter(str.strip, answer.splitlines()):
        name, capability, memory, driver = (part.strip() for part in line.rsplit(",", 3))
        major, minor = capability.split(".")
        cards.append(
            Card(name=name, capability=(int(major), int(minor)), memory=int(float(memory) * 2**20), driver=driver)
        )
    return tuple(cards)


def why_unusable(cards: Sequence[Card], *, dtype_name: str, cuda: str | None, starts: Callable[[], bool]) -> str | None:
    """Why torch cannot train in this dtype on any of the cards, and what would work; None: no reason is known.

    cuda: the CUDA version that torch is built for. starts: whether torch can use the GPUs; only called if the driver
    is too old, since NVIDIA's compatibility package can make up for that.
    """
    if not cards or cuda is None:
        return None
    major, best = int(cuda.split(".")[0]), max(cards, key=lambda card: card.capability)
    oldest = OLDEST_DRIVER.get(major, 0)
    if _major(best.driver) < oldest and not starts():
        return (
            f"the NVIDIA driver {best.driver} is too old for torch's CUDA {cuda}; update it to {oldest} or newer (on "
            f"data-center cards the package cuda-compat-{cuda.replace('.', '-')} works as well), or train on the CPU"
        )
    if best.capability < OLDEST_CAPABILITY.get(major, (0, 0)):
        needed = _dotted(OLDEST_CAPABILITY[major])
        return f"torch for CUDA {cuda} has no kernels for {best}: {needed} is its oldest; use a newer GPU, or the CPU"
    if dtype_name == "bf16":
        return why_no_bf16(str(best), best.capability)
    return None


def why_no_bf16(card: str, capability: tuple[int, int]) -> str | None:
    if capability >= BF16_CAPABILITY:
        return None
    return (
        f"{card} does not compute in bf16: compute capability {_dotted(BF16_CAPABILITY)} or higher is needed (A100, "
        "L4, RTX 30, H100 and later); use such a GPU, or fp32, at twice the memory and several times the time"
    )


def _major(version: str) -> int:
    """Major version of a driver; a version that cannot be parsed counts as new."""
    head = version.split(".")[0]
    return int(head) if head.isdigit() else 10**9


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


@dataclass(frozen=True, kw_only=True)
class CardRates:
    """What a card's maker says of it, per second.

    flops      dense bf16 products
    bandwidth  bytes of its own memory
    link       bytes to another card of the node, one way
    """

    flops: float
    bandwidth: float
    link: float


# By a part of the name that nvidia-smi gives; longer names first, as "H100 NVL" holds "H100".
RATES = {
    "B200": CardRates(flops=2250e12, bandwidth=8.0e12, link=900e9),
    "H200": CardRates(flops=989e12, bandwidth=4.8e12, link=450e9),
    "H100 PCIe": CardRates(flops=756e12, bandwidth=2.0e12, link=64e9),
    "H100 NVL": CardRates(flops=835e12, bandwidth=3.9e12, link=300e9),
    "H100": CardRates(flops=989e12, bandwidth=3.35e12, link=450e9),
    "A100": CardRates(flops=312e12, bandwidth=2.0e12, link=300e9),
    "L40S": CardRates(flops=362e12, bandwidth=0.86e12, link=32e9),
    "L4": CardRates(flops=121e12, bandwidth=0.3e12, link=32e9),
}
# Of a card that is named in no table: the one that this project was measured on.
DEFAULT_RATES = "H100"


def rates_of(name: str) -> CardRates | None:
    """Of a card by its name, as nvidia-smi gives it; None where none are known."""
    return next((rates for known, rates in RATES.items() if known.lower() in name.lower()), None)
