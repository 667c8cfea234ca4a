"""A real model on real labels: SmolLM2-135M, warmed up on STS-B, then 20 steps of REAL, engine and policy on one GPU.

Needs $SMOLLM2, the model's folder (examples/stsb/get_model.py), and $STSB, a folder with stsb_{train,dev,test}.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from tests.gpu.harness import DEVICE, ON_GPU, Report, Skip, run

SCALE = ScoreScale.parse("0-5")
# Rows per warm-up step, warm-up steps, prompts, rollouts, steps, held-out rows.
SIZES = (32, 240, 32, 8, 20, 512) if ON_GPU else (8, 40, 2, 2, 2, 8)
RATE = "1e-5"
LOGGED = (
    *("seconds/start", "seconds/generate", "seconds/train", "seconds/sync", "seconds/evaluate"),
    *("sync/seconds", "sync/logprob_mean", "sync/logprob_max", "rollout_gap/logprob_mean", "memory/policy_peak_bytes"),
)


def call(*words: str) -> float:
    """Run a module of this checkout; its seconds. RuntimeError with the end of its output when it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout[-6000:])
        raise RuntimeError(f"{' '.join(words[:2])} ended with {done.returncode}")
    return time.perf_counter() - start


def objective(path: Path, scale: ScoreScale) -> dict[str, float]:
    """What REAL maximises, on held-out rows: the mean of -(E - y)^2 + log pi(y); and what people look at."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    read = [row for row in rows if row["expected"] is not None and None not in row["distribution"]]
    if not read:
        raise RuntimeError(f"{path}: none of {len(rows)} held-out rows holds a score; the warm-up was too short")
    rewards, errors = [], []
    for row in read:
        target = scale.target(row["label"])
        low, high = (math.log(max(row["distribution"][i], 1e-12)) for i in (target.low, target.high))
        likelihood = (1 - target.weight) * low + target.weight * high
        errors.append((row["expected"] - row["label"]) ** 2)
        rewards.append(likelihood - errors[-1])
    expected, labels = [row["expected"] for row in read], [row["label"] for row in read]
    return {
        "reward": statistics.fmean(rewards),
        "rmse": statistics.fmean(errors) ** 0.5,
        "pearson": statistics.correlation(expected, labels) if len(set(expected)) > 1 else float("nan"),
        "mass": statistics.fmean(row["mass"] for row in read),
        "readable": len(read) / len(rows),
    }


def show(report: Report, folder: Path, scale: ScoreScale) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of a run's log, and its objective before and after."""
    log: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in LOGGED:
        values = [row[name] for row in log if row.get(name) is not None]
        if values:
            report.figure(f"{name}, median and largest of {len(values)}", [statistics.median(values), max(values)])
    files = sorted((folder / "eval").glob("step_*.jsonl"), key=lambda p: int(p.stem.removeprefix("step_")))
    before, after = objective(files[0], scale), objective(files[-1], scale)
    for name in before:
        report.figure(f"held out, {name}: before, after", [before[name], after[name]])
    return before, after


def check(report: Report) -> None:
    model, data = os.environ.get("SMOLLM2"), os.environ.get("STSB")
    if not model or not data:
        raise Skip("set SMOLLM2 to the model's folder and STSB to a folder with stsb_{train,dev,test}.jsonl")
    rows, warmup, prompts, samples, steps, held_out = SIZES
    out = Path(os.environ.get("WORK") or "runs/gpu/smollm2")
    shutil.rmtree(out, ignore_errors=True)
    call("examples/stsb/prepare.py", "--output_dir", str(out / "data"), "--data_dir", data)
    seconds = call(
        *("-m", "real_openrlhf.train_warmup", "--actor.model_name_or_path", model),
        *("--data.prompt_dataset", str(out / "data/sft.jsonl"), "--ckpt.output_dir", str(out / "warmup")),
        *("--data.apply_chat_template", "--data.max_len", "320", "--rollout.max_new_tokens", "64"),
        *("--real.scale", "0-5", "--real.device", DEVICE, "--actor.adam.lr", "2e-4"),
        *("--train.batch_size", str(rows), "--train.max_steps", str(warmup), "--train.num_episodes", "100"),
    )
    report.figure(f"warm-up, {warmup} steps of {rows} rows: s", seconds)
    shared = [
        "--train.colocate_all",
        "--vllm.enable_sleep",
        "--ds.enable_sleep",
        "--vllm.gpu_memory_utilization",
        "0.4",
    ]
    seconds = call(
        *("-m", "real_openrlhf.train_real", "--actor.model_name_or_path", str(out / "warmup/model")),
        *(
            "--data.prompt_dataset",
            str(out / "data/train.jsonl"),
            "--data.apply_chat_template",
            "--data.max_len",
            "320",
        ),
        *("--eval.dataset", str(out / "data/dev.jsonl"), "--eval.max_samples", str(held_out), "--eval.steps", "-1"),
        *("--rollout.batch_size", str(prompts), "--rollout.n_samples_per_prompt", str(samples)),
        *("--rollout.max_new_tokens", "64", "--train.max_steps", str(steps), "--actor.adam.lr", RATE),
        *("--real.scale", "0-5", "--real.beta", "1", "--real.keep_groups", "all", "--real.device", DEVICE),
        *("--ckpt.output_dir", str(out / "real"), *(shared if ON_GPU else [])),
    )
    report.figure(f"REAL, {steps} steps of {prompts} x {samples} rollouts, start and evaluations included: s", seconds)
    before, after = show(report, out / "real", SCALE)
    report.expect(after["reward"] > before["reward"], "the held-out reward did not rise")


if __name__ == "__main__":
    run("smollm2", "Do 20 steps of REAL on one GPU, colocated with sleep, raise SmolLM2's held-out reward?", check)
