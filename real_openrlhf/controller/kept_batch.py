"""A batch that could not be trained on, kept for study: safetensors for the numbers, JSON for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.common.atomic_file import write_text

FOLDER = "not_finite"
# Kept per run: the first ones tell most, and a run of thousands of steps must not fill the disk.
MOST = 10


def keep_batch(output_dir: Path, step: int, groups: Sequence[TrainGroup], metrics: Mapping[str, Any]) -> Path | None:
    """Write <output_dir>/not_finite/step_<n>.safetensors and .json; None when there are enough already.

    Tensors are named <group>/<name> and <group>/<rollout>/<name>, as in `algo.types`. OSError if it is not written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step}.safetensors"
    if not path.exists() and len(list(folder.glob("step_*.safetensors"))) >= MOST:
        return None
    # Copies: safetensors wants every tensor whole and in memory of its own.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(groups).items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from error
    rows = [
        {
            "row": group.group.row,
            "label": group.group.label,
            "weight_version": group.group.weight_version,
            "texts": [rollout.text for rollout in group.group.rollouts],
            "not_finite": sorted(
                name
                for name, tensor in tensors.items()
                if name.startswith(f"{g}/") and tensor.is_floating_point() and _bad(tensor)
            ),
        }
        for g, group in enumerate(groups)
    ]
    facts = {
        "step": step,
        "metrics": {name: _json(value) for name, value in metrics.items()},
        "groups": rows,
    }
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return path


def _tensors(groups: Sequence[TrainGroup]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for g, group in enumerate(groups):
        found[f"{g}/prompt_ids"] = group.group.prompt_ids
        for name in ("cot", "score", "squared_error", "likelihood", "rewards", "advantages"):
            found[f"{g}/{name}"] = getattr(group.coefficients, name)
        for k, rollout in enumerate(group.group.rollouts):
            found[f"{g}/{k}/token_ids"] = rollout.token_ids
            if rollout.logprobs is not None:  # else the response was given, and its score's log-probs are NaN
                found[f"{g}/{k}/score_logprobs"] = rollout.score_logprobs
                found[f"{g}/{k}/logprobs"] = rollout.logprobs
            if group.ref_logprobs is not None:
                found[f"{g}/{k}/ref_logprobs"] = group.ref_logprobs[k]
    return found


def _bad(tensor: Tensor) -> bool:
    return not bool(tensor.isfinite().all())


def _json(value: Any) -> Any:
    """JSON has no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
