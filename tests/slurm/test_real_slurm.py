"""The batch scripts under a real Slurm: two nodes on this host (setup.sh), Ray, and training runs of a tiny judge."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.helpers.tiny_judge import ANCHOR, make_judge, make_rows, write_rows
from tests.slurm.conftest import Slurm

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_judge(folder / "judge", tied=False, steps=150, seed=1)
    write_rows(folder / "train.jsonl", make_rows(200, seed=7))
    return folder


def flags(data: Path, out: Path, steps: int) -> list[object]:
    return [
        *("--actor.model_name_or_path", data / "judge", "--data.prompt_dataset", data / "train.jsonl"),
        *("--data.max_len", 48, "--rollout.max_new_tokens", 12, "--rollout.batch_size", 8),
        *("--rollout.n_samples_per_prompt", 4, "--train.max_tokens_per_gpu", 512, "--train.max_steps", steps),
        *("--train.num_episodes", 1000, "--actor.adam.lr", "1e-3", "--real.anchor", ANCHOR, "--real.device", "cpu"),
        *("--vllm.num_engines", 1, "--ckpt.output_dir", out),
    ]


def steps_of(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if row["phase"] == "train"]


def test_two_nodes_train(slurm: Slurm, data: Path) -> None:
    out = slurm.folder / "two"
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, out, 2), nodes=2)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    assert "cluster complete: 2 of 2 nodes" in slurm.output(job)
    assert steps_of(out) == [1, 2] and (out / "model/model.safetensors").exists()
    slurm.assert_nothing_is_left(job)


def test_a_training_that_fails_is_a_job_that_failed(slurm: Slurm, data: Path) -> None:
    given = [*flags(data, slurm.folder / "failed", 2), "--data.prompt_dataset", "/no/such.jsonl"]
    job = slurm.submit("slurm/train_real.sbatch", *given)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "cluster complete" in slurm.output(job) and "/no/such.jsonl" in slurm.output(job)
    slurm.assert_nothing_is_left(job)


def test_a_flag_that_there_is_not_fails_the_job_at_once(slurm: Slurm, data: Path) -> None:
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, slurm.folder / "wrong", 2), "--rollout.batchsize", 8)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "--rollout.batch_size" in slurm.output(job) and "head" not in slurm.output(job)
    slurm.assert_nothing_is_left(job)


def test_a_node_that_never_joins_ends_the_job_at_the_deadline(slurm: Slurm, tmp_path: Path) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text('[ -z "${SLURM_STEP_ID:-}" ] || [ "$SLURM_PROCID" != 1 ] || sleep 3600\n')
    job = slurm.submit("tests/slurm/probe.sbatch", tmp_path, 1, nodes=2, ENV_SETUP=setup, READY_DEADLINE=60)
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    said = slurm.output(job)
    assert "the cluster was not complete after" in said and "last seen: 1 of 2 nodes" in said
    slurm.assert_nothing_is_left(job)


def test_two_jobs_on_the_same_nodes_have_nothing_to_do_with_each_other(slurm: Slurm, tmp_path: Path) -> None:
    jobs = [slurm.submit("tests/slurm/probe.sbatch", tmp_path, 2, nodes=2) for _ in range(2)]
    for job in jobs:
        ended, said = slurm.ended(job), slurm.output(job)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), said
        assert "probe: 2 nodes, 2 jobs" in said and "refused" in said and "entered" not in said
        assert ended["NodeList"] == "n[1-2]"
        slurm.assert_nothing_is_left(job)


def test_usr1_saves_requeues_and_resumes_to_the_same_step(slurm: Slurm, data: Path) -> None:
    out, last = slurm.folder / "resumed", 40
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, out, last))
    slurm.until(job, lambda: 2 in steps_of(out))
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.until(job, lambda: "end, exit code 85" in slurm.output(job))
    # Requeued: what the first attempt had is gone before the second begins.
    slurm.until(job, lambda: slurm.show(job)["Restarts"] == "1")
    saved = max(steps_of(out))
    assert 2 <= saved < last
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    assert steps_of(out) == list(range(1, last + 1))
    slurm.assert_nothing_is_left(job)


def test_usr1_while_a_process_is_lost_ends_with_a_save_or_a_word(slurm: Slurm, data: Path) -> None:
    out = slurm.folder / "lost"
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, out, 100_000), "--ckpt.save_steps", 1, NO_REQUEUE=1)
    slurm.until(job, lambda: 2 in steps_of(out))
    policies = [line.split()[0] for line in slurm.left(job) if "RealPolicyActor" in line]
    assert len(policies) == 1
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    os.kill(int(policies[0].rstrip(":")), signal.SIGKILL)
    ended, said = slurm.ended(job), slurm.output(job)
    assert ended["ExitCode"] in ("85:0", "1:0")
    assert ("SIGUSR1 asked this run to stop" in said) == (ended["ExitCode"] == "1:0"), said
    assert "--ckpt.load latest" in said and "Traceback" not in said
    slurm.assert_nothing_is_left(job)


def test_scancel_leaves_nothing(slurm: Slurm, data: Path) -> None:
    out = slurm.folder / "cancelled"
    job = slurm.submit("slurm/train_real.sbatch", *flags(data, out, 100_000), nodes=2)
    slurm.until(job, lambda: 1 in steps_of(out))
    assert len(slurm.left(job)) > 4
    nodes = slurm.call("bash", "slurm/attach.sh", job, "ray", "status")
    assert len(re.findall(r"^ 1 node_\w+$", nodes, flags=re.MULTILINE)) == 2, nodes
    slurm.call("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    slurm.assert_nothing_is_left(job)
    assert "end, exit code 143" in slurm.output(job)
