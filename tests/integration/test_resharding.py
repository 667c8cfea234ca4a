"""A checkpoint of the policy on another number of ranks: what follows is what would have followed without a break."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from real_openrlhf.actors.sync.transfer import free_port
from tests.helpers.policy_worker import UPDATES

pytestmark = pytest.mark.integration


def run_ranks(folder: Path, out: Path, *more: str, stage: int, world: int) -> tuple[dict, str]:
    """All ranks of the worker; rank 0's record, and what they printed."""
    out.mkdir()
    command = [sys.executable, "-m", "tests.helpers.policy_worker", str(folder), str(out), "--micro", "4", *more]
    command += ["--stage", str(stage), "--world", str(world), "--port", str(free_port())]
    processes = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    return json.loads((out / "record.json").read_text(encoding="utf-8")), "".join(outputs)


@pytest.mark.parametrize(
    ("head", "stage", "before", "after"),
    [
        ("untied", 3, 2, 1),
        pytest.param("tied", 2, 1, 2, marks=pytest.mark.slow),
        pytest.param("tied", 3, 1, 2, marks=pytest.mark.slow),
        pytest.param("untied", 2, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_on_other_ranks(judges: Path, tmp_path: Path, head: str, stage: int, before: int, after: int) -> None:
    saved = tmp_path / "saved"
    # A save fails first, because one rank's disk is full: all ranks hear of it, and training goes on.
    unbroken, _ = run_ranks(judges / head, tmp_path / "a", "--save", str(saved), stage=stage, world=before)
    assert len(unbroken["metrics"]) == UPDATES
    files = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    resumed, said = run_ranks(judges / head, tmp_path / "b", "--load", str(saved), stage=stage, world=after)

    assert len(resumed["metrics"]) == UPDATES - 1
    for mine, theirs in zip(resumed["metrics"], unbroken["metrics"][1:]):
        assert mine["policy/lr"] == theirs["policy/lr"]
        for name in ("loss/total", "policy/grad_norm", "policy/expected_score"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    got, want = (load_file(tmp_path / run / "model" / "model.safetensors") for run in "ba")
    start = load_file(judges / head / "model.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        # Decay, moments and steps of Adam are all in here: without any of them, weights are off by 1e-3 and more.
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float((want[name] - start[name]).abs().max()) for name in want) > 1e-2
    assert resumed["version"] == unbroken["version"] == UPDATES

    # Ranks that were there go on with their random numbers; new ones say that theirs are new.
    randoms = [json.loads((tmp_path / "b" / f"random_{rank}.json").read_text()) for rank in range(after)]
    assert randoms[0] == json.loads((tmp_path / "a" / "random_0.json").read_text())
    assert len({tuple(numbers) for numbers in randoms}) == after
    assert said.count("is new: the checkpoint was written by") == max(0, after - before)
    # The checkpoint is as it was, and nothing of the conversion is left.
    assert files == {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    assert not list((tmp_path / "b").rglob(".tmp-*"))
