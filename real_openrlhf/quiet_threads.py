"""Import before torch: OpenMP's threads sleep while they wait for each other, instead of spinning.

On idle cores spinning saves a few microseconds per parallel region. Where other work has taken a core, the spinning
thread uses up the share of the one that it waits for, and a small model's step takes many times its share of the time
(examples/benchmark/README.md has the measurement). OMP_WAIT_POLICY in the environment has the last word.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
