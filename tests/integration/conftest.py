"""Tiny judges, trained once per run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_judge import make_judge, make_rows, write_rows

# GiB per engine, of runs and of this process. The four of a run would not all fit beside other programs.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tied/, untied/, train.jsonl and eval.jsonl."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("judges")
    make_judge(folder / "tied", tied=True, steps=150)
    make_judge(folder / "untied", tied=False, steps=150, seed=1)
    write_rows(folder / "train.jsonl", make_rows(200, seed=7))
    write_rows(folder / "eval.jsonl", make_rows(60, seed=8))
    return folder
