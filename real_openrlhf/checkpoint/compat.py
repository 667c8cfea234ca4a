"""Whether a checkpoint belongs to the run that wants to resume from it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from real_openrlhf.checkpoint.errors import CheckpointError, IncompatibleCheckpointError, LayoutError

logger = logging.getLogger(__name__)

# Keys of a model's config that do not change the model: where it came from, how it is run, who wrote it.
_VOLATILE = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
)


class Severity(Enum):
    """
    REFUSE   resuming would silently train something else, or on something else
    LAYOUT   the shards do not fit and cannot be converted
    RESHARD  the shards do not fit, but are converted when they are loaded
    WARN     may change, with a warning
    """

    REFUSE = "refuse"
    LAYOUT = "layout"
    RESHARD = "reshard"
    WARN = "warn"


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One field that differs. name: for settings, `settings.<name>`."""

    name: str
    saved: Any
    now: Any
    severity: Severity

    def __str__(self) -> str:
        return f"{_TITLES.get(self.name, self.name)}: {_shown(self.saved)} in the checkpoint, {_shown(self.now)} now"


_TITLES = {
    "model_sha256": "model config (sha256)",
    "tokenizer_sha256": "tokenizer (sha256)",
    "data_sha256": "data set (sha256)",
    "template_sha256": "prompt template (sha256)",
    "scale": "score scale",
    "anchors": "answer anchors",
    "ranks": "policy ranks",
    "zero_stage": "ZeRO stage",
    "adapters": "LoRA adapters",
}
_SEVERITY = {
    "model_sha256": Severity.REFUSE,
    "tokenizer_sha256": Severity.REFUSE,
    "data_sha256": Severity.REFUSE,
    "template_sha256": Severity.REFUSE,
    "scale": Severity.REFUSE,
    "anchors": Severity.REFUSE,
    "adapters": Severity.REFUSE,
    "ranks": Severity.RESHARD,
    "zero_stage": Severity.LAYOUT,
    "preset": Severity.WARN,
    "seed": Severity.WARN,
}
_STRINGS = ("model_sha256", "tokenizer_sha256", "data_sha256", "template_sha256", "preset", "adapters")
_INTEGERS = ("seed", "ranks", "zero_stage")
# ZeRO stages whose shards DeepSpeed can convert to universal checkpoints.
_RESHARDED_STAGES = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run trains, on which data, and on how many ranks.

    model_sha256       see `model_config_sha256`
    tokenizer_sha256   see `tokenizer_sha256`
    data_sha256        `JudgeDataset.sha256`
    template_sha256    `PromptTemplate.sha256`
    scale              (value, label) pairs in order
    anchors            the texts before the score
    ranks, zero_stage  of the policy; they decide the layout of its shards
    adapters           rank, scale and target modules of LoRA adapters; "none" without
    settings           settings that may change (learning rate, ...): JSON values by flag name
    """

    model_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    template_sha256: str
    scale: tuple[tuple[float, str], ...]
    anchors: tuple[str, ...]
    preset: str
    seed: int
    ranks: int
    zero_stage: int
    adapters: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Any) -> RunIdentity:
        """Inverse of `to_json`; CheckpointError when a field is missing, unknown or of another type."""
        if not isinstance(content, Mapping):
            raise CheckpointError("the run identity is not a JSON object")
        names = {f.name for f in fields(cls)}
        if names != set(content):
            raise CheckpointError(
                f"the run identity lacks {sorted(names - set(content))} and has unknown {sorted(set(content) - names)}"
            )
        wrong = [name for name in _STRINGS if not isinstance(content[name], str)]
        wrong += [name for name in _INTEGERS if type(content[name]) is not int]
        try:
            scale = tuple((float(value), str(label)) for value, label in content["scale"])
            anchors, settings = tuple(map(str, content["anchors"])), dict(content["settings"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the run identity's scale, anchors or settings are malformed: {error}") from error
        if wrong:
            raise CheckpointError(f"the run identity has another type than expected in {', '.join(wrong)}")
        return cls(**{**content, "scale": scale, "anchors": anchors, "settings": settings})

    def diff(self, other: RunIdentity) -> list[Mismatch]:
        """The differences between this identity (saved) and `other` (now), in the order of the fields."""
        # Compared as JSON, since tuples are read back as lists.
        saved, now = self.to_json(), other.to_json()
        pairs = [(name, saved[name], now[name], severity) for name, severity in _SEVERITY.items()]
        absent = "not set"
        for name in sorted({*saved["settings"], *now["settings"]}):
            before, after = (side["settings"].get(name, absent) for side in (saved, now))
            pairs.append((f"settings.{name}", before, after, Severity.WARN))
        return [
            Mismatch(name=name, saved=before, now=after, severity=severity)
            for name, before, after, severity in pairs
            if before != after
        ]


def check(saved: RunIdentity, now: RunIdentity, *, force: bool) -> list[Mismatch]:
    """Raise if a run with the identity `now` must not resume from `saved`. Returns and logs the allowed differences.

    IncompatibleCheckpointError: other model, adapters, tokenizer, data, template, scale or anchors, unless `force`.
    LayoutError, even with `force`: another ZeRO stage, or another number of ranks without ZeRO. With ZeRO 1, 2 or 3
    another number of ranks is allowed: the policy converts the shards (actors.policy.shards).
    """
    mismatches = saved.diff(now)
    refused = [m for m in mismatches if m.severity is Severity.REFUSE]
    layout = [m for m in mismatches if m.severity is Severity.LAYOUT]
    if saved.zero_stage not in _RESHARDED_STAGES:
        layout += [m for m in mismatches if m.severity is Severity.RESHARD]
    if refused and not force:
        raise IncompatibleCheckpointError(
            "the checkpoint belongs to another run:\n"
            + "".join(f"  {m}\n" for m in refused)
            + "resume with the settings that the checkpoint was made with, start in a new output folder, or force it"
        )
    if layout:
        raise LayoutError(
            "the checkpoint's shards do not fit this run:\n"
            + "".join(f"  {m}\n" for m in layout)
            + f"resume with --ds.zero_stage {saved.zero_stage} on {saved.ranks} policy ranks; with ZeRO stage 1, 2 or "
            "3 the number of ranks may change, the stage never"
        )
    for mismatch in mismatches:
        note = {Severity.REFUSE: " (forced)", Severity.RESHARD: " (the shards are converted)"}
        logger.warning("resuming with a change%s: %s", note.get(mismatch.severity, ""), mismatch)
    return mismatches


def json_sha256(content: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def model_config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 of `PretrainedConfig.to_dict()` without keys that do not change the model."""
    return json_sha256(_without(config, _VOLATILE))


def tokenizer_sha256(tokenizer: Any) -> str:
    """sha256 of a Hugging Face tokenizer: vocabulary, merges, special tokens, chat template."""
    content: dict[str, Any] = {
        "vocab": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Every call sets padding and truncation again, so they do not count.
        content["backend"] = _without(json.loads(backend.to_str()), ("padding", "truncation"))
    return json_sha256(content)


def _without(content: Any, names: tuple[str, ...]) -> Any:
    """Nested dicts without these keys: configs of vision or MoE models contain further configs."""
    if isinstance(content, Mapping):
        return {str(key): _without(value, names) for key, value in content.items() if key not in names}
    return content


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 200 else f"{text[:200]}..."
