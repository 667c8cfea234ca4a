"""`kill -9` of the driver in the middle of a run: what survives it, and does the run go on from its last checkpoint?"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.gpu.harness import DEVICE, ON_GPU, Report, run
from tests.helpers.tiny_judge import ANCHOR, make_judge, make_rows, write_rows

STEPS, SAVE = 6, 2
# Every process that the run starts inherits it, whatever becomes of its parents.
MARK = "REAL_GPU_CHECK"
WATCHED_S = 60


def marked(mark: str) -> dict[int, str]:
    """The living processes of a run, by id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes()
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment and state != "Z":
            found[int(folder.name)] = words.strip()[:60]
    return found


def gpu_megabytes() -> int | None:
    if not ON_GPU:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def check(report: Report) -> None:
    work = Path(os.environ.get("WORK") or "runs/gpu/resume")
    shutil.rmtree(work, ignore_errors=True)
    judge = make_judge(work / "judge", tied=True)
    write_rows(work / "train.jsonl", make_rows(256, seed=5))
    command = [
        *(sys.executable, "-m", "real_openrlhf.train_real", "--actor.model_name_or_path", str(judge)),
        *("--data.prompt_dataset", str(work / "train.jsonl"), "--data.max_len", "48"),
        *("--rollout.max_new_tokens", "12", "--rollout.batch_size", "8", "--rollout.n_samples_per_prompt", "4"),
        *("--train.max_steps", str(STEPS), "--ckpt.save_steps", str(SAVE), "--actor.adam.lr", "1e-4"),
        *("--real.beta", "1", "--real.keep_groups", "all", "--real.anchor", ANCHOR, "--real.device", DEVICE),
        *("--ckpt.output_dir", str(work / "real"), "--vllm.enforce_eager"),
    ]
    if ON_GPU:
        command += ["--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep"]
        command += ["--vllm.gpu_memory_utilization", "0.3"]
    mark, log = secrets.token_hex(8), work / "train.log"
    with log.open("w", encoding="utf-8") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, MARK: mark})
        try:
            while not (work / f"real/checkpoints/step_{SAVE}").is_dir():
                if driver.poll() is not None:
                    raise RuntimeError(f"the run ended by itself: {log.read_text(encoding='utf-8')[-3000:]}")
                time.sleep(0.1)
            report.figure("processes before", sorted(marked(mark).values()))
            report.figure("GPU memory before, MB", gpu_megabytes())
        finally:
            driver.kill()
            driver.wait()
    start = time.monotonic()
    while (left := marked(mark)) and time.monotonic() - start < WATCHED_S:
        time.sleep(0.5)
    report.figure("seconds until nothing was left", time.monotonic() - start)
    report.figure(f"still there after {WATCHED_S} s", sorted(left.values()))
    report.figure("GPU memory then, MB", gpu_megabytes())
    report.expect(not left, "processes outlive a killed driver; end them by their ids")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    done = subprocess.run(
        [*command, "--ckpt.load", "latest"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the resumed run ended with {done.returncode}: {done.stdout[-3000:]}")
    rows = [json.loads(line) for line in (work / "real/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["phase"] == "train"]
    report.figure("steps in the log of both runs", steps)
    report.expect(steps == list(range(1, STEPS + 1)), "steps are missing or stand twice in the log")


if __name__ == "__main__":
    run("resume", "After kill -9 of the driver: what survives, and does the run go on from its checkpoint?", check)
