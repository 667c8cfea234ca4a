"""Carries out a plan: starts workers, lets them take turns, watches the time, saves results after every step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from examples.benchmark.flops import Shape, needed
from examples.benchmark.plan import MARGIN, Estimates, Item, Round, WeightSync, fit
from examples.benchmark.processes import Worker, WorkerError
from examples.benchmark.protocol import Case, Measured
from examples.benchmark.results import Record, Results
from real_openrlhf.common.device import Device

ROOT = Path(__file__).resolve().parents[2]
# Steps before a worker's first measured step: the optimizer gets its state, kernels and memory are warm. The second
# also shows how fast the worker is.
WARM_UP = (
    Case(prompt=64, response=16, samples=2, micro_batch=2),
    Case(prompt=128, response=32, samples=4, micro_batch=4),
)
GEMM_SECONDS = 20.0  # time reserved for the last measurement of the GEMM rate and for the report
START_LIMIT = 600.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """worker: command of a contestant without its flags; sync: the program that times weight syncs, None for none."""

    minutes: float
    seed: int
    learning_rate: float
    logits_mb: int
    models: dict[str, Path]
    device: Device
    work_dir: Path
    output: Path
    worker: tuple[str, ...]
    sync: Path | None


class Bench:
    """One run. Use it as a context manager, which ends the workers."""

    def __init__(self, options: Options, results: Results) -> None:
        self.options, self.results = options, results
        self._shapes = {name: Shape.of(path) for name, path in options.models.items()}
        self._workers: dict[tuple[str, str], Worker] = {}
        self._broken: set[tuple[str, str]] = set()  # workers that could not be started; not tried again
        self._begin = time.monotonic()
        self._deadline = self._begin + 60 * options.minutes - GEMM_SECONDS * len(self._shapes)
        self._env = {**os.environ, **options.device.trainer_env(1), "RAY_worker_niceness": "0"}
        folders = {str(path.resolve()): name for name, path in options.models.items()}
        self._private = {**folders, sys.prefix: "venv", str(ROOT): "."}
        # A guess before anything is measured: half the rate of plain matrix products.
        self.estimates = Estimates(shapes=self._shapes, rate=5e10)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=self.console, transient=True
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bench:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(self._workers)
        self._progress.stop()
        self._save()

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, plan: Sequence[Item]) -> None:
        self._gemm("before")
        self._task = self._progress.add_task("", total=len(plan))
        for i, item in enumerate(plan):
            if i == middle(plan):
                self._gemm("middle")
            self._item(item, plan)
            self._save()
            self._progress.advance(self._task)
        self._close(list(self._workers))
        self._gemm("after")
        self.results.finished = True
        self._save()

    @property
    def left(self) -> float:
        """Seconds until all measurements must be done."""
        return self._deadline - time.monotonic()

    def _announce(self, plan: Sequence[Item]) -> None:
        kept, dropped = fit(plan, self.left, self._price)
        self._say(f"time for {len(kept)} of {len(plan)} rounds, by what is known of the workers' speed so far")
        for item in dropped:
            self._say(f"  probably no time for: {item.name}")

    def _price(self, item: Item, running: Collection[tuple[str, str]]) -> float:
        return MARGIN * self.estimates.item(item, running)

    def _item(self, item: Item, plan: Sequence[Item]) -> None:
        if self._too_long(item.name, self._price(item, self._workers)):
            return
        if isinstance(item, WeightSync):
            self._sync(item)
        elif item.alone:
            for contestant in item.contestants:
                self._close(list(self._workers))
                self._start(item.model, [contestant])
                self._step(item, contestant)
        else:
            self._ensure(item)
            if item is plan[0]:
                self._announce(plan)
            # The workers have said how fast they are.
            if not self._too_long(item.name, self._price(item, self._workers)):
                for contestant in item.contestants:
                    self._step(item, contestant)

    def _too_long(self, what: str, seconds: float) -> bool:
        """Whether the remaining time is too short; that is then printed and recorded."""
        left = max(0.0, self.left)
        if seconds <= left:
            return False
        why = f"no time: about {seconds:.0f} s needed, {left:.0f} s left of {self.options.minutes:g} min"
        self.results.miss(what, why)
        self._say(f"left out: {what} ({why})")
        return True

    def _step(self, item: Round, contestant: str) -> None:
        case = item.case(contestant)
        worker = self._workers.get((item.model, contestant))
        self._describe(f"{item.name}: {contestant}")
        if self._too_long(f"{item.name}: {contestant}", self.estimates.step(item.model, contestant, case)):
            return
        try:
            if worker is None:
                raise WorkerError("its worker does not run")
            measured = worker.step(case, self.options.seed, max(1.0, self.left))
        except WorkerError as error:
            self._failed(item.model, contestant, f"{item.name}: {contestant}", error)
            return
        self.estimates.observe(item.model, contestant, case, measured.total)
        flops = needed(self._shapes[item.model], case)
        self.results.records.append(Record.of(item, measured, flops))
        self._save()
        self._say(f"{item.name}: {contestant:8} {_line(measured)}")

    def _failed(self, model: str, contestant: str, what: str, error: WorkerError) -> None:
        self.results.miss(what, str(error))
        self._say(f"FAILED {what}: {error}")
        worker = self._workers.get((model, contestant))
        if worker is not None and not worker.alive:
            self._close([(model, contestant)])

    # -- workers -----------------------------------------------------------------------------------------------

    def _ensure(self, item: Round) -> None:
        """Start the round's workers, and end those of other models."""
        self._close([key for key in self._workers if key[0] != item.model])
        self._start(item.model, [c for c in item.contestants if (item.model, c) not in self._workers])

    def _start(self, model: str, contestants: Sequence[str]) -> None:
        """Workers start in parallel up to their first step, then they are warmed up one after the other."""
        begin = time.monotonic()
        contestants = [contestant for contestant in contestants if (model, contestant) not in self._broken]
        for contestant in contestants:
            self._describe(f"{model}: {contestant} starts")
            self._workers[model, contestant] = Worker(
                [*self.options.worker, *self._flags(model, contestant)],
                env=self._env,
                cwd=ROOT,
                log=self.options.work_dir / "logs" / f"{model}_{contestant}.log",
            )
        for contestant in contestants:
            worker = self._workers[model, contestant]
            try:
                ready = worker.ready(min(START_LIMIT, max(1.0, self.left)))
                self.results.workers[f"{model}/{contestant}"] = {k: v for k, v in ready.items() if k != "ready"}
                for case in WARM_UP:
                    measured = worker.step(case, self.options.seed, max(1.0, self.left))
            except WorkerError as error:
                self._failed(model, contestant, f"{model}: start of {contestant}", error)
                self._broken.add((model, contestant))
                self._close([(model, contestant)])
                continue
            self.estimates.observe(model, contestant, WARM_UP[-1], measured.total)
            self.estimates.observe_start(model, contestant, (time.monotonic() - begin) / len(contestants))

    def _flags(self, model: str, contestant: str) -> list[str]:
        options = self.options
        flags = {
            "contestant": contestant,
            "model": options.models[model].resolve(),
            "seed": options.seed,
            "learning_rate": options.learning_rate,
            "logits_mb": options.logits_mb,
            "device": options.device.name,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def _close(self, keys: Iterable[tuple[str, str]]) -> None:
        for key in list(keys):
            worker = self._workers.pop(key, None)
            if worker is not None:
                worker.close()

    # -- other measurements ------------------------------------------------------------------------------------

    def _gemm(self, when: str) -> None:
        for model, path in self.options.models.items():
            self._describe(f"{model}: GEMM rate")
            try:
                measured = gemm_rate(path, self.options.device.name, self._env)
            except subprocess.CalledProcessError as error:
                self.results.miss(f"{model}: GEMM rate {when}", str(error.stderr).strip()[-300:])
                continue
            self.results.gemm.append({"model": model, "when": when, **measured})
            self._say(f"{model}: GEMM rate {when} {measured['flops_per_second'] / 1e9:.1f} GFLOP/s")
        rates = [entry["flops_per_second"] for entry in self.results.gemm]
        if when == "before" and rates:
            self.estimates.rate = median(rates) / 2
        self._save()

    def _sync(self, item: WeightSync) -> None:
        self._close(list(self._workers))
        program, output = self.options.sync, self.options.work_dir.resolve() / "sync.json"
        if program is None or not program.is_file():
            self.results.miss(item, "no program that times it")
            return
        self._describe(item.name)
        output.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"examples.benchmark.{program.stem}", "--repeats", "5"]
        command += ["--model", str(self.options.models[item.model].resolve()), "--output", str(output)]
        log = self.options.work_dir / "logs" / "sync.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, env=self._env, cwd=ROOT, stdout=errors, stderr=errors, start_new_session=True
            )
            code = wait(process, max(1.0, self.left))
        if code or not output.is_file():
            self.results.miss(item, f"its program ended with exit code {code}, see logs/sync.log")
            self._say(f"FAILED {item.name}: exit code {code}")
            return
        self.results.sync = {"model": item.model, **json.loads(output.read_text(encoding="utf-8"))}
        medians = {side: round(median(self.results.sync[side]), 3) for side in ("real", "openrlhf")}
        self._say(f"{item.name}: median seconds {medians}")

    def _save(self) -> None:
        self.results.about["wall_minutes"] = round((time.monotonic() - self._begin) / 60, 2)
        self.results.save(self.options.output, self._private)

    def _describe(self, text: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=text)

    def _say(self, text: str) -> None:
        done, left = (time.monotonic() - self._begin) / 60, max(0.0, self.left) / 60
        self.console.print(f"[{done:5.1f} min, {left:5.1f} left] {text}", markup=False)


def wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code. A program that takes too long is asked to end what it started, and then killed with it."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(30)
        return -signal.SIGKILL
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def gemm_rate(model: Path, device: str, env: Mapping[str, str]) -> dict[str, Any]:
    """The result of `gemm.measure` in a process with the workers' environment. Raises CalledProcessError."""
    command = [sys.executable, "-m", "examples.benchmark.gemm", "--model", str(model.resolve()), "--device", device]
    done = subprocess.run(command, env=dict(env), cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def middle(plan: Sequence[Item]) -> int:
    """Index of the first item after the rounds that the plan begins with, those of one model's centre."""

    def same(item: Item) -> bool:
        return isinstance(item, Round) and item.purpose == "time" and item.point == getattr(plan[0], "point", None)

    return next((i for i, item in enumerate(plan) if not same(item)), len(plan))


def _line(measured: Measured) -> str:
    case = measured.case
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in measured.seconds.items())
    return (
        f"P={case.prompt} R={case.response} K={case.samples}: {measured.total:.2f} s ({phases}), "
        f"{measured.peak_bytes / 2**30:.2f} GiB, loss {measured.loss:.3g}"
    )
