"""Moves the caches that libraries keep in the home folder to a temporary folder, if the home folder cannot be written.

DeepSpeed makes ~/.triton when it is imported, vLLM writes ~/.cache/vllm, and so on. Call `use_writable_caches` before
they are imported, in every process that imports them, since other nodes may have another home folder.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_CACHE, _CONFIG, _DATA = ("XDG_CACHE_HOME", ".cache"), ("XDG_CONFIG_HOME", ".config"), ("XDG_DATA_HOME", ".local/share")
# Environment variable -> where its library writes if it is not set: a base folder (its own variable, and its default
# below the home folder), and a path below that.
_PLACES = {
    "TRITON_CACHE_DIR": (("TRITON_HOME", ""), ".triton"),
    "TORCH_EXTENSIONS_DIR": (_CACHE, "torch_extensions"),
    "VLLM_CACHE_ROOT": (_CACHE, "vllm"),
    "VLLM_CONFIG_ROOT": (_CONFIG, "vllm"),
    "FLASHINFER_WORKSPACE_BASE": (("HOME", ""), ".cache/flashinfer"),
    "MPLCONFIGDIR": (_CONFIG, "matplotlib"),
    "WANDB_CACHE_DIR": (_CACHE, "wandb"),
    "WANDB_CONFIG_DIR": (_CONFIG, "wandb"),
    "WANDB_DATA_DIR": (_DATA, "wandb"),
}
# A Hugging Face cache that can be read but not written is still used for reading; only writes go elsewhere.
_HUB = (_CACHE, "huggingface")
_HUB_WRITES = {"HF_MODULES_CACHE": "modules", "HF_DATASETS_CACHE": "datasets"}

_chosen: dict[str, str] = {}


class HomeError(ValueError):
    """Neither the home folder nor a temporary one can be written; the message says what to set."""


def use_writable_caches(*, tell: bool = True) -> None:
    """Set libraries' cache variables to a temporary folder where their default cannot be written. Set ones stay.

    tell: log a warning. Raises HomeError if there is no writable temporary folder either.
    """
    wanted = _wanted()
    if not wanted:
        return
    folder = _temporary(wanted)
    for name, below in wanted.items():
        _chosen[name] = os.environ[name] = str(folder / below)
    if tell:
        logger.warning("HOME %s cannot be written: %s go to %s", _home(), ", ".join(wanted), folder)


def chosen_here() -> frozenset[str]:
    """Variables that `use_writable_caches` set in this process; on another node their values would be wrong."""
    return frozenset(name for name, value in _chosen.items() if os.environ.get(name) == value)


def _wanted() -> dict[str, str]:
    """The variables that must be set -> folder below the temporary one."""
    _takes_a_file.cache_clear()
    wanted = {
        name: name.lower()
        for name, (base, below) in _PLACES.items()
        if not os.environ.get(name) and not _writable(_place(base, below))
    }
    hub = _place(*_HUB)
    if not os.environ.get("HF_HOME") and not _writable(hub):
        names = _HUB_WRITES if hub.is_dir() else {"HF_HOME": "huggingface"}
        wanted |= {name: f"huggingface/{below}" if hub.is_dir() else below for name, below in names.items()}
    return {name: below for name, below in wanted.items() if not os.environ.get(name)}


def _home() -> str:
    return os.environ.get("HOME") or os.path.expanduser("~")


def _place(base: tuple[str, str], below: str) -> Path:
    variable, at_home = base
    return Path(os.environ.get(variable) or Path(_home()) / at_home) / below


def _writable(path: Path) -> bool:
    """Whether the folder can be made or written. Tested with a file without a name, so that nothing is left over."""
    if not path.is_absolute():
        return False  # a user without a home folder: "~" would become a folder of that name
    while not path.exists():
        path = path.parent
    return _takes_a_file(path)


@functools.cache
def _takes_a_file(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary(wanted: dict[str, str]) -> Path:
    """This user's own temporary folder, the same in every run."""
    try:
        folder = Path(tempfile.gettempdir()) / f"real_openrlhf_{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or not _takes_a_file(folder):
            # Another user made it, in a folder that all may write.
            folder = Path(tempfile.mkdtemp(prefix="real_openrlhf_"))
    except OSError as error:
        raise HomeError(
            f"HOME {_home()} cannot be written, nor can a temporary folder ({error.strerror or error}); set HOME or "
            f"TMPDIR to a folder that can be written, or set {', '.join(wanted)}"
        ) from error
    return folder
