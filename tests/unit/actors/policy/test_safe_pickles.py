from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from real_openrlhf.actors.policy.safe_pickles import UnsafePickleError, check_pickles


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_what_checkpoints_hold_may_be_loaded(tmp_path: Path) -> None:
    state = {
        "weights": {"a": torch.ones(2, dtype=torch.bfloat16)},
        "rng": numpy.random.get_state(),
        "step": 3,
        "x": None,
    }
    torch.save(state, tmp_path / "rank_0.pt")
    check_pickles([tmp_path / "rank_0.pt"])


def test_a_class_of_deepspeed_may_be_loaded_and_a_neighbour_may_not(tmp_path: Path) -> None:
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    torch.save({"loss_scaler": scaler.LossScaler(scale=1)}, tmp_path / "a.pt")
    check_pickles([tmp_path / "a.pt"])
    torch.save({"path": Path("x")}, tmp_path / "b.pt")
    with pytest.raises(UnsafePickleError, match=r"b.pt names pathlib"):
        check_pickles([tmp_path / "a.pt", tmp_path / "b.pt"])


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_file_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "ran", tmp_path / "rank_0.pt"
    torch.save({"state": Command(marker)}, path, pickle_protocol=protocol)
    with pytest.raises(
        UnsafePickleError, match=r"rank_0.pt (names (posix|nt).system|is not a file that torch.save wrote)"
    ):
        check_pickles([path])
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file is harmless, and the test above showed nothing"


@pytest.mark.parametrize(
    "form", ["a bare pickle", "torch's former format", "no pickle at all", "without data", "empty"]
)
def test_other_files_are_refused(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "a.pt"
    if form == "a bare pickle":
        path.write_bytes(pickle.dumps(Command(marker)))
    elif form == "torch's former format":
        torch.save(Command(marker), path, _use_new_zipfile_serialization=False)
    elif form == "without data":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/version", "3")
    else:
        path.write_bytes(b"" if form == "empty" else b"hello" * 100)
    with pytest.raises(UnsafePickleError, match=r"a.pt"):
        check_pickles([path])
    assert not marker.exists()
