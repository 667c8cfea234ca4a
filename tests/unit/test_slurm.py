"""The batch script under bash, with stand-ins for srun, scontrol, Ray and the run: the cluster, signals, the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.run.memory import Question, memory_plan
from real_openrlhf.run.model_shape import ModelShape
from tests.helpers.configs import QWEN3_32B, write_config

ROOT = Path(__file__).parents[2]
MODULE = "-m real_openrlhf.train_real"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which the batch script runs: srun, ray and python stand-ins that keep notes."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    scripts = {
        "scontrol": 'if [ "$1" = show ]; then echo node1; exit; fi\n'
        'echo "scontrol $*, tokens: $(ls "$SLURM_SUBMIT_DIR"/.ray_token* 2>/dev/null | wc -l)" >>"$NOTES"\n'
        'exit "${REQUEUE_FAILS:-0}"',
        # One task on this host; what it was started with goes to the notes.
        "srun": 'echo "srun $*" >>"$NOTES"\nwhile case $1 in --*) true ;; *) false ;; esac; do shift; done\n'
        'SLURM_PROCID=0 exec "$@"',
        "ray": 'echo "ray $*" >>"$NOTES"\ncat "$RAY_AUTH_TOKEN_PATH" >"$NOTES.token"\n'
        'stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$NOTES.mode"\n[ -z "$NODE_DIES" ] || exit 1\nexec sleep 60',
        "python": 'if [ "$1" = -m ]; then echo "$RAY_ADDRESS $*" >>"$NOTES"; exec $RUN; fi\n'
        'if [ "$1" = - ] && [ "$#" = 3 ]; then echo "1 of 1 nodes"; exit "$NOT_READY"; fi\n'
        'if [ "$1" = -c ] && [ "${2#import ray}" != "$2" ]; then echo 127.0.0.1; exit; fi\n'
        f'exec "{sys.executable}" -S "$@"',
    }
    for name, text in scripts.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_dir / name).chmod(0o755)
    return {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "PYTHON": str(bin_dir / "python"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "4",
        "RAY_TMP": str(tmp_path / "t"),
        "RUN": "true",
        "NOT_READY": "0",
        "NODE_DIES": "",
    }


def run_batch(env: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "slurm/train_real.sbatch", *flags], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(("run", "code"), [("true", 0), (f"{sys.executable} -c exit(2)", 2)])
def test_the_batch_script_passes_the_exit_code_on_and_cleans_up(slurm: dict[str, str], run: str, code: int) -> None:
    result = run_batch({**slurm, "RUN": run}, "--real.anchor", "The score is ")
    assert result.returncode == code, result.stderr
    notes = Path(slurm["NOTES"]).read_text()
    head = next(line for line in notes.splitlines() if line.startswith("ray start --head"))
    port = int(re.search(r"--port=(\d+)", head)[1])  # type: ignore[index]
    assert 20000 <= port < 32000
    assert "--num-gpus=8" in head and "--include-dashboard=false" in head and "--dashboard-host=127.0.0.1" in head
    assert f"127.0.0.1:{port} {MODULE}" in notes
    assert "--real.anchor The score is " in notes
    assert Path(slurm["NOTES"] + ".mode").read_text().strip() == "600"
    assert len(Path(slurm["NOTES"] + ".token").read_text().strip()) == 64
    assert nothing_is_left(slurm)


def layout(env: dict[str, str]) -> Config:
    """The configuration that the script starts, with the least that a user adds."""
    user = ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d", "--ckpt.output_dir", "o"]
    user += ["--rollout.batch_size", "48"]
    assert run_batch(env, *user).returncode == 0
    line = next(line for line in Path(env["NOTES"]).read_text().splitlines() if MODULE in line)
    config = parse_args(line.partition(MODULE)[2].split())
    device: Literal["cpu", "cuda"] = "cpu" if env.get("GPUS_PER_NODE") == "0" else "cuda"
    validate(config, device=device)
    return config


def test_all_gpus_train_and_generate_in_turns(slurm: dict[str, str]) -> None:
    config = layout({**slurm, "SLURM_JOB_NUM_NODES": "2"})
    assert (config.actor.num_nodes, config.actor.num_gpus_per_node, config.ranks) == (2, 8, 16)
    assert (config.vllm.num_engines, config.vllm.tensor_parallel_size) == (8, 2)
    assert config.train.colocate_all and config.vllm.enable_sleep and config.ds.enable_sleep
    assert config.engine_utilisation == 0.75 and config.train.micro_batch_size is None
    # The longest prompt that --data.max_len leaves room for, with all its rollouts, is one pass.
    rollouts, response = config.rollout.n_samples_per_prompt, config.rollout.max_new_tokens
    assert config.train.max_tokens_per_gpu == config.data.max_len - response + rollouts * response


@pytest.mark.parametrize(("nodes", "fits"), [("2", True), ("1", False)])
def test_qwen3_32b_needs_two_nodes_of_eight_gpus_with_80_gb(
    slurm: dict[str, str], tmp_path: Path, nodes: str, fits: bool
) -> None:
    config = layout({**slurm, "SLURM_JOB_NUM_NODES": nodes})
    shape = ModelShape.of(write_config(tmp_path / "model", "qwen3", **QWEN3_32B))
    assert shape is not None
    asked = Question(shape=shape, itemsize=2, card=80 * 10**9, prompt=2048, liger=False)
    assert memory_plan(config, asked).fits is fits


@pytest.mark.parametrize(("gpus", "ranks", "engines", "width"), [("1", 1, 1, 1), ("3", 3, 3, 1), ("4", 4, 2, 2)])
def test_engines_share_out_the_gpus_of_a_node(
    slurm: dict[str, str], gpus: str, ranks: int, engines: int, width: int
) -> None:
    config = layout({**slurm, "GPUS_PER_NODE": gpus})
    assert (config.ranks, config.vllm.num_engines, config.vllm.tensor_parallel_size) == (ranks, engines, width)


def test_without_gpus_nothing_is_shared(slurm: dict[str, str]) -> None:
    config = layout({**slurm, "GPUS_PER_NODE": "0", "SLURM_JOB_NUM_NODES": "2"})
    assert (config.ranks, config.vllm.num_engines, config.train.colocate_all) == (2, 2, False)


def nothing_is_left(env: dict[str, str]) -> bool:
    """No token, no temporary folder."""
    tokens = list(Path(env["SLURM_SUBMIT_DIR"]).glob(".ray_token*"))
    return not tokens and not list(Path(env["RAY_TMP"]).iterdir())


def signalled(env: dict[str, str], number: signal.Signals, ready: str) -> tuple[int, str]:
    """Exit code and output of the script, which alone gets the signal (as --signal=B: does) when the notes say so."""
    script = ROOT / "slurm/train_real.sbatch"
    with subprocess.Popen(["bash", script], env=env, stdout=subprocess.PIPE, text=True) as process:
        notes = Path(env["NOTES"])
        while process.poll() is None and not (notes.exists() and ready in notes.read_text()):
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=100)
    return process.returncode, output


def test_the_batch_script_cleans_up_when_it_is_ended(slurm: dict[str, str]) -> None:
    code, _ = signalled({**slurm, "RUN": "sleep 60"}, signal.SIGTERM, MODULE)
    assert code == 143
    assert nothing_is_left(slurm)
    assert "requeue" not in Path(slurm["NOTES"]).read_text()


@pytest.fixture
def listening(tmp_path: Path) -> str:
    """A run that saves and exits with 85 when it is told to stop, as train_real does."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), sys.exit(85)))\n"
        "open(os.environ['NOTES'], 'a').write('listening\\n')\n"
        "time.sleep(60)\n"
    )
    return f"{sys.executable} {script}"


