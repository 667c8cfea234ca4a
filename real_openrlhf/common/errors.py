"""Errors that every folder may raise."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on. The message says why and what to do, and is shown without a traceback."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


class FolderError(ValueError):
    """A folder cannot be written or repaired; the message names it."""
