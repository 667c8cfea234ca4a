"""The training step on one GPU, compared with OpenRLHF's with packing and flash attention, within a few minutes.

    python -m examples.benchmark.gpu --minutes 3 --output_dir runs/benchmark_gpu
    python -m examples.benchmark.gpu --minutes 3 --models 8b,32b --output_dir DIR     # from two depths, extrapolated
    python -m examples.benchmark.gpu --minutes 1 --models 1.7b --profile --output_dir DIR
    python -m examples.benchmark.gpu --report DIR/gpu.json                            # the table again

Models have real shapes and random weights (`gpu_models.py`). There is one process per contestant and model, one after
the other; the next one imports while this one works. Writes gpu.json after every step, then gpu.md, and the profile as
text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from examples.benchmark.flops import Shape, executed
from examples.benchmark.gpu_models import SIZES, depths, write_config
from examples.benchmark.gpu_plan import (
    COUNTED,
    Memory,
    Point,
    add_arguments,
    largest_micro_batch,
    micro_tokens,
    pass_peak,
    points,
    probes,
)
from examples.benchmark.gpu_report import write_report
from examples.benchmark.processes import Worker, WorkerError
from examples.benchmark.protocol import Measured

ROOT = Path(__file__).resolve().parents[2]
CONTESTANTS = {"real": 1.0, "openrlhf": 2.0}  # by the length of their steps
GEMM_ROWS = {"cuda": 8192, "cpu": 128}
SEED = 1
BUILD_SECONDS = 180.0
LEAST_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """A process: one contestant with one model."""

    model: str
    layers: int
    contestant: str

    def __str__(self) -> str:
        return f"{self.contestant}, {self.model}, {self.layers} layers"


class GpuProcess(Worker):
    """The harness's side of `gpu_worker.py`."""

    def build(self, seconds: float) -> dict[str, Any]:
        self._say({"op": "build"})
        return self.ready(seconds)

    def ask(self, seconds: float, **message: Any) -> dict[str, Any]:
        self._say(message)
        answer = self._answer(seconds)
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer


