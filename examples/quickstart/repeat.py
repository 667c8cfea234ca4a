"""Repeats the quickstart's REAL run: does its objective rise, how much do runs differ, which settings matter?

    python examples/quickstart/repeat.py --cells exact --output_dir runs/repeat
    python examples/quickstart/repeat.py --cells exact paper exact_lr_5e-5 --repeats 1 --steps 50
    python examples/quickstart/repeat.py --table runs/repeat/rubric/steps_100.json

A cell is a set of flags (CELLS). Every seed has its own data, model and warm-up, made once. Every run from there is
deterministic; a repeat has another --train.seed, so another order of the prompts and other samples. Each core runs one
at a time. The JSON is written after every run, and a second call skips runs that are already in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

HERE = Path(__file__).resolve().parent
# The same flags as in run.sh.
WARMUP = (
    *("--learning_rate", "3e-3", "--warmup_steps", "50", "--lr_scheduler", "cosine"),
    *("--batch_size", "64", "--max_steps", "800", "--max_len", "256", "--log_steps", "20"),
)
# Also measured here: the norms of both terms at the parameters. No watch may end a run that is to be measured.
MEASURED = (
    *("--logger.term_grad_norm_at", "parameters", "--logger.term_grad_norm_steps", "5", "--guard.stop", "none"),
    *("--logger.progress", "false", "--ray.num_cpus", "4"),
)
FACTORS = {
    "lr_5e-5": ("--actor.adam.lr", "5e-5"),
    "token_mean": ("--real.aggregation", "token_mean"),
    "renormalise": ("--real.renormalise",),
    "kl_0.05": ("--algo.kl.init_coef", "0.05"),
    "prob": ("--real.answer_reward", "prob"),
    "partial": ("--real.keep_groups", "partial", "--real.refill"),
}
# One factor is changed at a time, from each of two presets.
CELLS: dict[str, tuple[str, ...]] = {preset: ("--real.preset", preset) for preset in ("exact", "paper")}
CELLS |= {f"{p}_{name}": (*CELLS[p], *flags) for p in ("exact", "paper") for name, flags in FACTORS.items()}
CELLS["paper_lr_2e-5"] = (*CELLS["paper"], "--actor.adam.lr", "2e-5")
# To see whether seeding matters: requests without seeds, in the order in which they arrive.
CELLS["paper_unseeded"] = (*CELLS["paper"], "--no-train.full_determinism_enable")
CELLS["beta_0.1"] = (*CELLS["exact"], "--real.beta", "0.1")
METRICS = ("expected/pearson", "expected/rmse", "mass", "reward")
SPLITS = ("valid", "test")


@dataclass(frozen=True)
class Task:
    """script: makes the data. config: of the REAL run."""

    script: Path
    config: Path


TASKS = {
    name: Task(folder / "task.py", folder / "config.yaml")
    for name, folder in (("rubric", HERE), ("facts", HERE.parent / "facts"))
}


def run(log: Path, *words: str) -> None:
    """Run a program of this checkout; RuntimeError with the end of its output when it fails."""
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{' '.join(words[:2])} ended with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")


def warm_up(folder: Path, task: Task, seed: int, device: str) -> Path:
    """Make data and a warmed-up model for this seed."""
    done = folder / "warmup/config.json"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        run(folder / "task.log", str(task.script), "--output_dir", str(folder / "data"), "--seed", str(seed))
        run(
            folder / "model.log",
            *(str(HERE / "make_model.py"), "--words", str(folder / "data/words.txt")),
            *("--output_dir", str(folder / "init"), "--seed", str(seed)),
        )
        run(
            folder / "warmup.log",
            *("examples/quickstart/warmup.py", "--model_name_or_path", str(folder / "init")),
            *("--data", str(folder / "data/sft.jsonl"), "--output_dir", str(folder / "warmup"), *WARMUP),
            *("--seed", str(seed), "--device", device),
        )
    return folder / "warmup"


def measure(folder: Path, out: Path, config: Path, *flags: str) -> dict[str, Any]:
    """A REAL run from the seed's warm-up: its evaluations, the gradient norms of both terms, and its seconds."""
    start = time.monotonic()
    held_out = ",".join(f"{split}={folder}/data/{split}.jsonl" for split in SPLITS)
    run(
        out.with_suffix(".log"),
        *("-m", "real_openrlhf.train_real", "--actor.model_name_or_path", str(folder / "warmup")),
        *("--data.prompt_dataset", str(folder / "data/train.jsonl"), "--eval.dataset", held_out),
        *("--config", str(config), *MEASURED, "--ckpt.output_dir", str(out), *flags),
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "evaluations": [
            {"step": row["step"]} | {f"{s}/{name}": row[f"eval/{s}/{name}"] for s in SPLITS for name in METRICS}
            for row in rows
            if row["phase"] == "eval"
        ],
        "norms": [
            {"step": row["step"]} | {n: row[f"param_grad_norm/{n}"] for n in ("term1", "term2", "cosine")}
            for row in rows
            if "param_grad_norm/term1" in row
        ],
        "seconds": round(time.monotonic() - start, 1),
    }


