"""The contestants: one module each with a class `Contestant`, see `common.Contestant`."""

from __future__ import annotations

import importlib

from examples.benchmark.contestants.common import Contestant, Setup
from examples.benchmark.protocol import CONTESTANTS


def build(name: str, setup: Setup) -> Contestant:
    """Load the model and make the optimizer. ValueError for an unknown name."""
    if name not in CONTESTANTS:
        raise ValueError(f"contestants are {', '.join(CONTESTANTS)}, got {name!r}")
    # Imported here, since a process builds only one of them, and they patch the modules that they import.
    module = importlib.import_module(f"{__name__}.{name}")
    contestant: Contestant = module.Contestant(setup)
    return contestant
