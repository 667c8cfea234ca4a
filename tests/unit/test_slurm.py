"""The batch scripts under bash, with stand-ins for Slurm's commands, Ray and the run: the cluster, signals, the end."""

from __future__ import annotations

import os
import re
import shutil
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
from real_openrlhf.evaluate import parse_args as parse_evaluation
from real_openrlhf.judge.cli_args import parse_args as parse_judging
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
        '[ "$1" = requeue ] || exit 1\n'
        'echo "scontrol $*, left: $(ls "$RAY_TMP" 2>/dev/null | wc -l)" >>"$NOTES"\n'
        'exit "${REQUEUE_FAILS:-0}"',
        # One task on this host; what it was started with goes to the notes.
        "srun": 'echo "srun $*" >>"$NOTES"\nwhile case $1 in --*) true ;; *) false ;; esac; do shift; done\n'
        'echo $$ >"$NOTES.srun"\nSLURM_PROCID=${RANK:-0} SLURM_STEP_ID=0 exec "$@"',
        # A signal for the step goes to its task, not to srun; here both are the same process.
        "scancel": 'echo "scancel $*" >>"$NOTES"\nkill -TERM "$(cat "$NOTES.srun")"',
        "ray": 'echo "ray $*" >>"$NOTES"\ncat "$RAY_AUTH_TOKEN_PATH" >"$NOTES.token"\n'
        'stat -c %a "$RAY_AUTH_TOKEN_PATH" "${RAY_AUTH_TOKEN_PATH%/*}" >"$NOTES.mode"\n'
        'env >"$NOTES.env"\n[ -z "$NODE_DIES" ] || { echo no room on this node; exit 1; }\nexec sleep 60',
        "python": 'if [ "$2" = ray.scripts.scripts ]; then shift 2; exec ray "$@"; fi\n'
        f'[ "$2" != real_openrlhf.config.script_flags ] || PYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"\n'
        'if [ "$1" = -m ]; then echo "$RAY_ADDRESS $*" >>"$NOTES"; exec $RUN; fi\n'
        'if [ "$1" = - ] && [ "$#" = 3 ]; then echo "1 of 1 nodes"; exit "$NOT_READY"; fi\n'
        'if [ "$1" = -c ] && [ "${2#import ray}" != "$2" ]; then echo 127.0.0.1; exit; fi\n'
        f'exec "{sys.executable}" -S "$@"',
    }
    for name, text in scripts.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_dir / name).chmod(0o755)
    # Where the job was submitted: the checkout.
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
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


def run_batch(env: dict[str, str], *flags: str, script: str = "train_real.sbatch") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "slurm" / script, *flags], env=env, capture_output=True, text=True, timeout=120
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
    assert "scancel --signal=TERM 123456.0" in notes
    # A token of its own, which only this user can read, and which nobody reads on a command line or in the output.
    assert Path(slurm["NOTES"] + ".mode").read_text().split() == ["600", "700"]
    token = Path(slurm["NOTES"] + ".token").read_text().strip()
    assert len(token) == 64
    assert token not in notes + result.stdout + result.stderr + Path(slurm["NOTES"] + ".env").read_text()
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


SEPARATE = (
    "actor: {num_nodes: 1, num_gpus_per_node: 8}\nvllm: {num_engines: 3, tensor_parallel_size: 2}\nds.zero_stage: 2\n"
)


