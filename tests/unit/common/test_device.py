from __future__ import annotations

import os
import pickle
import sys
import types
from dataclasses import replace

import pytest
import torch

from real_openrlhf.common import device as module
from real_openrlhf.common.cards import Card
from real_openrlhf.common.device import IPC_ELSE_GLOO, SYNC_TOLERANCE, Device, DeviceError

H100 = Card(name="H100", capability=(9, 0), memory=80 * 2**30, driver="580.65.06")


@pytest.fixture
def build(monkeypatch):
    """Pretend that torch was built for CUDA or not, and that this process sees so many GPUs."""

    def set_build(cuda: bool, gpus: int) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.8" if cuda else None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(module, "local_cards", lambda: (H100,) * gpus)

    return set_build


@pytest.mark.parametrize(
    ("cuda", "local", "cluster", "requested", "expected"),
    [
        (False, 0, None, "auto", "cpu"),
        (True, 2, None, "auto", "cuda"),
        (True, 2, None, "cpu", "cpu"),
        (True, 2, None, "cuda", "cuda"),
        (True, 0, None, "auto", "cpu"),
        # A head node without GPUs in front of a cluster that has some, and the other way round.
        (True, 0, 8, "auto", "cuda"),
        (True, 0, 8, "cuda", "cuda"),
        (True, 2, 0, "auto", "cpu"),
        # GPUs declared to Ray where torch is a CPU build.
        (False, 0, 4, "auto", "cpu"),
    ],
)
def test_resolve(build, cuda, local, cluster, requested, expected):
    build(cuda, local)
    device = Device.resolve(requested, "auto", cluster)
    assert device.name == expected
    assert device.dtype_name == {"cpu": "fp32", "cuda": "bf16"}[expected]
    assert device.dist_backend == {"cpu": "gloo", "cuda": "nccl"}[expected]


@pytest.mark.parametrize(
    ("cuda", "local", "cluster", "says"),
    [(False, 0, None, "CPU build"), (True, 0, None, "this machine"), (True, 2, 0, "Ray cluster"), (False, 0, 8, "CPU")],
)
def test_cuda_where_there_is_none(build, cuda, local, cluster, says):
    build(cuda, local)
    with pytest.raises(DeviceError, match=says):
        Device.resolve("cuda", "auto", cluster)


def test_cards_that_cannot_do_it_are_refused_before_anything_starts(build, monkeypatch):
    build(True, 1)
    monkeypatch.setattr(module, "local_cards", lambda: (replace(H100, name="T4", capability=(7, 5)),))
    for requested in ("auto", "cuda"):
        with pytest.raises(
            DeviceError, match=r"T4 \(compute capability 7.5\) does not compute in bf16: .* 8.0 or higher"
        ):
            Device.resolve(requested)
    assert Device.resolve("auto", "fp32").name == "cuda"
    assert Device.resolve("cpu").name == "cpu"
    # The cluster's cards are not these: its nodes look at their own.
    assert Device.resolve("cuda", "auto", 4).name == "cuda"


def test_cards_that_are_left_idle_are_named(build, monkeypatch, caplog):
    build(False, 0)
    assert Device.resolve("auto").name == "cpu" and "idle" not in caplog.text and "H100" not in caplog.text
    monkeypatch.setattr(module, "local_cards", lambda: (H100,))
    assert Device.resolve("auto").name == "cpu"
    assert "cannot use this machine's H100" in caplog.text


