"""A supervised start for REAL: SFT, RAFT, or TRACT's two stages, on judgements that are given.

    python -m real_openrlhf.train_warmup --actor.model_name_or_path MODEL --data.prompt_dataset sft.parquet ...

The data have a prompt, a human score, and the response to learn: feedback, then the score. Where there is no feedback,
--warmup.feedback missing has the model write it. Flags, checks, checkpoints and evaluation are those of train_real.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.quiet_imports import quiet_imports
from real_openrlhf.config.cli import parse_args
from real_openrlhf.run.early import check_early


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the input is wrong, 1 the run failed, 85 stopped by a signal (then --ckpt.load latest)."""
    try:
        config = parse_args(list(sys.argv[1:] if argv is None else argv), warmup=True)
        use_writable_caches()
        quiet_imports()
        check_early(config)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    # Here: help and mistakes in flags answer before torch, transformers and Ray are imported.
    if config.warmup.method == "tract":
        from real_openrlhf.run.tract import run_tract

        return run_tract(config)
    from real_openrlhf.run.main import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
