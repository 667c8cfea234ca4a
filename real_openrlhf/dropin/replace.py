"""Puts our own in the place of something of OpenRLHF's, by name; each name is a row of actors/openrlhf_internals.py."""

from __future__ import annotations

import importlib
from typing import Any


def replace(where: str, ours: Any) -> Any:
    """where: "module:name" or "module:Class.name". Returns what was there. AttributeError if nothing was."""
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    before = getattr(owner, name)
    setattr(owner, name, ours)
    return before