class Contest:
    """One contestant on one model: what it is asked, and its results (`run`, a JSON object)."""

    def __init__(
        self, task: Task, process: GpuProcess, shape: Shape, run: dict[str, Any], *, deadline: float, end: float
    ) -> None:
        self.task, self.process, self.shape, self.run = task, process, shape, run
        self.deadline, self.end = deadline, end
        # By gradient checkpointing on or off; None if its memory could not be measured.
        self.memory: dict[bool, Memory | None] = {}
        self.seconds_per_flop = 0.0

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def leave_out(self, point: Point, why: str) -> None:
        self.run["left_out"].append({"point": str(point), "why": why})
        self.say(f"{point}: left out, {why}")

    def limit(self) -> float:
        """Seconds that a step may take: until the end of the whole run."""
        return max(LEAST_SECONDS, self.end - time.monotonic())

    def measure(self, point: Point) -> dict[str, Any] | None:
        """Steps at a point, the first of them not counted. None: left out."""
        if point.kind != "centre" and not self.affordable(point):
            self.leave_out(point, "no time")
            return None
        micro_batch = self.micro_batch(point)
        if micro_batch is None and not point.gradient_checkpointing and point.kind != "memory":
            point = replace(point, gradient_checkpointing=True)
            micro_batch = self.micro_batch(point)
        if micro_batch is None or (point.kind == "memory" and micro_batch != point.samples):
            self.leave_out(point, f"does not fit: {self.estimate(point) / 2**30:.0f} GiB by estimate")
            return None
        while True:
            try:
                return self.steps(point, micro_batch)
            except WorkerError as error:
                self.run["failed"].append({"point": str(point), "micro_batch": micro_batch, "error": str(error)[:500]})
                self.say(f"{point}, micro-batch {micro_batch}: {str(error)[:200]}")
                fits = "out of memory" not in str(error).lower()
                if fits or not self.process.alive or point.kind == "memory" or micro_batch % 2:
                    return None
                micro_batch //= 2

    def steps(self, point: Point, micro_batch: int) -> dict[str, Any]:
        case = point.case(micro_batch)
        n = COUNTED[point.kind]
        warm = 0 if point.kind == "memory" else 1
        measured = [self.process.step(case, SEED, self.limit()) for _ in range(warm + n)][warm:]
        seconds = [m.total for m in measured]
        last: Measured = measured[-1]
        if point.kind != "memory":
            self.seconds_per_flop = median(seconds) / executed(self.shape, self.task.contestant, case)
        step: dict[str, Any] = {
            "kind": point.kind,
            "case": asdict(case),
            "seconds": seconds,
            "median": median(seconds),
            "phases": {name: median(m.seconds[name] for m in measured) for name in last.seconds},
            "peaks": last.peaks,
            "peak_passes": max(pass_peak(m.peaks) for m in measured),
            "peak_all": max(m.peak_bytes for m in measured),
            "loss": last.loss,
            "facts": last.facts,
        }
        self.run["steps"].append(step)
        self.say(
            f"{point}, micro-batch {micro_batch}: {step['median']:.3f} s, "
            f"passes {step['peak_passes'] / 2**30:.1f} GiB, whole step {step['peak_all'] / 2**30:.1f} GiB"
        )
        return step

    def affordable(self, point: Point) -> bool:
        flops = executed(self.shape, self.task.contestant, point.case())
        steps = COUNTED[point.kind] + 1
        return time.monotonic() + flops * self.seconds_per_flop * steps < self.deadline

    def micro_batch(self, point: Point) -> int | None:
        if point.gradient_checkpointing not in self.memory:
            self.memory[point.gradient_checkpointing] = self.probe(point)
        facts = self.run["facts"]
        return largest_micro_batch(
            self.task.contestant,
            point,
            self.memory[point.gradient_checkpointing],
            held=facts["held_bytes"],
            total=facts["total_bytes"],
        )

    def probe(self, point: Point) -> Memory | None:
        """Memory as a linear function of tokens, from two small steps with the lengths of the first point."""
        if self.run["facts"]["total_bytes"] is None:
            return None
        try:
            found = [self.process.step(case, SEED, self.limit()) for case in probes(self.task.contestant, point)]
        except WorkerError as error:
            self.run["failed"].append({"point": f"probe of memory, {point}", "error": str(error)[:500]})
            return Memory(lines={"forward": (2.0**60, 0.0)}) if not point.gradient_checkpointing else None
        memory = Memory.of(self.task.contestant, *found)
        self.run["memory_lines"].append(
            {"gradient_checkpointing": point.gradient_checkpointing, "bytes": dict(memory.lines)}
        )
        return memory

    def estimate(self, point: Point) -> int:
        """Bytes of the passes with all rollouts in one micro-batch."""
        memory = self.memory.get(point.gradient_checkpointing)
        return memory.bytes(micro_tokens(self.task.contestant, point.case())) if memory else 0

    def profile(self, step: Mapping[str, Any], file: Path) -> None:
        try:
            found = self.process.ask(
                min(60.0, self.limit()), op="profile", case=step["case"], seed=SEED, file=str(file.resolve())
            )
        except WorkerError as error:
            self.run["failed"].append({"point": "profile", "error": str(error)[:500]})
            self.say(f"profile: {str(error)[:200]}")
            return
        self.run["profile"] = {**found, "file": file.name}
        print(file.read_text(encoding="utf-8"), flush=True)

    def compete(self, asked: Sequence[Point], *, profile: Path | None, save: Callable[[], None]) -> None:
        """Measure all points in order. Of the memory points, OpenRLHF only runs the largest that fits."""
        if self.task.contestant == "real":
            rows = GEMM_ROWS["cuda" if self.run["facts"]["device"] == "cuda" else "cpu"]
            self.run["gemm"] = self.process.ask(60.0, op="gemm", rows=rows)
            self.say(f"matrix products: {self.run['gemm']['flops_per_second'] / 1e12:.1f} TFLOP/s")
        enough = False
        for point in asked:
            if not self.process.alive:
                self.leave_out(point, "the process is gone")
                continue
            if point.kind == "memory" and enough:
                continue
            step = self.measure(point)
            if step and point.kind == "memory":
                enough = self.task.contestant == "openrlhf"
            if step and point.kind == "centre" and profile is not None:
                self.profile(step, profile)
            save()


def start(task: Task, folder: Path, args: argparse.Namespace) -> GpuProcess:
    """Start a process, which imports and then waits."""
    model = write_config(task.model, task.layers, folder / f"{task.model}-{task.layers}")
    command = [sys.executable, "-m", "examples.benchmark.gpu_worker", "--contestant", task.contestant]
    command += ["--model", str(model), "--device", args.device, "--logits_mb", str(args.logits_mb)]
    command += ["--no_liger"] if args.no_liger else []
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if args.alloc_conf:
        env["PYTORCH_CUDA_ALLOC_CONF"] = args.alloc_conf
    return GpuProcess(command, env=env, cwd=ROOT, log=args.output_dir / f"{task.contestant}.log")


