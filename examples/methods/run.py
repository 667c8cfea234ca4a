"""Runs an example's cells: start, RAFT warm-up, and the RL methods from it with equal budgets; then the tables.

    python -m examples.methods.run stsb --size cpu --data_dir DIR --model MODEL
    python -m examples.methods.run mtbench --size cpu --data_dir DIR --model MODEL --list

Every cell that is done has a JSON in RESULTS/SIZE/cells and is not run again; a training that was interrupted goes on
from its last checkpoint. So the same command goes on where it ended. One Ray cluster serves all cells, and on a CPU one
rollout engine. A method that fails is named at the end; the others go on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.methods import judged
from examples.methods.plan import METHODS, RAFT, START, Cell, Example, Size, all_cells, cells, first_cells, rl
from examples.methods.tables import write_tables
from examples.paper_tables.judged import chosen_rate
from examples.paper_tables.run import CellFailed, Cluster, to_file
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.config.cli import parse_args
from real_openrlhf.data.row import DataError
from real_openrlhf.evals.metrics import judge_metrics
from real_openrlhf.run.main import run
from real_openrlhf.run.signals import EXIT_RESUME

EXAMPLES = ("stsb", "mtbench")
RATES = "rates.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """model: what everything begins with; output: models, data and logs; results: what is kept."""

    model: Path
    output: Path
    results: Path
    device: str = "auto"

    @property
    def data(self) -> Path:
        return self.output / "data"

    def json(self, name: str, seed: int) -> Path:
        return self.results / "cells" / f"{name}-seed{seed}.json"

    def folder(self, name: str, seed: int) -> Path:
        return self.output / f"seed_{seed}" / name


class Runner:
    def __init__(self, example: Example, size: Size, place: Place, cluster: Cluster) -> None:
        self.example, self.size, self.place, self.cluster = example, size, place, cluster
        self._total = len(list(all_cells(size)))
        self._began = time.monotonic()

    def cell(self, cell: Cell, seed: int) -> dict[str, Any]:
        """The cell's JSON, made if it is not there. CellFailed names the log."""
        path = self.place.json(cell.name, seed)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        began = time.monotonic()
        done = len(list(path.parent.glob("*.json")))
        folder = self.place.folder(cell.name, seed)
        self._say(f"[{done + 1}/{self._total}] {cell.name} of seed {seed}; its log: {folder}*.log")
        found: dict[str, Any] = {"cell": cell.name, "title": cell.title, "seed": seed, "rate": cell.rate}
        if cell.name != START:
            self._train(cell, seed)
            found |= {"curve": judged.curve(folder), "phases": judged.phases(folder)}
        found |= self._judge(cell, seed)
        found["seconds"] = round(time.monotonic() - began, 1)
        found["size"] = asdict(self.size)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, ensure_ascii=False) + "\n")
        self._say(f"    done in {found['seconds']:.0f} s; {self._pearson(found)}")
        return found

    def model(self, name: str, seed: int) -> Path:
        return self.place.model if name == START else self.place.folder(name, seed) / "model"

    def _train(self, cell: Cell, seed: int) -> None:
        folder = self.place.folder(cell.name, seed)
        if (folder / "model/config.json").is_file():
            return
        self._run(train_flags(self.example, self.size, self.place, cell, seed), folder, warmup=cell.name == RAFT)

    def _judge(self, cell: Cell, seed: int) -> dict[str, Any]:
        """By a run without steps, so that every model is judged by the same means."""
        folder = self.place.folder(f"{cell.name}_judged", seed)
        if folder.exists():
            shutil.rmtree(folder)  # begun and not ended
        model = self.model(cell.name, seed)
        self._run(judge_flags(self.example, self.size, self.place, model, folder), folder)
        found = {"tests": judged.judged_tests(folder), "texts": judged.texts(folder)}
        shutil.rmtree(folder / "model")  # a copy
        return found

    def _run(self, flags: Sequence[str], folder: Path, *, warmup: bool = False) -> None:
        log = folder.with_name(f"{folder.name}.log")  # a name may hold a rate, with its point
        ended: Any = None
        with to_file(log):
            try:
                kept = self.cluster.engines() if self.size.keep_engines else None
                code = run(parse_args(flags, warmup=warmup), kept=kept)
                if code == EXIT_RESUME:
                    raise SystemExit(code)  # a signal: nothing else is begun, and the same command goes on
                ended = f"exit code {code}" if code else None
            except Exception as error:  # a bug, or Ray lost an actor: other cells may go on
                logging.exception("the cell failed")
                ended = repr(error)
        if ended:
            # What is left of it would hold places of the cluster.
            self.cluster.close()
            raise CellFailed(f"{folder.name} ended with {ended}; see {log}")

    def _pearson(self, found: Mapping[str, Any]) -> str:
        shown = []
        for name, columns in found["tests"].items():
            value = judge_metrics(columns["expected"], columns["decoded"], columns["label"])["expected/pearson"]
            shown.append(f"{name} {'undefined' if value is None else format(value, '.3f')}")
        return f"Pearson of E[score]: {', '.join(shown)}"

    def _say(self, text: str) -> None:
        minutes = (time.monotonic() - self._began) / 60
        print(f"{self.example.name} {minutes:6.1f} min  {text}", flush=True)


