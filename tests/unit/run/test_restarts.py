"""What is started again, from where, and how often; nothing really starts."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from real_openrlhf.checkpoint.errors import CheckpointError
from real_openrlhf.checkpoint.manifest import Checkpoint
from real_openrlhf.common.device import DeviceError
from real_openrlhf.common.errors import RunError
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.controller.checkpointing import make_store
from real_openrlhf.controller.loop import Stopped
from real_openrlhf.controller.output_folder import RunLogError
from real_openrlhf.run import restarts
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.restarts import Interrupted, launch_until_done
from real_openrlhf.run.signals import StopRequest
from tests.unit.checkpoint import helpers


class Run:
    """attempts: what each attempt does, with this run; the last one returns."""

    def __init__(self, folder: Path, *attempts: Callable[[Run], None], limit: int = 2) -> None:
        ckpt = SimpleNamespace(folder=str(folder), max_num=9, best_metric=None, max_restarts=limit)
        self.plan: Any = SimpleNamespace(config=SimpleNamespace(ckpt=ckpt))
        self.store = make_store(folder, keep=9, metric=None)
        self.attempts = list(attempts)
        self.started_from: list[int | None] = []
        self.again: list[Any] = []

    def launch(self, plan: Any, checkpoint: Checkpoint | None, kept: Any, *, stop: StopRequest, again: Any) -> None:
        stop.arm()
        self.started_from.append(None if checkpoint is None else checkpoint.step)
        self.again.append(again)
        if self.attempts:
            self.attempts.pop(0)(self)

    def go(self, checkpoint: Checkpoint | None = None) -> Run:
        launch_until_done(self.plan, checkpoint, self.launch)
        return self

    def save(self, step: int) -> Checkpoint:
        return helpers.save(self.store, step)


def died() -> ActorUnavailableError:
    return ActorUnavailableError("The actor died.\nits worker was killed", None)


def dies(*saved: int, at: int = 0, before: signal.Signals | None = None) -> Callable[[Run], None]:
    """before: a signal before the fault."""

    def attempt(run: Run) -> None:
        for step in saved:
            run.save(step)
        if before is not None:
            signal.raise_signal(before)
        raise Interrupted(at) from died()

    return attempt


def fails(error: Exception) -> Callable[[Run], None]:
    def attempt(run: Run) -> None:
        raise error

    return attempt


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(restarts, "pause", lambda seconds, stop: made.append(seconds))
    return made


@pytest.mark.parametrize("error", [ConfigError("a flag"), RunLogError("the folder"), CheckpointError("the file")])
def test_what_is_wrong_input_at_first_is_a_failed_run_later(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        Run(tmp_path, fails(error)).go()
    with pytest.raises(RunError, match=f"cannot go on: {error}"):
        Run(tmp_path, dies(at=1), fails(error)).go()


def test_without_a_fault_there_is_one_start(tmp_path: Path) -> None:
    run = Run(tmp_path).go()
    assert run.started_from == [None] and run.again == [None]


def test_from_the_beginning_when_there_is_no_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, dies(at=4)).go()
    assert run.started_from == [None, None]
    assert run.again[1].where == "the beginning"
    assert run.again[1].why.startswith("a fault after step 4: ActorUnavailableError: its worker was killed")


def test_from_the_last_checkpoint(tmp_path: Path) -> None:
    assert Run(tmp_path, dies(2, 4, at=5), dies(6, at=7)).go().started_from == [None, 4, 6]


def test_a_bounded_number_of_times_without_a_new_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, dies(2), dies(), dies(), dies())
    with pytest.raises(ActorUnavailableError):
        run.go()
    assert run.started_from == [None, 2, 2]


def test_starts_that_did_not_help_are_given_time(tmp_path: Path, pauses: list[float]) -> None:
    Run(tmp_path, dies(), dies(), dies(), dies(2), dies(), limit=3 + 1).go()
    assert pauses == [0.0, 30.0, 60.0, 0.0, 30.0]


def test_a_node_that_is_gone_may_come_back(tmp_path: Path) -> None:
    """A first start without enough GPUs is the user's mistake, a later one is not."""
    lacks = fails(DeviceError("the cluster has 8 GPUs, the run needs 16"))
    assert Run(tmp_path, dies(3), lacks).go().started_from == [None, 3, 3]
    with pytest.raises(RunError, match="the run cannot go on: the cluster has 8 GPUs"):
        Run(tmp_path / "never", dies(3), lacks, lacks).go()
    with pytest.raises(DeviceError):
        Run(tmp_path / "first", lacks).go()


