"""The configuration of a run: one frozen dataclass per flag prefix. A flag's name is the path to its field.

Names are OpenRLHF's wherever it has the flag; flags of this package begin with `real`, `guard`, `sync` and `ray`.
Defaults are those of the preset `exact` for flags that presets set (see `presets`). Impossible values of single flags
are refused here, contradictions between flags in `validate`.
"""

# ruff: noqa: RUF009  (flag() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from real_openrlhf.algo.choices import KLEstimator
from real_openrlhf.algo.objectives import SUPERVISED
from real_openrlhf.config.flags import ConfigError, Section, flag
from real_openrlhf.config.guard_flags import GuardConfig
from real_openrlhf.config.logger_flags import LoggerConfig
from real_openrlhf.config.real_flags import RealConfig, WarmupConfig

__all__ = ["Config", "ConfigError"]

# Schedulers of transformers that need no further arguments.
SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
)


@dataclass(frozen=True, kw_only=True)
class AdamConfig(Section):
    prefix: ClassVar[str] = "actor.adam"
    lr: float = flag(1e-6, "learning rate (5e-8 for Mistral-7B in the paper, 1e-6 for Qwen3, about 10x for LoRA)", ge=0)
    betas: tuple[float, float] = flag((0.9, 0.95), "Adam's betas", ge=0, lt=1)
    eps: float = flag(1e-8, "Adam's epsilon", gt=0)
    weight_decay: float = flag(0.1, "decoupled weight decay", ge=0)


