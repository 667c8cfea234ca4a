"""What the plan says of weights, gradients and optimizer states, against the tensors of the running policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from real_openrlhf.actors.sync.transfer import free_port
from real_openrlhf.config.schema import LoraConfig
from real_openrlhf.run.model_shape import ModelShape
from real_openrlhf.run.states import REDUCE_BUCKET, policy_states
from tests.helpers.configs import SMALL
from tests.unit.config.test_validate import config_with

pytestmark = pytest.mark.integration

# A wider model than SMALL: 26 million parameters instead of 15 thousand.
WIDE = {**SMALL, "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5}
ITEMSIZE = {"fp32": 4, "bf16": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that two ranks cannot divide evenly."""
    return saved(tmp_path_factory.mktemp("memory"), SMALL, head_dim=16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("wide"), WIDE, head_dim=64)


def saved(path: Path, sizes: dict[str, Any], *, head_dim: int) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=head_dim, tie_word_embeddings=False)).save_pretrained(path)
    return path


def measured(folder: Path, *flags: str, world: int) -> list[dict[str, Any]]:
    port = str(free_port())
    command = [sys.executable, "-m", "tests.helpers.memory_worker", str(folder), "--port", port, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    # Else the allocator keeps what is freed, and it counts as resident.
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--world", str(world)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(world)
    ]
    found = []
    try:
        for process in ranks:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-3000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
    return found


@pytest.mark.parametrize(
    ("stage", "dtype", "world", "lora"),
    [
        (0, "fp32", 1, 0),
        pytest.param(0, "bf16", 1, 0, marks=pytest.mark.slow),
        pytest.param(1, "bf16", 1, 0, marks=pytest.mark.slow),
        pytest.param(2, "fp32", 1, 0, marks=pytest.mark.slow),
        pytest.param(2, "bf16", 1, 0, marks=pytest.mark.slow),
        (2, "bf16", 2, 0),
        pytest.param(2, "bf16", 1, 4, marks=pytest.mark.slow),
        pytest.param(3, "fp32", 1, 0, marks=pytest.mark.slow),
        pytest.param(3, "bf16", 2, 0, marks=pytest.mark.slow),
        (3, "bf16", 2, 4),
    ],
)
def test_the_policys_tensors_are_those_of_the_plan(stage: int, dtype: str, world: int, lora: int, folder: Path) -> None:
    shape = ModelShape.of(str(folder), LoraConfig(rank=lora))
    assert shape is not None
    changes = {"ds.zero_stage": stage, "actor.num_gpus_per_node": world}
    planned = policy_states(config_with(changes), shape, ITEMSIZE[dtype])
    flags = ["--stage", str(stage), "--dtype", dtype, "--lora", str(lora)]
    for found in measured(folder, *flags, world=world):
        for name, wanted in (("weights", planned.weights), ("masters", planned.master), ("moments", planned.moments)):
            assert found[name] == wanted, name
        if stage == 3 or world == 1:
            assert found["gradients"] == planned.gradients
        if stage == 3:
            # Of the two buffers the one that stays; the other is a temporary of the reduction.
            assert found["buckets"] == REDUCE_BUCKET * ITEMSIZE[dtype]


@pytest.mark.slow  # for a quiet machine
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (2, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_larger_model_takes_the_memory_of_the_plan(stage: int, dtype: str, folder: Path, wide: Path) -> None:
    """By the operating system, before the optimizer's second step.

    The difference of two models: torch, DeepSpeed and everything else of a process is in both.
    """
    sizes, resident = [], []
    for path in (folder, wide):
        shape = ModelShape.of(str(path), LoraConfig(rank=0))
        assert shape is not None
        planned = policy_states(config_with({"ds.zero_stage": stage}), shape, ITEMSIZE[dtype])
        # Stage 3 keeps its bucket, of which as much is in memory as all gradients have ever filled.
        bucket = shape.trained * ITEMSIZE[dtype] if stage == 3 else 0
        assert bucket <= planned.buckets
        sizes.append(planned.weights + planned.gradients + planned.optimizer + bucket)
        (found,) = measured(path, "--stage", str(stage), "--dtype", dtype, world=1)
        resident.append(found["resident"])
    planned_more, more = (second - first for first, second in (sizes, resident))
    assert planned_more == pytest.approx(more, rel=0.1)