@pytest.mark.parametrize("script", ["train_real.sbatch", "train_32b.sbatch"])
def test_what_a_configuration_gives_counts_before_the_scripts_flags(
    slurm: dict[str, str], tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "slurm/separate.yaml"
    file.write_text(SEPARATE)
    env = {**slurm, **SETTINGS, "SLURM_JOB_NUM_NODES": "2"}
    # Relative to the checkout, where the run is started too.
    monkeypatch.chdir(tmp_path)
    config = parse_args(arguments(env, script, MODULE, "--config", "slurm/separate.yaml"))
    assert (config.actor.num_nodes, config.vllm.num_engines, config.vllm.tensor_parallel_size) == (1, 3, 2)
    assert not (config.train.colocate_all or config.vllm.enable_sleep or config.ds.enable_sleep)
    # What it leaves open is the script's.
    assert (config.ds.zero_stage, config.train.max_tokens_per_gpu, config.ckpt.load) == (2, 18432, "auto")
    validate(config, device="cuda")


def test_a_flag_that_there_is_not_ends_the_job_before_a_cluster_starts(slurm: dict[str, str]) -> None:
    result = run_batch(slurm, "--rollout.batchsize", "8")
    assert result.returncode == 2 and "--rollout.batch_size" in result.stderr
    assert not Path(slurm["NOTES"]).exists() and "end, exit code 2" in result.stdout


def test_without_gpus_nothing_is_shared(slurm: dict[str, str]) -> None:
    config = layout({**slurm, "GPUS_PER_NODE": "0", "SLURM_JOB_NUM_NODES": "2"})
    assert (config.ranks, config.vllm.num_engines, config.train.colocate_all) == (2, 2, False)


def nothing_is_left(env: dict[str, str]) -> bool:
    """No token, no temporary folder; and none was ever in the checkout."""
    checkout = {path.name for path in Path(env["SLURM_SUBMIT_DIR"]).iterdir()} - {"bin", "slurm", "t", "run.py"}
    return not list(Path(env["RAY_TMP"]).iterdir()) and not {name for name in checkout if "notes" not in name}


def signalled(
    env: dict[str, str], number: signal.Signals, ready: str, *, script: str = "train_real.sbatch"
) -> tuple[int, str]:
    """Exit code and output of the script, which alone gets the signal (as --signal=B: does) when the notes say so."""
    # Tests in the background of a shell have SIGINT ignored, and would hand that on; a job of Slurm's begins without.
    command = ["env", "--default-signal=INT", "bash", ROOT / "slurm" / script]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
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


REQUEUED = "scontrol requeue 123456, left: 0"


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


def test_usr1_while_the_nodes_begin_lets_them_clean_up(slurm: dict[str, str], tmp_path: Path) -> None:
    """srun would have them killed; the step's number is not known yet."""
    setup = tmp_path / "slurm/env.sh"
    setup.write_text('[ -z "${SLURM_STEP_ID:-}" ] || { echo begins >>"$NOTES"; while true; do sleep 0.1; done; }\n')
    code, output = signalled({**slurm, "ENV_SETUP": str(setup), "NOT_READY": "1"}, signal.SIGUSR1, "begins")
    assert code == 85, output
    notes = Path(slurm["NOTES"]).read_text().splitlines()
    assert "scancel --signal=TERM 123456" in notes and notes[-1] == REQUEUED
    assert nothing_is_left(slurm)


def test_usr1_before_the_run_began_requeues_no_more_than_twice(slurm: dict[str, str]) -> None:
    """A time limit that is shorter than the signal's lead would begin again for ever."""
    env = {**slurm, "NOT_READY": "1"}
    assert signalled({**env, "SLURM_RESTART_COUNT": "1"}, signal.SIGUSR1, "ray start")[0] == 85
    Path(slurm["NOTES"]).unlink()
    assert signalled({**env, "SLURM_RESTART_COUNT": "2"}, signal.SIGUSR1, "ray start")[0] == 1
    assert "requeue" not in Path(slurm["NOTES"]).read_text()
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
    assert "Ray ended with exit code 1; its last lines:\nno room on this node\n" in result.stderr
    assert MODULE not in Path(slurm["NOTES"]).read_text()


def test_the_batch_script_waits_no_longer_than_its_deadline(slurm: dict[str, str]) -> None:
    result = run_batch({**slurm, "NOT_READY": "1", "READY_DEADLINE": "1"})
    assert result.returncode == 1
    assert "READY_DEADLINE" in result.stderr and "last seen: 1 of 1 nodes" in result.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.s*")))
def test_no_script_ends_processes_by_name(script: str) -> None:
    text = (ROOT / "slurm" / script).read_text()
    code = "\n".join(line.partition("#")[0] for line in text.splitlines() if not line.startswith("#SBATCH"))
    assert not re.search(r"ray\"? stop|pkill|killall", code)


# -- Python's whereabouts --------------------------------------------------------------------------------


def test_a_file_of_the_user_is_read_on_the_batch_node_and_on_every_node(slurm: dict[str, str], tmp_path: Path) -> None:
    setup = tmp_path / "slurm/env.sh"
    setup.write_text(
        f'export PATH={tmp_path}/bin:$PATH FROM_SETUP=yes$NOT_SET\necho "setup ${{SLURM_STEP_ID:-batch}}" >>"$NOTES"\n'
    )
    env = {name: value for name, value in slurm.items() if name != "PYTHON"}
    result = run_batch({**env, "ENV_SETUP": str(setup)})
    assert result.returncode == 0, result.stderr
    notes = Path(slurm["NOTES"]).read_text().splitlines()
    assert [line for line in notes if line.startswith("setup")] == ["setup batch", "setup 0"]
    assert "FROM_SETUP=yes" in Path(slurm["NOTES"] + ".env").read_text().splitlines()


def test_a_file_of_the_user_that_fails_ends_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "slurm/env.sh").write_text("return 3\n")
    result = run_batch({**slurm, "ENV_SETUP": str(tmp_path / "slurm/env.sh")})
    assert result.returncode == 1 and "env.sh failed on" in result.stderr


