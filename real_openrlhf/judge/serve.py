"""Starts vLLM's server with the settings of this package's engines: `python -m real_openrlhf.judge serve`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence

from real_openrlhf.common.device import Device


def serve_command(
    model: str,
    *,
    device: Device,
    host: str,
    port: int,
    max_model_len: int,
    logprobs_mode: str = "raw_logprobs",
    tensor_parallel_size: int = 1,
    extra: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment variables that it needs."""
    options = {
        "host": host,
        "port": port,
        "dtype": device.vllm_dtype,
        "max_model_len": max_model_len,
        "tensor_parallel_size": tensor_parallel_size,
        "logprobs_mode": logprobs_mode,
        **({} if device.is_cuda else {"enforce_eager": True}),
        **device.engine_options(max_model_len),
    }
    # The module that `vllm serve` runs. The command itself needs a distribution named vllm; the CPU build has another.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*command, *extra], device.engine_env(tensor_parallel_size)


def serve(command: Sequence[str], env: dict[str, str], *, api_key: str | None = None) -> None:
    """Replace this process by the server, under the same process id. Does not return.

    api_key: what requests must bring; it is handed on by the environment, and not shown.
    """
    sys.stderr.write(f"{' '.join(f'{k}={shlex.quote(v)}' for k, v in env.items())} {shlex.join(command)}\n")
    sys.stderr.flush()
    secret = {} if api_key is None else {"VLLM_API_KEY": api_key}
    os.execvpe(command[0], list(command), {**os.environ, **env, **secret})
