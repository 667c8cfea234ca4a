"""Several trainings in one process, on one Ray cluster and one set of engines, as examples/paper_tables has them.

    python -m tests.helpers.kept_runs '[["--flag", "value"], [...]]'

Ends with the exit code of the first that fails, else 0.
"""

from __future__ import annotations

import json
import sys

from real_openrlhf.config.cli import parse_args
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.main import run
from real_openrlhf.run.ray_session import ray_session


def main() -> int:
    with ray_session(None, num_cpus=None, needed_cpus=3.0):
        kept = KeptEngines()
        try:
            for flags in json.loads(sys.argv[1]):
                if code := run(parse_args(flags), kept=kept):
                    print(f"ended with {code}: {flags}", file=sys.stderr)
                    return code
        finally:
            kept.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
