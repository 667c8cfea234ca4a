"""Weights, gradients and optimizer states of a rank, to the byte: what DeepSpeed 0.19 keeps, by ZeRO stage.

tests/integration/test_memory.py holds these numbers against the tensors of the running policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from real_openrlhf.config.schema import Config
from real_openrlhf.run.model_shape import ModelShape

# DeepSpeed's defaults for what OpenRLHF leaves at "auto", in elements (deepspeed/runtime/zero/config.py).
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
MAX_LIVE = 1_000_000_000
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one rank, wherever they lie.

    weights    of the forward pass; under ZeRO 3 the rank's share
    gradients  as they lie when the last backward pass of an update is through
    master     fp32 copies of what is trained
    moments    Adam's two
    copy       of the gradients, while the optimizer steps
    buckets    buffers in which gradients are put together: under ZeRO 3 always there, else in backward passes
    reduced    what comes out of them before it is added up
    gathered   whole parameters that may be there at once under ZeRO 3
    """

    weights: int
    gradients: int
    master: int
    moments: int
    copy: int
    buckets: int
    reduced: int
    gathered: int

    @property
    def optimizer(self) -> int:
        """What --ds.adam_offload keeps in CPU memory, and --ds.enable_sleep between trainings."""
        return self.master + self.moments


def policy_states(config: Config, shape: ModelShape, itemsize: int) -> States:
    """Of the policy's fullest rank. itemsize: bytes of a weight, 2 in bf16, 4 in fp32."""
    stage, ranks = config.ds.zero_stage, config.ranks
    mine, mixed = shape.partition(stage, ranks), itemsize != _FP32
    # In fp32, stage 0 has torch's own optimizer. Stage 3 means to update its shards where they lie, but compares a
    # device with its name (zero/stage3.py, _create_fp32_partitions), which are never equal, and makes a copy.
    has_master = mixed or stage >= 1
    sums = itemsize if config.ds.grad_accum_dtype == "bf16" else _FP32  # stages 0 and 1 add up in the weights' dtype
    return States(
        weights=_weights(config, shape, itemsize),
        gradients=mine * sums if stage >= 2 else shape.trained * itemsize,
        master=mine * _FP32 if has_master else 0,
        moments=mine * 2 * _FP32,
        copy=_step_copy(stage, mine, shape.trained, mixed=mixed),
        buckets=itemsize * REDUCE_BUCKET * (0 if stage == 0 else 2 if stage < 3 and config.ds.overlap_comm else 1),
        # Stage 3: the flat copy that the reduction makes of a bucket. Stage 2: the rank's own share.
        reduced=itemsize * (min(REDUCE_BUCKET, shape.trained) if stage == 3 else mine if stage == 2 else 0),
        gathered=_gathered(config, shape, itemsize),
    )


def _weights(config: Config, shape: ModelShape, itemsize: int) -> int:
    stage, ranks = config.ds.zero_stage, config.ranks
    if stage == 3:
        shards = shape.share(ranks)
        # ZeRO++'s second copy, divided within a group of ranks.
        return itemsize * (shards + (shape.share(config.ds.zpg) if config.ds.zpg > 1 else 0))
    trained = shape.trained if stage == 0 else shape.partition(stage, ranks) * ranks
    return itemsize * (sum(shape.frozen) + trained)


def _step_copy(stage: int, mine: int, trained: int, *, mixed: bool) -> int:
    if stage == 0:
        return trained * _FP32 if mixed else 0
    return _FP32 * (min(mine, SUB_GROUP) if stage == 3 else mine)


def _gathered(config: Config, shape: ModelShape, itemsize: int) -> int:
    """The most: prefetching stops at MAX_LIVE, and one parameter may come on top."""
    if config.ds.zero_stage != 3 or config.ranks == 1:
        return 0
    return itemsize * min(shape.whole, MAX_LIVE + shape.largest_tensor)
