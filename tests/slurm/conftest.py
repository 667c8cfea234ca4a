"""A Slurm with two nodes on this host, and its jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# Seconds; a failure of what is waited for shows as a timeout, nothing is measured. A busy machine needs more.
PATIENCE = float(os.environ.get("SLURM_TEST_PATIENCE", "500"))


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
        self.env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Ray would end jobs here for the memory that other programs use.
        self.env["RAY_memory_monitor_refresh_ms"] = "0"

    def call(self, *words: str) -> str:
        return subprocess.run(words, env=self.env, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    def submit(self, script: str, *arguments: object, nodes: int = 1, **variables: object) -> str:
        options = [f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=4", "--mem=0", "--time=60"]
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
            # Programs that set their title may overwrite their environment.
            if f"SLURM_JOB_ID={job}".encode() in environ or f"{self.tmp}/real_{job}.".encode() in words:
                found.append(f"{process.name}: {words[:200]!r}")
        return found

    def assert_nothing_is_left(self, job: str) -> None:
        wait_for(lambda: not self.left(job), lambda: "\n".join(self.left(job)))


@pytest.fixture(scope="session")
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