REQUEUED = "scontrol requeue 123456, tokens: 0"


def test_usr1_is_passed_on_and_the_job_requeued_when_all_is_clean(slurm: dict[str, str], listening: str) -> None:
    code, output = signalled({**slurm, "RUN": listening}, signal.SIGUSR1, "listening")
    assert code == 85, output
    notes = Path(slurm["NOTES"]).read_text()
    assert notes.splitlines()[-1] == REQUEUED and "--ckpt.load auto" in notes
    assert nothing_is_left(slurm)


def test_usr1_before_the_run_can_listen_requeues_too(slurm: dict[str, str]) -> None:
    code, output = signalled({**slurm, "RUN": "sleep 60"}, signal.SIGUSR1, MODULE)
    assert code == 85, output
    assert Path(slurm["NOTES"]).read_text().splitlines()[-1] == REQUEUED


def test_usr1_before_the_cluster_is_complete_requeues_too(slurm: dict[str, str]) -> None:
    code, output = signalled({**slurm, "NOT_READY": "1"}, signal.SIGUSR1, "ray start")
    assert code == 85, output
    notes = Path(slurm["NOTES"]).read_text()
    assert notes.splitlines()[-1] == REQUEUED and MODULE not in notes
    assert nothing_is_left(slurm)


@pytest.mark.parametrize(
    ("setting", "says"), [("NO_REQUEUE", "exit code 85"), ("REQUEUE_FAILS", "could not be requeued")]
)
def test_a_job_that_is_not_requeued(slurm: dict[str, str], setting: str, says: str) -> None:
    result = run_batch({**slurm, "RUN": f"{sys.executable} -c exit(85)", setting: "1"})
    assert result.returncode == 85 and says in result.stdout
    assert (REQUEUED in Path(slurm["NOTES"]).read_text()) == (setting == "REQUEUE_FAILS")


def test_the_batch_script_ends_when_a_node_ends_before_the_cluster_is_complete(slurm: dict[str, str]) -> None:
    result = run_batch({**slurm, "NODE_DIES": "1", "NOT_READY": "1"})
    assert result.returncode == 1
    assert "a Ray node ended before the cluster was complete" in result.stderr
    assert MODULE not in Path(slurm["NOTES"]).read_text()


def test_the_batch_script_waits_no_longer_than_its_deadline(slurm: dict[str, str]) -> None:
    result = run_batch({**slurm, "NOT_READY": "1", "READY_DEADLINE": "1"})
    assert result.returncode == 1
    assert "READY_DEADLINE" in result.stderr and "last seen: 1 of 1 nodes" in result.stderr


def test_the_batch_script_never_ends_processes_by_name() -> None:
    text = (ROOT / "slurm/train_real.sbatch").read_text()
    code = "\n".join(line.partition("#")[0] for line in text.splitlines() if not line.startswith("#SBATCH"))
    assert not re.search(r"ray\"? stop|pkill|killall", code)
