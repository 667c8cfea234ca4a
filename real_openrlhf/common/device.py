"""Decides cpu/gloo/fp32 or cuda/nccl/bf16. All other code takes the decision from here.

The driver resolves one `Device` and gives it to every actor (it is frozen and picklable). Values that depend on the
machine, such as its number of cores, are computed in the process that calls: call `engine_env`, `trainer_env`,
`current` and `memory_stats` in the actor's own process.
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
# weights count as not synced. fp32: the two implementations differ by about 1e-5 on average;
# a single stale matrix (a tied head) gives 0.08 and more. bf16 keeps 8 bits of mantissa: between two
# implementations, or a packed row and its separate rows, 0.03 to 0.06 per token were seen with correct weights and
# output layers in fp32 (tests/gpu/results/h100). Dummy or stale weights differ by whole nats.
SYNC_TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}

# Rewards of a group that differ by less than this count as equal (--real.tolerance). In bf16, log p(y) of one text
# differs by 0.03 to 0.06 between two correct computations, so rewards that should be equal spread over about 0.1.
# Divided by its own standard deviation, that noise would become advantages of +-1.
REWARD_TOLERANCE = {"fp32": 1e-6, "bf16": 0.1}

# Sequences that an engine runs at a time on a GPU. vLLM 0.29's default is 256 on most cards, too few for an A100, and
# 1,024 on others from 70 GiB on.
GPU_SEQUENCES = 512
GPU_BATCHED_TOKENS = 8192

# GiB of KV cache per engine on a CPU: some 90,000 tokens of a 135M-parameter model in fp32. So 256 requests of a few
# hundred tokens run at once, and none is preempted and computed again.
CPU_KVCACHE_GIB = "4"
# Most tokens in one forward pass of an engine on a CPU: vLLM's default there.
CPU_BATCHED_TOKENS = 4096

# Tokens per KV cache block of an engine on a CPU. A prompt's rollouts share its full blocks; the rest of the prompt is
# computed once per rollout. vLLM's default there, 128, leaves a longer rest.
CPU_BLOCK_TOKENS = 32

# With these, the process of a training rank or an engine on a CPU keeps its memory: large blocks come from glibc's
# heap, which is not trimmed, in huge pages where the kernel has some. Mapping the pages of a fresh activation costs
# more than an element-wise operation that writes it, and a step has hundreds. glibc reads these when a process starts.
CPU_ALLOCATOR_ENV = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "THP_MEM_ALLOC_ENABLE": "1",
}
# Threads that wait for the others of a parallel region soon sleep. Spinning threads would keep the core from the thread
# they wait for, if other programs use the remaining cores.
CPU_PROCESS_ENV = {"GOMP_SPINCOUNT": SPINS, **CPU_ALLOCATOR_ENV}


# Sync backend when it is not known yet whether every engine worker shares its GPU with a policy rank.
IPC_ELSE_GLOO = "ipc_else_gloo"


class DeviceError(ValueError):
    """The requested device or dtype is not available."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One of the two stacks the package runs on.

    name        "cpu" or "cuda"
    dtype_name  "fp32" or "bf16": of the forward pass, of the engines and of weights that are sent
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

        cluster_gpus: number of GPUs of the Ray cluster, if one is joined or about to be started. They then
        count instead of this process's own GPUs, since the driver often runs on a head node without any.

        Raises DeviceError for unknown names, for "cuda" without GPUs, and for GPUs of this process that torch cannot
        use, or not in this dtype. GPUs of other nodes are checked there, by `check_card`.
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

    # -- the choice in the words of other libraries ----------------------------------------------

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
        """The default: flash attention if its CUDA kernels can be loaded. It has none for fp32."""
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
        """Select this process's GPU; does nothing on a CPU."""
        if self.is_cuda:
            torch.cuda.set_device(local_rank)

    def trainer_threads(self, ranks_on_node: int) -> int:
        """Number of torch threads in a training rank: on a CPU its share of the cores, else torch's own number."""
        return torch.get_num_threads() if self.is_cuda else max(1, len(_cores()) // ranks_on_node)

    def logits_mb(self) -> int:
        """Default of --real.logits_mb: a tenth of this process's GPU, 1 GiB on a CPU.

        A chunk of the output layer takes an eighth of it; what does not fit is computed again in the backward pass. On
        an H100, 8,192 rows of 151,936 logits took 127 ms with 1 GiB, 62 with 4, 45 with 16 (tests/gpu/results/h100).
        """
        return torch.cuda.get_device_properties(self.current()).total_memory // 10 // 2**20 if self.is_cuda else 1024

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()

    def rng_state(self) -> torch.Tensor | None:
        """State of the GPU's random number generator; None on a CPU, where torch's own generator is used."""
        return torch.cuda.get_rng_state() if self.is_cuda else None

    def set_rng_state(self, state: torch.Tensor | None) -> None:
        """Restore what `rng_state` returned. A state from the other kind of device is ignored."""
        if self.is_cuda and state is not None:
            torch.cuda.set_rng_state(state)

    def memory_stats(self) -> dict[str, int]:
        """{"peak_bytes": ...}: the most that torch ever held on the GPU, or the process's highest RSS."""
        if self.is_cuda:
            return {"peak_bytes": int(torch.cuda.max_memory_allocated())}
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    # -- Ray -------------------------------------------------------------------------------------

    def bundle(self) -> dict[str, float]:
        """The resources of one actor (one rank, one engine worker) in a placement group."""
        return {"GPU": 1, "CPU": 1} if self.is_cuda else {"CPU": 1}

    def sync_backend(self, requested: str = "auto", *, colocated: bool, one_host: bool) -> str:
        """The backend of the weight sync.

        requested: a backend or "auto" (--sync.backend). one_host: policy rank 0 and all engine workers are on one host.
        auto on CPUs: "shared_memory" on one host, else "gloo". On GPUs: "nccl". Colocated, NCCL refuses two processes
        of one group on the same GPU, so auto is IPC_ELSE_GLOO: `RayWeightSync`, which knows the GPUs, takes "ipc" if
        every engine worker is on the GPU of a policy rank, else "gloo", through CPU memory.
        vLLM's own transfer for colocated GPUs (also called ipc) is not used. It loads layer by layer and, as it says
        itself, processes only one layer of tied weights, which would leave a stale head.

        Raises DeviceError for shared memory between hosts; config.validate has refused NCCL where it cannot work.
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
        """Options of one Ray actor; with share < 1, several actors can run on one bundle."""
        if not 0 < share <= 1:
            raise DeviceError(f"the share of a bundle must be above 0 and at most 1, got {share}")
        return {"num_cpus": share, "num_gpus": share if self.is_cuda else 0}

    # -- environment variables -------------------------------------------------------------------

    def engine_env(self, tensor_parallel_size: int = 1) -> dict[str, str]:
        """Environment variables for a process that will start vLLM. Variables that are already set stay as they are."""
        env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        if self.is_cuda:
            # FlashInfer compiles its sampler at every start and needs nvcc for that.
            env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        else:
            env |= {
                # vLLM's default leaves out one core; on two cores that is half the machine.
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
        """vLLM engine arguments that depend on the device; None: vLLM's default.

        fp32_head: logits of a bf16 model are summed in fp32 and not rounded, as the policy's are
        (`LogprobHead`). vLLM reads head_dtype in model_executor/layers/logits_processor.py; the
        weight itself does not change, so that a sync loads it as usual.

        On CPU, the prompt of a seeded request must never be cut into chunks: vLLM 0.29 takes back the
        sample drawn for an unfinished chunk by Generator.set_offset (gpu_model_runner.py). CPU
        generators do not have that method, and the engine dies.
        """
        options: dict[str, Any] = {}
        if self.dtype_name == "bf16" and fp32_head:
            options["hf_overrides"] = {"head_dtype": "float32"}
        if self.is_cuda:
            # vLLM needs room for at least one token of every sequence.
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
        """Environment variables for a training rank.

        Ray sets OMP_NUM_THREADS to the actor's CPUs, which is one thread. On a GPU that is enough, unless DeepSpeed's
        CPU Adam does the updates (adam_offload), which reads the variable when it is loaded. The cores are counted in
        the driver's process; if OMP_NUM_THREADS is set there, that value is used.
        """
        if ranks_on_node < 1:
            raise DeviceError(f"ranks_on_node must be at least 1, got {ranks_on_node}")
        threads = max(1, len(_cores()) // ranks_on_node)
        if self.is_cuda:
            return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)} if adam_offload else {}
        process = {key: os.environ.get(key) or value for key, value in CPU_PROCESS_ENV.items()}
        return {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", **process}


def _look_at_cards(name: str, dtype: str) -> None:
    """DeviceError for GPUs here that cannot be used as resolved; a warning if they are left idle."""
    cards = local_cards()
    if name == "cpu":
        if cards:
            logger.warning("running on CPU: torch %s cannot use this machine's %s", torch.__version__, cards[0].name)
        return
    why = why_unusable(cards, dtype_name=dtype, cuda=torch.version.cuda, starts=torch.cuda.is_available)
    if why:
        raise DeviceError(why)


def flash_attn_available() -> bool:
    """Whether flash-attn is there with its compiled kernels; without CUDA, an empty module is installed instead."""
    try:
        return hasattr(importlib.import_module("flash_attn_2_cuda"), "varlen_fwd")
    except (ImportError, OSError):
        return False


def _cores() -> list[int]:
    """The cores that this process may use: in a container or under Slurm, maybe only a part of the host's."""
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