def test_in_a_container_every_python_runs_there(slurm: dict[str, str], tmp_path: Path) -> None:
    wrapper = tmp_path / "bin/contain"
    wrapper.write_text(
        '#!/bin/bash\n[ "$1 $2" = "exec --nv" ] || exit 9\necho "inside ${*:3:4}" >>"$NOTES"\nexec "${@:4}"\n'
    )
    wrapper.chmod(0o755)
    (tmp_path / "bin/python").rename(tmp_path / "bin/python3")
    env = {name: value for name, value in slurm.items() if name != "PYTHON"}
    result = run_batch({**env, "CONTAINER": "contain exec --nv image.sif"})
    assert result.returncode == 0, result.stderr
    inside = [line for line in Path(slurm["NOTES"]).read_text().splitlines() if line.startswith("inside")]
    assert "inside image.sif python3 -m ray.scripts.scripts" in inside
    assert f"inside image.sif python3 {MODULE}" in inside


def test_without_python_the_job_says_what_to_set(slurm: dict[str, str], tmp_path: Path) -> None:
    env = {name: value for name, value in slurm.items() if name != "PYTHON"}
    result = run_batch(env)
    assert result.returncode == 1
    assert f"no python at {tmp_path}/.venv/bin/python" in result.stderr and "CONTAINER" in result.stderr
    assert not Path(slurm["NOTES"]).exists()


def test_a_folder_of_somebody_else_is_not_used(slurm: dict[str, str]) -> None:
    """Names in /tmp can be guessed: who makes the folder first must not get at the token."""
    trap = Path(slurm["RAY_TMP"]) / "real_123456.0"
    trap.mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(trap, 65534, -1)
    else:
        trap.rmdir()
        trap.symlink_to("/", target_is_directory=True)
    result = run_batch(slurm)
    assert result.returncode == 1 and "cannot make" in result.stderr
    assert trap.exists() and not Path(slurm["NOTES"] + ".token").exists()


def test_what_a_requeued_job_left_on_the_node_is_replaced(slurm: dict[str, str]) -> None:
    left = Path(slurm["RAY_TMP"]) / "real_123456.0/ray"
    left.mkdir(parents=True)
    assert run_batch(slurm).returncode == 0
    assert nothing_is_left(slurm)