def test_an_actor_looks_at_its_own_card(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(DeviceError, match=r"T4 on .* does not compute in bf16"):
        Device(name="cuda", dtype_name="bf16").check_card()
    Device(name="cuda", dtype_name="fp32").check_card()
    Device(name="cpu", dtype_name="bf16").check_card()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    Device(name="cuda", dtype_name="bf16").check_card()


@pytest.mark.parametrize(("device", "dtype"), [("gpu", "auto"), ("cpu", "fp16"), ("", "fp32")])
def test_unknown_names(device, dtype):
    with pytest.raises(DeviceError, match="must be"):
        Device.resolve(device, dtype)


def test_dtypes(build, caplog):
    build(True, 1)
    fp32, bf16 = Device.resolve("cuda", "fp32"), Device.resolve("cuda")
    assert (fp32.torch_dtype, fp32.vllm_dtype, fp32.sync_tolerance) == (torch.float32, "float32", 1e-3)
    assert (bf16.torch_dtype, bf16.vllm_dtype, bf16.sync_tolerance) == (torch.bfloat16, "bfloat16", 0.2)
    assert (fp32.reward_tolerance, bf16.reward_tolerance) == (1e-6, 0.1)
    assert set(SYNC_TOLERANCE) == {"fp32", "bf16"}
    assert Device.resolve("cpu", "bf16").torch_dtype == torch.bfloat16 and "slower" in caplog.text


def test_flash_attention_only_with_its_kernels(monkeypatch):
    cpu, bf16, fp32 = (Device(name=n, dtype_name=d) for n, d in (("cpu", "bf16"), ("cuda", "bf16"), ("cuda", "fp32")))
    # The stand-in of an installation without CUDA: the module exists and is empty.
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", types.ModuleType("flash_attn_2_cuda"))
    assert bf16.attn_implementation == "sdpa"
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)  # an import of None fails
    assert bf16.attn_implementation == "sdpa"
    kernels = types.ModuleType("flash_attn_2_cuda")
    kernels.varlen_fwd = lambda: None
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", kernels)
    assert [d.attn_implementation for d in (cpu, bf16, fp32)] == ["sdpa", "flash_attention_2", "sdpa"]


def test_ray_resources():
    cpu, cuda = Device(name="cpu", dtype_name="fp32"), Device(name="cuda", dtype_name="bf16")
    assert cpu.bundle() == {"CPU": 1} and cuda.bundle() == {"GPU": 1, "CPU": 1}
    assert cpu.actor_options() == {"num_cpus": 1, "num_gpus": 0}
    assert cuda.actor_options(0.2) == {"num_cpus": 0.2, "num_gpus": 0.2}
    with pytest.raises(DeviceError, match="share"):
        cuda.actor_options(0)


