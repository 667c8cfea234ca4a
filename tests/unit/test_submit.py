"""What goes to a cluster with a job, what stays here, and how its end comes back; with a stand-in for the server."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from real_openrlhf.submit import EXCLUDED, SubmitError, environment, main, parse_args, runtime_env

ROOT = Path(__file__).parents[2]
COMMAND = ["python", "-m", "real_openrlhf.train_real", "--real.anchor", "The $core is ", "--env", "x"]


class Server:
    """A job server that notes what it is sent."""

    status, code = "SUCCEEDED", 0
    refuses: Exception | None = None
    sent: dict[str, Any]

    def __init__(self, address: str) -> None:
        Server.sent = {"address": address}

    def submit_job(self, **job: Any) -> str:
        if self.refuses is not None:
            raise self.refuses
        Server.sent.update(job)
        return job["submission_id"] or "raysubmit_1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in ("step 1\n", "done\n"):
            yield text

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=self.status, driver_exit_code=self.code, message="no news")


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Server)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    return Server


def test_words_arrive_as_they_were_written(server: type[Server], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--submission_id", "mine", "--stop_wait", "60", "--working_dir", "none", "--", *COMMAND]) == 0
    # A shell on the head node takes the line apart again.
    shell = f"{server.sent['entrypoint'].replace('python', 'printf %s,', 1)}"
    assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout == ",".join(COMMAND[1:]) + ","
    assert server.sent["address"] == "http://127.0.0.1:8265"
    assert server.sent["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert "working_dir" not in server.sent["runtime_env"]
    out, err = capfd.readouterr()
    assert out == "step 1\ndone\n" and "ray job stop --address http://127.0.0.1:8265 mine" in err


@pytest.mark.parametrize(
    ("status", "code", "ours", "says"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, "exit code 2"),
        ("FAILED", 85, 85, "exit code 85"),
        ("FAILED", None, 1, "failed"),
        ("STOPPED", None, 1, "--ckpt.load auto"),
        ("RUNNING", None, 1, "the connection ended while job raysubmit_1 was RUNNING"),
    ],
)
def test_the_end_of_the_job_is_the_end_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, code: int, ours: int, says: str
) -> None:
    monkeypatch.setattr(Server, "status", status)
    monkeypatch.setattr(Server, "code", code)
    assert main(["--working_dir", "none", "--", *COMMAND]) == ours
    assert says in capsys.readouterr().err
    assert main(["--working_dir", "none", "--no_wait", "--", *COMMAND]) == 0


def test_what_the_environment_of_a_job_holds() -> None:
    here = {"NCCL_DEBUG": "INFO", "VLLM_LOGGING_LEVEL": "DEBUG", "WANDB_PROJECT": "p", "TOKENIZERS_PARALLELISM": "true"}
    secret = {"WANDB_API_KEY": "s", "HF_HUB_TOKEN": "s", "VLLM_API_KEY": "s"}
    local = {"VLLM_CACHE_ROOT": "/x", "WANDB_DIR": "/x", "HF_HUB_CACHE": "/x", "VLLM_HOST_IP": "1", "PATH": "/bin"}
    local |= {"NCCL_SOCKET_IFNAME": "en0", "WANDB_CACHE_DIR": "/x", "VLLM_CONFIG_ROOT": "/x", "HOME": "/root"}
    assert environment([], {**here, **secret, **local}) == here
    asked = environment(["NCCL_SOCKET_IFNAME=eth0", "HOME", "EMPTY=", "MAX_TOKENS=3"], {**here, **local})
    assert asked == {**here, "NCCL_SOCKET_IFNAME": "eth0", "HOME": "/root", "EMPTY": "", "MAX_TOKENS": "3"}


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN=s3cr", "AWS_SECRET_ACCESS_KEY", "db_password=s3cr"])
def test_secrets_do_not_travel(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--env", name, "--", *COMMAND]) == 2
    said = capsys.readouterr().err
    assert "secrets do not travel" in said and "s3cr" not in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no command; give it after --"),
        (["--"], "no command"),
        (["--working_dir", "/nowhere", "--", "x"], "--working_dir /nowhere"),
        (["--stop_wait", "0", "--", "x"], "--stop_wait must be at least 1"),
        (["--env", "NOT_SET_HERE", "--", "x"], "--env NOT_SET_HERE=VALUE"),
    ],
)
def test_wrong_input(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Server, "refuses", RuntimeError("Request failed with status code 401: Unauthorized"))
    assert main(["--address", "http://h:1", "--working_dir", "none", "--", "x"]) == 2
    said = capsys.readouterr().err
    assert "http://h:1 does not take the job" in said and "401" in said and "RAY_AUTH_TOKEN_PATH" in said


def test_code_goes_with_the_job_and_the_rest_stays(tmp_path: Path) -> None:
    """Packed by Ray itself, as its client does it."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "real_openrlhf", checkout / "real_openrlhf")
    for name in ("setup.py", ".gitignore"):
        shutil.copy(ROOT / name, checkout)
    for name in (
        ".git/HEAD",
        "runs/r/model.safetensors",
        ".venv/bin/python",
        "wandb/log",
        "mine/secret.txt",
        ".mypy_cache/x",
        "a.whl",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    args = parse_args(["--working_dir", str(checkout), "--exclude", "mine", "--", "x"])
    env = runtime_env(args, {})
    archive = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes() + env["excludes"]
    create_package(env["working_dir"], archive, include_gitignore=True, excludes=excludes)
    names = set(zipfile.ZipFile(archive).namelist())
    assert {"real_openrlhf/train_real.py", "real_openrlhf/run/main.py", "setup.py"} <= names
    left_out = (".git/", ".venv/", "runs/", "wandb/", "mine/", ".mypy_cache/")
    assert [name for name in names if name.startswith(left_out) or name.endswith(".whl")] == []
    assert set(EXCLUDED) <= set(env["excludes"])


def test_help_and_mistakes_answer_before_ray_is_imported() -> None:
    code = "import sys; from real_openrlhf.submit import main; assert main(['--']) == 2; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_submit_error_is_wrong_input() -> None:
    assert issubclass(SubmitError, ValueError)
