"""Killed or stopped, then resumed: the same weights and the same records as without a break."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest
from safetensors.torch import load_file

from real_openrlhf.run.signals import EXIT_RESUME
from tests.integration.test_train_real import flags, read_lines

pytestmark = pytest.mark.integration
STEPS = 4
# Timings, and what only a first start has.
NOT_COMPARED = ("time", "seconds/", "speed/", "sync/transfer_seconds", "sync/check_seconds")
# Two epochs over each step's rollouts in two mini-batches, and prompts that run out and begin again: 24 of them, 8 or
# more per step, since dynamic sampling refills.
EPOCHS = [
    "--train.max_epochs",
    "2",
    "--real.mini_batches",
    "2",
    "--data.max_samples",
    "24",
    "--train.num_episodes",
    "9",
]
TWO_RANKS = ("--actor.num_gpus_per_node", "2", "--ds.zero_stage", "3")
MARK = "REAL_TEST_RUN"


def command(judges: Path, out: Path, *more: str) -> list[str]:
    base = flags(judges, "tied", out, "--train.full_determinism_enable", *EPOCHS)
    base[base.index("--train.max_steps") + 1] = str(STEPS)
    base[base.index("--eval.steps") + 1] = "2"
    return [sys.executable, "-m", "real_openrlhf.train_real", *base, *more]


def run(args: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, capture_output=True, text=True, timeout=580)


@contextlib.contextmanager
def started(args: list[str], output: int | IO[bytes] = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """The run in the background. At the end of the block every process of it is killed, and Ray's folder removed."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(args, stdout=output, stderr=output, env={**os.environ, MARK: mark})
    try:
        yield process
    finally:
        kill_everything(mark)
        process.wait()
        for folder in Path(tempfile.gettempdir(), "ray").glob(f"session_*_{process.pid}"):
            shutil.rmtree(folder, ignore_errors=True)


def kill_everything(mark: str) -> None:
    """kill -9 of the driver, Ray's own processes, the engines and the policy: whatever inherited the mark."""
    while family := [process for process in psutil.process_iter() if marked(process, mark)]:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        time.sleep(0.05)  # psutil's wait would take the exit code from Popen


def marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def wait_for_step(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    """Returns, while the run goes on, once the records of this step were written."""
    deadline = time.monotonic() + 400
    path = out / "metrics.jsonl"
    while True:
        lines = [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] if path.exists() else []
        if any(line["phase"] == "train" and line["step"] >= step for line in lines):
            return
        assert process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_saved(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*"))


def records(out: Path) -> list[dict]:
    """metrics.jsonl without timings and without the lines of starts."""
    lines = [line for line in read_lines(out / "metrics.jsonl") if line["phase"] != "sync"]
    return [{k: v for k, v in line.items() if not k.startswith(NOT_COMPARED)} for line in lines]


def assert_same(one: Path, two: Path, last: int = STEPS) -> None:
    assert records(one) == records(two)
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), f"{name} differs"
    for written in ("samples.jsonl", f"eval/step_{last}.jsonl"):
        assert (one / written).read_text() == (two / written).read_text()


def assert_covers(out: Path) -> None:
    """That the run was one that could go wrong: several updates per step, groups dropped and prompts used again."""
    train = [line for line in records(out) if line["phase"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert all(line["policy/updates"] == 4 for line in train)
    assert any(line["sampling/pass_rate"] < 1 for line in train)
    assert sum(line["sampling/groups"] for line in train) > 24


def test_kill_then_resume(judges: Path, tmp_path: Path) -> None:
    """Two ranks, ZeRO-3: N steps, kill -9 of everything, resume, N steps."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = run(command(judges, whole, *TWO_RANKS))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_covers(whole)

    args = command(judges, out, *TWO_RANKS, "--ckpt.save_steps", "1", "--ckpt.load", "auto")
    with started(args) as process:
        wait_for_step(process, out, 3)
    assert process.returncode == -signal.SIGKILL
    assert steps_saved(out)[-1] in (2, 3), "step 3 is either lost, or just saved"

    done = run(args)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed from" in done.stderr
    assert_same(whole, out)


@pytest.fixture(scope="module")
def one_rank(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run on one rank with ZeRO-2."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    done = run(command(judges, out))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_covers(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_then_resume(judges: Path, tmp_path: Path, one_rank: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    with started(command(judges, out)) as process:
        wait_for_step(process, out, 1)
        process.send_signal(number)
        assert process.wait(timeout=200) == EXIT_RESUME
    stopped_at = read_lines(out / "metrics.jsonl")[-1]["step"]
    assert 1 <= stopped_at < STEPS, "the signal came too late to test anything"
    assert steps_saved(out) == [stopped_at]

    # Another scale is refused before anything starts.
    refused = run(command(judges, out, "--ckpt.load", "latest", "--real.scale", "1-4", "--data.skip_bad_rows"))
    assert refused.returncode == 2 and "scale" in refused.stderr

    done = run(command(judges, out, "--ckpt.load", "latest"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(one_rank, out)


@pytest.mark.slow
def test_resume_on_other_ranks(judges: Path, tmp_path: Path) -> None:
    """Killed on one rank, resumed on two: the same prompts in the same order, and nearly the same numbers.

    One update a step: of several, each rank takes its own part of its own groups.
    """
    whole, out = tmp_path / "whole", tmp_path / "run"
    once = ("--train.max_epochs", "1", "--real.mini_batches", "1")
    done = run(command(judges, whole, *once))
    assert done.returncode == 0, done.stderr[-4000:]
    saving = (*once, "--ckpt.save_steps", "2", "--ckpt.load", "auto")
    with started(command(judges, out, *saving)) as process:
        wait_for_step(process, out, 3)
    assert steps_saved(out) == [2]
    done = run(command(judges, out, *saving, "--actor.num_gpus_per_node", "2"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the shards are converted" in done.stderr
    third, unbroken = (next(line for line in records(where) if line["step"] == 3) for where in (out, whole))
    # The rollouts of the third step come from the very weights that were saved.
    for name in ("label/mean", "sampling/groups", "rollouts/tokens", "score/expected", "reward/mean"):
        assert third[name] == pytest.approx(unbroken[name], rel=1e-5), name
    assert third["loss/total"] == pytest.approx(unbroken["loss/total"], rel=1e-3, abs=1e-5)
    assert [line["step"] for line in records(out) if line["phase"] == "train"] == [1, 2, 3, 4]
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_without_determinism(judges: Path, tmp_path: Path) -> None:
    """No flag: rollouts differ, but not which prompts are asked at which step."""
    plain = [word for word in command(judges, tmp_path / "run") if word != "--train.full_determinism_enable"]
    lines = (judges / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:24]
    plain[plain.index("--data.prompt_dataset") + 1] = str(tmp_path / "few.jsonl")
    (tmp_path / "few.jsonl").write_text("".join(lines), encoding="utf-8")
    plain += ["--real.keep_groups", "all", "--no-real.refill", "--ckpt.save_steps", "2", "--ckpt.load", "auto"]
    with started(plain) as process:
        wait_for_step(process, tmp_path / "run", 3)
    done = run(plain)
    assert done.returncode == 0, done.stderr[-4000:]
    train = [line for line in records(tmp_path / "run") if line["phase"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    # 24 prompts in steps of 8: three steps are one epoch, with the mean label of all prompts.
    labels = [json.loads(line)["label"] for line in lines]
    assert sum(line["label/mean"] for line in train[:3]) / 3 == pytest.approx(sum(labels) / 24)