@dataclass(frozen=True, kw_only=True)
class ActorConfig(Section):
    prefix: ClassVar[str] = "actor"
    model_name_or_path: str = flag("", "the model to train: hub name or Hugging Face folder", required=True, path=True)
    num_nodes: int = flag(1, "nodes of the policy", ge=1)
    num_gpus_per_node: int = flag(1, "ranks of the policy per node: GPUs, or processes on a CPU", ge=1)
    gradient_checkpointing_enable: bool = flag(False, "recompute activations in the backward pass")
    gradient_checkpointing_reentrant: bool = flag(False, "use the reentrant form of gradient checkpointing")
    adam: AdamConfig = field(default_factory=AdamConfig)
    lr_scheduler: str = flag("constant", "learning-rate schedule of transformers", choices=SCHEDULERS)
    lr_warmup_ratio: float = flag(0.0, "share of all updates used for warm-up", ge=0, le=1)
    min_lr_ratio: float = flag(0.1, "lowest learning rate of the *_with_min_lr schedules, as a share", ge=0, le=1)
    max_norm: float = flag(1.0, "gradient norm above which gradients are scaled down; 0: off", ge=0)
    eps_clip: float = flag(0.2, "clipped ratio: half width of the band around 1", gt=0, lt=1)
    eps_clip_low_high: tuple[float, float] | None = flag(None, "clipped ratio: the band's two half widths", gt=0)
    entropy_coef: float | None = flag(None, "weight of the entropy bonus; 0: log entropy only; none: off", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_bounds[0] >= 1:
            self.reject(
                "eps_clip_low_high", f"must start below 1, or the ratio has no lower bound, got {self.clip_bounds}"
            )

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """Half widths (low, high) of the clipped ratio's band."""
        return self.eps_clip_low_high or (self.eps_clip, self.eps_clip)


@dataclass(frozen=True, kw_only=True)
class RefConfig(Section):
    prefix: ClassVar[str] = "ref"
    num_nodes: int = flag(1, "nodes of the reference group; with LoRA there is no such group", ge=1)
    num_gpus_per_node: int = flag(1, "ranks of the reference group per node", ge=1)
    offload: bool = flag(False, "keep the reference model's weights in CPU memory (ZeRO-3)")


@dataclass(frozen=True, kw_only=True)
class VllmConfig(Section):
    prefix: ClassVar[str] = "vllm"
    num_engines: int = flag(1, "rollout engines", ge=1)
    tensor_parallel_size: int = flag(1, "GPUs per engine", ge=1)
    enable_prefix_caching: bool = flag(True, "compute a prompt's KV cache once for all of its rollouts")
    enforce_eager: bool = flag(False, "no CUDA graphs in the engines")
    gpu_memory_utilization: float | None = flag(
        None, "share of GPU memory that an engine may take; none: 0.9, or the most that colocation allows", gt=0, le=1
    )
    enable_sleep: bool = flag(False, "engines release GPU memory while the policy trains")
    max_num_seqs: int | None = flag(None, "rollouts that an engine generates at a time; none: 512 on a GPU", ge=1)
    max_num_batched_tokens: int | None = flag(None, "tokens of an engine's pass; none: 8192 on a GPU", ge=1)
    fp32_head: bool = flag(True, "compute logits of bf16 engines in fp32, as the policy does")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    prefix: ClassVar[str] = "ds.lora"
    rank: int = flag(0, "rank of the adapters; 0: full-parameter training", ge=0)
    alpha: int = flag(16, "scale of the adapters, divided by their rank", ge=1)
    target_modules: tuple[str, ...] = flag(("all-linear",), "names of the linear layers that get an adapter")
    dropout: float = flag(0.0, "dropout inside the adapters", ge=0, lt=1)

    def __str__(self) -> str:
        """The adapters in words, for plans and model cards. Checkpoints compare this text, so it must not change."""
        if self.rank == 0:
            return "none"
        return f"rank {self.rank}, alpha {self.alpha}, beside {' '.join(sorted(self.target_modules))}"


@dataclass(frozen=True, kw_only=True)
class DsConfig(Section):
    prefix: ClassVar[str] = "ds"
    zero_stage: int = flag(2, "DeepSpeed ZeRO stage", ge=0, le=3)
    param_dtype: Literal["auto", "fp32", "bf16"] = flag("auto", "auto: bf16 on GPUs, fp32 on a CPU")
    attn_implementation: str = flag("auto", "attention of transformers: auto, eager, sdpa, flash_attention_2, ...")
    adam_offload: bool = flag(False, "keep the optimizer in CPU memory")
    zpg: int = flag(1, "ZeRO++: size of the groups that hold a secondary copy of the shards", ge=1)
    overlap_comm: bool = flag(False, "overlap gradient reduction with the backward pass")
    grad_accum_dtype: Literal["fp32", "bf16"] | None = flag(
        None, "dtype of accumulated gradients; none: fp32 under ZeRO 2 and 3"
    )
    enable_sleep: bool = flag(False, "keep the policy's optimizer in CPU memory while it does not train")
    use_liger_kernel: bool | None = flag(
        None, "Liger's RMSNorm, rotary embedding and SwiGLU in the policy; none: on GPUs, if Liger knows the model"
    )
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    prefix: ClassVar[str] = "train"
    batch_size: int | None = flag(None, "rollouts per update over all ranks; none: see --real.mini_batches", ge=1)
    micro_batch_size: int | None = flag(None, "rollouts per forward pass and rank; none: those of one prompt", ge=1)
    max_tokens_per_gpu: int = flag(16192, "tokens per forward pass and rank; larger groups are divided", ge=1)
    max_epochs: int = flag(1, "passes over each step's rollouts", ge=1)
    num_episodes: int = flag(1, "passes over the prompts", ge=1)
    max_steps: int | None = flag(None, "stop after this many steps; 0: evaluate and export only", ge=0)
    # NumPy's generator takes 32 bits; engines add their number.
    seed: int = flag(42, "seed of data order, samples of the data, engines and policy", ge=0, le=2**31 - 1)
    full_determinism_enable: bool = flag(False, "seed every sampling request and use deterministic kernels; slower")
    colocate_all: bool = flag(False, "engines and policy share their GPUs")
    async_enable: bool = flag(False, "sample the next batch while training, by weights that are one version old")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    prefix: ClassVar[str] = "rollout"
    batch_size: int = flag(256, "prompts per step", ge=1)
    n_samples_per_prompt: int = flag(16, "K, rollouts per prompt", ge=1)
    max_new_tokens: int = flag(1024, "longest response in tokens", ge=1)
    temperature: float = flag(1.0, "sampling temperature T; log-probs are taken at T as well", gt=0)
    top_p: float = flag(1.0, "nucleus sampling; below 1, sampling and log-probs no longer agree", gt=0, le=1)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    prefix: ClassVar[str] = "data"
    prompt_dataset: str = flag(
        "", "training prompts: a JSONL, JSON, CSV or parquet file, or a hub id", required=True, path=True
    )
    input_key: str = flag("prompt", "column of the prompt: text, or chat messages")
    label_key: str = flag("label", "column of the human score")
    response_key: str = flag("response", "train_warmup: column of the response that is learned")
    judged_key: str | None = flag(
        None, "column of the response that is judged, for --guard.min_mentions; none: judged.response, if it is there"
    )
    apply_chat_template: bool = flag(False, "wrap prompts in the tokenizer's chat template")
    input_template: str | None = flag(None, "text around the prompt, with one {} for it")
    enable_thinking: bool | None = flag(None, "passed to the chat template (Qwen3); none: not passed")
    max_len: int = flag(3072, "longest prompt and response together, in tokens", ge=2)
    max_samples: int | None = flag(None, "use so many rows, drawn by --train.seed", ge=1)
    skip_bad_rows: bool = flag(False, "count and list bad rows and go on without them")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_template is not None and self.input_template.count("{}") != 1:
            self.reject("input_template", f"needs exactly one {{}} where the prompt goes, got {self.input_template!r}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    prefix: ClassVar[str] = "eval"
    dataset: str | None = flag(
        None, "held-out prompts: a source as in --data.prompt_dataset, or NAME=SOURCE,NAME=SOURCE; none: no evaluation"
    )
    steps: int = flag(10, "evaluate every so many steps, besides before and after training; -1: never in between")
    temperature: float = flag(1.0, "sampling temperature of evaluation; 0: greedy", ge=0)
    top_p: float = flag(1.0, "nucleus sampling of evaluation", gt=0, le=1)
    n_samples_per_prompt: int = flag(1, "generations per held-out prompt", ge=1)
    max_samples: int | None = flag(None, "use so many held-out rows, drawn by --eval.seed", ge=1)
    engine: Literal["shared", "own"] = flag(
        "shared", "borrow the rollout engines between steps, or start another engine that judges during the next step"
    )
    force_anchor: bool = flag(False, "evaluation: continue a response without a score once behind the answer anchor")
    seed: int = flag(42, "seed of evaluation and of its sample", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != -1 and self.steps < 1:
            self.reject("steps", f"must be a whole number >= 1, or -1 for never in between, got {self.steps}")
        if self.temperature == 0 and self.n_samples_per_prompt > 1:
            self.reject("temperature", "0 is greedy: --eval.n_samples_per_prompt must be 1, all samples would be equal")


@dataclass(frozen=True, kw_only=True)
class CkptConfig(Section):
    prefix: ClassVar[str] = "ckpt"
    output_dir: str = flag("", "folder of the trained model, logs and samples; needed unless --dry_run", path=True)
    path: str | None = flag(None, "folder of the checkpoints; none: <output_dir>/checkpoints", path=True)
    save_steps: int = flag(-1, "save a checkpoint every so many steps; -1: only when a signal stops the run")
    max_num: int = flag(3, "how many of the newest checkpoints to keep, in addition to the best", ge=1)
    best_metric_key: str = flag(
        "expected/pearson",
        "evaluation metric that chooses the exported judge and the best checkpoint; none: the last weights",
    )
    load: str = flag(
        "none", "resume: none, latest, best, a checkpoint's path, or auto (latest if there is one)", path=True
    )
    max_restarts: int = flag(
        3, "start everything again from the last checkpoint after a fault, so often without a new one; 0: never", ge=0
    )
    force: bool = flag(False, "resume even if data, template, scale, tokenizer or model changed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_steps != -1 and self.save_steps < 1:
            self.reject("save_steps", f"must be a whole number >= 1, or -1 for never, got {self.save_steps}")
        if not self.load:
            self.reject("load", "is empty; use none, auto, latest, best or a path")

    @property
    def best_metric(self) -> str | None:
        return None if self.best_metric_key == "none" else self.best_metric_key

    @property
    def folder(self) -> str:
        """The folder of the checkpoints."""
        return self.path or f"{self.output_dir}/checkpoints"


@dataclass(frozen=True, kw_only=True)
class KLConfig(Section):
    prefix: ClassVar[str] = "algo.kl"
    init_coef: float = flag(0.0, "weight of the KL to the model that training began with; 0: off", ge=0)
    estimator: KLEstimator = flag("k3", "estimator of the KL's value; the gradient is unbiased with each")


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(Section):
    prefix: ClassVar[str] = "algo.advantage"
    is_correction_level: Literal["off", "token"] = flag("off", "truncated importance weights trainer / engine")
    is_correction_threshold: float = flag(2.0, "C of the weight min(C, pi_trainer / pi_rollout)", gt=0)


@dataclass(frozen=True, kw_only=True)
class AlgoConfig(Section):
    prefix: ClassVar[str] = "algo"
    kl: KLConfig = field(default_factory=KLConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)


@dataclass(frozen=True, kw_only=True)
class SyncConfig(Section):
    prefix: ClassVar[str] = "sync"
    deadline: float = flag(600.0, "seconds a weight sync may take", gt=0)
    check_sequences: int = flag(4, "sequences on which engine and policy are compared after each sync", ge=1)
    check_tokens: int = flag(128, "tokens of each of these sequences", ge=2)
    max_mean_difference: float | None = flag(None, "largest mean log-prob difference; none: by dtype", gt=0)
    backend: Literal["auto", "gloo", "shared_memory", "ipc", "nccl"] = flag(
        "auto",
        "how weights travel; auto: shared memory on one CPU host, CUDA IPC on a shared GPU, NCCL between GPUs, or gloo",
    )
    bucket_mb: int = flag(256, "megabytes of weights sent at a time", ge=1)


@dataclass(frozen=True, kw_only=True)
class RayConfig(Section):
    prefix: ClassVar[str] = "ray"
    address: str | None = flag(None, "cluster to join; none: RAY_ADDRESS or the job's cluster, else one is started")
    placement_timeout: float = flag(600.0, "seconds to wait for the cluster to have room", gt=0)
    num_cpus: int | None = flag(None, "CPUs of a cluster that the run starts; none: all", ge=1)
    call_timeout: float | None = flag(
        3600.0, "seconds without any news after which a call to an actor counts as hung; none: wait for ever", gt=0
    )


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The configuration of a run. overridden: flags that differ from the preset; set by the parser."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    ds: DsConfig = field(default_factory=DsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    real: RealConfig = field(default_factory=RealConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    assume_gpus: str | None = flag(
        None, "with --dry_run: plan for GPUs that are not here: 8x80GB, 8xA100-80GB, or on two nodes 2x8x80GB"
    )
    dry_run: bool = flag(False, "check everything, print the plan and stop")
    overridden: tuple[str, ...] = ()

    @property
    def supervised(self) -> bool:
        """A warm-up: given responses are learned, and nothing is sampled in training."""
        return self.real.objective in SUPERVISED

    @property
    def uses_engines(self) -> bool:
        """Something is sampled: rollouts, or held-out judgements."""
        return not self.supervised or self.eval.dataset is not None

    @property
    def ranks(self) -> int:
        """Number of policy ranks."""
        return self.actor.num_nodes * self.actor.num_gpus_per_node

    @property
    def reference_ranks(self) -> int:
        """Ranks of the reference group: 0 without a KL, and 0 with LoRA, where the policy is its own reference."""
        if self.algo.kl.init_coef == 0 or self.ds.lora.rank > 0:
            return 0
        return self.ref.num_nodes * self.ref.num_gpus_per_node

    @property
    def colocated_utilisation(self) -> float:
        """The largest share of a GPU that an engine may take next to the policy: more if both free memory in turn.

        The rest is an estimate for the policy's weights, for what else it keeps on the GPU, and for two CUDA contexts.
        """
        return 0.75 if self.vllm.enable_sleep and self.ds.enable_sleep else 0.5

    @property
    def engine_utilisation(self) -> float:
        """--vllm.gpu_memory_utilization, or its default."""
        return self.vllm.gpu_memory_utilization or (self.colocated_utilisation if self.train.colocate_all else 0.9)

    @property
    def samples_per_step(self) -> int:
        """Number of rollouts of a full step."""
        return self.rollout.batch_size * self.rollout.n_samples_per_prompt

    @property
    def corrects_importance(self) -> bool:
        """Whether truncated importance weights are on."""
        return self.algo.advantage.is_correction_level != "off"

    @property
    def samples_per_update(self) -> int:
        """Rollouts per optimizer update over all ranks: --train.batch_size, or a step's / --real.mini_batches."""
        return self.train.batch_size or max(self.samples_per_step // self.real.mini_batches, 1)

    @property
    def rollouts_per_pass(self) -> int:
        """Rollouts per forward pass and rank: --train.micro_batch_size, or the K rollouts of one prompt.

        A warm-up takes as many as --train.max_tokens_per_gpu allows.
        """
        whole = self.samples_per_update if self.supervised else self.rollout.n_samples_per_prompt
        return self.train.micro_batch_size or whole
