"""The batch scripts under a real Slurm: two nodes on this host (setup.sh), Ray, and training runs of a tiny judge."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_judge import ANCHOR, make_judge, make_rows, write_rows

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# A failure of what is waited for shows as a timeout; nothing is measured.
PATIENCE = 500


def wait_for(what: Callable[[], bool], text: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, text()
        time.sleep(0.5)


class Slurm:
    """Jobs on the cluster. tmp: RAY_TMP of all of them, empty when nothing is left."""

    def __init__(self, conf: Path, folder: Path, tmp: Path) -> None:
        self.folder, self.tmp = folder, tmp
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RAY", "SBATCH"))}
        self.env = {**keep, "SLURM_CONF": str(conf), "RAY_TMP": str(tmp), "PYTHON": sys.executable}
        self.env |= {"PYTHONPATH": str(ROOT), "GPUS_PER_NODE": "0", "OMP_NUM_THREADS": "1", "NO_REQUEUE": ""}

    def call(self, *words: str) -> str:
        return subprocess.run(words, env=self.env, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    def submit(self, script: str, *arguments: object, nodes: int = 1, **variables: object) -> str:
        options = [f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=4", "--mem=0", "--time=15"]
        options.append(f"--output={self.folder}/%j.out")
        env = {**self.env, **{k: str(v) for k, v in variables.items()}}
        words = ["sbatch", "--parsable", *options, script, *map(str, arguments)]
        return subprocess.run(words, env=env, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def output(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def until(self, job: str, what: Callable[[], bool]) -> None:
        """Waits for it while the job lasts."""
        wait_for(lambda: what() or self.show(job)["JobState"] in ENDED, lambda: self.output(job))
        assert what(), self.output(job)

    def ended(self, job: str) -> dict[str, str]:
        wait_for(lambda: self.show(job)["JobState"] in ENDED, lambda: f"{self.show(job)}\n{self.output(job)}")
        return self.show(job)

    def left(self, job: str) -> list[str]:
        """Processes and temporary folders of the job, and whatever it wrote into the checkout."""
        found = [str(path) for path in self.tmp.glob(f"real_{job}*")] + [str(p) for p in ROOT.glob(".ray_token*")]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environ = (process / "environ").read_bytes().split(b"\0")
                words = (process / "cmdline").read_bytes()
            except OSError:
                continue
            # Programs that set their title overwrite their environment, Ray's workers among them.
            if f"SLURM_JOB_ID={job}".encode() in environ or f"{self.tmp}/real_{job}.".encode() in words:
                found.append(f"{process.name}: {words[:200]!r}")
        return found

    def assert_nothing_is_left(self, job: str) -> None:
        wait_for(lambda: not self.left(job), lambda: "\n".join(self.left(job)))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    words = ["bash", str(ROOT / "tests/slurm/setup.sh"), str(folder / "cluster")]
    # Short: paths of sockets have a limit.
    with (
        tempfile.TemporaryDirectory(prefix="rs", dir="/tmp") as tmp,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up,
    ):
        assert up.stdout and up.stdin and up.stderr
        if up.stdout.readline().strip() != "ready":
            said = up.stderr.read()
            if up.wait() == 77:
                pytest.skip(said.strip())
            raise AssertionError(said)
        try:
            yield Slurm(folder / "cluster/slurm.conf", folder, Path(tmp))
        finally:
            up.stdin.close()
            up.wait(timeout=120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_judge(folder / "judge", tied=False, steps=150, seed=1)
    write_rows(folder / "train.jsonl", make_rows(200, seed=7))
    return folder


def flags(data: Path, out: Path, steps: int) -> list[object]:
    return [
        *("--actor.model_name_or_path", data / "judge", "--data.prompt_dataset", data / "train.jsonl"),
        *("--data.max_len", 48, "--rollout.max_new_tokens", 12, "--rollout.batch_size", 8),
        *("--rollout.n_samples_per_prompt", 4, "--train.max_tokens_per_gpu", 512, "--train.max_steps", steps),
        *("--train.num_episodes", 1000, "--actor.adam.lr", "1e-3", "--real.anchor", ANCHOR, "--real.device", "cpu"),
        *("--ckpt.output_dir", out),
    ]


def steps_of(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if row["phase"] == "train"]


def test_two_nodes_train(slurm: Slurm, data: Path) -> None:
    out = slurm.folder / "two"
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, out, 2), nodes=2)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    assert "cluster complete: 2 of 2 nodes" in slurm.output(job)
    assert steps_of(out) == [1, 2] and (out / "model/model.safetensors").exists()
    slurm.assert_nothing_is_left(job)


def test_a_training_that_fails_is_a_job_that_failed(slurm: Slurm, data: Path) -> None:
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, slurm.folder / "wrong", 2), "--rollout.batchsize", 8)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "--rollout.batch_size" in slurm.output(job)
    slurm.assert_nothing_is_left(job)


def test_a_node_that_never_joins_ends_the_job_at_the_deadline(slurm: Slurm, tmp_path: Path) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text('[ -z "${SLURM_STEP_ID:-}" ] || [ "$SLURM_PROCID" != 1 ] || sleep 3600\n')
    job = slurm.submit("tests/slurm/probe.sbatch", tmp_path, 1, nodes=2, ENV_SETUP=setup, READY_DEADLINE=60)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    said = slurm.output(job)
    assert "the cluster was not complete after" in said and "last seen: 1 of 2 nodes" in said
    slurm.assert_nothing_is_left(job)


def test_two_jobs_on_the_same_nodes_have_nothing_to_do_with_each_other(slurm: Slurm, tmp_path: Path) -> None:
    jobs = [slurm.submit("tests/slurm/probe.sbatch", tmp_path, 2, nodes=2) for _ in range(2)]
    for job in jobs:
        ended, said = slurm.ended(job), slurm.output(job)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), said
        assert "probe: 2 nodes, 2 jobs" in said and "refused" in said and "entered" not in said
        assert ended["NodeList"] == "n[1-2]"
        slurm.assert_nothing_is_left(job)


def test_usr1_saves_requeues_and_resumes_to_the_same_step(slurm: Slurm, data: Path) -> None:
    out, last = slurm.folder / "resumed", 40
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, out, last))
    slurm.until(job, lambda: 2 in steps_of(out))
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.until(job, lambda: "end, exit code 85" in slurm.output(job))
    # Requeued: what the first attempt had is gone before the second begins.
    slurm.until(job, lambda: slurm.show(job)["Restarts"] == "1")
    saved = max(steps_of(out))
    assert 2 <= saved < last
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    assert steps_of(out) == list(range(1, last + 1))
    slurm.assert_nothing_is_left(job)


def test_scancel_leaves_nothing(slurm: Slurm, data: Path) -> None:
    out = slurm.folder / "cancelled"
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, out, 100_000), nodes=2)
    slurm.until(job, lambda: 1 in steps_of(out))
    assert len(slurm.left(job)) > 4
    nodes = slurm.call("bash", "slurm/attach.sh", job, "ray", "status")
    assert len(re.findall(r"^ 1 node_\w+$", nodes, flags=re.MULTILINE)) == 2, nodes
    slurm.call("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    slurm.assert_nothing_is_left(job)
    assert "end, exit code 143" in slurm.output(job)
