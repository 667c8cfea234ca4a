"""The installer for GPUs refuses what cannot work before it makes anything, and says what would work."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def install(tmp_path: Path, driver: str = "580.65.06", capability: str = "9.0", **env: str) -> tuple[int, str]:
    """Exit code and messages, on a machine that says it has one GPU and whose Python makes no venv."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    scripts = {
        "nvidia-smi": f'case $1 in *name*) echo "Card, 1 MiB, {driver}, {capability}" ;; *driver*) echo "{driver}" ;; '
        f'*) printf "7.5\\n{capability}\\n" ;; esac',
        "c++": "exit 0",
        "no-venv": "exit 1",
    }
    for name, text in scripts.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_dir / name).chmod(0o755)
    path = ":".join(p for p in os.environ["PATH"].split(":") if not (Path(p) / "nvcc").exists())
    env = {
        "PATH": f"{bin_dir}:{path}",
        "PYTHON": str(bin_dir / "no-venv"),
        "VENV": str(tmp_path / "venv"),
        "INSTALL_LOG": str(tmp_path / "log"),
        **env,
    }
    script = ["bash", ROOT / "examples/install/gpu.sh"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
    assert not (tmp_path / "venv").exists()
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"driver": "570.124.06"}, "driver 570.124.06 is too old: .* CUDA 13, which needs 580 or newer.*cuda-compat"),
        ({"driver": "[N/A]"}, "driver .* is too old"),
        ({"capability": "7.5"}, "no GPU with bf16: compute capability 7.5, 8.0 or higher is needed"),
        ({"FLASH_ATTN": "build"}, "nvcc was not found: FLASH_ATTN=build compiles with it"),
        ({"FLASH_ATTN": "yes"}, "FLASH_ATTN is 'build' or 'skip', got 'yes'"),
        ({"DRIVER_CHECK": "no"}, "DRIVER_CHECK is 'skip' or unset, got 'no'"),
        ({"GPU_CHECK": "no"}, "GPU_CHECK is 'skip' or unset, got 'no'"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, settings: dict[str, str], says: str) -> None:
    code, message = install(tmp_path, **settings)
    assert code == 1 and "failed" not in message
    assert re.search(says, message), message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"driver": "595.10", "capability": "12.0"},
        {"driver": "550.54.15", "DRIVER_CHECK": "skip"},
        {"capability": "8.0"},
        {"driver": "none", "capability": "none", "GPU_CHECK": "skip"},
    ],
)
def test_what_can_work_goes_on_to_the_venv(tmp_path: Path, settings: dict[str, str]) -> None:
    code, message = install(tmp_path, **settings)
    assert code == 1 and "install: 'venv' failed" in message
