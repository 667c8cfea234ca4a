"""Paths as people write them: the one place where ~ becomes the home folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def expand(text: str) -> str:
    """Replace a leading ~ or ~user by that home folder. Anything else, such as a hub id, stays as it is.

    A shell expands ~ only in `--flag ~/x`, neither in `--flag=~/x` nor in a file.
    """
    return os.path.expanduser(text)


def path_argument(text: str) -> Path:
    """For argparse: a path that is not blank."""
    return Path(text_argument(text))


def text_argument(text: str) -> str:
    """For argparse: a path, hub id or other source, as text; not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is blank; give a path")
    return expand(text)


def looks_like_a_path(text: str) -> bool:
    """Whether a name that does not exist was meant as a path, not as a hub id ("name" or "owner/name")."""
    return text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text or text.endswith("/")
