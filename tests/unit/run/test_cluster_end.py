"""Real processes with the names of Ray's: what does not end by itself is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from real_openrlhf.run import cluster_end
from real_openrlhf.run.cluster_end import nothing_left

# Starts a worker and waits; ends with SIGTERM.
RAYLET = """#!{python}
import subprocess, sys, time
open("/proc/self/comm", "w").write("raylet")
subprocess.Popen([sys.executable, "-c", "import time; print('worker', flush=True); time.sleep(600)"])
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="no /proc")
def test_a_stopped_worker_does_not_outlive_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_end, "_END_S", 0.5)
    script = tmp_path / "raylet"
    script.write_text(RAYLET.format(python=sys.executable))
    raylet = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert raylet.stdout is not None and raylet.stdout.readline() == "worker\n"
        (worker,) = psutil.Process(raylet.pid).children()
        os.kill(worker.pid, signal.SIGSTOP)
        with nothing_left():
            raylet.terminate()  # ray.shutdown's part
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert other.poll() is None
    finally:
        for process in (raylet, other):
            process.kill()
            process.wait()
