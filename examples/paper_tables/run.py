"""Runs the cells of the paper's tables on the judging task, and writes the tables.

    python -m examples.paper_tables.run                        # the small size
    python -m examples.paper_tables.run --tables 2 8 --seeds 0
    python -m examples.paper_tables.run --list

One Ray cluster serves all cells, and one rollout engine most of them. Every cell that is done has a JSON in
RESULTS/SIZE/cells and is not run again; models are kept in OUTPUT/SIZE/seed_N. A cell that fails is named at the end;
in the search for rates it ends the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.judging_task import warm_up
from examples.judging_task.task import TESTS
from examples.paper_tables import cells as plan
from examples.paper_tables.cells import SIZES, Cell, Size
from examples.paper_tables.judged import SPLITS, chosen_rate, judged_cell
from examples.paper_tables.tables import write_tables
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.config.cli import parse_args
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.main import run
from real_openrlhf.run.ray_session import ray_session
from real_openrlhf.run.tract import run_tract

HERE = Path(__file__).resolve().parent
# The policy's rank, the kept engine, and the one that writes TRACT's feedback.
_SLOTS = 3.0
TINY_DATA = {"sft_careful": 256, "sft": 256, "train": 128, "valid": 16, **{test: 16 for test in TESTS}}


class CellFailed(RuntimeError):
    """A cell ended with an error; the message names it and its log."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """output: models and logs; results: what is kept."""

    size: str
    output: Path
    results: Path

    def seed(self, seed: int) -> Path:
        return self.output / self.size / f"seed_{seed}"

    def json(self, cell: Cell, seed: int) -> Path:
        return self.results / self.size / "cells" / f"{cell.name}-seed{seed}.json"


class Cluster:
    """One Ray session with one set of engines; after a failure, another."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._held = ExitStack()
        self._kept: KeptEngines | None = None

    def engines(self) -> KeptEngines:
        if self._kept is None:
            self._held.enter_context(ray_session(None, num_cpus=None, needed_cpus=_SLOTS))
            self._kept = KeptEngines()
            self._held.callback(self._kept.shutdown)
        return self._kept

    def close(self) -> None:
        self._kept = None
        with to_file(self.log):
            self._held.close()


