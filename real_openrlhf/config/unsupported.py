"""Flags of OpenRLHF that this package does not have on purpose, each with the reason."""

from __future__ import annotations

_CKPT = "checkpoints always hold all of DeepSpeed's state; see --ckpt.save_steps, --ckpt.max_num and --ckpt.load"
_DEVICE = "REAL decides this itself from the device (--real.device)"
_VLM = "only text models are trained"

# A key that ends in "." means every flag that begins with it.
UNSUPPORTED: dict[str, str] = {
    "critic.": "REAL has no critic: advantages are leave-one-out within a prompt's rollouts",
    "reward.": "REAL has no reward model: the reward is computed from the score distribution and the label",
    "algo.advantage.estimator": "REAL's advantages are leave-one-out (RLOO); see --real.standardise and "
    "--real.advantage_clip",
    "algo.advantage.lambd": "this is a parameter of GAE, which needs a critic; REAL's lambda is --real.lam",
    "algo.advantage.gamma": "rewards are not discounted: a rollout has one reward",
    "algo.advantage.no_std_norm": "use --no-real.standardise",
    "algo.advantage.is_correction_mode": "importance weights are truncated (clip); see "
    "--algo.advantage.is_correction_threshold",
    "algo.advantage.is_correction_gating": "importance weights are truncated by the ratio itself",
    "algo.kl.use_loss": "the KL is always a term of the loss, switched on by --algo.kl.init_coef",
    "algo.kl.unbiased_gradient": "the KL's gradient is always the unbiased one",
    "algo.kl.target": "the KL's weight is constant (--algo.kl.init_coef)",
    "algo.kl.horizon": "the KL's weight is constant (--algo.kl.init_coef)",
    "algo.dynamic_filtering_enable": "use --real.keep_groups: all keeps every group, the others are dynamic sampling",
    "algo.dynamic_filtering_range": "groups are kept by the accuracy of their scores; use --real.keep_groups",
    "train.async_queue_size": "one batch is sampled ahead, never more (--train.async_enable)",
    "train.partial_rollout_enable": "a rollout is sampled by one version of the weights; see --train.async_enable",
    "train.enable_ema": "no moving average of the weights is kept",
    "train.ema_beta": "no moving average of the weights is kept",
    "train.agent_func_path": "here a judge answers in one turn; an agent with REAL's reward for a stock OpenRLHF is in "
    "real_openrlhf/dropin",
    "train.dynamic_batch_enable": "micro-batches are always filled by --train.micro_batch_size and "
    "--train.max_tokens_per_gpu",
    "train.colocate_actor_ref": "policy and reference group have separate GPUs",
    "train.colocate_critic_reward": "REAL has neither critic nor reward model",
    "rollout.vllm_generate_batch_size": "a step's prompts are generated together; see --rollout.batch_size and "
    "--real.refill",
    "rollout.micro_batch_size": "rollouts need no forward pass of the trainer; use --train.micro_batch_size",
    "rollout.max_tokens_per_gpu": "rollouts need no forward pass of the trainer; use --train.micro_batch_size",
    "actor.dual_clip": "the clipped ratio is PPO's (--actor.eps_clip)",
    "actor.policy_loss_type": "the loss is REAL's; see --real.objective",
    "actor.loss_agg_mode": "use --real.aggregation",
    "actor.aux_loss_coef": "the balancing loss of mixtures of experts is not supported",
    "actor.optim": "the optimizer is Adam (--actor.adam.lr and related flags)",
    "actor.muon.": "the optimizer is Adam (--actor.adam.lr and related flags)",
    "actor.freeze_visual_encoder": _VLM,
    "data.image_key": _VLM,
    "data.max_images_per_prompt": _VLM,
    "data.prompt_probs": "give one file; mix data sets when it is made",
    "data.prompt_split": "give the split's own file, or a hub id with its split, to --data.prompt_dataset",
    "data.disable_fast_tokenizer": "the tokenizer is the model's own",
    "data.dataloader_num_workers": "prompts are read once, at start",
    "eval.split": "give the split's own file, or a hub id with its split, to --eval.dataset",
    "ckpt.save_hf": "the final model is always a Hugging Face folder",
    "ckpt.disable_ds": _CKPT,
    "ckpt.max_mem": _CKPT,
    "ckpt.load_enable": "use --ckpt.load latest, best, auto or a path",
    "ds.packing_samples": "micro-batches never hold padding; leave it out",
    "ds.use_universal_ckpt": _CKPT,
    "ds.deepcompile": "compiled training is not supported",
    "ds.experts_implementation": "mixtures of experts are not supported",
    "ds.tensor_parallel_size": "the policy is sharded by ZeRO (--ds.zero_stage), not by tensors",
    "ds.load_in_4bit": "quantised training is not supported",
    "ds.ring_attn_size": "sequences are not split over ranks",
    "ds.ring_attn_head_stride": "sequences are not split over ranks",
    "ds.value_head_prefix": "REAL has no critic",
    "vllm.sync_backend": _DEVICE,
    "vllm.sync_with_ray": _DEVICE,
    "logger.wandb.key": "others see what a command line holds (ps, lists of jobs); set WANDB_API_KEY, or "
    "run `wandb login`",
    "use_ms": "models come from the Hugging Face hub or from a folder",
    "local_rank": "ranks are set by Ray",
}


def why_unsupported(name: str) -> str | None:
    """The reason why OpenRLHF's flag `name` (without dashes) does not exist here; None: it is no such flag."""
    if name in UNSUPPORTED:
        return UNSUPPORTED[name]
    for key, reason in UNSUPPORTED.items():
        if key.endswith(".") and name.startswith(key):
            return reason
    return None
