"""What must be the same in a run and in a checkpoint that it resumes from."""

from __future__ import annotations

from transformers import AutoConfig

from real_openrlhf.checkpoint.compat import RunIdentity, model_config_sha256, tokenizer_sha256
from real_openrlhf.config.cli import config_to_dict
from real_openrlhf.run.inputs import Inputs


def run_identity(inputs: Inputs) -> RunIdentity:
    """What must be the same to resume, and the settings that may change with a warning."""
    config = inputs.config
    flags = config_to_dict(config)
    scale = config.real.score_scale
    return RunIdentity(
        model_sha256=model_config_sha256(
            AutoConfig.from_pretrained(config.actor.model_name_or_path, trust_remote_code=False).to_dict()
        ),
        tokenizer_sha256=tokenizer_sha256(inputs.tokenizer),
        data_sha256=inputs.train_set.sha256,
        template_sha256=inputs.template.sha256,
        scale=tuple(zip(scale.values, scale.labels)),
        anchors=config.real.anchor,
        preset=config.real.preset,
        seed=config.train.seed,
        ranks=config.ranks,
        zero_stage=config.ds.zero_stage,
        adapters=str(config.ds.lora),
        settings={name: flags[name] for name in ("actor", "algo", "rollout", "real", "vllm")},
    )
