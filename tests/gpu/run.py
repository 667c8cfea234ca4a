"""A whole run on one GPU: engine and policy take turns on it, 20 steps of REAL on a tiny judge, evaluation and export.

The run's own output goes to $OUT/run_train.log while it works.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from real_openrlhf.algo.score_scale import ScoreScale
from tests.gpu.harness import DEVICE, ON_GPU, Report, run
from tests.gpu.smollm2 import show
from tests.helpers.tiny_judge import ANCHOR, make_judge, make_rows, write_rows

RATE = os.environ.get("RATE") or "1e-4"
STEPS = int(os.environ.get("STEPS") or (20 if ON_GPU else 2))


def check(report: Report) -> None:
    work = Path(os.environ.get("WORK") or "runs/gpu/run")
    out = Path(os.environ.get("OUT") or "runs/gpu")
    shutil.rmtree(work, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    judge = make_judge(work / "judge", tied=True)
    train, held_out = make_rows(512, seed=5), make_rows(256, seed=6)
    write_rows(work / "train.jsonl", train)
    write_rows(work / "eval.jsonl", held_out)
    command = [
        *(sys.executable, "-m", "real_openrlhf.train_real", "--actor.model_name_or_path", str(judge)),
        *("--data.prompt_dataset", str(work / "train.jsonl"), "--eval.dataset", str(work / "eval.jsonl")),
        *("--data.max_len", "48", "--rollout.max_new_tokens", "12", "--rollout.batch_size", "16"),
        *("--rollout.n_samples_per_prompt", "8", "--train.max_steps", str(STEPS), "--eval.steps", "-1"),
        *("--actor.adam.lr", RATE, "--real.beta", "1", "--real.keep_groups", "all", "--real.anchor", ANCHOR),
        *("--real.device", DEVICE, "--ckpt.output_dir", str(work / "real"), "--ckpt.save_steps", "10"),
    ]
    if ON_GPU:
        command += ["--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep"]
        command += ["--vllm.gpu_memory_utilization", "0.3"]
    command += os.environ.get("RUN_FLAGS", "").split()
    start = time.perf_counter()
    with (out / "run_train.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
            report.figure("seconds, start to end", time.perf_counter() - start)
            if (work / "real/metrics.jsonl").is_file():
                shutil.copy(work / "real/metrics.jsonl", out / "run_metrics.jsonl")
    report.figure("exit code", code)
    if code:
        print((out / "run_train.log").read_text(encoding="utf-8")[-4000:])
        raise RuntimeError(f"train_real ended with {code}")
    before, after = show(report, work / "real", ScoreScale.parse("1-5"))
    report.figure("exported", sorted(p.name for p in (work / "real/model").iterdir()))
    report.figure("dtype of the export", json.loads((work / "real/model/config.json").read_text())["dtype"])
    report.expect(after["reward"] > before["reward"], "the held-out reward did not rise")


if __name__ == "__main__":
    run("run", "Does a whole colocated run raise a tiny judge's held-out reward?", check)
