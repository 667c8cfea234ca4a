"""Paths as people write them: the one place where ~ becomes the home folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def expand(text: str) -> str:
    """A leading ~ or ~user is that home folder; anything else stays, so that hub ids and words pass through.

    A shell expands ~ in `--flag ~/x` only, neither in `--flag=~/x` nor in a file.
    """
    return os.path.expanduser(text)


def path_argument(text: str) -> Path:
    """For argparse: a path, which is not blank."""
    return Path(text_argument(text))


def text_argument(text: str) -> str:
    """For argparse: a path, hub id or other source, as text; not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is blank; give a path")
    return expand(text)


def check_model_folder(path: str, name: str) -> None:
    """ValueError for a model that is named by its path, where there is no such folder. name: of the setting."""
    if looks_like_a_path(path) and not Path(path).is_dir():
        raise ValueError(f"{name} {path!r}: there is no such folder")


def looks_like_a_path(text: str) -> bool:
    """Whether a name that is not there was meant as a path, not as a hub id ("name" or "owner/name")."""
    return text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text or text.endswith("/")