def gains(runs: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Last evaluation minus first, for each run."""
    return [row["evaluations"][-1][name] - row["evaluations"][0][name] for row in runs]


def table(results: dict[str, Any], cell: str) -> str:
    """Markdown: start and end of every run of a cell on the test split, and how much runs differ."""
    runs = [row for row in results["runs"] if row["cell"] == cell]
    lines = [
        "| seed | repeat | Pearson | RMSE | mass | held-out reward |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(runs, key=lambda row: (row["seed"], row["repeat"])):
        first, last = row["evaluations"][0], row["evaluations"][-1]
        cells = [f"{first[f'test/{name}']:.3f} to {last[f'test/{name}']:.3f}" for name in METRICS]
        lines.append(f"| {row['seed']} | {row['repeat'] + 1} | {' | '.join(cells)} |")
    lines += [
        "",
        "| seed | runs | Pearson's gain: mean [least, most] | reward's gain: mean [least, most] |",
        "|---|---|---|---|",
    ]
    for seed in sorted({row["seed"] for row in runs}):
        mine = [row for row in runs if row["seed"] == seed]
        shown = [_spread(gains(mine, f"test/{name}"), 3) for name in ("expected/pearson", "reward")]
        lines.append(f"| {seed} | {len(mine)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def grid(results: dict[str, Any]) -> str:
    """Markdown: each cell's gains on the validation split over its runs, and the balance of its terms."""
    lines = [
        "| cell | runs | Pearson's gain: mean [least, most] | reward's gain | RMSE's change | mass, least | "
        "Term 1 : Term 2, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in results["cells"]:
        runs = [row for row in results["runs"] if row["cell"] == cell]
        if not runs:
            continue
        mass = min(e["valid/mass"] for row in runs for e in row["evaluations"])
        ratios = [n["term1"] / n["term2"] for row in runs for n in row["norms"] if n["term2"]]
        shown = [_spread(gains(runs, f"valid/{name}"), 3) for name in ("expected/pearson", "reward", "expected/rmse")]
        ratio = f"{statistics.median(ratios):.2g}" if ratios else "none"
        lines.append(f"| `{cell}` | {len(runs)} | {' | '.join(shown)} | {mass:.3f} | {ratio} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    mean, low, high = (f"{x:+.{digits}f}" for x in (statistics.fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"


def plot(results: dict[str, Any], cell: str, path: Path) -> None:
    """Held-out correlation and objective of every run of a cell against the step, a colour per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    runs = [row for row in results["runs"] if row["cell"] == cell]
    seeds = sorted({row["seed"] for row in runs})
    names = {"test/expected/pearson": "Pearson of E[score] and label", "test/reward": "mean reward, the objective"}
    for panel, (name, label) in zip(panels, names.items(), strict=True):
        labelled: set[int] = set()
        for row in runs:
            seed = row["seed"]
            panel.plot(
                [e["step"] for e in row["evaluations"]],
                [e[name] for e in row["evaluations"]],
                color=f"C{seeds.index(seed)}",
                marker="o",
                alpha=0.7,
                label=None if seed in labelled else f"seed {seed}",
            )
            labelled.add(seed)
        panel.set_xlabel("REAL step")
        panel.set_ylabel(f"{label}, held out")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


class Experiment:
    """Cells x seeds x repeats of one task, one run per core at a time; runs in its JSON are not run again."""

    def __init__(self, path: Path, task: str, steps: int, command: str, device: str) -> None:
        self.path, self.task, self.steps, self.device = path, TASKS[task], steps, device
        self.results: dict[str, Any] = {"task": task, "steps": steps, "commands": [], "cells": {}, "runs": []}
        if path.is_file():
            self.results = json.loads(path.read_text(encoding="utf-8"))
        if command not in self.results["commands"]:
            self.results["commands"].append(command)
        self._cores: SimpleQueue[int] = SimpleQueue()

    def run(self, cells: Sequence[str], seeds: Sequence[int], repeats: int) -> bool:
        """True if every run finished."""
        known = {(row["cell"], row["seed"], row["repeat"]) for row in self.results["runs"]}
        self.results["cells"] |= {cell: list(CELLS[cell]) for cell in cells}
        for seed in seeds:
            warm_up(self._folder(seed), self.task, seed, self.device)
        # Repeat by repeat, so that after an early end all cells and seeds have runs.
        wanted = [(cell, seed, repeat) for repeat in range(repeats) for cell in cells for seed in seeds]
        cores = sorted(os.sched_getaffinity(0))
        for core in cores:
            self._cores.put(core)
        with ThreadPoolExecutor(len(cores)) as pool:
            return all(list(pool.map(self._one, [job for job in wanted if job not in known])))

    def _folder(self, seed: int) -> Path:
        return self.path.parent / f"seed_{seed}"

    def _one(self, job: tuple[str, int, int]) -> bool:
        cell, seed, repeat = job
        core = self._cores.get()
        try:
            # This holds for this thread only, and for the processes that it starts.
            os.sched_setaffinity(0, {core})
            out = self._folder(seed) / f"{cell}_{self.steps}_{repeat}"
            flags = ("--train.seed", str(repeat), "--real.device", self.device)
            length = ("--train.max_steps", str(self.steps))
            found = measure(self._folder(seed), out, self.task.config, *length, *flags, *CELLS[cell])
        except RuntimeError as error:
            print(f"{cell}, seed {seed}, repeat {repeat + 1} failed: {error}", file=sys.stderr, flush=True)
            return False
        finally:
            self._cores.put(core)
        self.results["runs"].append({"cell": cell, "seed": seed, "repeat": repeat, **found})
        self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        first, last = found["evaluations"][0], found["evaluations"][-1]
        shown = ", ".join(f"{n} {first[f'valid/{n}']:.3f} to {last[f'valid/{n}']:.3f}" for n in METRICS)
        print(f"{cell}, seed {seed}, repeat {repeat + 1}: {shown}; {found['seconds']} s", flush=True)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["exact"], choices=sorted(CELLS), metavar="CELL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="steps of REAL; each number has its own JSON")
    parser.add_argument("--task", default="rubric", choices=sorted(TASKS))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/repeat"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", type=Path, help="print the tables of this JSON, draw its plots, and run nothing")
    args = parser.parse_args()
    whole = True
    path = args.table
    if path is None:
        path = args.output_dir / args.task / f"steps_{args.steps}.json"
        words = f"--cells {' '.join(args.cells)} --seeds {' '.join(map(str, args.seeds))} --repeats {args.repeats}"
        command = f"python examples/quickstart/repeat.py --task {args.task} --steps {args.steps} {words}"
        experiment = Experiment(path, args.task, args.steps, command, args.device)
        whole = experiment.run(args.cells, args.seeds, args.repeats)
    results = json.loads(path.read_text(encoding="utf-8"))
    print(grid(results))
    for cell in results["cells"]:
        print(f"\n{cell}\n\n{table(results, cell)}")
        plot(results, cell, path.with_name(f"{path.stem}_{cell}.png"))
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
