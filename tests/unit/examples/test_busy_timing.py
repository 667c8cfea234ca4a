"""The timing beside busy processes: ratios of the same round, and processes that end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from examples.benchmark.busy_timing import busy, summary


def test_ratios_are_of_the_same_round() -> None:
    rounds = [
        {"asleep, idle": 2.0, "asleep, busy": 6.0, "spinning, idle": 1.0, "spinning, busy": 40.0},
        {"asleep, idle": 4.0, "asleep, busy": 8.0, "spinning, idle": 4.0, "spinning, busy": 80.0},
        {"asleep, idle": 1.0, "asleep, busy": 2.5, "spinning, idle": 1.0, "spinning, busy": 10.0},
    ]
    found = summary(rounds)
    assert found["slowdown asleep"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    assert found["slowdown spinning"] == {"median": 20.0, "least": 10.0, "most": 40.0}
    assert found["idle, asleep against spinning"]["median"] == 1.0
    assert found["busy, asleep against spinning"]["least"] == 0.1


def test_busy_processes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: list[str]) -> subprocess.Popen[bytes]:
        started.append(real([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyError), busy(2):
        assert all(process.poll() is None for process in started) and len(started) == 2
        raise KeyError
    assert all(process.poll() is not None for process in started)
