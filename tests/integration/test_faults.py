"""Processes of a run are killed or stopped while it goes on: it ends as an undisturbed run, without a person.

The fault comes at a known point: a process is stopped (SIGSTOP) before the run needs it, and killed once the run waits.
What every run of the tests has of this: the policy of a warm-up is killed (test_train_warmup.py), and an engine
(test_rollout_engine.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.integration.test_resume import (
    assert_covers,
    assert_same,
    command,
    records,
    run,
    started,
    steps_saved,
    wait_for_step,
)
from tests.integration.test_train_real import read_lines

pytestmark = pytest.mark.integration
POLICY, ENGINE, EVALUATOR = "ray::RealPolicyActor", "ray::RolloutEngine", "ray::EvaluatorActor"
CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
SAVING = ("--ckpt.save_steps", "1")


def family(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


def find(driver: subprocess.Popen[bytes], title: str, which: int = 0) -> psutil.Process:
    """A process of the run by its title; of several, the one that started as number `which`."""
    found = []
    for process in family(driver):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    assert found, f"no {title} in this run"
    return sorted(found, key=lambda p: (p.create_time(), p.pid))[which]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextlib.contextmanager
def logged(args: Sequence[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A run in the background, and the file with what it says."""
    said = folder / "said.txt"
    with said.open("wb") as file, started(list(args), output=file) as process:
        yield process, said


def ends_well(process: subprocess.Popen[bytes], said: Path) -> None:
    assert process.wait(timeout=500) == 0, said.read_text(errors="replace")[-6000:]


def faults_in(out: Path) -> list[str]:
    return [line["message"] for line in read_lines(out / "warnings.jsonl") if line["watch"] == "fault"]


def segments_left(maps: Sequence[str]) -> list[str]:
    """Names of vLLM's shared memory among these that are still in /dev/shm."""
    return [name for name in maps if name.startswith("/dev/shm/psm_") and Path(name).exists()]


