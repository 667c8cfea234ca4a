"""A run's own Ray cluster as a stranger sees it who can connect to the machine."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest

pytestmark = pytest.mark.integration

# A driver with one actor. Its token is told on a pipe that nobody else reads, for this test alone.
RUN = """
import os, sys, ray
from real_openrlhf.run.ray_session import ray_session

@ray.remote
class Actor:
    def secrets(self):
        return os.environ["RAY_AUTH_TOKEN"]

with ray_session(None, num_cpus=1, needed_cpus=1.0) as session:
    token = ray.get(Actor.remote().secrets.remote())
    folder = ray._private.worker._global_node.get_session_dir_path()
    print(session.address, token, folder, flush=True)
    sys.stdin.read()
"""
# A call of each server that can run code, or tell how.
METHODS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.RuntimeEnvService/GetOrCreateRuntimeEnv",
)


class Cluster:
    def __init__(self, process: subprocess.Popen[str], line: str) -> None:
        self.address, self.token, session = line.split()
        self.session = Path(session)
        self.processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]

    def ports(self) -> set[tuple[str, int]]:
        found = set()
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):  # Ray ends idle workers
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add((connection.laddr.ip, connection.laddr.port))
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    words = [sys.executable, "-c", RUN]
    with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield Cluster(process, process.stdout.readline())
        finally:
            process.stdin.close()
            assert process.wait(timeout=60) == 0


def local(ip: str) -> str:
    return "127.0.0.1" if ip in ("0.0.0.0", "::") else ip


def call(address: str, method: str, token: str | None) -> grpc.StatusCode:
    """How the server answers a message without content."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(method)(b"", metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_a_stranger_is_refused_and_the_run_is_not(cluster: Cluster) -> None:
    for method in METHODS[:2]:
        for token in (None, "0" * 64):
            assert call(cluster.address, method, token) == grpc.StatusCode.UNAUTHENTICATED
        assert call(cluster.address, method, cluster.token) == grpc.StatusCode.OK


def test_no_server_of_the_cluster_answers_a_stranger(cluster: Cluster) -> None:
    refused = set()
    for ip, port in cluster.ports():
        for method in METHODS:
            code = call(f"{local(ip)}:{port}", method, None)
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                break  # it speaks another language
            if code != grpc.StatusCode.UNIMPLEMENTED:
                assert code == grpc.StatusCode.UNAUTHENTICATED, (ip, port, method, code)
                refused.add(method)
    assert len(refused) >= 4


def test_no_job_server_answers_a_stranger(cluster: Cluster) -> None:
    """Ray's agent has one, also without a dashboard."""
    refused = 0
    for ip, port in cluster.ports():
        url = f"http://{local(ip)}:{port}/api/job_agent/jobs/"
        request = urllib.request.Request(
            url, data=b'{"entrypoint": "id"}', headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                raise AssertionError(f"{ip}:{port} answers {answer.status}")
        except urllib.error.HTTPError as error:
            assert error.code in (401, 404, 405, 501), (ip, port, error)
            refused += error.code == 401
        except (OSError, http.client.HTTPException):
            continue  # it speaks another language
    assert refused >= 1


def test_the_token_is_on_no_command_line_and_in_no_file(cluster: Cluster) -> None:
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert any("gcs_server" in line for line in lines)
    assert not any(cluster.token in line for line in lines)
    files = [path for path in cluster.session.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path for path in files if cluster.token.encode() in path.read_bytes()] == []
