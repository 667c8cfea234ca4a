"""Submit a run to a Ray cluster from another machine: its code, its settings, its logs and its exit code.

    python -m real_openrlhf.submit --address http://127.0.0.1:8265 --working_dir . -- \\
        python -m real_openrlhf.train_real --ckpt.load auto --ckpt.output_dir /shared/runs/real-1 ...

The command runs on the cluster's head node, in a copy of the working directory. That is what `ray job submit` does too.
Here settings of communication travel and secrets do not, words arrive as they were written, `ray job stop` leaves time
to save, and the exit code is that of the command.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Settings of the user that hold on the cluster too.
TRAVEL = ("NCCL_", "GLOO_", "UCX_", "FI_", "VLLM_", "HF_HUB_", "WANDB_", "TOKENIZERS_PARALLELISM", "PYTORCH_ALLOC_CONF")
# What is in a job's environment is shown by Ray's dashboard. WANDB_API_KEY, HF_TOKEN, ...
_SECRET = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
# Places on this machine, and its address.
_LOCAL = re.compile(r"(_HOME|_DIR|_ROOT|_PATH|_FILE|_CACHE|_CACHE_DIR|_CONFIG|_HOST_IP|_SOCKET_IFNAME|_HCA)$")
# Besides what Ray leaves out by itself (.git, .venv, venv, __pycache__, and what .gitignore and .rayignore name).
EXCLUDED = (".git", ".venv", "venv", "__pycache__", "runs", "wandb", ".cache", ".*_cache", "*.egg-info", "*.whl")
WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


class SubmitError(ValueError):
    """A flag is wrong, or the cluster does not take the job."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m real_openrlhf.submit",
        usage="%(prog)s [options] -- COMMAND ...",
        description="Submit a command to a Ray cluster, show its logs, and end with its exit code.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--address", help="of the cluster's job server; RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265")
    add("--working_dir", default=".", help="folder whose files go with the command; none: what the cluster has")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="files that stay here, as in .gitignore")
    add("--env", nargs="+", default=[], metavar="NAME[=VALUE]", help="further variables that go with the command")
    add("--stop_wait", type=int, default=1800, help="seconds that `ray job stop` gives a run to save")
    add("--submission_id", help="name of the job; Ray makes one when it is not given")
    add("--no_wait", action="store_true", help="do not wait for the end")
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    args.command = words[split + 1 :]
    if not args.command:
        raise SubmitError("there is no command; give it after --, such as -- python -m real_openrlhf.train_real ...")
    if args.stop_wait < 1:
        raise SubmitError(f"--stop_wait must be at least 1, got {args.stop_wait}")
    return args


def environment(names: Sequence[str], here: Mapping[str, str]) -> dict[str, str]:
    """The variables that go with the command. names: further ones, as NAME or NAME=VALUE. SubmitError for secrets."""
    chosen = {
        name: value
        for name, value in here.items()
        if name.startswith(TRAVEL) and not _SECRET.search(name) and not _LOCAL.search(name)
    }
    for text in names:
        name, given, value = text.partition("=")
        if _SECRET.search(name):
            raise SubmitError(
                f"--env {name}: the dashboard shows a job's variables, so secrets do not travel with it. Set it where "
                "the cluster is started (`wandb login` on the head node, a Kubernetes secret)"
            )
        if not given and name not in here:
            raise SubmitError(f"--env {name}: it is not set here; give it a value, --env {name}=VALUE")
        chosen[name] = value if given else here[name]
    return chosen


def runtime_env(args: argparse.Namespace, here: Mapping[str, str]) -> dict[str, Any]:
    env: dict[str, Any] = {"env_vars": {**environment(args.env, here), WAIT: str(args.stop_wait)}}
    if args.working_dir != "none":
        if not Path(args.working_dir).is_dir():
            raise SubmitError(f"--working_dir {args.working_dir} is no folder")
        env |= {"working_dir": str(Path(args.working_dir).resolve()), "excludes": [*EXCLUDED, *args.exclude]}
    return env


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: the command's; 0 with --no_wait; 1 for a stopped job or a lost cluster; 2 for wrong input."""
    try:
        args = parse_args(list(sys.argv[1:] if argv is None else argv))
        env = runtime_env(args, os.environ)
        return _submit(args, env)
    except SubmitError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _submit(args: argparse.Namespace, env: dict[str, Any]) -> int:
    # Here: help and mistakes answer before Ray is imported.
    from ray.job_submission import JobSubmissionClient

    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(args.command), submission_id=args.submission_id, runtime_env=env)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise SubmitError(
            f"the job server at {address} does not take the job: {' '.join(str(error).split())[:600]}. A tunnel to a "
            "cluster: ssh -L 8265:127.0.0.1:8265 HEAD_NODE; a cluster with a token: RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH"
        ) from error
    where = f"--address {address} {job}"
    sys.stderr.write(f"job {job}: `ray job logs {where}`, `ray job stop {where}` (saves and ends)\n")
    return 0 if args.no_wait else _follow(client, job)


def _follow(client: Any, job: str) -> int:
    async def show() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        sys.stderr.write(f"\nno longer watching; job {job} goes on\n")
        return 130
    except (RuntimeError, OSError) as error:  # of aiohttp and requests, too
        sys.stderr.write(f"the connection to job {job} was lost: {error}; `ray job logs` shows it again\n")
        return 1
    info = client.get_job_info(job)
    state = str(getattr(info.status, "value", info.status))
    if state == "SUCCEEDED":
        return 0
    if state == "FAILED":
        sys.stderr.write(f"job {job} failed with exit code {info.driver_exit_code}\n")
        return info.driver_exit_code or 1
    if state == "STOPPED":
        sys.stderr.write(
            f"job {job} was stopped; submitted again with --ckpt.load auto it resumes from its last save\n"
        )
    else:
        sys.stderr.write(f"the connection ended while job {job} was {state}: {info.message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
