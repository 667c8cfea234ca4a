"""The algorithm is torch only: importing it must not load the stack."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import real_openrlhf.algo

HEAVY = ["ray", "vllm", "deepspeed", "openrlhf", "transformers", "datasets", "scipy"]


def test_algo_drags_in_none_of_the_stack() -> None:
    modules = [m.name for m in pkgutil.walk_packages(real_openrlhf.algo.__path__, "real_openrlhf.algo.")]
    assert "real_openrlhf.algo.loss" in modules and "real_openrlhf.algo.objectives.real" in modules
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == []
