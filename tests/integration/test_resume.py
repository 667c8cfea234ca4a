"""Stopped by a signal or killed, then resumed: the same weights and the same records as without a break."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from real_openrlhf.checkpoint.signals import EXIT_RESUME
from tests.integration.test_train_real import flags, read_lines

pytestmark = pytest.mark.integration
STEPS = 4
# Timings, and what only a first start has.
NOT_COMPARED = ("time", "seconds/", "speed/", "sync/transfer_seconds", "sync/check_seconds")


def command(judges: Path, out: Path, *more: str) -> list[str]:
    base = flags(judges, "tied", out, "--train.full_determinism_enable", "--train.max_epochs", "2")
    base[base.index("--train.max_steps") + 1] = str(STEPS)
    base[base.index("--eval.steps") + 1] = "2"
    return [sys.executable, "-m", "real_openrlhf.train_real", *base, *more]


def run(args: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, capture_output=True, text=True, timeout=580)


def start_and_wait_for_step(args: list[str], out: Path, step: int) -> subprocess.Popen[bytes]:
    """Returns while the run goes on, after the records of this step were written."""
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while True:
        path = out / "metrics.jsonl"
        lines = [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] if path.exists() else []
        if any(line["phase"] == "train" and line["step"] >= step for line in lines):
            return process
        assert process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the driver, Ray, the engines and the policy."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)


def records(out: Path) -> list[dict]:
    """metrics.jsonl without timings and without the lines of starts."""
    lines = [line for line in read_lines(out / "metrics.jsonl") if line["phase"] != "sync"]
    return [{k: v for k, v in line.items() if not k.startswith(NOT_COMPARED)} for line in lines]


def assert_same(one: Path, two: Path) -> None:
    assert records(one) == records(two)
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), f"{name} differs"
    final = f"eval/step_{STEPS}.jsonl"
    assert (one / final).read_text() == (two / final).read_text()


@pytest.fixture(scope="module")
def unbroken(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    done = run(command(judges, out))
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_signal_then_resume(judges: Path, tmp_path: Path, unbroken: Path) -> None:
    out = tmp_path / "run"
    process = start_and_wait_for_step(command(judges, out), out, 1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=200) == EXIT_RESUME
    stopped_at = read_lines(out / "metrics.jsonl")[-1]["step"]
    assert 1 <= stopped_at < STEPS, "the signal came too late to test anything"
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith("step_")] == [f"step_{stopped_at}"]

    # Another scale is refused before anything starts.
    refused = run(command(judges, out, "--ckpt.load", "latest", "--real.scale", "1-4", "--data.skip_bad_rows"))
    assert refused.returncode == 2 and "scale" in refused.stderr

    done = run(command(judges, out, "--ckpt.load", "latest"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(unbroken, out)


@pytest.mark.slow
def test_kill_then_resume(judges: Path, tmp_path: Path, unbroken: Path) -> None:
    out = tmp_path / "run"
    saving = ("--ckpt.save_steps", "1")
    process = start_and_wait_for_step(command(judges, out, *saving), out, 2)
    os.kill(process.pid, signal.SIGSTOP)
    kill_everything(process)
    assert list((out / "checkpoints").glob("step_*")), "no checkpoint was complete before the kill"
    done = run(command(judges, out, *saving, "--ckpt.load", "auto"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(unbroken, out)
