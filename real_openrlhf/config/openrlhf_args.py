"""Converts `Config` to the nested arguments that OpenRLHF's classes read. This is done nowhere else."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from real_openrlhf.config.convert import flags_by_name, get_value
from real_openrlhf.config.schema import Config

# Defaults of openrlhf.cli.train_ppo_ray 0.11.2 for the flags that `Config` does not have.
_OPENRLHF_DEFAULTS: dict[str, Any] = {
    "actor.optim": "adam",
    "actor.muon.lr": 0.02,
    "actor.muon.momentum": 0.95,
    "actor.muon.ns_steps": 5,
    "actor.muon.nesterov": True,
    "actor.dual_clip": None,
    "actor.policy_loss_type": "ppo",
    "actor.loss_agg_mode": "token-mean",
    "actor.aux_loss_coef": 0,
    "actor.freeze_visual_encoder": False,
    "critic.num_nodes": 1,
    "critic.num_gpus_per_node": 8,
    "critic.model_name_or_path": None,
    "critic.value_clip": 0.5,
    "critic.freezing_steps": -1,
    "critic.save_value_network": False,
    "critic.optim": "adam",
    "critic.muon.lr": 0.02,
    "critic.muon.momentum": 0.95,
    "critic.muon.ns_steps": 5,
    "critic.muon.nesterov": True,
    "critic.adam.lr": 9e-6,
    "critic.adam.betas": (0.9, 0.95),
    "critic.adam.eps": 1e-8,
    "critic.adam.weight_decay": 0.0,
    "critic.lr_scheduler": "cosine_with_min_lr",
    "critic.lr_warmup_ratio": 0.03,
    "critic.min_lr_ratio": 0.1,
    "critic.max_norm": 1.0,
    "reward.num_nodes": 1,
    "reward.num_gpus_per_node": 8,
    "reward.model_name_or_path": None,
    "reward.remote_url": None,
    "reward.offload": False,
    "reward.normalize_enable": False,
    "reward.clip_range": (-10, 10),
    "reward.overlong_buffer_len": None,
    "reward.overlong_penalty_factor": 1,
    "reward.stop_properly_penalty_coef": None,
    "train.colocate_actor_ref": False,
    "train.colocate_critic_reward": False,
    "train.async_queue_size": 1,
    "train.partial_rollout_enable": False,
    "train.enable_ema": False,
    "train.ema_beta": 0.992,
    "train.dynamic_batch_enable": False,
    "train.agent_func_path": None,
    "rollout.vllm_generate_batch_size": None,
    "rollout.micro_batch_size": 1,
    "rollout.max_tokens_per_gpu": None,
    "vllm.sync_backend": "nccl",
    "vllm.sync_with_ray": False,
    "algo.advantage.estimator": "rloo",
    "algo.advantage.lambd": 1,
    "algo.advantage.gamma": 1,
    "algo.advantage.no_std_norm": False,
    "algo.advantage.is_correction_mode": "clip",
    "algo.advantage.is_correction_gating": "ratio",
    "algo.kl.use_loss": False,
    "algo.kl.unbiased_gradient": True,
    "algo.kl.target": None,
    "algo.kl.horizon": 10000,
    "algo.dynamic_filtering_range": (0, 1),
    "ckpt.save_hf": False,
    "ckpt.disable_ds": False,
    "ckpt.max_mem": float("inf"),
    "ckpt.load_enable": False,
    "ds.packing_samples": False,
    "ds.use_universal_ckpt": False,
    "ds.deepcompile": False,
    "ds.experts_implementation": None,
    "ds.tensor_parallel_size": 1,
    "ds.load_in_4bit": False,
    "ds.ring_attn_size": 1,
    "ds.ring_attn_head_stride": 1,
    "ds.value_head_prefix": "score",
    "data.prompt_probs": None,
    "data.prompt_split": "train",
    "data.disable_fast_tokenizer": False,
    "data.dataloader_num_workers": 0,
    "data.image_key": "images",
    "data.max_images_per_prompt": 0,
    "eval.split": "train",
    "use_ms": False,
    "logger.wandb.key": None,
    "local_rank": -1,
}
# Sections of `Config` that OpenRLHF does not have.
_OURS = ("real.", "sync.", "ray.")


def to_openrlhf_args(config: Config, *, device_dtype: str, attn: str, sync_backend: str = "nccl") -> SimpleNamespace:
    """The namespace of openrlhf.cli.train_ppo_ray, with "auto" and None replaced by their values.

    device_dtype: "fp32" or "bf16"; attn: transformers' name of the attention; sync_backend: "nccl" or
    "gloo". `adam` and `muon` are separate namespaces, since OpenRLHF
    passes `vars()` of them to the optimizer.
    """
    flat = copy.deepcopy(_OPENRLHF_DEFAULTS)
    for name in flags_by_name():
        if not name.startswith(_OURS):
            flat[name] = get_value(config, name)
    targets = config.ds.lora.target_modules
    flat.update(
        {
            "actor.eps_clip_low_high": config.actor.clip_bounds,
            # OpenRLHF's strategy reads this one here, in addition to those under `actor`.
            "max_norm": config.actor.max_norm,
            "optim": "adam",
            "algo.advantage.is_correction_threshold": [0.0, config.algo.advantage.is_correction_threshold],
            "algo.dynamic_filtering_enable": config.real.filters_groups,
            "algo.kl.use_loss": config.algo.kl.init_coef > 0,
            "ckpt.path": config.ckpt.folder,
            "data.max_samples": config.data.max_samples or int(1e8),
            "ds.attn_implementation": attn,
            "ds.lora.target_modules": "all-linear" if targets == ("all-linear",) else list(targets),
            "ds.param_dtype": device_dtype,
            "rollout.micro_batch_size": config.rollouts_per_pass,
            "rollout.vllm_generate_batch_size": config.rollout.batch_size,
            "train.batch_size": config.samples_per_update,
            "train.micro_batch_size": config.rollouts_per_pass,
            "vllm.sync_backend": sync_backend,
        }
    )
    return _nested(flat)


def _nested(flat: dict[str, Any]) -> SimpleNamespace:
    root = SimpleNamespace()
    for name, value in flat.items():
        node = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(node, part):
                setattr(node, part, SimpleNamespace())
            node = getattr(node, part)
        setattr(node, last, value)
    return root