def mapped(processes: Sequence[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                found.update(part for part in line.split() if part.startswith("/dev/shm/"))
    return found


@pytest.mark.faults
def test_an_engine_is_killed_while_it_generates(judges: Path, tmp_path: Path) -> None:
    """None of the prompts in flight is lost or trained on twice."""
    out = tmp_path / "run"
    args = command(judges, out, *SAVING, "--logger.samples", "32")
    args[args.index("--train.max_steps") + 1] = "2"
    # More prompts than two steps take: none comes again by itself.
    args[args.index("--data.max_samples") + 1] = "200"
    with logged(args, tmp_path) as (process, said):
        wait_for_step(process, out, 1)
        core = find(process, CORE)
        core.suspend()  # step 2 waits for its rollouts from now on
        time.sleep(1.0)
        core.kill()
        ends_well(process, said)
    (fault,) = faults_in(out)
    assert "after step 1" in fault and "EngineDied" in fault and "step_1" in fault
    assert [line["step"] for line in records(out) if line["phase"] == "train"] == [1, 2]
    # Each prompt that was trained on, once: 8 prompts and more, 4 rollouts each.
    rows = [line["row"] for line in read_lines(out / "samples.jsonl") if line["step"] == 2]
    assert len(rows) == 32 and all(rows.count(row) == 4 for row in rows)


@pytest.fixture(scope="module")
def undisturbed(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(command(judges, out))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_covers(out)
    return out


@pytest.mark.faults
@pytest.mark.parametrize(
    ("title", "says"),
    [
        (POLICY, "ActorDiedError"),
        (ENGINE, "ActorDiedError"),
        (CORE, "EngineDied"),
        (WORKER, "EngineDied"),
    ],
)
def test_a_process_is_killed(judges: Path, tmp_path: Path, undisturbed: Path, title: str, says: str) -> None:
    """Stopped after step 1, so that the run waits for it in step 2, and killed there."""
    out = tmp_path / "run"
    with logged(command(judges, out, *SAVING), tmp_path) as (process, said):
        wait_for_step(process, out, 1)
        victim = find(process, title)
        victim.suspend()
        time.sleep(2.0)
        before = family(process)
        segments = mapped(before)
        victim.kill()
        ends_well(process, said)
    (fault,) = faults_in(out)
    assert says in fault
    assert_same(undisturbed, out)
    assert not segments_left(sorted(segments))


@pytest.mark.faults
def test_killed_before_the_first_checkpoint(judges: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Everything begins again; without --ckpt.save_steps that is always so."""
    out = tmp_path / "run"
    with logged(command(judges, out), tmp_path) as (process, said):
        wait_for_step(process, out, 3)
        find(process, POLICY).kill()
        ends_well(process, said)
    assert "the beginning" in faults_in(out)[0]
    assert_same(undisturbed, out)


@pytest.mark.faults
def test_killed_again_and_again(judges: Path, tmp_path: Path) -> None:
    """Without progress the run gives up after the number of starts that the flag says."""
    out = tmp_path / "run"
    with logged(command(judges, out, "--ckpt.max_restarts", "1"), tmp_path) as (process, said):
        wait_for_step(process, out, 1)
        first = find(process, POLICY)
        first.kill()
        wait_until(lambda: "start 1 of 1 from the beginning" in said.read_text(), "no second start")
        wait_until(lambda: '"train"' not in (out / "metrics.jsonl").read_text(), "the records were not begun anew")
        wait_for_step(process, out, 1)
        find(process, POLICY).kill()
        assert process.wait(timeout=200) == 1
    assert "no further start: 2 in a row came to no new checkpoint" in said.read_text()


@pytest.mark.faults
@pytest.mark.parametrize("engine", ["shared", "own"])
def test_the_evaluator_is_killed(judges: Path, tmp_path: Path, undisturbed: Path, engine: str) -> None:
    """Another evaluator takes its place and judges again; nothing else is started again."""
    out = tmp_path / "run"
    with logged(command(judges, out, "--eval.engine", engine), tmp_path) as (process, said):
        wait_for_step(process, out, 1)
        victim = find(process, EVALUATOR)
        victim.suspend()
        wait_for_step(process, out, 2)
        time.sleep(3.0)  # the evaluation after step 2 waits
        victim.kill()
        ends_well(process, said)
    assert "the evaluator died; evaluation 2 is repeated by another" in said.read_text()
    assert not faults_in(out)
    assert_same(undisturbed, out)


@pytest.mark.faults
def test_a_weight_sync_hangs(judges: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The evaluator's own engine is needed by syncs alone, until step 2."""
    out = tmp_path / "run"
    more = (*SAVING, "--eval.engine", "own", "--sync.deadline", "20")
    with logged(command(judges, out, *more), tmp_path) as (process, said):
        wait_until((out / "eval" / "step_0.jsonl").exists, "no first evaluation")
        find(process, CORE, which=1).suspend()
        ends_well(process, said)
    assert any("weight sync" in fault and "--sync.deadline" in fault for fault in faults_in(out))
    assert_same(undisturbed, out)


@pytest.mark.faults
@pytest.mark.parametrize("title", [POLICY, CORE, ENGINE])
def test_a_process_hangs(judges: Path, tmp_path: Path, undisturbed: Path, title: str) -> None:
    out = tmp_path / "run"
    with logged(command(judges, out, *SAVING, "--ray.call_timeout", "25"), tmp_path) as (process, said):
        wait_for_step(process, out, 1)
        victim = find(process, title)
        victim.suspend()
        ends_well(process, said)
        assert not victim.is_running()
    assert any("--ray.call_timeout" in fault for fault in faults_in(out))
    assert_same(undisturbed, out)


@pytest.mark.faults
def test_nothing_is_left_of_a_driver_that_is_killed(judges: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with logged(command(judges, out, "--eval.engine", "own"), tmp_path) as (process, _):
        wait_for_step(process, out, 1)
        members = family(process)
        segments = mapped(members)
        titles = [" ".join(member.cmdline()) for member in members]
        for title in (POLICY, ENGINE, EVALUATOR, CORE, WORKER):
            assert any(name.startswith(title) for name in titles), title
        process.kill()
        _, left = psutil.wait_procs(members, timeout=60)
        assert not [member for member in left if member.status() != psutil.STATUS_ZOMBIE]
    assert not segments_left(sorted(segments))


@pytest.mark.faults
def test_the_newest_checkpoint_is_truncated_at_a_random_byte(judges: Path, tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "run"
    args = command(judges, out, *SAVING, "--ckpt.load", "auto")
    with logged(args, tmp_path) as (process, _):
        wait_for_step(process, out, 3)
        wait_until(lambda: len(steps_saved(out)) >= 2, "nothing was saved")
    newest = out / "checkpoints" / f"step_{steps_saved(out)[-1]}"
    chance = random.Random(time.time_ns())
    victim = chance.choice([path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size])
    at = chance.randrange(victim.stat().st_size)
    os.truncate(victim, at)
    done = run(args)
    assert done.returncode == 0, f"{victim} at {at}: {done.stderr[-4000:]}"
    assert any("skipping a checkpoint" in line and str(newest) in line for line in done.stderr.splitlines())
    assert f"resumed from {newest}\n" not in done.stderr
    assert_same(undisturbed, out)


@pytest.mark.faults
def test_a_signal_and_then_a_fault(judges: Path, tmp_path: Path) -> None:
    """As when a cluster takes a job's nodes away: nothing starts again, and the exit code says that it can go on."""
    out = tmp_path / "run"
    with logged(command(judges, out, *SAVING), tmp_path) as (process, said):
        wait_for_step(process, out, 2)
        core = find(process, CORE)
        core.suspend()
        process.send_signal(signal.SIGUSR1)
        time.sleep(1.0)
        core.kill()
        assert process.wait(timeout=200) == 85, said.read_text()[-4000:]
    assert steps_saved(out)


def memory(driver: subprocess.Popen[bytes]) -> dict[str, int]:
    """MiB by kind of process, and of Ray's object store, which its raylet has mapped."""
    kinds = {"policy": POLICY, "engine": ENGINE, "evaluator": EVALUATOR, "core": CORE, "worker": WORKER}
    found = {"driver": psutil.Process(driver.pid).memory_info().rss}
    for process in family(driver):
        with contextlib.suppress(psutil.Error):
            words, used = process.cmdline(), process.memory_info()
            title = " ".join(words)
            for kind in [name for name, begin in kinds.items() if title.startswith(begin)]:
                found[kind] = found.get(kind, 0) + used.rss
            if words and words[0].endswith("/raylet"):
                found["object store"] = used.shared
    return {kind: size // 2**20 for kind, size in found.items()}


def assert_flat(samples: dict[int, dict[str, int]]) -> None:
    """The last third of the run needs no more than the second: a tenth and 16 MiB for what varies."""
    values = list(samples.values())
    third = len(values) // 3
    for kind in values[-1]:
        before, after = (
            [sample[kind] for sample in part if kind in sample]
            for part in (values[third : 2 * third], values[2 * third :])
        )
        assert sum(after) / len(after) < 1.1 * sum(before) / len(before) + 16, (kind, samples)


@pytest.mark.faults
def test_soak(judges: Path, tmp_path: Path) -> None:
    """Many steps with a random process killed every few of them, and as many without. REAL_SOAK_STEPS sets how many,
    REAL_SOAK_OUTPUT a file for the figures."""
    steps = int(os.environ.get("REAL_SOAK_STEPS", "24"))
    whole, out = tmp_path / "whole", tmp_path / "run"
    (tmp_path / "1").mkdir()

    def long(folder: Path, *more: str) -> list[str]:
        args = command(judges, folder, *more)
        args[args.index("--train.max_steps") + 1] = str(steps)
        args[args.index("--train.num_episodes") + 1] = str(8 * steps)
        args[args.index("--eval.steps") + 1] = "8"
        # A longer run takes smaller steps: a judge that can do the task leaves no prompts of which some are wrong.
        rate = args.index("--actor.adam.lr") + 1
        args[rate] = str(float(args[rate]) * min(1.0, 24 / steps))
        return args

    flat: dict[int, dict[str, int]] = {}
    with logged(long(whole), tmp_path / "1") as (process, said):
        for step in range(2, steps, max(2, steps // 24)):
            wait_for_step(process, whole, step)
            flat[step] = memory(process)
        assert process.wait(timeout=3000) == 0, said.read_text(errors="replace")[-6000:]
    assert set(flat[2]) == {"driver", "policy", "engine", "evaluator", "core", "worker", "object store"}
    chance, killed = random.Random(steps), {}
    with logged(long(out, "--ckpt.save_steps", "2"), tmp_path) as (process, said):
        step, kills = 0, 0
        while (step := step + chance.randint(3, 9)) < steps:
            wait_for_step(process, out, step)
            killed[step] = memory(process)
            time.sleep(chance.random())
            with contextlib.suppress(AssertionError, psutil.Error):  # between two starts there may be none
                find(process, chance.choice([POLICY, ENGINE, EVALUATOR, CORE, WORKER])).kill()
                kills += 1
        assert process.wait(timeout=3000) == 0, said.read_text(errors="replace")[-6000:]
    figures = {"steps": steps, "kills": kills, "restarts": len(faults_in(out)), "unit": "MiB"}
    figures |= {"memory": flat, "memory_with_kills": killed}
    if path := os.environ.get("REAL_SOAK_OUTPUT"):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")
    assert kills >= steps // 12
    assert_same(whole, out, last=steps)
    assert_flat(flat)
    first, *_, last = [sample["driver"] for sample in killed.values()]
    assert last < 1.5 * first, killed
