"""What every GPU check shares: it asks one question and answers with a verdict, figures and what to do.

    python -m tests.gpu.attention            # one check; `bash tests/gpu.sh` runs them all

A check is a module with a function that fills a `Report`; `run` prints it and writes it as JSON to $OUT (default
runs/gpu). Without a GPU it says so and ends with exit code 0. These are no pytest tests: they measure, on a machine
that CI does not have.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# "cpu" runs a check on tiny shapes without a GPU: it then proves the script and answers nothing.
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
# By kind: the check passed, it failed, or it could not be asked here.
EXIT_CODES = {"yes": 0, "no": 1, "skipped": 0, "error": 2}


class Ended(BaseException):
    """Somebody else ended the check: `tests/gpu.sh` does when its time is up."""


class Skip(Exception):
    """The question cannot be asked on this machine; the message says what is missing."""


@dataclass
class Report:
    """question: what is asked. figures: numbers by name. advice: what a user should do with the answer."""

    name: str
    question: str
    verdict: str = "yes"
    figures: dict[str, Any] = field(default_factory=dict)
    advice: str = ""
    seconds: float = 0.0
    card: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = value
        print(f"  {name}: {_shown(value)}", flush=True)

    def expect(self, holds: bool, otherwise: str) -> None:
        """A condition of the verdict "yes"; otherwise: what to do when it does not hold."""
        if not holds:
            self.verdict = "no"
            self.advice = f"{self.advice} {otherwise}".strip()
            print(f"  NO: {otherwise}", flush=True)


def run(name: str, question: str, check: Callable[[Report], None], *, min_memory_gib: float = 0.0) -> None:
    """Ask, print, write $OUT/<name>.json and leave with the exit code of the verdict."""
    report = Report(name=name, question=question, command=f"python -m tests.gpu.{name}")
    print(f"== {name}: {question}", flush=True)
    start = time.perf_counter()
    signal.signal(signal.SIGTERM, _ended)
    try:
        report.card, report.versions = card(min_memory_gib), versions()
        check(report)
    except Skip as reason:
        report.verdict, report.advice = "skipped", str(reason)
    except Ended:
        report.verdict, report.advice = "error", "ended from outside, the time was up; the figures so far stand"
    except Exception as error:
        traceback.print_exc()
        report.verdict, report.advice = "error", f"{type(error).__name__}: {error}"
    report.seconds = round(time.perf_counter() - start, 1)
    if report.verdict != "skipped":
        folder = Path(os.environ.get("OUT") or "runs/gpu")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(vars(report), indent=1) + "\n", encoding="utf-8")
    print(f"-- {name}: {report.verdict}, {report.seconds:.0f} s. {report.advice}", flush=True)
    sys.exit(EXIT_CODES[report.verdict])


def _ended(number: int, frame: object) -> None:
    raise Ended


def card(min_memory_gib: float = 0.0) -> str:
    """Name and memory of the GPU. Raises Skip without one, with one older than sm_80, or with too little memory."""
    if not ON_GPU:
        return "none: a rehearsal on a CPU"
    if not torch.cuda.is_available():
        raise Skip("no GPU that torch can see")
    properties = torch.cuda.get_device_properties(0)
    gib = properties.total_memory / 2**30
    if properties.major < 8:
        raise Skip(f"{properties.name} is sm_{properties.major}{properties.minor}; bf16 and flash attention need sm_80")
    if gib < min_memory_gib:
        raise Skip(f"{properties.name} has {gib:.0f} GiB; this check needs {min_memory_gib:.0f}")
    return f"{properties.name}, {gib:.0f} GiB, sm_{properties.major}{properties.minor}"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformers", "ray", "deepspeed", "openrlhf", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def milliseconds(call: Callable[[], Any], *, repeats: int = 10, warm_up: int = 3) -> float:
    """Median time of a call on the GPU, by CUDA events, after warm_up calls that do not count."""
    for _ in range(warm_up):
        call()
    times: list[float] = []
    if not ON_GPU:
        start_s = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start_s)
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_gib(call: Callable[[], Any]) -> float:
    """Highest memory of torch's allocator during a call, above what was held before."""
    if not ON_GPU:
        call()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def relative_error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """|out - wanted| / |wanted| in float64; NaN where either holds one."""
    out, wanted = out.double(), wanted.double()
    return float((out - wanted).norm() / wanted.norm())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