def test_every_new_checkpoint_gives_all_starts_back(tmp_path: Path) -> None:
    run = Run(tmp_path, dies(1), dies(), dies(2), dies(), dies(3), dies()).go()
    assert run.started_from == [None, 1, 1, 2, 2, 3, 3]


def test_no_restart_at_all(tmp_path: Path) -> None:
    run = Run(tmp_path, dies(2), limit=0)
    with pytest.raises(ActorUnavailableError):
        run.go()
    assert run.started_from == [None]


def test_no_restart_in_a_session_of_the_caller(tmp_path: Path) -> None:
    """Its actors would still be there."""
    run, kept = Run(tmp_path, dies(2)), KeptEngines()
    with pytest.raises(ActorUnavailableError):
        launch_until_done(run.plan, None, run.launch, kept)
    assert run.started_from == [None]


def test_checkpoints_of_an_earlier_course_are_not_taken(tmp_path: Path) -> None:
    """The user went back to step 2; step 8 is what they did not want."""
    run = Run(tmp_path, dies(), dies(4))
    back = run.save(2)
    run.save(8)
    assert run.go(back).started_from == [2, 2, 4]


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path) -> None:
    def dies_while_the_disk_fails(run: Run) -> None:
        run.save(2)
        path = run.save(4).path / "stream.json"
        path.write_bytes(path.read_bytes()[:5])
        dies()(run)

    assert Run(tmp_path, dies_while_the_disk_fails).go().started_from == [None, 2]


def test_what_comes_again_is_not_tried_again(tmp_path: Path) -> None:
    """A fault of the first start, and an error that is no fault, at any start."""
    for attempts in ([fails(died())], [dies(), fails(ValueError("a flag"))]):
        run = Run(tmp_path, *attempts)
        with pytest.raises((ActorUnavailableError, ValueError)):
            run.go()
        assert len(run.started_from) == len(attempts)


def test_a_later_start_may_fail_as_often_as_a_run(tmp_path: Path) -> None:
    """Memory of what was killed may not be free yet."""
    assert Run(tmp_path, dies(), fails(died())).go().started_from == [None] * 3
    run = Run(tmp_path, dies(), fails(died()), fails(died()))
    with pytest.raises(ActorUnavailableError):
        run.go()


@pytest.mark.parametrize(("saved", "step"), [((), 0), ((3,), 3)])
def test_a_fault_between_a_signal_and_its_save(tmp_path: Path, saved: tuple[int, ...], step: int) -> None:
    """As when Slurm ends a job: nothing is started again, and the caller learns whether there is a state."""
    handler = signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path, dies(*saved, before=signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        run.go()
    assert (stopped.value.saved, stopped.value.step) == (bool(saved), step)
    assert run.started_from == [None]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("saved", [(), (3,)])
def test_a_signal_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: tuple[int, ...]) -> None:
    """The same, seen the other way round: actors are gone a moment before the signal, which nobody waits for."""

    def waits(seconds: float, stop: StopRequest) -> None:
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(restarts, "pause", waits)
    run = Run(tmp_path, dies(*saved))
    with pytest.raises(Stopped) as stopped:
        run.go()
    assert stopped.value.saved == bool(saved) and run.started_from == [None]


def test_a_signal_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture above
    with StopRequest() as stop:
        monkeypatch.setattr(restarts.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGUSR1))
        restarts.pause(1e9, stop)
    assert stop.requested == "SIGUSR1"


def test_the_next_attempt_knows_of_a_signal_that_came_while_it_started(tmp_path: Path) -> None:
    """It has no handler of its own; Ray installs one in the meantime."""
    seen = []

    def launch(plan: Any, checkpoint: Checkpoint | None, kept: Any, *, stop: StopRequest, again: Any) -> None:
        if again is not None:
            signal.raise_signal(signal.SIGUSR1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.arm()
        seen.append(stop.requested)
        if again is None:
            raise Interrupted(1) from died()

    run = Run(tmp_path)
    launch_until_done(run.plan, None, launch)
    assert seen == [None, "SIGUSR1"]
