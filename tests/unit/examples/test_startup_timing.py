"""The timing of start-up: runs of two stand-in checkouts, turn by turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.benchmark import startup_timing

PROGRAM = """
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--train.max_steps"] == "1" and flags["--real.scale"] == "1-5", flags
folder = pathlib.Path(flags["--ckpt.output_dir"])
folder.mkdir()
rows = [{"phase": "sync", "time": 0.0}, {"phase": "train", "time": time.time()}, {"phase": "train", "time": 9e12}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


def checkout(folder: Path, program: str) -> Path:
    (folder / "real_openrlhf").mkdir(parents=True)
    (folder / "real_openrlhf" / "__init__.py").touch()
    (folder / "real_openrlhf" / "train_real.py").write_text(program)
    return folder


def test_each_checkout_runs_its_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup_timing, "ROOT", checkout(tmp_path / "this", PROGRAM))
    slow = PROGRAM.replace("folder.mkdir()", "folder.mkdir(); time.sleep(1)")
    other = checkout(tmp_path / "other", slow)
    output = tmp_path / "out" / "startup.json"
    argv = ["--other", str(other), "--output", str(output), "--repeats", "2", "--", "--real.scale", "1-5"]
    assert startup_timing.main(argv) == 0
    found = json.loads(output.read_text())
    assert len(found["this"]) == len(found["other"]) == 2
    # The sleep lies before the step: it is in its seconds, and the line of another phase is not taken.
    assert all(seconds >= 1 for seconds in found["other"]) and all(seconds > 0 for seconds in found["this"])
    assert all(end >= step for step, end in zip(found["other"], found["facts"]["ended"]["other"]))
    assert found["facts"]["ratios"] == sorted(found["facts"]["ratios"])


def test_a_run_that_fails_is_no_time(tmp_path: Path) -> None:
    broken = checkout(tmp_path / "broken", "raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match=r"exit code 1.*\n.*no such model"):
        startup_timing.run(broken, [], tmp_path / "run")


def test_a_run_without_a_step_is_no_time(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "sync", "time": 1.0}\n')
    with pytest.raises(ValueError, match="no line of phase train"):
        startup_timing.first_step(tmp_path / "metrics.jsonl")


def test_the_other_must_be_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        startup_timing.parse_args(["--other", str(tmp_path), "--output", "x", "--", "--a", "1"])
    assert "give a checkout" in capsys.readouterr().err