@pytest.mark.parametrize(
    ("cores", "workers", "bind"),
    [
        ({0, 1}, 1, "0-1"),
        ({0, 1, 2, 3}, 2, "0-1|2-3"),
        ({0, 2, 3, 7}, 1, "0,2-3,7"),
        ({5}, 2, "5|5"),
        ({0, 1, 2}, 2, "0|1"),
    ],
)
def test_engine_env_binds_the_cores_there_are(monkeypatch, cores, workers, bind):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    env = Device(name="cpu", dtype_name="fp32").engine_env(workers)
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == bind
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "7"  # the environment has the last word
    assert env["TORCHDYNAMO_DISABLE"] == "1"
    assert module.CPU_PROCESS_ENV.keys() <= env.keys()
    gpu = Device(name="cuda", dtype_name="bf16").engine_env()
    assert not [key for key in gpu if "CPU" in key or "DYNAMO" in key or "MALLOC" in key]
    assert gpu["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert Device(name="cuda", dtype_name="bf16").engine_env()["VLLM_USE_FLASHINFER_SAMPLER"] == "1"


def test_engine_options():
    options = Device(name="cpu", dtype_name="fp32").engine_options(10_000)
    assert options["enable_chunked_prefill"] is False and options["max_num_batched_tokens"] == 10_000
    assert options["block_size"] % 32 == 0  # what vLLM's CPU attention takes
    gpu = Device(name="cuda", dtype_name="bf16")
    head = {"hf_overrides": {"head_dtype": "float32"}}
    assert gpu.engine_options(10_000) == {"max_num_seqs": 512, "max_num_batched_tokens": 8192, **head}
    assert gpu.engine_options(10_000, max_num_seqs=9000)["max_num_batched_tokens"] == 9000
    few = gpu.engine_options(10_000, max_num_batched_tokens=100)  # a pass holds a token of every sequence
    assert (few["max_num_seqs"], few["max_num_batched_tokens"]) == (100, 100)
    assert Device(name="cpu", dtype_name="fp32").engine_options(10, max_num_seqs=9000)["max_num_batched_tokens"] == 9000
    sizes = {"max_num_seqs": 7, "max_num_batched_tokens": 99}
    assert gpu.engine_options(10, **sizes, fp32_head=False) == sizes
    # fp32 has nothing to widen, bf16 has on a CPU too.
    assert "hf_overrides" not in Device(name="cuda", dtype_name="fp32").engine_options(10)
    assert head.items() <= Device(name="cpu", dtype_name="bf16").engine_options(10).items()
    assert sizes.items() <= Device(name="cpu", dtype_name="fp32").engine_options(10, **sizes).items()


def test_trainer_env(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cpu = Device(name="cpu", dtype_name="fp32")
    for name in module.CPU_PROCESS_ENV:
        monkeypatch.delenv(name, raising=False)
    assert cpu.trainer_env(2) == {"OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu", **module.CPU_PROCESS_ENV}
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    assert cpu.trainer_env(2)["MALLOC_MMAP_MAX_"] == "7"  # the environment has the last word
    assert cpu.trainer_env(99)["OMP_NUM_THREADS"] == "1"
    cuda = Device(name="cuda", dtype_name="bf16")
    assert cuda.trainer_env(2) == {}
    # The updates of --ds.adam_offload run on the cores: a rank gets its share of them, or what the user says.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cuda.trainer_env(2, adam_offload=True) == {"OMP_NUM_THREADS": "4"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cuda.trainer_env(2, adam_offload=True) == {"OMP_NUM_THREADS": "3"}
    assert cpu.trainer_env(2, adam_offload=True)["OMP_NUM_THREADS"] == "4"
    with pytest.raises(DeviceError, match="ranks_on_node"):
        cpu.trainer_env(0)


def test_this_process():
    cpu = Device(name="cpu", dtype_name="fp32")
    assert cpu.current() == torch.device("cpu")
    cpu.synchronize()
    cpu.empty_cache()
    before = cpu.memory_stats()["peak_bytes"]
    block = torch.ones(64 * 2**20)  # 256 MiB
    assert cpu.memory_stats()["peak_bytes"] >= before and cpu.memory_stats()["peak_bytes"] > block.nbytes


def test_travels_between_processes():
    device = Device(name="cuda", dtype_name="bf16")
    assert pickle.loads(pickle.dumps(device)) == device
    with pytest.raises(AttributeError):
        device.name = "cpu"
    for bad in ({"name": "tpu", "dtype_name": "bf16"}, {"name": "cpu", "dtype_name": "fp64"}):
        with pytest.raises(DeviceError):
            Device(**bad)


def test_module_names_every_dtype():
    assert set(module._TORCH_DTYPES) == set(module._VLLM_DTYPES) == set(SYNC_TOLERANCE)


def test_colocated_weights_stay_on_their_gpu_if_they_can():
    cpu, cuda = Device(name="cpu", dtype_name="fp32"), Device(name="cuda", dtype_name="bf16")
    for one_host in (False, True):
        assert cuda.sync_backend(colocated=False, one_host=one_host) == "nccl"
        # RayWeightSync looks at the GPUs and decides; what was asked for stays.
        assert cuda.sync_backend(colocated=True, one_host=one_host) == IPC_ELSE_GLOO
        assert cuda.sync_backend("gloo", colocated=True, one_host=one_host) == "gloo"
        assert cuda.sync_backend("ipc", colocated=True, one_host=one_host) == "ipc"
    assert cpu.sync_backend(colocated=False, one_host=False) == "gloo"


def test_weights_go_by_shared_memory_on_one_cpu_host_alone():
    cpu = Device(name="cpu", dtype_name="fp32")
    assert cpu.sync_backend(colocated=False, one_host=True) == "shared_memory"
    assert cpu.sync_backend("gloo", colocated=False, one_host=True) == "gloo"
    assert cpu.sync_backend("shared_memory", colocated=False, one_host=True) == "shared_memory"
    with pytest.raises(DeviceError, match="do not share one host"):
        cpu.sync_backend("shared_memory", colocated=False, one_host=False)
