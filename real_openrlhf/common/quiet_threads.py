"""Import before torch: OpenMP's threads soon sleep while they wait for each other, instead of spinning on.

On idle cores a short spin saves waking a thread for every small parallel region. Where other work has taken a core, a
long one uses up the share of the very thread that is waited for, and a small model's step takes many times its share of
the time (examples/benchmark/README.md has the measurement). GOMP_SPINCOUNT in the environment has the last word.
"""

import os

# Turns of libgomp's loop, microseconds; its own default is 300,000.
SPINS = "2000"

os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
