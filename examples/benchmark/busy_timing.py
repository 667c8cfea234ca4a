"""What a shared machine costs: times the quickstart's warm-up alone and next to busy processes, by how threads wait.

    python -m examples.benchmark.busy_timing --model DIR --data FILE --output FILE

Four variants take turns in one run: OpenMP's threads spin shortly before they sleep (shipped) or as long as libgomp's
default, on idle cores or next to --busy processes that never rest. The output has the seconds of --steps optimizer
steps of each variant and round, without start-up, and the slowdown, busy against idle of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from real_openrlhf.common.quiet_threads import SPINS

# Values of GOMP_SPINCOUNT; the second is libgomp's default.
SPIN_COUNTS = {"shipped": SPINS, "default": "300000"}
LOG_STEPS = 10


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Run n processes that use all the time of a core that they can get."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(model: Path, data: Path, steps: int, spins: str) -> float:
    """Seconds of `steps` optimizer steps, by the warm-up's own log; its first LOG_STEPS steps do not count."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "examples/quickstart/warmup.py", "--model_name_or_path", str(model)]
        command += ["--data", str(data), "--output_dir", folder, "--learning_rate", "3e-3", "--batch_size", "64"]
        command += ["--max_steps", str(steps + LOG_STEPS), "--max_len", "256", "--log_steps", str(LOG_STEPS)]
        command += ["--device", "cpu", "--seed", "0"]
        environment = os.environ | {"GOMP_SPINCOUNT": spins}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        log = (Path(folder) / "warmup_metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in log]
    return sum(row["tokens"] / row["tokens_per_second"] for row in rows[1:])


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds of paired ratios, with the least and the most."""

    def ratio(above: str, below: str) -> dict[str, float]:
        values = [r[above] / r[below] for r in rounds]
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    return {
        "slowdown shipped": ratio("shipped, busy", "shipped, idle"),
        "slowdown default": ratio("default, busy", "default, idle"),
        "idle, shipped against default": ratio("shipped, idle", "default, idle"),
        "busy, shipped against default": ratio("shipped, busy", "default, busy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="of make_model.py")
    parser.add_argument("--data", type=Path, required=True, help="sft.jsonl of task.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2)
    args = parser.parse_args()
    rounds: list[dict[str, float]] = []
    for number in range(args.rounds):
        found: dict[str, float] = {}
        variants = [(name, n) for n in (0, args.busy) for name in SPIN_COUNTS]
        # The order changes from round to round.
        for name, n in variants if number % 2 == 0 else variants[::-1]:
            with busy(n):
                found[f"{name}, {'busy' if n else 'idle'}"] = seconds(
                    args.model, args.data, args.steps, SPIN_COUNTS[name]
                )
        rounds.append(found)
        print(found, flush=True)
        facts = {"cores": len(os.sched_getaffinity(0)), "busy processes": args.busy, "steps": args.steps}
        result = {"facts": facts, "rounds": rounds, "summary": summary(rounds)}
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rounds), indent=1))


if __name__ == "__main__":
    main()
