"""Decides cpu/gloo/fp32 or cuda/nccl/bf16. Nothing else in the package asks which it is.

The driver resolves one `Device` and hands it to every actor (it is frozen and picklable). What
depends on the machine, such as its cores, is computed where it is asked for: call `engine_env`,
`trainer_env`, `current` and `memory_stats` in the actor's own process.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import socket
from dataclasses import dataclass
from typing import Any

import torch

from real_openrlhf.common.cards import local_cards, why_no_bf16, why_unusable
from real_openrlhf.common.quiet_threads import SPINS

logger = logging.getLogger(__name__)

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

# Mean |engine log-prob - policy log-prob| per token, right after a weight sync, above which the
# weights count as not synced. fp32: the two implementations differ by about 1e-5 in the mean;
# a single stale matrix (a tied head) gives 0.08 and more. bf16 keeps 8 bits of mantissa: between two
# implementations, or a packed row and its separate rows, 0.03 to 0.06 per token were seen with honest weights, output
# layers in fp32 (tests/gpu/results/h100). Dummy or stale weights differ by nats.
SYNC_TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}

# Rewards of a group that lie closer together than this count as equal (--real.tolerance). In bf16, log p(y) of one text
# differs by 0.03 to 0.06 between two honest computations, so the rewards of rollouts that agree spread over about 0.1;
# divided by their own standard deviation, that noise would become advantages of +-1.
REWARD_TOLERANCE = {"fp32": 1e-6, "bf16": 0.1}

# vLLM 0.29 takes 256 sequences at a time on most cards, which leaves an A100 idle, and 1,024 on others from 70 GiB on.
GPU_SEQUENCES = 512
GPU_BATCHED_TOKENS = 8192

# GiB of KV cache per engine on a CPU: some 90,000 tokens of a 135M-parameter model in fp32, so that 256 requests of a
# few hundred tokens run at once and none is preempted and computed again.
CPU_KVCACHE_GIB = "4"
# Tokens of one forward pass of an engine on a CPU: vLLM's default there.
CPU_BATCHED_TOKENS = 4096

# Tokens of one KV cache block of an engine on a CPU. Whole blocks of a prompt are shared by its rollouts; what is left
# over is computed once per rollout, and vLLM's blocks there hold 128.
CPU_BLOCK_TOKENS = 32

# Memory of a training rank or an engine on a CPU stays with the process: large blocks come from glibc's heap, which is
# not trimmed, and lie in huge pages where the kernel has some. To map the pages of a fresh activation costs more than
# an element-wise operation that writes it, and a step makes hundreds. glibc reads these when a process starts.
CPU_ALLOCATOR_ENV = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "THP_MEM_ALLOC_ENABLE": "1",
}
# A thread that waits for the others of a parallel region soon sleeps: spinning, it would keep the one that it waits for
# from a core that other work has taken.
CPU_PROCESS_ENV = {"GOMP_SPINCOUNT": SPINS, **CPU_ALLOCATOR_ENV}


# A weight sync for which it is not known yet whether every engine worker shares its GPU with a rank of the policy.
IPC_ELSE_GLOO = "ipc_else_gloo"


class DeviceError(ValueError):
    """The requested device or dtype does not exist here."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One of the two stacks the package runs on.

    name        "cpu" or "cuda"
    dtype_name  "fp32" or "bf16": of the forward pass, of the engines and of weights in transit
    """

    name: str
    dtype_name: str

    def __post_init__(self) -> None:
        if self.name not in ("cpu", "cuda"):
            raise DeviceError(f"a device is 'cpu' or 'cuda', got {self.name!r}")
        if self.dtype_name not in _TORCH_DTYPES:
            raise DeviceError(f"a dtype is one of {sorted(_TORCH_DTYPES)}, got {self.dtype_name!r}")

    @classmethod
    def resolve(cls, requested: str = "auto", param_dtype: str = "auto", cluster_gpus: int | None = None) -> Device:
        """From flags: requested "auto", "cpu" or "cuda"; param_dtype "auto", "fp32" or "bf16".

        cluster_gpus: GPUs of the Ray cluster, where one is joined or about to be started. It then
        decides instead of this process's own GPUs: the driver often sits on a head node without any.

        Raises DeviceError for unknown names, for "cuda" where there is none, and for GPUs of this process that torch
        cannot use, or not in this dtype; those of other nodes are looked at by `check_card`, there.
        """
        if requested not in ("auto", "cpu", "cuda"):
            raise DeviceError(f"device must be 'auto', 'cpu' or 'cuda', got {requested!r}")
        if param_dtype not in ("auto", *_TORCH_DTYPES):
            raise DeviceError(f"param_dtype must be 'auto', 'fp32' or 'bf16', got {param_dtype!r}")
        built = torch.version.cuda is not None or torch.version.hip is not None
        gpus = torch.cuda.device_count() if cluster_gpus is None else cluster_gpus
        if requested == "cuda" and not (built and gpus > 0):
            where = "this machine" if cluster_gpus is None else "the Ray cluster"
            why = f"{where} has no GPU that torch can see" if built else f"torch {torch.__version__} is a CPU build"
            raise DeviceError(f"device 'cuda' was asked for, but {why}; use 'cpu' or 'auto'")
        if requested == "auto" and gpus > 0 and not built:
            # GPUs are a logical resource to Ray and can be declared where there are none.
            logger.warning("the cluster declares %d GPUs, but torch is a CPU build: running on CPU", gpus)
        name = requested if requested != "auto" else ("cuda" if built and gpus > 0 else "cpu")
        dtype = param_dtype if param_dtype != "auto" else ("bf16" if name == "cuda" else "fp32")
        if cluster_gpus is None and requested != "cpu":
            _look_at_cards(name, dtype)
        if name == "cpu" and dtype == "bf16":
            logger.warning("bf16 on a CPU without AVX512-BF16 is about ten times slower than fp32")
        return cls(name=name, dtype_name=dtype)

    # -- names by which libraries know the choice ------------------------------------------------

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH_DTYPES[self.dtype_name]

    @property
    def vllm_dtype(self) -> str:
        return _VLLM_DTYPES[self.dtype_name]

    @property
    def dist_backend(self) -> str:
        return "nccl" if self.is_cuda else "gloo"

    @property
    def attn_implementation(self) -> str:
        """The default; flash attention where its CUDA kernels load. It has no fp32 kernels."""
        usable = self.is_cuda and self.dtype_name == "bf16" and flash_attn_available()
        return "flash_attention_2" if usable else "sdpa"

    @property
    def sync_tolerance(self) -> float:
        return SYNC_TOLERANCE[self.dtype_name]

    @property
    def reward_tolerance(self) -> float:
        """Default of --real.tolerance."""
        return REWARD_TOLERANCE[self.dtype_name]

    # -- this process ----------------------------------------------------------------------------

    def current(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.is_cuda else torch.device("cpu")

    def check_card(self) -> None:
        """Raises DeviceError if this process's GPU cannot compute in the dtype."""
        if not self.is_cuda or self.dtype_name != "bf16" or torch.version.hip is not None:
            return
        found = why_no_bf16(
            f"{torch.cuda.get_device_name()} on {socket.gethostname()}", torch.cuda.get_device_capability()
        )
        if found:
            raise DeviceError(found)

    def set_local_rank(self, local_rank: int) -> None:
        """Choose this process's GPU; nothing to choose on a CPU."""
        if self.is_cuda:
            torch.cuda.set_device(local_rank)

    def trainer_threads(self, ranks_on_node: int) -> int:
        """Threads of torch in a training rank: its share of the cores on a CPU, else what torch has."""
        return torch.get_num_threads() if self.is_cuda else max(1, len(_cores()) // ranks_on_node)

    def logits_mb(self) -> int:
        """Default of --real.logits_mb: a tenth of this process's GPU, 1 GiB on a CPU.

        An eighth of it is a chunk of the output layer, and what it cannot keep is computed twice. On an H100, 8,192
        rows of 151,936 logits took 127 ms with 1 GiB, 62 with 4, 45 with 16 (tests/gpu/results/h100).
        """
        return torch.cuda.get_device_properties(self.current()).total_memory // 10 // 2**20 if self.is_cuda else 1024

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()

    def rng_state(self) -> torch.Tensor | None:
        """State of the GPU's generator of random numbers; None on a CPU, whose generator is torch's own."""
        return torch.cuda.get_rng_state() if self.is_cuda else None

    def set_rng_state(self, state: torch.Tensor | None) -> None:
        """The inverse. A state of the other kind of device is left alone."""
        if self.is_cuda and state is not None:
            torch.cuda.set_rng_state(state)

    def memory_stats(self) -> dict[str, int]:
        """{"peak_bytes"}: most that torch ever held on the GPU, or the process's highest RSS."""
        if self.is_cuda:
            return {"peak_bytes": int(torch.cuda.max_memory_allocated())}
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    # -- Ray -------------------------------------------------------------------------------------

    def bundle(self) -> dict[str, float]:
        """What one actor (one rank, one engine worker) occupies in a placement group."""
        return {"GPU": 1, "CPU": 1} if self.is_cuda else {"CPU": 1}

    def sync_backend(self, requested: str = "auto", *, colocated: bool, one_host: bool) -> str:
        """Of the weight sync.

        requested: a backend or "auto" (--sync.backend). one_host: policy rank 0 and all engine workers are on one.
        auto on CPUs: "shared_memory" on one host, else "gloo". On GPUs: "nccl"; colocated, where NCCL refuses two
        processes of one group on the same GPU, IPC_ELSE_GLOO: `RayWeightSync`, which knows the GPUs, takes "ipc" if
        every engine worker is on the GPU of a policy rank, else "gloo", through CPU memory.
        vLLM's own engine for colocated GPUs (also called ipc) is not used. It loads layer by layer, and says that of
        tied weights it processes only one layer's: a stale head is what the agreement check is there to find.

        Raises DeviceError for shared memory between hosts; config.validate has refused NCCL where it cannot be.
        """
        if requested == "auto":
            if not self.is_cuda:
                return "shared_memory" if one_host else "gloo"
            return IPC_ELSE_GLOO if colocated else "nccl"
        if requested == "shared_memory" and not one_host:
            raise DeviceError(
                "--sync.backend shared_memory: policy rank 0 and the engines do not share one host, or live in "
                "different containers of it; use auto or gloo"
            )
        return requested

    def actor_options(self, share: float = 1.0) -> dict[str, Any]:
        """Options of one Ray actor; share < 1 lets several actors live on one bundle."""
        if not 0 < share <= 1:
            raise DeviceError(f"the share of a bundle must lie in (0, 1], got {share}")
        return {"num_cpus": share, "num_gpus": share if self.is_cuda else 0}

    # -- environment variables -------------------------------------------------------------------

    def engine_env(self, tensor_parallel_size: int = 1) -> dict[str, str]:
        """For a process about to start vLLM. What the environment already sets is kept as it is."""
        env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        if self.is_cuda:
            # FlashInfer compiles its sampler at every start, for which it needs nvcc.
            env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        else:
            env |= {
                # vLLM's default leaves one core out; on two cores that is half the machine.
                "VLLM_CPU_OMP_THREADS_BIND": "|".join(_split_cores(tensor_parallel_size)),
                "VLLM_CPU_KVCACHE_SPACE": CPU_KVCACHE_GIB,
                # Saves two inductor compilations of the sampler at every start.
                "TORCHDYNAMO_DISABLE": "1",
                **CPU_PROCESS_ENV,
            }
        return {key: os.environ.get(key) or value for key, value in env.items()}

    def engine_options(
        self,
        max_model_len: int,
        *,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        fp32_head: bool = True,
    ) -> dict[str, Any]:
        """vLLM engine arguments that depend on the device; None: its default.

        fp32_head: in bf16, logits are products with sums in fp32 that are not rounded, as the policy's are
        (`LogprobHead`). vLLM reads head_dtype in model_executor/layers/logits_processor.py; the
        weight stays the model's own, so that a sync loads it as ever.

        On CPU a seeded request must never have its prompt cut into chunks: vLLM 0.29 takes back the
        sample drawn for an unfinished chunk by Generator.set_offset (gpu_model_runner.py), which CPU
        generators do not have, and the engine dies of it.
        """
        options: dict[str, Any] = {}
        if self.dtype_name == "bf16" and fp32_head:
            options["hf_overrides"] = {"head_dtype": "float32"}
        if self.is_cuda:
            # vLLM wants room for a token of every sequence.
            sequences = max_num_seqs or min(GPU_SEQUENCES, max_num_batched_tokens or GPU_SEQUENCES)
            tokens = max_num_batched_tokens or max(GPU_BATCHED_TOKENS, sequences)
            return options | {"max_num_seqs": sequences, "max_num_batched_tokens": tokens}
        if max_num_seqs:
            options["max_num_seqs"] = max_num_seqs
        return options | {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max_num_batched_tokens
            or max(max_model_len, CPU_BATCHED_TOKENS, max_num_seqs or 0),
            "block_size": CPU_BLOCK_TOKENS,
        }

    def trainer_env(self, ranks_on_node: int, *, adam_offload: bool = False) -> dict[str, str]:
        """For a training rank. Ray sets OMP_NUM_THREADS to the actor's CPUs, hence one thread.

        On a GPU that is enough unless DeepSpeed's CPU Adam does the updates (adam_offload): it reads the variable when
        it is loaded. The cores are counted in the driver's process; OMP_NUM_THREADS in its environment stands there.
        """
        if ranks_on_node < 1:
            raise DeviceError(f"ranks_on_node must be at least 1, got {ranks_on_node}")
        threads = max(1, len(_cores()) // ranks_on_node)
        if self.is_cuda:
            return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)} if adam_offload else {}
        process = {key: os.environ.get(key) or value for key, value in CPU_PROCESS_ENV.items()}
        return {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", **process}


def _look_at_cards(name: str, dtype: str) -> None:
    """DeviceError for GPUs here that cannot do what was resolved; a warning where they are left idle."""
    cards = local_cards()
    if name == "cpu":
        if cards:
            logger.warning("running on CPU: torch %s cannot use this machine's %s", torch.__version__, cards[0].name)
        return
    why = why_unusable(cards, dtype_name=dtype, cuda=torch.version.cuda, starts=torch.cuda.is_available)
    if why:
        raise DeviceError(why)


def flash_attn_available() -> bool:
    """flash-attn with its compiled kernels; an installation without CUDA has an empty stand-in."""
    try:
        return hasattr(importlib.import_module("flash_attn_2_cuda"), "varlen_fwd")
    except (ImportError, OSError):
        return False


def _cores() -> list[int]:
    """The cores this process may use; a container or Slurm may have given it a part of the host."""
    return sorted(os.sched_getaffinity(0))


def _split_cores(parts: int) -> list[str]:
    """One list of cores per worker, in the notation of VLLM_CPU_OMP_THREADS_BIND.

    >>> # four cores, two workers -> ["0-1", "2-3"]; workers share cores when there are too few
    """
    cores = _cores()
    size = max(1, len(cores) // parts)
    return [_ranges(cores[(i * size) % len(cores) :][:size]) for i in range(parts)]


def _ranges(cores: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    out: list[list[int]] = []
    for core in cores:
        if out and core == out[-1][1] + 1:
            out[-1][1] = core
        else:
            out.append([core, core])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in out)
