"""Limits that a model's configuration sets for its engines. They are known before an engine starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from real_openrlhf.actors.engine.spec import EngineSpecError
from real_openrlhf.common.errors import one_line

# Keys of a configuration with the number of positions; vLLM 0.29 reads the same (model_arch_config_convertor.py).
_POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# RoPE scalings whose max_position_embeddings already includes the factor.
_SCALED_ALREADY = ("su", "longrope", "llama3")
# vLLM's environment variable that allows more tokens than positions.
_ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """
    positions   most tokens of prompt and response together
    heads       attention heads
    vocabulary  token ids below it exist

    None: the configuration does not say.
    """

    positions: int | None
    heads: int | None
    vocabulary: int | None

    @classmethod
    def of(cls, model: str, *, trust_remote_code: bool = False) -> ModelLimits:
        """The limits of a model. EngineSpecError if its configuration does not load."""
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
        except Exception as error:  # transformers and huggingface_hub raise many kinds
            raise EngineSpecError(f"the configuration of {model} does not load: {one_line(error)}") from error
        return cls(
            positions=_positions(config),
            heads=getattr(config, "num_attention_heads", None),
            vocabulary=getattr(config, "vocab_size", None),
        )

    def check_length(self, max_model_len: int, flag: str) -> None:
        """EngineSpecError for more tokens than the model has positions, unless vLLM's own variable allows it."""
        most = self.positions
        if most is None or max_model_len <= most or os.environ.get(_ALLOW_LONG, "0").lower() in ("1", "true"):
            return
        raise EngineSpecError(f"{flag} {max_model_len} is more than the model's {most} positions; use at most {most}")

    def check_workers(self, tensor_parallel_size: int, flag: str) -> None:
        """EngineSpecError for workers that cannot share the attention heads evenly."""
        if not self.heads or self.heads % tensor_parallel_size == 0:
            return
        fits = [str(n) for n in range(1, tensor_parallel_size) if self.heads % n == 0]
        raise EngineSpecError(
            f"{flag} {tensor_parallel_size} must divide the model's {self.heads} attention heads; use {', '.join(fits)}"
        )

    def check_tokens(self, token_ids: Iterable[int], what: str) -> None:
        """EngineSpecError for a token that has no embedding in the model. what: whose tokens, for the message."""
        highest = max(token_ids, default=0)
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise EngineSpecError(
                f"{what} hold the token {highest}, but the model's vocabulary ends at {self.vocabulary - 1}: tokenizer "
                "and model do not belong together"
            )


def _positions(config: Any) -> int | None:
    """The number of positions, computed as vLLM 0.29 does (config/model.py, _get_and_verify_max_len)."""
    found = [value for key in _POSITION_KEYS if (value := getattr(config, key, None)) is not None]
    if not found:
        return None
    most = float(getattr(config, "model_max_length", None) or min(found))
    rope = getattr(config, "rope_parameters", None) or {}
    if "gemma3" not in config.model_type:
        factor = 1.0
        for one in [rope] if "rope_type" in rope else list(rope.values()):
            if not isinstance(one, Mapping) or one.get("rope_type") in _SCALED_ALREADY:
                continue
            factor = one.get("factor", factor) or 1.0
            if one.get("rope_type") == "yarn":
                most = float(one.get("original_max_position_embeddings") or most)
        most *= factor
    return int(most)
