"""Joining or starting a cluster, with a stand-in for ray."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.run import ray_session as module
from real_openrlhf.run.ray_session import (
    NICENESS,
    RECONNECT,
    NoCluster,
    cluster_to_join,
    passed_environment,
    ray_session,
)
from tests.helpers.homes import isolate

OWN = {NICENESS: "0", RECONNECT: "30"}


class FakeRay:
    __version__ = "2"

    def __init__(self, *, initialized: bool = False, answers: Exception | None = None) -> None:
        self.initialized, self.answers = initialized, answers
        self.inits: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.shutdowns = 0

    def is_initialized(self) -> bool:
        return self.initialized

    def init(self, **options: Any) -> None:
        self.inits.append(options)
        self.tokens.append(os.environ.get("RAY_AUTH_TOKEN"))
        if self.answers is not None:
            raise self.answers

    def shutdown(self) -> None:
        self.shutdowns += 1
        self.tokens.append(os.environ.get("RAY_AUTH_TOKEN"))

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 6.0, "GPU": 2.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}, {"Alive": False}, {"Alive": True}]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="10.0.0.1:6379")


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Set first: what a test sets is taken back.
    for name in OWN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeRay) -> FakeRay:
    monkeypatch.setattr(module, "ray", fake)
    return fake


def test_starts_its_own_cluster_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeRay())
    with ray_session(None, num_cpus=4, needed_cpus=2.0) as session:
        assert fake.shutdowns == 0
    (options,) = fake.inits
    # "local": a cluster that `ray start` left on this machine must not be joined by accident.
    assert options["address"] == "local" and options["num_cpus"] == 4
    assert fake.shutdowns == 1 and session.owned
    assert (session.nodes, session.cpus, session.gpus, session.address) == (2, 6.0, 2.0, "10.0.0.1:6379")
    assert str(session) == "Ray 2, own cluster: 2 nodes, 6 CPUs, 2 GPUs"


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("before", "address"), [(None, None), ("7", None), (None, "a:1")])
def test_settings_of_an_own_clusters_processes(
    monkeypatch: pytest.MonkeyPatch, name: str, before: str | None, address: str | None
) -> None:
    """They read them when they start; a user's own stay, and a cluster that is joined has its own."""
    use(monkeypatch, FakeRay())
    if before is not None:
        monkeypatch.setenv(name, before)
    after = before if before or address else OWN[name]
    with ray_session(address, num_cpus=1, needed_cpus=1.0):
        assert os.environ.get(name) == after


@pytest.mark.parametrize(
    ("num_cpus", "cores", "needed", "slots"), [(4, 64, 2.0, 4), (1, 64, 3.0, 3), (None, 8, 2.0, 8), (None, 2, 4.2, 5)]
)
def test_an_own_cluster_has_room_for_every_actor(
    monkeypatch: pytest.MonkeyPatch, num_cpus: int | None, cores: int, needed: float, slots: int
) -> None:
    fake = use(monkeypatch, FakeRay())
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    with ray_session(None, num_cpus=num_cpus, needed_cpus=needed):
        pass
    assert fake.inits[0]["num_cpus"] == slots


@pytest.mark.parametrize(
    ("flag", "variable", "joined"),
    [("a:1", None, "a:1"), (None, "b:2", "b:2"), ("a:1", "b:2", "a:1"), ("auto", None, "auto")],
)
def test_joins_a_cluster(monkeypatch: pytest.MonkeyPatch, flag: str | None, variable: str | None, joined: str) -> None:
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    fake = use(monkeypatch, FakeRay())
    with ray_session(flag, num_cpus=4, needed_cpus=2.0) as session:
        pass
    # Resources of a cluster that is there cannot be chosen; Ray refuses num_cpus.
    assert fake.inits[0]["address"] == joined and "num_cpus" not in fake.inits[0]
    assert not session.owned and str(session).startswith("Ray 2, cluster at 10.0.0.1:6379")
    assert fake.shutdowns == 1  # disconnects; the cluster goes on


@pytest.mark.parametrize(
    ("flag", "variable", "joins"),
    [(None, "", None), ("local", None, None), (None, "local", None), ("local", "b:2", None), ("", "b:2", "b:2")],
)
def test_cluster_to_join(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, variable: str | None, joins: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_to_join(flag) == joins


def test_an_own_cluster_has_a_token_from_its_start_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeRay())
    with ray_session(None, num_cpus=1, needed_cpus=1.0):
        pass
    start, end = fake.tokens
    assert start is not None and start == end
    assert "RAY_AUTH_TOKEN" not in os.environ
    # A cluster that is joined has its own.
    with ray_session("a:1", num_cpus=1, needed_cpus=1.0):
        pass
    assert fake.tokens[2:] == [None, None]


@pytest.mark.parametrize("error", [ConnectionError("nobody home"), AuthenticationError("nobody home")])
def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    use(monkeypatch, FakeRay(answers=error))
    words = r"no Ray cluster answers at 'a:1' \(--ray.address .*nobody home.*RAY_AUTH_TOKEN_PATH.*ray start --head"
    with (
        pytest.raises(NoCluster, match=words),
        ray_session("a:1", num_cpus=None, needed_cpus=1.0),
    ):
        pass


def test_a_session_that_is_already_there_is_used_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeRay(initialized=True))
    with ray_session(None, num_cpus=4, needed_cpus=2.0) as session:
        assert not session.owned
    assert fake.inits == [] and fake.shutdowns == 0


def test_ray_ends_with_an_error_of_the_run_and_with_one_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeRay())
    with pytest.raises(KeyError), ray_session(None, num_cpus=1, needed_cpus=1.0):
        raise KeyError
    assert fake.shutdowns == 1
    monkeypatch.setattr(fake, "nodes", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), ray_session(None, num_cpus=1, needed_cpus=1.0):
        pass
    assert fake.shutdowns == 2


def test_the_environment_that_actors_get(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(module.os.environ):
        monkeypatch.delenv(name)
    assert passed_environment() == {"TOKENIZERS_PARALLELISM": "false"}
    passed = {"NCCL_SOCKET_IFNAME": "eth0", "HF_HOME": "/x", "VLLM_LOGGING_LEVEL": "INFO", "WANDB_MODE": "offline"}
    passed |= {"TOKENIZERS_PARALLELISM": "true", "GLOO_SOCKET_IFNAME": "eth0"}
    passed |= {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    kept_back = {"WANDB_API_KEY": "secret", "HF_TOKEN": "secret", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}
    kept_back |= {"VLLM_HOST_IP": "10.0.0.1"}
    for name, value in (passed | kept_back).items():
        monkeypatch.setenv(name, value)
    assert passed_environment() == passed
    # Where a cache of this process went is no place on another node.
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("HOME", "/proc/nohome")
    monkeypatch.setenv("VLLM_CONFIG_ROOT", "/chosen")
    use_writable_caches(tell=False)
    assert "VLLM_CACHE_ROOT" in module.os.environ and "HF_HOME" in module.os.environ
    found = passed_environment()
    assert found["VLLM_CONFIG_ROOT"] == "/chosen" and not {"VLLM_CACHE_ROOT", "HF_HOME", "WANDB_CACHE_DIR"} & set(found)
