"""The root of the errors that stop a run and explain themselves."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on, and the message says why and what to do: shown without a traceback."""
