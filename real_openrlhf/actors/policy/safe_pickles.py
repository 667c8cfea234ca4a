"""Refuses checkpoint files that would run code when they are loaded.

DeepSpeed loads its shards by Python's pickle, which calls whatever a file names. So all files are looked through first,
without loading them: they may name tensors, and the few classes below that DeepSpeed and NumPy write.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

from torch.serialization import get_unsafe_globals_in_checkpoint

# Beside what torch's own weights_only allows.
ALLOWED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        # States of NumPy's random numbers, by NumPy 2 and 1.
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.ndarray",
    }
)


class UnsafePickleError(ValueError):
    """A file names code that no checkpoint of this package holds, or is not in torch's format."""


def check_pickles(paths: Iterable[Path]) -> None:
    """UnsafePickleError for the first file that may not be loaded; nothing in the files is run."""
    for path in paths:
        try:
            named = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - ALLOWED)
        except (UnpicklingError, ValueError, EOFError, RuntimeError) as error:
            raise UnsafePickleError(f"{path} is not a file that torch.save wrote: {error}") from error
        if named:
            raise UnsafePickleError(
                f"{path} names {', '.join(named[:3])}, which no checkpoint of this package holds; loading it could run "
                "any code, so it is not loaded"
            )
