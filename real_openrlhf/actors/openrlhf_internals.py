"""Every place where this package depends on internals of OpenRLHF 0.11.2: check these rows when OpenRLHF changes.

Versions are pinned, so that every row holds today. tests/unit/actors/test_openrlhf_internals.py reads OpenRLHF's
source and fails for a row that no longer holds, for an import without a row, and for a method of ours that overrides
one of OpenRLHF's without a row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["subclass", "unwrap", "override", "skip", "call", "replace", "attributes", "keys", "namespace"]


@dataclass(frozen=True, kw_only=True)
class Touch:
    """One such place.

    where  "module:name" or "module:Class.method", as importable
    how    subclass    our class derives from it
           unwrap      the same, from the plain class under its ray.remote wrapper
           override    our subclass has its own; names: the parent's arguments that we pass to super(), if any
           skip        must not run, and does not: ours replaces it, or nothing calls it
           call        used as it is; names: the arguments that we pass
           replace     ours is put in its place under this name, in the processes of such a run
           attributes  names: attributes of its instances that we set or read
           keys        names: the keys of the dict that we pass
           namespace   the arguments that its flags make; names: some that we fill in differently
    by     our module below real_openrlhf
    """

    where: str
    how: How
    by: str
    why: str
    names: tuple[str, ...] = ()


_STRATEGY = "openrlhf.utils.deepspeed:DeepspeedStrategy"
_ACTOR = "openrlhf.models:Actor"
_TRAINER = "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer"
_POLICY = "openrlhf.trainer.ray.ppo_actor:PolicyModelActor"
_REFERENCE = "openrlhf.trainer.ray.launcher:ReferenceModelActor"
_BASE = "openrlhf.trainer.ray.launcher:BaseDistributedActor"
_MODEL_BASE = "openrlhf.trainer.ray.launcher:BaseModelActor"
_ENGINE = "openrlhf.trainer.ray.vllm_engine:RolloutRayActor"
_EXECUTOR = "openrlhf.utils.agent:SingleTurnAgentExecutor"
_BUFFER = "openrlhf.trainer.ppo_utils:NaiveReplayBuffer"
_WORKER = "openrlhf.trainer.ray.vllm_worker_wrap:WorkerWrap"

TOUCHES: tuple[Touch, ...] = (
    # DeepSpeed strategy
    Touch(
        where=_STRATEGY,
        how="subclass",
        by="actors.policy.strategy",
        why="ZeRO, optimizer and schedule are OpenRLHF's; what assumes CUDA is not",
    ),
    Touch(
        where=f"{_STRATEGY}.__init__",
        how="override",
        by="actors.policy.strategy",
        why="takes the device; everything else is read from args",
        names=(
            "seed",
            "full_determinism",
            "max_norm",
            "micro_train_batch_size",
            "train_batch_size",
            "zero_stage",
            "args",
        ),
    ),
    Touch(
        where=f"{_STRATEGY}.setup_distributed",
        how="override",
        by="actors.policy.strategy",
        why="calls torch.cuda.set_device and builds a 'cuda' mesh; ours asks the device for backend and mesh",
    ),
    Touch(
        where=f"{_STRATEGY}.setup_ring_attn",
        how="call",
        by="actors.policy.strategy",
        why="sets ring_attn_rank, which other methods read",
        names=("ds_device_mesh",),
    ),
    Touch(
        where=f"{_STRATEGY}.get_ds_train_config",
        how="override",
        by="actors.policy.strategy",
        why="no fixed train_batch_size (dynamic sampling varies it); torch's AdamW on a CPU",
        names=("optim_dict", "max_norm"),
    ),
    Touch(
        where=f"{_STRATEGY}.get_ds_eval_config",
        how="override",
        by="actors.policy.strategy",
        why="no fixed train_batch_size: the reference's ranks need not divide it",
        names=("offload",),
    ),
    Touch(
        where=f"{_STRATEGY}.backward",
        how="override",
        by="actors.policy.strategy",
        why="the losses of an update are sums: they must not be divided by the accumulation steps",
    ),
    Touch(
        where=f"{_STRATEGY}.optimizer_step",
        how="override",
        by="actors.policy.strategy",
        why="one optimizer update; ours takes the norm of the gradients where DeepSpeed does not keep it",
        names=("_optimizer", "model", "_scheduler", "name"),
    ),
    Touch(
        where=f"{_STRATEGY}.get_grad_norm",
        how="override",
        by="actors.policy.strategy",
        why="logged after every update, before clipping; its own is 0 under ZeRO 0 in fp32",
        names=("model",),
    ),
    Touch(
        where=f"{_STRATEGY}.prepare",
        how="call",
        by="actors.policy.policy_actor",
        why="(model, cfg) -> model, optimizer, scheduler",
    ),
    Touch(
        where=f"{_STRATEGY}.prepare",
        how="call",
        by="actors.policy.reference_actor",
        why="a model without an optimizer; its attribute _offload decides where ZeRO-3 keeps the weights",
    ),
    Touch(
        where=f"{_STRATEGY}._ds_init_train_model",
        how="keys",
        by="actors.policy.policy_actor",
        why="cfg is a plain dict: a key that OpenRLHF renames would silently fall back to its default",
        names=(
            "optim",
            "adam",
            "lr_scheduler",
            "lr_warmup_ratio",
            "min_lr_ratio",
            "max_norm",
            "scheduler_steps",
        ),
    ),
    Touch(
        where=_STRATEGY,
        how="attributes",
        by="actors.policy.strategy",
        why="setup_distributed is ours, so what it set is ours to set",
        names=(
            "seed",
            "full_determinism",
            "train_batch_size",
            "micro_train_batch_size",
            "adam_offload",
            "args",
            "world_size",
            "ds_device_mesh",
            "accumulated_gradient",
        ),
    ),
    Touch(
        where=f"{_STRATEGY}.all_reduce",
        how="skip",
        by="actors.policy.strategy",
        why="moves data to the CUDA device; sum_over_ranks and max_over_ranks take its place",
    ),
    Touch(
        where=f"{_STRATEGY}.save_model",
        how="skip",
        by="actors.policy.policy_actor",
        why="ends in a CUDA synchronisation; RealPolicyActor.save_model takes its place",
    ),
    # Model
    Touch(
        where=_ACTOR,
        how="subclass",
        by="actors.policy.model",
        why="the strategy's isinstance checks unwrap it",
    ),
    Touch(
        where=f"{_ACTOR}.__init__",
        how="override",
        by="actors.policy.model",
        why="gets a loaded model: its own loading supports bf16 and fp16 only and trusts remote code",
        names=("pretrain_or_model", "temperature"),
    ),
    Touch(
        where=f"{_ACTOR}.forward",
        how="override",
        by="actors.policy.model",
        why="takes a RealBatch: packed groups, log-probs instead of logits",
    ),
    Touch(
        where=f"{_ACTOR}.gradient_checkpointing_enable",
        how="call",
        by="actors.policy.policy_actor",
        why="--actor.gradient_checkpointing_enable",
        names=("gradient_checkpointing_kwargs",),
    ),
    Touch(
        where=_ACTOR,
        how="attributes",
        by="actors.policy.model",
        why="set by the loading that we replace, or read in our forward",
        names=("temperature", "model", "packing_samples", "is_vlm"),
    ),
    Touch(
        where="openrlhf.models.actor:_patch_zero3_weight_mapping",
        how="call",
        by="actors.policy.model",
        why="without it transformers 5 loads some models wrongly under ZeRO-3",
    ),
    # Trainer
    Touch(
        where=_TRAINER,
        how="subclass",
        by="actors.policy.trainer",
        why="the place of the training loop in OpenRLHF's actor",
    ),
    Touch(
        where=f"{_TRAINER}.__init__",
        how="skip",
        by="actors.policy.trainer",
        why="builds a replay buffer, PolicyLoss and a CUDA weight-sync group; the attributes below are set instead",
    ),
    Touch(
        where=_TRAINER,
        how="attributes",
        by="actors.policy.trainer",
        why="set instead of calling __init__",
        names=(
            "strategy",
            "args",
            "actor",
            "actor_optim",
            "actor_scheduler",
            "max_epochs",
        ),
    ),
    Touch(
        where=f"{_TRAINER}.ppo_train",
        how="override",
        by="actors.policy.trainer",
        why="trains on groups, not on a replay buffer; global denominators per update",
    ),
    Touch(
        where=f"{_TRAINER}.training_step",
        how="override",
        by="actors.policy.trainer",
        why="one forward, the fused loss, one backward",
    ),
    Touch(
        where=f"{_TRAINER}.broadcast_to_vllm",
        how="skip",
        by="actors.sync.transfer",
        why="one call and one NCCL broadcast per parameter; buckets over gloo or NCCL take its place",
    ),
    # Policy actor
    Touch(
        where=_POLICY,
        how="unwrap",
        by="actors.policy.policy_actor",
        why="rank, rendezvous and process group of a DeepSpeed rank inside Ray",
    ),
    Touch(
        where=f"{_BASE}.__init__",
        how="override",
        by="actors.policy.policy_actor",
        why="sets MASTER_ADDR, RANK, LOCAL_RANK; Ray wants the subclass of a wrapped class to have its own __init__",
        names=("world_size", "rank", "master_addr", "master_port"),
    ),
    Touch(
        where=f"{_BASE}.get_master_addr_port",
        how="call",
        by="run.ray_groups",
        why="the other ranks and the engines meet rank 0 there",
    ),
    Touch(
        where=f"{_BASE}._get_free_port",
        how="call",
        by="actors.policy.policy_actor",
        why="the weight-sync group's port on rank 0's node",
    ),
    Touch(
        where=_BASE, how="attributes", by="actors.policy.policy_actor", why="rank 0 sends and saves", names=("_rank",)
    ),
    Touch(
        where=f"{_MODEL_BASE}._setup_distributed",
        how="call",
        by="actors.policy.policy_actor",
        why="keeps the strategy and joins the process group",
        names=("strategy",),
    ),
    Touch(
        where=f"{_POLICY}.init_model_from_pretrained",
        how="skip",
        by="actors.policy.policy_actor",
        why="loads bf16 with flash attention and needs vLLM handles; RealPolicyActor.build takes its place",
    ),
    Touch(
        where=f"{_POLICY}.fit",
        how="skip",
        by="actors.policy.policy_actor",
        why="empties the CUDA cache unconditionally; RealPolicyActor.train takes its place",
    ),
    Touch(
        where=f"{_POLICY}.save_model",
        how="override",
        by="actors.policy.policy_actor",
        why="gathers parameter by parameter under ZeRO-3, keeps the dtype, needs no CUDA",
    ),
    Touch(
        where=f"{_POLICY}.reload_states",
        how="call",
        by="run.ray_groups",
        why="--ds.enable_sleep: optimizer states and gradient buffers back to the GPU before training",
    ),
    Touch(
        where=f"{_POLICY}.offload_states",
        how="call",
        by="run.ray_groups",
        why="--ds.enable_sleep: optimizer states and gradient buffers to CPU memory after training",
    ),
    Touch(
        where=f"{_POLICY}.save_checkpoint",
        how="override",
        by="actors.policy.policy_actor",
        why="OpenRLHF rotates and names checkpoints itself; here a store does, and the shards go where it says",
    ),
    # Reference actor
    Touch(
        where=_REFERENCE,
        how="unwrap",
        by="actors.policy.reference_actor",
        why="rank, rendezvous and process group, as for the policy",
    ),
    Touch(
        where=f"{_BASE}.__init__",
        how="override",
        by="actors.policy.reference_actor",
        why="Ray wants the subclass of a wrapped class to have its own __init__",
        names=("world_size", "rank", "master_addr", "master_port"),
    ),
    Touch(
        where=f"{_MODEL_BASE}._setup_distributed",
        how="call",
        by="actors.policy.reference_actor",
        why="keeps the strategy and joins the process group",
        names=("strategy",),
    ),
    Touch(
        where=f"{_REFERENCE}.init_model_from_pretrained",
        how="skip",
        by="actors.policy.reference_actor",
        why="loads bf16 with flash attention; ReferenceActor.build takes its place",
    ),
    Touch(
        where=f"{_REFERENCE}.forward",
        how="skip",
        by="actors.policy.reference_actor",
        why="moves padded sequences to the CUDA device; ReferenceActor.reference_logprobs takes groups",
    ),
    Touch(
        where=_REFERENCE,
        how="attributes",
        by="actors.policy.reference_actor",
        why="the engine around the model",
        names=("model",),
    ),
    # Rollout engine
    Touch(
        where=_ENGINE,
        how="unwrap",
        by="actors.engine.rollout_engine",
        why="pausing, sleeping and the token-level request are OpenRLHF's",
    ),
    Touch(
        where=f"{_ENGINE}.__init__",
        how="skip",
        by="actors.engine.rollout_engine",
        why="starts the engine with text rewards and agents; ours starts it with dummy weights and the score tokens",
    ),
    Touch(
        where=f"{_ENGINE}.generate",
        how="override",
        by="actors.engine.rollout_engine",
        why="ours takes prompts and returns groups; each request goes through the parent's",
        names=("prompt_token_ids", "sampling_params"),
    ),
    Touch(
        where=f"{_ENGINE}.reset_prefix_cache",
        how="override",
        by="actors.engine.rollout_engine",
        why="the parent ignores that vLLM refused the reset",
    ),
    Touch(
        where=f"{_ENGINE}.sleep",
        how="override",
        by="actors.engine.rollout_engine",
        why="level 2, since a sync brings the weights back; the engine has no version until then",
        names=("level",),
    ),
    Touch(
        where=f"{_ENGINE}.wake_up",
        how="override",
        by="actors.engine.rollout_engine",
        why="weights before a sync, KV cache after it; an error when the engine's process has ended",
        names=("tags",),
    ),
    Touch(
        where=f"{_ENGINE}._configure_device_env",
        how="call",
        by="actors.engine.rollout_engine",
        why="which GPUs and bundles vLLM's own workers take",
        names=("backend", "bundle_indices", "num_gpus"),
    ),
    Touch(
        where=_ENGINE,
        how="attributes",
        by="actors.engine.rollout_engine",
        why="set instead of calling __init__; the parent's methods read them",
        names=("llm", "_mm_pad_token_ids"),
    ),
    # Drop-ins
    Touch(
        where=_EXECUTOR,
        how="subclass",
        by="dropin.agent",
        why="prompt, request and result in OpenRLHF's own form; --train.agent_func_path wants a subclass",
    ),
    Touch(
        where=f"{_EXECUTOR}.execute",
        how="override",
        by="dropin.agent",
        why="asks for the scale's log-probs, ends the actions before the score, adds reward, score and logs",
        names=("prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "llm_engine"),
    ),
    Touch(
        where=f"{_EXECUTOR}.__init__",
        how="override",
        by="dropin.agent",
        why="OpenRLHF makes agents without arguments",
    ),
    # A stock run with REAL's terms (real_openrlhf.patch)
    Touch(
        where=_TRAINER,
        how="subclass",
        by="dropin.terms_actors",
        why="an instance that OpenRLHF made becomes ours: its constructor stays as it is",
    ),
    Touch(
        where=f"{_TRAINER}.training_step",
        how="override",
        by="dropin.terms_actors",
        why="hands the loss the score position, then runs as it is",
        names=("experience", "kl_ctl", "step", "loss_batch_info"),
    ),
    Touch(
        where=_TRAINER,
        how="attributes",
        by="dropin.terms_actors",
        why="the tokenizer and the actor are read, the loss is set",
        names=("args", "actor", "tokenizer", "actor_loss_fn"),
    ),
    Touch(
        where=_POLICY,
        how="unwrap",
        by="dropin.terms_actors",
        why="its trainer gets REAL's terms",
    ),
    Touch(
        where=f"{_BASE}.__init__",
        how="override",
        by="dropin.terms_actors",
        why="Ray wants the subclass of a wrapped class to have its own __init__",
        names=("world_size", "rank", "master_addr", "master_port"),
    ),
    Touch(
        where=f"{_POLICY}.init_model_from_pretrained",
        how="override",
        by="dropin.terms_actors",
        why="REAL's terms come to the trainer once it is there",
        names=("strategy",),
    ),
    Touch(
        where=_POLICY,
        how="attributes",
        by="dropin.terms_actors",
        why="the trainer that it made",
        names=("trainer",),
    ),
    Touch(
        where=_ENGINE,
        how="unwrap",
        by="dropin.terms_actors",
        why="its agent is told the settings",
    ),
    Touch(
        where=f"{_ENGINE}.__init__",
        how="override",
        by="dropin.terms_actors",
        why="loads the agent file, whose settings are set after it",
    ),
    Touch(
        where=_ENGINE,
        how="attributes",
        by="dropin.terms_actors",
        why="the agent",
        names=("executor",),
    ),
    Touch(
        where="openrlhf.utils.config:hierarchize",
        how="replace",
        by="patch",
        why="the first to see all arguments: they are checked, and carry REAL's settings to the actors",
    ),
    Touch(where=_POLICY, how="replace", by="patch", why="the actor with REAL's trainer, or on a CPU"),
    Touch(where=_ENGINE, how="replace", by="patch", why="the engine with REAL's agent, or on a CPU"),
    # A stock run on a CPU (--real.device cpu)
    Touch(
        where=_STRATEGY,
        how="subclass",
        by="dropin.on_cpu",
        why="by way of actors.policy.strategy, which runs on gloo",
    ),
    Touch(
        where=f"{_STRATEGY}.backward",
        how="override",
        by="dropin.on_cpu",
        why="OpenRLHF's own, which averages over the accumulation steps; that of actors.policy.strategy does not",
        names=("loss", "model", "_optimizer"),
    ),
    Touch(
        where=f"{_STRATEGY}.all_reduce",
        how="override",
        by="dropin.on_cpu",
        why="moves data to the CUDA device, which is the CPU meanwhile",
        names=("data", "op"),
    ),
    Touch(
        where="openrlhf.utils:get_strategy",
        how="replace",
        by="dropin.on_cpu",
        why="makes OpenRLHF's strategy; ours is the one of actors.policy.strategy, on gloo",
    ),
    Touch(
        where="openrlhf.utils.config:hierarchize",
        how="replace",
        by="dropin.on_cpu",
        why="what needs a GPU is refused, attention set to sdpa, Ray started with logical GPUs",
    ),
    Touch(where=_BUFFER, how="subclass", by="dropin.on_cpu", why="its constructor names a CUDA device"),
    Touch(
        where=f"{_BUFFER}.__init__",
        how="override",
        by="dropin.on_cpu",
        why="the target device is the CPU",
    ),
    Touch(
        where=_BUFFER,
        how="attributes",
        by="dropin.on_cpu",
        why="set after the constructor",
        names=("target_device",),
    ),
    Touch(
        where="openrlhf.trainer.ray.ppo_actor:NaiveReplayBuffer",
        how="replace",
        by="dropin.on_cpu",
        why="the trainer makes it under this name",
    ),
    Touch(
        where="openrlhf.trainer.ray.ppo_actor:stateless_init_process_group",
        how="replace",
        by="dropin.on_cpu",
        why="weights are sent over a TCP store; it is NCCL's communicator",
    ),
    Touch(where=_POLICY, how="unwrap", by="dropin.on_cpu", why="what it asks of CUDA is replaced in its process"),
    Touch(where=_REFERENCE, how="unwrap", by="dropin.on_cpu", why="the same"),
    Touch(
        where="openrlhf.trainer.ray.launcher:ReferenceModelActor",
        how="replace",
        by="dropin.on_cpu",
        why="the reference on a CPU",
    ),
    Touch(
        where=f"{_BASE}.__init__",
        how="override",
        by="dropin.on_cpu",
        why="the process becomes one without CUDA first",
        names=("world_size", "rank", "master_addr", "master_port"),
    ),
    Touch(where=_ENGINE, how="unwrap", by="dropin.on_cpu", why="vLLM needs other arguments on a CPU"),
    Touch(
        where=f"{_ENGINE}.__init__",
        how="override",
        by="dropin.on_cpu",
        why="its arguments go to vLLM; worker extension and the CPU's own are set",
    ),
    Touch(where=_WORKER, how="subclass", by="dropin.on_cpu_worker", why="it receives weights into CUDA memory"),
    Touch(
        where=f"{_WORKER}.update_weight",
        how="override",
        by="dropin.on_cpu_worker",
        why="receives them from the store",
    ),
    Touch(
        where=_WORKER,
        how="attributes",
        by="dropin.on_cpu_worker",
        why="the group that its init_process_group makes",
        names=("_model_update_group",),
    ),
    Touch(
        where="openrlhf.utils.distributed_util:stateless_init_process_group",
        how="replace",
        by="dropin.on_cpu_worker",
        why="init_process_group looks it up there",
    ),
    # Arguments
    Touch(
        where="openrlhf.cli.train_ppo_ray",
        how="namespace",
        by="config.openrlhf_args",
        why="OpenRLHF's classes read nested namespaces; this adapter is the only place that makes them",
        names=(
            "actor.eps_clip_low_high",
            "algo.advantage.is_correction_threshold",
            "algo.dynamic_filtering_enable",
            "ds.attn_implementation",
            "ds.param_dtype",
            "train.batch_size",
            "vllm.sync_backend",
        ),
    ),
)
