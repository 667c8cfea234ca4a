"""Whether a model that a flag names can be there at all; asked before transformers tries for a minute."""

from __future__ import annotations

import difflib
import logging
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from real_openrlhf.common.paths import looks_like_a_path

logger = logging.getLogger(__name__)

CONFIG, ADAPTERS = "config.json", "adapter_config.json"
OFFLINE = "HF_HUB_OFFLINE"
# Seconds that the hub has to answer, so that its client's retries are worth while.
PATIENCE = 5.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", flags=re.ASCII)


class ModelNameError(ValueError):
    """There is no such model; the message names the flag and says what would work."""


def check_model(name: str, flag: str, *, needs_config: bool = True) -> None:
    """ModelNameError for a folder that is not there or holds no model, and for a hub id that cannot be had.

    A hub id that is in the cache is good also where the hub cannot be reached: the libraries are then told not to try
    (HF_HUB_OFFLINE), which they read when they are imported. needs_config: False where the tokenizer is enough.
    """
    check_folder(name, flag, needs_config=needs_config)
    if not Path(name).is_dir():
        _check_hub_id(name, flag)


def check_folder(name: str, flag: str, *, needs_config: bool = True) -> None:
    """`check_model`, which does not ask for a hub id."""
    path = Path(name)
    if path.is_dir():
        if needs_config and not (path / CONFIG).is_file():
            raise ModelNameError(f"{flag} {name!r}: the folder {_what_is_wrong(path)}")
    elif path.exists():
        raise ModelNameError(f"{flag} {name!r} is a file; give the folder of a model, or a hub id")
    elif looks_like_a_path(name) or not _HUB_ID.fullmatch(name):
        raise ModelNameError(f"{flag} {name!r}: there is no such folder{_similar(path)}")


def _what_is_wrong(folder: Path) -> str:
    """With a folder that has no config.json, and what would work."""
    if (folder / "model" / CONFIG).is_file():
        return f"has no {CONFIG}, but {str(folder / 'model')!r} has; give that one"
    if (folder / ADAPTERS).is_file():
        return f"has no {CONFIG}, but LoRA adapters; merge them into their model and give the merged one"
    return f"has no {CONFIG}, so it is not a model of Hugging Face" if any(folder.iterdir()) else "is empty"


def _similar(path: Path) -> str:
    try:
        there = [one.name for one in path.parent.iterdir() if one.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, there, n=1)
    return f" (did you mean {str(path.parent / found[0])!r}?)" if found else ""


def _check_hub_id(name: str, flag: str) -> None:
    if os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on"):
        reason: str | None = f"{OFFLINE} is set"
    else:
        reason = _why_unreachable()
    if reason is None:
        return
    os.environ[OFFLINE] = "1"
    # Here: it reads the variable when it is imported.
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, CONFIG), str):
        raise ModelNameError(
            f"{flag} {name!r}: there is no such folder{_similar(Path(name))}; as a hub id it is not in the cache, and "
            f"the hub cannot be asked ({reason})"
        )
    logger.warning("%s %s comes from the cache: the hub cannot be asked (%s)", flag, name, reason)


def _why_unreachable() -> str | None:
    """Why nothing answers at the hub's address; None where something does, or where a proxy alone could tell."""
    if {"http", "https", "all"} & set(getproxies()):
        return None
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=PATIENCE).close()
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
    return None
