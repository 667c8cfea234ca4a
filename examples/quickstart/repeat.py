"""The quickstart's REAL run many times over: does its objective rise, and how far do runs lie apart?

    python examples/quickstart/repeat.py --seeds 0 1 2 --repeats 3 --output_dir runs/repeat --flags --real.beta 1
    python examples/quickstart/repeat.py --table runs/repeat/results.json

Every seed has its own data, model and warm-up, made once; its repeats start from there with the same flags and differ
in what the engine happened to sample. results.json is written after every run, and a second call leaves out what is in
it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# run.sh's own, but for the preset and beta.
WARMUP = (
    *("--learning_rate", "3e-3", "--warmup_steps", "50", "--lr_scheduler", "cosine"),
    *("--batch_size", "64", "--max_steps", "800", "--max_len", "256", "--log_steps", "20"),
)
REAL = (
    *("--data.input_key", "prompt", "--data.label_key", "label", "--data.max_len", "128"),
    *("--rollout.batch_size", "16", "--rollout.n_samples_per_prompt", "8", "--rollout.max_new_tokens", "32"),
    *("--train.micro_batch_size", "32", "--train.max_steps", "50", "--train.seed", "0", "--actor.adam.lr", "2e-4"),
    *("--real.scale", "1-5", "--real.anchor", "score ", "--real.keep_groups", "all", "--eval.steps", "25"),
)
METRICS = ("expected/pearson", "expected/rmse", "mass", "reward")


def run(log: Path, *words: str) -> None:
    """A program of this checkout; RuntimeError with the end of its output when it fails."""
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{' '.join(words[:2])} ended with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")


def warm_up(folder: Path, seed: int, device: str) -> Path:
    """Data and a warmed-up model of this seed."""
    done = folder / "warmup/config.json"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        run(folder / "task.log", str(HERE / "task.py"), "--output_dir", str(folder / "data"), "--seed", str(seed))
        run(
            folder / "model.log",
            *(str(HERE / "make_model.py"), "--words", str(folder / "data/words.txt")),
            *("--output_dir", str(folder / "init"), "--seed", str(seed)),
        )
        run(
            folder / "warmup.log",
            *("-m", "real_openrlhf.train_warmup", "--model_name_or_path", str(folder / "init")),
            *("--data", str(folder / "data/sft.jsonl"), "--output_dir", str(folder / "warmup"), *WARMUP),
            *("--seed", str(seed), "--device", device),
        )
    return folder / "warmup"


def one(folder: Path, out: Path, device: str, flags: list[str]) -> dict[str, Any]:
    """A REAL run: its evaluations, and the seconds it took."""
    start = time.monotonic()
    run(
        out.with_suffix(".log"),
        *("-m", "real_openrlhf.train_real", "--actor.model_name_or_path", str(folder / "warmup")),
        *("--data.prompt_dataset", str(folder / "data/train.jsonl"), "--eval.dataset", str(folder / "data/test.jsonl")),
        *(*REAL, "--ckpt.output_dir", str(out), "--real.device", device, "--logger.progress", "false", *flags),
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [
        {"step": row["step"], **{name: row[f"eval/{name}"] for name in METRICS}}
        for row in rows
        if row["phase"] == "eval"
    ]
    return {"evaluations": evaluations, "seconds": round(time.monotonic() - start, 1)}


def table(results: dict[str, Any]) -> str:
    """Markdown: start and end of every run, and their spread."""
    lines = [
        f"`{results['command']}`",
        "",
        "| seed | repeat | Pearson | RMSE | mass | held-out reward |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["runs"]:
        first, last = row["evaluations"][0], row["evaluations"][-1]
        cells = [f"{first[name]:.3f} to {last[name]:.3f}" for name in METRICS]
        lines.append(f"| {row['seed']} | {row['repeat'] + 1} | {' | '.join(cells)} |")
    lines += [
        "",
        "| seed | runs | Pearson's gain: mean [least, most] | reward's gain: mean [least, most] |",
        "|---|---|---|---|",
    ]
    for seed in sorted({row["seed"] for row in results["runs"]}):
        mine = [row["evaluations"] for row in results["runs"] if row["seed"] == seed]
        gains = {name: [e[-1][name] - e[0][name] for e in mine] for name in METRICS}
        shown = [
            f"{statistics.fmean(gains[name]):+.3f} [{min(gains[name]):+.3f}, {max(gains[name]):+.3f}]"
            for name in ("expected/pearson", "reward")
        ]
        lines.append(f"| {seed} | {len(mine)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Every run's held-out correlation and objective against the step, a colour per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    seeds = sorted({row["seed"] for row in results["runs"]})
    for panel, name, label in zip(
        panels,
        ("expected/pearson", "reward"),
        ("Pearson of E[score] and label", "mean reward, the objective"),
        strict=True,
    ):
        for row in results["runs"]:
            steps = [e["step"] for e in row["evaluations"]]
            first = row["repeat"] == 0
            panel.plot(
                steps,
                [e[name] for e in row["evaluations"]],
                color=f"C{seeds.index(row['seed'])}",
                marker="o",
                alpha=0.7,
                label=f"seed {row['seed']}" if first else None,
            )
        panel.set_xlabel("REAL step")
        panel.set_ylabel(f"{label}, held out")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/repeat"))
    parser.add_argument(
        "--name", default="results", help="of the JSON in --output_dir; cells of another name run again"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", type=Path, help="print the table of this JSON, draw its plot, and run nothing")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags of train_real; all that follows")
    args = parser.parse_args()
    if args.table is not None:
        results = json.loads(args.table.read_text(encoding="utf-8"))
        print(table(results))
        plot(results, args.table.with_suffix(".png"))
        return
    path = args.output_dir / f"{args.name}.json"
    words = [f"--seeds {' '.join(map(str, args.seeds))} --repeats {args.repeats}", *args.flags]
    results: dict[str, Any] = {
        "command": f"python examples/quickstart/repeat.py {words[0]} --flags {' '.join(args.flags)}"
    }
    results["runs"] = []
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
    known = {(row["seed"], row["repeat"]) for row in results["runs"]}
    for seed in args.seeds:
        warm_up(args.output_dir / f"seed_{seed}", seed, args.device)
    # Repeat by repeat, so that an early end leaves all seeds.
    for repeat in range(args.repeats):
        for seed in args.seeds:
            if (seed, repeat) in known:
                continue
            folder = args.output_dir / f"seed_{seed}"
            found = one(folder, folder / f"{args.name}_{repeat}", args.device, args.flags)
            results["runs"].append({"seed": seed, "repeat": repeat, **found})
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            first, last = found["evaluations"][0], found["evaluations"][-1]
            print(f"seed {seed}, repeat {repeat + 1}: {first} -> {last}, {found['seconds']} s", flush=True)
    print(table(results))
    plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
