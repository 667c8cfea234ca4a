"""One-pass RAIL scoring, and a judge to call: `Judge(path).score(instruction, response)`.

types.py     what a judgement is, and the Protocol that engines and servers fit
scoring.py   the core: generate once, read the distribution, force the anchor where no score came
backends.py  which backend: TransformersBackend or VLLMBackend in this process, ServerBackend over HTTP (*_backend.py)
judge.py     the `Judge` class; cli.py is `python -m real_openrlhf.judge`, cli_args.py its flags
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Imported on demand: who needs only the core does not load a tokenizer's libraries.
    if name == "Judge":
        from real_openrlhf.judge.judge import Judge

        return Judge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
