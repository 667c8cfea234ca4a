"""What only GPUs can run of vLLM (sleep, tensor parallel workers in Ray bundles), against its installed source."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def vllm() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def method(path: Path, cls: str, name: str) -> Function:
    body = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == cls).body
    return next(n for n in body if isinstance(n, Function) and n.name == name)


def arguments(node: Function) -> set[str]:
    return {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}


def test_sleep_and_wake_up_take_what_openrlhf_hands_them(vllm: Path) -> None:
    engine = vllm / "v1/engine/async_llm.py"
    assert "level" in arguments(method(engine, "AsyncLLM", "sleep"))
    assert "tags" in arguments(method(engine, "AsyncLLM", "wake_up"))
    fields = next(
        n for n in ast.parse((vllm / "engine/arg_utils.py").read_text()).body if getattr(n, "name", "") == "EngineArgs"
    )
    assert "enable_sleep_mode" in ast.unparse(fields)


def test_the_scheduler_waits_for_the_kv_cache(vllm: Path) -> None:
    """Awake are "weights" and "kv_cache"; between the two a sync may run, and no request does."""
    executor = ast.unparse(method(vllm / "v1/executor/abstract.py", "Executor", "sleep"))
    assert "'weights'" in executor and "'kv_cache'" in executor
    wake = ast.unparse(method(vllm / "v1/engine/core.py", "EngineCore", "wake_up"))
    assert "if not self.model_executor.is_sleeping:\n        self.resume_scheduler()" in wake


def test_level_2_keeps_buffers_and_forgets_prefixes(vllm: Path) -> None:
    assert "_sleep_saved_buffers" in ast.unparse(method(vllm / "v1/worker/gpu_worker.py", "Worker", "sleep"))
    core = ast.unparse(method(vllm / "v1/engine/core.py", "EngineCore", "sleep"))
    assert "clear_prefix_cache = level >= 1" in core


def test_a_cpu_cannot_sleep(vllm: Path) -> None:
    available = ast.unparse(method(vllm / "platforms/interface.py", "Platform", "is_sleep_mode_available"))
    assert "CUDA" in available and "CPU" not in available


def test_workers_of_an_engine_take_the_bundles_and_the_share_that_openrlhf_names(vllm: Path) -> None:
    placing = ast.unparse(method(vllm / "v1/executor/ray_executor.py", "RayDistributedExecutor", "_init_workers_ray"))
    assert "num_gpus = envs.VLLM_RAY_PER_WORKER_GPUS" in placing
    assert "VLLM_RAY_BUNDLE_INDICES" in placing and "num_cpus=0" in placing
    # The engine's process is no Ray actor: the placement group comes with its configuration.
    assert "ray.util.get_current_placement_group()" in (vllm / "engine/arg_utils.py").read_text()
