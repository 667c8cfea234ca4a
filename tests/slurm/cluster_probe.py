"""A job's program: one task per node; then it waits for the other jobs and tries to enter their clusters.

python tests/slurm/cluster_probe.py FOLDER JOBS
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ENTER = "import ray, sys; ray.init(address=sys.argv[1]); print('entered', len(ray.nodes()))"


def main(folder: Path, jobs: int) -> int:
    ray.init(log_to_driver=False)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    @ray.remote(num_cpus=1)
    def where() -> str:
        return ray.get_runtime_context().get_node_id()

    def task(node: str) -> ray.ObjectRef:
        return where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()

    assert ray.get([task(node) for node in nodes]) == nodes
    mine = folder / f"{os.environ['SLURM_JOB_ID']}.address"
    mine.with_suffix(".new").write_text(os.environ["RAY_ADDRESS"])
    mine.with_suffix(".new").rename(mine)
    # No deadline: the job's own is one.
    while len(there := sorted(folder.glob("*.address"))) < jobs:
        time.sleep(0.2)
    print(f"probe: {len(nodes)} nodes, {len(there)} jobs")
    for other in there:
        if other != mine:
            done = subprocess.run([sys.executable, "-c", ENTER, other.read_text()], capture_output=True, text=True)
            print("entered" if "entered" in done.stdout else "refused", done.stderr[-2000:])
    (folder / f"{os.environ['SLURM_JOB_ID']}.tried").touch()
    # A cluster that has ended refuses everybody: stay until all have tried.
    while len(list(folder.glob("*.tried"))) < jobs:
        time.sleep(0.2)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