def gpu_bytes() -> int | None:
    """Memory of the first GPU, without a CUDA context in this process, which would use memory. None if not known."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    asking_torch = "import torch; print(torch.cuda.get_device_properties(0).total_memory / 2**20)"
    for command in (query, [sys.executable, "-c", asking_torch]):
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            return int(float(found.split()[0]) * 2**20)
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            continue
    return None


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers", "deepspeed", "openrlhf", "flash_attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def share(task: Task) -> float:
    """The task's share of the time. A task with a part of the layers measures only the centre."""
    return CONTESTANTS[task.contestant] * (2 if task.layers == SIZES[task.model].layers else 1)


def asked_of(task: Task, args: argparse.Namespace, results: Mapping[str, Any]) -> list[Point]:
    """The task's points: for OpenRLHF those that this project has measured; with some of the layers only the centre."""
    size = SIZES[task.model]
    found = points(
        args.centre, args.prompts, args.responses, args.samples,
        gradient_checkpointing=args.gradient_checkpointing or size.gradient_checkpointing,
        only_centre=task.layers != size.layers,
    )  # fmt: skip
    ours = [
        r for r in results["runs"] if (r["model"], r["layers"], r["contestant"]) == (task.model, task.layers, "real")
    ]
    if task.contestant == "real" or not ours:
        return found
    done = {(s["kind"], *(s["case"][n] for n in ("prompt", "response", "samples"))) for s in ours[0]["steps"]}
    return [p for p in found if (p.kind, p.prompt, p.response, p.samples) in done]


def measure_all(args: argparse.Namespace, results: dict[str, Any], save: Callable[[], None]) -> None:
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    total = gpu_bytes() if args.device == "cuda" else None
    tasks = [
        Task(model=model, layers=layers, contestant=contestant)
        for model in args.models
        for layers in depths(SIZES[model], layers=args.layers, total_bytes=total)
        for contestant in CONTESTANTS
    ]
    profiled = "1.7b" if "1.7b" in args.models else args.models[0]
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as name:
        folder = Path(name)
        ahead: GpuProcess | None = start(tasks[0], folder, args)
        for number, task in enumerate(tasks):
            process, ahead = ahead or start(task, folder, args), None
            left = end - time.monotonic()
            shares = [share(t) for t in tasks[number:]]
            run: dict[str, Any] = {**asdict(task), "steps": [], "left_out": [], "failed": [], "memory_lines": []}
            results["runs"].append(run)
            print(f"{task}: {left:.0f} s left", flush=True)
            try:
                if left < 5:
                    raise WorkerError("no time")
                started = time.monotonic()
                run |= {
                    k: v for k, v in process.build(min(BUILD_SECONDS, left + LEAST_SECONDS)).items() if k != "ready"
                }
                results["runs"][-1] = run
                run["build_seconds"] = time.monotonic() - started
                if number + 1 < len(tasks):
                    ahead = start(tasks[number + 1], folder, args)
                deadline = time.monotonic() + (end - time.monotonic()) * shares[0] / sum(shares)
                shape = Shape.of(folder / f"{task.model}-{task.layers}")
                contest = Contest(task, process, shape, run, deadline=deadline, end=end)
                wanted = args.profile and (task.model, task.contestant) == (profiled, "real")
                contest.compete(
                    asked_of(task, args, results),
                    profile=args.output_dir / f"profile-{task.model}.txt" if wanted else None,
                    save=save,
                )
            except WorkerError as error:
                run["failed"].append({"point": "the process", "error": str(error)[:500]})
                print(f"  {str(error)[:300]}", flush=True)
            finally:
                process.close(5)
                if ahead is not None and sys.exc_info()[0] is not None:
                    ahead.kill()
                results["seconds"] = time.monotonic() - begin
                save()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="starting up included")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark_gpu"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--profile", action="store_true", help="one step of this project under torch's profiler")
    parser.add_argument("--no_liger", action="store_true", help="without Liger's layers, on both sides")
    parser.add_argument("--logits_mb", type=int, default=0, help="of this project's step; 0: the device's default")
    parser.add_argument("--alloc_conf", default="", help="PYTORCH_CUDA_ALLOC_CONF of both sides; empty: as it is")
    parser.add_argument("--report", type=Path, help="write the table of this gpu.json again, and measure nothing")
    add_arguments(parser, SIZES)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.report:
        print(write_report(json.loads(args.report.read_text(encoding="utf-8")), args.report.parent))
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": f"python -m examples.benchmark.gpu {' '.join(sys.argv[1:])}",
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "alloc_conf": args.alloc_conf or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "centre": list(args.centre),
        "versions": versions(),
        "runs": [],
    }
    file = args.output_dir / "gpu.json"

    def save() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    try:
        measure_all(args, results, save)
    finally:
        print(write_report(results, args.output_dir), flush=True)


if __name__ == "__main__":
    main()
