"""Which backend a judge has in this process: transformers for small models on a CPU, vLLM for all others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from real_openrlhf.judge.types import JudgeBackend, JudgeError

if TYPE_CHECKING:  # it needs torch, which command lines do without until their flags are parsed
    from real_openrlhf.algo.score_position import ScoreReader

AUTO, TRANSFORMERS, VLLM = "auto", "transformers", "vllm"
BACKENDS = (AUTO, TRANSFORMERS, VLLM)
# Of weights: 270 million parameters in fp32, 540 million in bf16.
SMALL_BYTES = 2**30 + 2**26


def check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise JudgeError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}")
    return name


def chosen_backend(wanted: str, model: str, device: str) -> str:
    """TRANSFORMERS or VLLM. auto: transformers on a CPU for a folder with at most SMALL_BYTES of weights, else vLLM."""
    if check_backend(wanted) != AUTO:
        return wanted
    size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    if not 0 < size <= SMALL_BYTES:
        return VLLM
    from real_openrlhf.common.device import Device

    return VLLM if Device.resolve(device).is_cuda else TRANSFORMERS


def start_backend(kind: str, model: str, reader: ScoreReader, **options: Any) -> JudgeBackend:
    """kind: TRANSFORMERS or VLLM. options: max_model_len, device, logprobs_mode, trust_remote_code."""
    if kind == TRANSFORMERS:
        from real_openrlhf.judge.transformers_backend import TransformersBackend

        return TransformersBackend(model, reader, **options)
    from real_openrlhf.judge.vllm_backend import VLLMBackend

    return VLLMBackend(model, reader.bound, **options)