def train_flags(example: Example, size: Size, place: Place, cell: Cell, seed: int) -> list[str]:
    """Flags of train_warmup for RAFT, else of train_real."""
    warmup = cell.name == RAFT
    folder = place.folder(cell.name, seed)
    values: dict[str, Any] = {
        "actor.model_name_or_path": place.model if warmup else place.folder(RAFT, seed) / "model",
        "data.prompt_dataset": place.data / ("sft.jsonl" if warmup else "train.jsonl"),
        "eval.dataset": f"dev={place.data / 'dev.jsonl'}",
        "train.seed": seed,
        "ckpt.output_dir": folder,
        "ckpt.load": "auto",
        "ckpt.save_steps": size.save_steps,
        "ckpt.max_num": 1,
        "real.device": place.device,
    }
    if size.dev_rows is not None:
        values["eval.max_samples"] = size.dev_rows
    if not warmup:
        values |= {
            "real.objective": cell.objective,
            "actor.adam.lr": cell.rate,
            "train.max_steps": size.steps,
            "eval.steps": size.curve_every,
        }
    if warmup:
        return _words(example, "warmup.yaml", values, size.warmup, size.both)
    return _words(example, "config.yaml", values, size.rl, size.both)


def judge_flags(example: Example, size: Size, place: Place, model: Path, folder: Path) -> list[str]:
    values: dict[str, Any] = {
        "actor.model_name_or_path": model,
        "data.prompt_dataset": place.data / "train.jsonl",
        "eval.dataset": ",".join(f"{name}={place.data / name}.jsonl" for name in example.tests),
        "train.max_steps": 0,
        # A judge that writes no score has its score read after the anchor, as `evaluate` does.
        "eval.force_anchor": True,
        "ckpt.output_dir": folder,
        "real.device": place.device,
    }
    if size.test_rows is not None:
        values["eval.max_samples"] = size.test_rows
    return _words(example, "config.yaml", values, size.rl, size.both)


def _words(example: Example, file: str, *values: Mapping[str, Any]) -> list[str]:
    """values: of a flag that several name, the first counts."""
    merged: dict[str, Any] = {}
    for part in reversed(values):
        merged |= part
    words = ["--config", str(example.folder / file)]
    for name, value in merged.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def search_rates(runner: Runner, seed: int) -> dict[str, float]:
    """The learning rate of each method: of the size's, the one whose last weights are best on the dev rows."""
    rates = runner.size.rates
    if len(rates) == 1:
        return dict.fromkeys(METHODS, rates[0])
    found: dict[str, dict[str, float | None]] = {}
    for objective in METHODS:
        made = {rate: runner.cell(rl(objective, rate), seed) for rate in rates}
        found[objective] = {f"{rate:g}": _last(cell["curve"])["expected/pearson"] for rate, cell in made.items()}
    chosen = {objective: chosen_rate(scores) for objective, scores in found.items()}
    write_text(runner.place.results / RATES, json.dumps({"dev_pearson": found, "chosen": chosen}, indent=1) + "\n")
    return chosen