# -- the other templates -----------------------------------------------------------------------------------

SETTINGS = {"REAL_MODEL": "/m", "REAL_DATA": "/d", "REAL_TEST": "/t", "REAL_OUT": "/o"}


def arguments(env: dict[str, str], script: str, module: str, *more: str) -> list[str]:
    """What the script starts the module with. more: what the user gives; files are named from the checkout."""
    result = run_batch(env, *more, script=script)
    assert result.returncode == 0, result.stderr
    line = next(line for line in Path(env["NOTES"]).read_text().splitlines() if module in line)
    assert nothing_is_left(env)
    return line.partition(module)[2].split()


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_settings_are_flags_of_training(slurm: dict[str, str], nodes: str) -> None:
    env = {**slurm, **SETTINGS, "SLURM_JOB_NUM_NODES": nodes}
    config = parse_args(arguments(env, "train_real.sbatch", MODULE, "--ckpt.output_dir", "/mine"))
    assert (config.actor.model_name_or_path, config.data.prompt_dataset, config.eval.dataset) == ("/m", "/d", "/t")
    assert config.ckpt.output_dir == "/mine"


def test_the_warmup_parses(slurm: dict[str, str]) -> None:
    argv = arguments({**slurm, **SETTINGS}, "warmup.sbatch", "-m real_openrlhf.train_warmup")
    config = parse_args(argv, warmup=True)
    validate(config, device="cuda")
    assert (config.ranks, config.ckpt.output_dir, config.ckpt.load) == (8, "/o", "auto")


def test_qwen3_32b_fits_the_template_of_two_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    env = {**slurm, **SETTINGS, "SLURM_JOB_NUM_NODES": "2"}
    config = parse_args(arguments(env, "train_32b.sbatch", MODULE))
    validate(config, device="cuda")
    assert (config.ranks, config.ckpt.save_steps, config.rollout.batch_size % config.ranks) == (16, 20, 0)
    shape = ModelShape.of(write_config(tmp_path / "model", "qwen3", **QWEN3_32B))
    assert shape is not None
    assert memory_plan(config, Question(shape=shape, itemsize=2, card=80 * 10**9, prompt=2048, liger=False)).fits


def test_an_evaluation_and_a_judged_file_parse(slurm: dict[str, str]) -> None:
    env = {**slurm, **SETTINGS, "REAL_BENCHMARKS": "a=/x b=/y", "REAL_INPUT": "/i.jsonl", "REAL_OUTPUT": "/o.jsonl"}
    evaluation = parse_evaluation(arguments(env, "evaluate.sbatch", "-m real_openrlhf.evaluate", "--n", "2"))
    assert (evaluation.model, evaluation.benchmark, evaluation.output_dir) == ("/m", ["a=/x", "b=/y"], Path("/o"))
    judging = parse_judging(arguments(env, "judge.sbatch", "-m real_openrlhf.judge"))
    assert (judging.model, judging.input, judging.output, judging.resume) == ("/m", "/i.jsonl", "/o.jsonl", True)
    # Neither needs a cluster.
    assert "ray" not in Path(slurm["NOTES"]).read_text()


@pytest.mark.parametrize("script", ["evaluate.sbatch", "judge.sbatch"])
def test_judging_that_is_stopped_is_requeued(slurm: dict[str, str], tmp_path: Path, script: str) -> None:
    """SIGINT must reach Python, which has not to ignore it, as commands in the background of a script do."""
    run = tmp_path / "run.py"
    run.write_text("import os, time\nopen(os.environ['NOTES'], 'a').write('judging\\n')\ntime.sleep(60)\n")
    code, output = signalled({**slurm, "RUN": f"{sys.executable} {run}"}, signal.SIGUSR1, "judging", script=script)
    assert code == 85, output
    assert Path(slurm["NOTES"]).read_text().splitlines()[-1] == REQUEUED
    assert nothing_is_left(slurm)
