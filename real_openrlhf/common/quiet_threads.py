"""Import before torch: OpenMP's threads then sleep soon while they wait for each other, instead of spinning.

On idle cores, a short spin saves waking a thread for every small parallel region. If other programs use a core, a long
spin takes time from the very thread that is waited for, and a step of a small model takes many times longer
(examples/benchmark/README.md has the measurement). If GOMP_SPINCOUNT is set in the environment, that value is used.
"""

import os

# Turns of libgomp's waiting loop, some microseconds; its own default is 300,000.
SPINS = "2000"

os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
