"""Errors that every folder may raise."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on, and the message says why and what to do: shown without a traceback."""


class FolderError(ValueError):
    """A folder cannot be written or put in order; the message names it."""