class Runner:
    def __init__(self, place: Place, size: Size, cluster: Cluster) -> None:
        self.place, self.size, self.cluster = place, size, cluster
        self.known: dict[str, Cell] = {method: plan.warmup(method) for method in plan.WARMUPS}

    def cell(self, cell: Cell, seed: int) -> dict[str, Any]:
        """The cell's JSON, run if it is not there."""
        self.known[cell.name] = cell
        path = self.place.json(cell, seed)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        return self._run(cell, seed)

    def model(self, name: str, seed: int) -> Path:
        """A cell's model, trained again if it is not there."""
        folder = self.place.seed(seed)
        if name == "base":
            make_base(folder, seed, self.size, tiny=self.place.size == "tiny")
            record = self.place.results / self.place.size / f"base-seed{seed}.json"
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, (folder / "base.json").read_text(encoding="utf-8"))
            return folder / "stage_1"
        model = folder / name / "model"
        if not (model / "config.json").is_file():
            self._run(self.known[name], seed)
        return model

    def _run(self, cell: Cell, seed: int) -> dict[str, Any]:
        model = self.model(cell.start, seed)
        output = self.place.seed(seed) / cell.name
        if output.exists():
            shutil.rmtree(output)  # begun and not ended
        flags = self._flags(cell, seed, model, output)
        log = output.with_suffix(output.suffix + ".log")
        start = time.perf_counter()
        ended: Any = None
        with to_file(log):
            try:
                config = parse_args(flags, warmup=cell.warmup)
                code = (run_tract if config.warmup.method == "tract" else run)(config, kept=self.cluster.engines())
                ended = f"exit code {code}" if code else None
            except Exception as error:  # a bug, or Ray lost an actor: the other cells go on
                logging.exception("the cell failed")
                ended = repr(error)
        if ended:
            # What is left of it would hold places of the cluster.
            self.cluster.close()
            raise CellFailed(f"{cell.name} of seed {seed} ended with {ended}; see {log}")
        found = {
            "cell": cell.name,
            "seed": seed,
            "start": cell.start,
            "flags": dict(cell.flags),
            "size": asdict(self.size),
            "seconds": round(time.perf_counter() - start, 1),
            **judged_cell(output, self.place.seed(seed) / "data"),
        }
        path = self.place.json(cell, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found) + "\n")
        average = found["average"]["expected"]["pearson"]
        print(f"{cell.name} of seed {seed}: {found['seconds']:.0f} s, mean Pearson of the tests {average}", flush=True)
        return found

    def _flags(self, cell: Cell, seed: int, model: Path, output: Path) -> list[str]:
        size, data = self.size, self.place.seed(seed) / "data"
        values: dict[str, Any] = {
            "actor.model_name_or_path": model,
            "data.prompt_dataset": data / ("sft.jsonl" if cell.warmup else "train.jsonl"),
            "eval.dataset": ",".join(f"{split}={data / split}.jsonl" for split in SPLITS),
            "eval.max_samples": size.rows,
            "train.seed": seed,
            "ckpt.output_dir": output,
        }
        if cell.warmup:
            values |= {
                "data.max_samples": size.warmup_rows,
                "train.max_steps": size.warmup_steps,
                "train.num_episodes": -(-size.warmup_steps * 64 // size.warmup_rows),
                "actor.adam.lr": size.warmup_rate,
            }
        else:
            values |= {
                "train.max_steps": size.steps,
                "train.num_episodes": -(-size.steps * 32 // 4096),
                "eval.steps": size.curve_every if cell.curve else -1,
            }
        values |= dict(cell.flags)
        if self.place.size == "tiny" and not cell.warmup:
            # It has learned nothing: a run would end at the first look at its rollouts.
            values |= {"real.min_mass": 0, "real.min_readable": 0}
        shared = "warmup.yaml" if cell.warmup else "config.yaml"
        return ["--config", str(HERE / shared), *(word for k, v in values.items() for word in (f"--{k}", str(v)))]


def make_base(folder: Path, seed: int, size: Size, *, tiny: bool = False) -> None:
    """The seed's data and base model: the judging task's stage 1, which can read and was not yet spoiled."""
    folder.mkdir(parents=True, exist_ok=True)
    few = [word for name, n in TINY_DATA.items() for word in (f"--n_{name}", str(n))] if tiny else []
    if not (folder / "data/words.txt").is_file():
        task = ("-m", "examples.judging_task.task", "--output_dir", str(folder / "data"), "--seed", str(seed))
        warm_up.run(folder / "task.log", *task, *few)
    if not (folder / "init/config.json").is_file():
        words = ("--words", str(folder / "data/words.txt"), "--output_dir", str(folder / "init"))
        warm_up.run(folder / "init.log", "examples/quickstart/make_model.py", *words, "--seed", str(seed))
    teach_base(folder, seed, size)


def teach_base(folder: Path, seed: int, size: Size) -> None:
    """Stage 1, anew with twice as many updates until the model reads: seeds differ in when that begins.

    The losses by number of updates go to base.json. RuntimeError after three attempts.
    """
    record = folder / "base.json"
    losses = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for steps in (size.base_steps * factor for factor in (1, 2, 4)):
        if str(steps) not in losses:
            stage = ("--learning_rate", "3e-3", "--warmup_steps", str(min(50, steps // 2)), "--max_steps", str(steps))
            shutil.rmtree(folder / "stage_1", ignore_errors=True)
            warm_up.train(folder, "stage_1", model="init", data="sft_careful", stage=stage, seed=seed)
            *_, last = (folder / "stage_1/warmup_metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses[str(steps)] = json.loads(last)["loss"]
            write_text(record, json.dumps(losses) + "\n")
        if size.base_loss is None or losses[str(steps)] <= size.base_loss:
            return
    raise RuntimeError(f"the base of seed {seed} does not read: its losses by updates are {losses}")


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """All that is printed and logged inside goes to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with path.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.removeHandler(handler)


def search_rates(runner: Runner, size: Size) -> dict[str, float]:
    """The learning rate of each method, from the first seed's validation split; the search is written down."""
    found: dict[str, dict[str, float | None]] = {}
    for objective, cells in plan.search(size).items():
        judged = [(cell, runner.cell(cell, size.seeds[0])) for cell in cells]
        found[objective] = {
            str(cell.flags["actor.adam.lr"]): each["valid"]["expected"]["pearson"] for cell, each in judged
        }
    rates = {objective: chosen_rate(scores) for objective, scores in found.items()}
    path = runner.place.results / runner.place.size / "rates.json"
    write_text(path, json.dumps({"valid_pearson": found, "chosen": rates}, indent=1) + "\n")
    return rates


def run_all(place: Place, size: Size, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Every cell of the tables; returns what went wrong."""
    failures: list[str] = []
    cluster = Cluster(place.output / place.size / "cluster.log")
    try:
        runner = Runner(place, size, cluster)
        tables = plan.tables(search_rates(runner, size))
        for name in names:
            for cell in tables[name].values():
                for seed in seeds:
                    try:
                        runner.cell(cell, seed)
                    except CellFailed as failure:
                        failures.append(str(failure))
                        print(f"FAILED: {failure}", flush=True)
    finally:
        cluster.close()
    return failures


def main() -> int:
    tables = list(plan.tables({objective: 0.0 for objective in plan.OBJECTIVES}))
    parser = argparse.ArgumentParser(description="The paper's tables on the judging task.", allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables, metavar="N", help=", ".join(tables))
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the size's seeds")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/paper_tables"), help="models and logs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="JSON files, tables and the figure")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    args = parser.parse_args()
    size = SIZES[args.size]
    seeds = size.seeds if args.seeds is None else args.seeds
    if not set(seeds) <= set(size.seeds):
        parser.error(f"--seeds: the size {args.size} has the seeds {' '.join(map(str, size.seeds))}")
    if args.list:
        for name, rows in plan.tables({objective: size.rates[0] for objective in plan.OBJECTIVES}).items():
            print(f"Table {name}: {'; '.join(f'{row} = {cell.name}' for row, cell in rows.items())}")
        return 0
    place = Place(size=args.size, output=args.output_dir.resolve(), results=args.results.resolve())
    failures = run_all(place, size, args.tables, seeds)
    print(write_tables(place.results / place.size))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
