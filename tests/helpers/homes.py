"""A process whose home folder and temporary folder are the test's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from real_openrlhf.common import home


def isolate(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    """No variable names a cache, temporary files go to `temporary`, and what is set is unset at the end."""
    for name in list(os.environ):
        if name.startswith(("XDG_", "TRITON_", "HF_", "VLLM_CACHE", "VLLM_CONFIG", "WANDB_", "FLASHINFER_")):
            monkeypatch.delenv(name)
    for name in (*home._PLACES, *home._HUB_WRITES, "HF_HOME"):
        # Set first, so that whatever the code sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(home, "_chosen", {})
