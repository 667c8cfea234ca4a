"""Joins a running Ray cluster, or starts one and shuts it down at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import AuthenticationError

from real_openrlhf.common.errors import RunError, one_line
from real_openrlhf.common.home import chosen_here
from real_openrlhf.run.cluster_end import nothing_left
from real_openrlhf.run.ray_token import own_token

logger = logging.getLogger(__name__)

# Environment variables of the driver that actors get too. Ray passes none on by itself, and a missing setting
# (NCCL's interface, a proxy for the hub) shows up as a hang much later.
PASSED_PREFIXES = ("NCCL_", "GLOO_", "VLLM_", "HF_", "WANDB_", "UCX_", "FI_")
PASSED = (
    "TOKENIZERS_PARALLELISM",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
# Secrets, and the driver's own address, which is wrong on every other node.
NEVER_PASSED = ("WANDB_API_KEY", "HF_TOKEN", "VLLM_HOST_IP")

# Environment variable from which Ray takes the niceness of the processes that it starts.
NICENESS = "RAY_worker_niceness"
# And the seconds for which its processes look for the GCS, which is gone when a driver is killed that started it. Ray's
# own 60 leaves its agents there for longer than a minute.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


class NoCluster(RunError, ConnectionError):
    """The cluster that was named cannot be joined."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """owned: this process started the cluster. cpus, gpus: numbers of the whole cluster."""

    owned: bool
    address: str
    nodes: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        kind = "own cluster" if self.owned else f"cluster at {self.address}"
        return f"Ray {ray.__version__}, {kind}: {self.nodes} nodes, {self.cpus:g} CPUs, {self.gpus:g} GPUs"


def passed_environment() -> dict[str, str]:
    """The variables that are passed on, with their values here, plus what every actor needs.

    Cache folders that this process chose because its home folder cannot be written are left out: each actor checks
    its own home folder.
    """
    mine = chosen_here()
    env = {
        name: value
        for name, value in os.environ.items()
        if (name in PASSED or name.startswith(PASSED_PREFIXES)) and name not in NEVER_PASSED and name not in mine
    }
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    return env


def cluster_to_join(address: str | None) -> str | None:
    """The address of the cluster that a run joins; None: it starts its own."""
    named = address or os.environ.get("RAY_ADDRESS")
    return None if not named or named == "local" else named


@contextmanager
def ray_session(address: str | None, *, num_cpus: int | None, needed_cpus: float) -> Iterator[Session]:
    """Join the cluster at `address`, RAY_ADDRESS or the job's; without one, or for "local", start a cluster here.

    A cluster that is started here has at least needed_cpus CPUs, whatever the machine has: they only count actors. On a
    small machine, engines and policy take turns on the same cores. It is shut down at the end. A joined cluster keeps
    running; only this driver's actors end.
    """
    already = ray.is_initialized()
    join = cluster_to_join(address)
    with ExitStack() as ours:
        if not already:
            if join:
                _join(join)
            else:
                ours.enter_context(own_token())
                _start(num_cpus, needed_cpus)
            ours.callback(_shutdown)
        total = ray.cluster_resources()
        session = Session(
            owned=not already and not join,
            address=ray.get_runtime_context().gcs_address,
            nodes=sum(node["Alive"] for node in ray.nodes()),
            cpus=total.get("CPU", 0.0),
            gpus=total.get("GPU", 0.0),
        )
        logger.info("%s", session)
        yield session


def _shutdown() -> None:
    with nothing_left():
        ray.shutdown()


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, AuthenticationError) as error:
        # Ray says the same of a cluster that is not there and of one that does not accept the token.
        raise NoCluster(
            f"no Ray cluster answers at {address!r} (--ray.address or RAY_ADDRESS): {one_line(error)}. If it asks "
            "for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with it. If there is none, start "
            "one with `ray start --head`, or leave the address out to have one started here"
        ) from error


def _start(num_cpus: int | None, needed_cpus: float) -> None:
    slots = max(num_cpus or os.cpu_count() or 1, int(-(-needed_cpus // 1)))
    # Ray starts actors at niceness 15: next to any other busy process they would get a thirtieth of a core.
    os.environ.setdefault(NICENESS, "0")
    os.environ.setdefault(RECONNECT, "30")
    # "local": without it Ray would join whatever `ray start` left running on this machine.
    ray.init(
        address="local", num_cpus=slots, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING
    )
