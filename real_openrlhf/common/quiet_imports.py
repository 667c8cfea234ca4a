"""What torch and others warn of when they are imported, which no user of this package can act on."""

from __future__ import annotations

import warnings


def quiet_imports() -> None:
    """Call it before torch is imported. vLLM asks for pynvml, of which torch then says that it is deprecated."""
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
