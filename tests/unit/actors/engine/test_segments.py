"""Names of shared memory go, the memory stays as long as a process has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import sys
from multiprocessing import resource_tracker, shared_memory
from real_openrlhf.actors.engine.segments import unlink_mapped_segments

mine = shared_memory.SharedMemory(create=True, size=4096)
# Another's, which this process has not mapped.
resource_tracker.unregister(mine._name, "shared_memory")
print(mine.name, *unlink_mapped_segments(), *unlink_mapped_segments(), flush=True)
mine.buf[:4] = b"kept"
print(bytes(mine.buf[:4]).decode(), flush=True)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_a_mapped_segment_loses_its_name_and_nothing_else() -> None:
    from multiprocessing import shared_memory

    other = shared_memory.SharedMemory(create=True, size=4096)
    try:
        done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        name, *removed = first.split()
        assert removed == [name] and second == "kept"
        assert not Path("/dev/shm", name).exists()
        assert Path("/dev/shm", other.name).exists()
    finally:
        other.close()
        other.unlink()
