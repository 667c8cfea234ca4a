from __future__ import annotations

import sys

from real_openrlhf.judge.cli import main

# The guard is needed: an engine's processes import this module again.
if __name__ == "__main__":
    sys.exit(main())