def _last(curve: Mapping[str, dict[str, float | None]]) -> dict[str, float | None]:
    return curve[max(curve, key=int)]


def run_all(runner: Runner) -> list[str]:
    """Every cell; returns what went wrong. CellFailed when a start or the search fails, on which the rest depends."""
    failures = []
    size = runner.size
    for cell in first_cells():
        runner.cell(cell, size.seeds[0])
    rates = search_rates(runner, size.seeds[0])
    for seed in size.seeds:
        for cell in cells(rates):
            if cell.name == START and seed != size.seeds[0]:
                continue  # one model, judged once
            try:
                runner.cell(cell, seed)
            except CellFailed as failure:
                if cell.objective is None:
                    raise
                failures.append(str(failure))
                print(f"FAILED: {failure}", flush=True)
    return failures


def prepare(example: Example, size: Size, place: Place, data_dir: Path | None) -> None:
    """The data, unless they are there."""
    done = place.data / "prepared.json"
    words = ["--output_dir", str(place.data), *(word.format(model=place.model) for word in size.prepare)]
    if data_dir is not None:
        words += ["--data_dir", str(data_dir)]
    if not done.is_file():
        example.prepare(words)
        write_text(done, json.dumps(list(size.prepare)) + "\n")
    elif json.loads(done.read_text(encoding="utf-8")) != list(size.prepare):
        raise DataError(f"{place.data} was prepared for another size; give another --output_dir")


def load_example(name: str) -> Example:
    found: Example = importlib.import_module(f"examples.{name}.study").EXAMPLE
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=EXAMPLES)
    parser.add_argument("--size", default="cpu", help="cpu, gpu or tiny; see the example's study.py")
    parser.add_argument("--data_dir", type=Path, help="the user's files; see the example's prepare.py")
    parser.add_argument("--model", type=Path, default=Path(".cache/stsb/model"), help="what everything begins with")
    parser.add_argument("--output_dir", type=Path, help="models, data and logs; else runs/EXAMPLE/SIZE")
    parser.add_argument("--results", type=Path, help="JSON files, tables, figures; else examples/EXAMPLE/results/SIZE")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    args = parser.parse_args(argv)
    example = load_example(args.example)
    if args.size not in example.sizes:
        parser.error(f"--size {args.size}: {args.example} has {', '.join(example.sizes)}")
    size = example.sizes[args.size]
    place = Place(
        model=args.model.resolve(),
        output=(args.output_dir or Path("runs") / args.example / args.size).resolve(),
        results=(args.results or example.folder / "results" / args.size).resolve(),
        device=args.device,
    )
    if args.list:
        path = place.results / RATES
        chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"] if path.is_file() else None
        for seed, name in all_cells(size, chosen):
            print(f"{name} of seed {seed}: {'done' if place.json(name, seed).is_file() else 'to do'}")
        return 0
    try:
        failures = go(example, size, place, args.data_dir)
    except (DataError, CellFailed) as error:
        print(f"{args.example}: {error}", file=sys.stderr)
        return 1 if isinstance(error, CellFailed) else 2
    print(write_tables(example, place.results))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def go(example: Example, size: Size, place: Place, data_dir: Path | None) -> list[str]:
    """Data and all cells; what went wrong."""
    if not (place.model / "config.json").is_file():
        raise DataError(f"--model {place.model}: there is no model; examples/stsb/get_model.py gets one")
    prepare(example, size, place, data_dir)
    cluster = Cluster(place.output / "cluster.log")
    try:
        return run_all(Runner(example, size, place, cluster))
    finally:
        cluster.close()


if __name__ == "__main__":
    sys.exit(main())
