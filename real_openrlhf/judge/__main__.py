from __future__ import annotations

import sys

from real_openrlhf.judge.cli import main

# Engines start their processes by importing this module again.
if __name__ == "__main__":
    sys.exit(main())
