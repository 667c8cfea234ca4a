"""The Kubernetes manifests: their commands parse and fit their GPUs, and everybody is asked for a token."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples/kubernetes"
MODULE = ["python", "-m", "real_openrlhf.train_real"]


def spec(name: str) -> dict[str, Any]:
    manifest = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    return manifest["spec"]


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def flags(words: list[str]) -> Config:
    assert words[:3] == MODULE
    config = parse_args(words[3:])
    validate(config, device="cuda")
    return config


def test_the_32b_job_asks_for_the_gpus_that_its_flags_use() -> None:
    job = spec("rayjob-32b.yaml")
    config = flags(shlex.split(job["entrypoint"]))
    (workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    per_worker = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == config.actor.num_nodes
    assert per_worker == config.actor.num_gpus_per_node
    assert (
        config.vllm.num_engines * config.vllm.tensor_parallel_size == config.ranks == per_worker * workers["replicas"]
    )
    # A new attempt resumes.
    assert job["backoffLimit"] > 0 and config.ckpt.load == "auto" and config.ckpt.save_steps > 0
    assert int(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600


def test_the_layout_is_that_of_the_slurm_template() -> None:
    text = (ROOT / "slurm/train_32b.sbatch").read_text(encoding="utf-8")
    own = text.partition("\nown_flags train_real ")[2].partition(' -- "${given[@]}"')[0]
    words = re.sub(r"\\\n", " ", own)
    paths = ["--actor.model_name_or_path", "/shared/models/judge-start", "--eval.dataset", "/shared/data/test.parquet"]
    paths += ["--data.prompt_dataset", "/shared/data/train.parquet", "--ckpt.output_dir", "/shared/runs/real-32b"]
    assert flags([*MODULE, *shlex.split(words), *paths]) == flags(shlex.split(spec("rayjob-32b.yaml")["entrypoint"]))


def test_the_quickstart_of_the_image_is_run() -> None:
    words = shlex.split(spec("rayjob-cpu.yaml")["entrypoint"])
    script = Path(words[-1])
    assert (ROOT / script.relative_to("/opt/real")).is_file()
    assert "WORKDIR /opt/real" in (FOLDER / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["rayjob-32b.yaml", "rayjob-cpu.yaml"])
def test_every_cluster_asks_for_a_token_and_no_secret_is_written_down(name: str) -> None:
    cluster = spec(name)["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    for container in containers(cluster):
        for variable in container["env"]:
            assert not re.search("KEY|TOKEN|SECRET", variable["name"]) or "value" not in variable
        volumes = {mount["mountPath"] for mount in container["volumeMounts"]}
        # Where actors are, shared memory is more than Kubernetes' 64 MiB.
        assert "/dev/shm" in volumes or cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") == "0"
