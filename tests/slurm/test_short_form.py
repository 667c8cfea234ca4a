"""The batch scripts under a real Slurm, if there is one, with programs that do nothing in the place of Ray and the run.

What these programs leave behind is worse than what Ray does: processes of their own session that ignore SIGTERM.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import Slurm

# A node: orphans that ignore SIGTERM. The run: waits for USR1; in its second attempt it is done.
PYTHON = r"""#!/bin/bash
[ "$2" != real_openrlhf.config.script_flags ] || exec @PYTHON@ "$@"
if [ "$2" = ray.scripts.scripts ]; then
  setsid bash -c 'trap "" TERM; while true; do sleep 1; done' &
  (setsid bash -c 'trap "" TERM; while true; do sleep 1; done' &)
  trap 'exit 1' TERM
  while true; do sleep 0.2; done
fi
if [ "$1" = -m ]; then
  echo "attempt ${SLURM_RESTART_COUNT:-0}"
  [ -z "${RUN_CODE:-}" ] || exit "$RUN_CODE"
  [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
  trap 'exit 85' USR1
  trap '' TERM
  while true; do sleep 0.2; done
fi
if [ "$1" = - ] && [ "$#" = 3 ]; then [ -e "$REAL_TMP.1/token" ] && echo "2 of 2 nodes"; exit; fi
if [ "$1" = -c ] && [ "${2#import ray}" != "$2" ]; then echo 127.0.0.1; exit; fi
exec python3 "$@"
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON.replace("@PYTHON@", sys.executable))
    path.chmod(0o755)
    return path


@pytest.mark.slurm  # Slurm takes its time before it starts a job again
def test_usr1_requeues_a_job_and_nothing_is_left(slurm: Slurm, python: Path) -> None:
    job = slurm.submit("slurm/train_real.sbatch", nodes=2, PYTHON=python)
    slurm.until(job, lambda: "attempt 0" in slurm.output(job))
    assert len(list(slurm.tmp.glob(f"real_{job}.*"))) == 2 and len(slurm.left(job)) > 6
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.until(job, lambda: "end, exit code 85" in slurm.output(job))
    slurm.assert_nothing_is_left(job)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.output(job)
    slurm.assert_nothing_is_left(job)


def test_a_run_that_fails_is_a_job_that_failed(slurm: Slurm, python: Path) -> None:
    job = slurm.submit("slurm/train_real.sbatch", nodes=2, PYTHON=python, RUN_CODE=2)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), slurm.output(job)
    slurm.assert_nothing_is_left(job)


def test_scancel_leaves_nothing(slurm: Slurm, python: Path) -> None:
    """Nor does it with a run that does not listen."""
    job = slurm.submit("slurm/train_real.sbatch", nodes=2, PYTHON=python, STOP_GRACE=1)
    slurm.until(job, lambda: "attempt 0" in slurm.output(job))
    assert len(slurm.left(job)) > 6
    inside = slurm.call("bash", "slurm/attach.sh", job, "env")
    assert f"RAY_AUTH_TOKEN_PATH={slurm.tmp}/real_{job}.0/token\n" in inside and "RAY_ADDRESS=127.0.0.1:2" in inside
    slurm.call("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    slurm.assert_nothing_is_left(job)
    assert "end, exit code 143" in slurm.output(job)
