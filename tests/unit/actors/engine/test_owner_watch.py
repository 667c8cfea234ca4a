"""Real processes, as an engine has them: owner, engine, worker. The owner is killed; nothing may be left."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

OWNER = """
import subprocess, sys
from real_openrlhf.actors.engine.owner_watch import own_engines
if sys.argv[1] == "owned":
    own_engines()
subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[3]])
"""
ENGINE = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
WORKER = """
import time
from real_openrlhf.actors.engine.owner_watch import end_with_owner
end_with_owner()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "not-owned"])
def test_an_engine_ends_with_its_owner(owned: bool) -> None:
    words = ["owned" if owned else "not", ENGINE, WORKER]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *words], stdout=subprocess.PIPE, text=True)
    family: list[psutil.Process] = []
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        family = psutil.Process(owner.pid).children(recursive=True)
        assert len(family) == 2
        owner.kill()
        owner.wait()
        _, alive = psutil.wait_procs(family, timeout=30 if owned else 3)
        assert len(alive) == (0 if owned else 2)
    finally:
        owner.kill()
        owner.wait()
        for process in family:
            if process.is_running():
                process.kill()
