"""The timing next to busy processes: ratios of the same round, and processes that end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmark.busy_timing import busy, summary


def test_ratios_are_of_the_same_round() -> None:
    rounds = [
        {"shipped, idle": 2.0, "shipped, busy": 6.0, "default, idle": 1.0, "default, busy": 40.0},
        {"shipped, idle": 4.0, "shipped, busy": 8.0, "default, idle": 4.0, "default, busy": 80.0},
        {"shipped, idle": 1.0, "shipped, busy": 2.5, "default, idle": 1.0, "default, busy": 10.0},
    ]
    found = summary(rounds)
    assert found["slowdown shipped"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    assert found["slowdown default"] == {"median": 20.0, "least": 10.0, "most": 40.0}
    assert found["idle, shipped against default"]["median"] == 1.0
    assert found["busy, shipped against default"]["least"] == 0.1


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


def test_the_table_of_readme_is_the_committed_json() -> None:
    folder = Path(__file__).parents[3] / "examples/benchmark"
    found = json.loads((folder / "results/busy.json").read_text(encoding="utf-8"))
    assert summary(found["rounds"]) == found["summary"]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for digits, name in ((1, "slowdown shipped"), (1, "slowdown default"), (2, "idle, shipped against default")):
        r = found["summary"][name]
        assert f"{r['median']:.{digits}f} [{r['least']:.{digits}f}, {r['most']:.{digits}f}]" in readme
    assert found["summary"]["slowdown shipped"]["most"] < 4
