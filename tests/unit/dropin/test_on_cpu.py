"""What stands in CUDA's place in a stock run on a CPU, without Ray."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from real_openrlhf.actors.sync.transfer import free_port

pytest.importorskip("openrlhf")


def test_weights_travel_over_the_store() -> None:
    from real_openrlhf.dropin.on_cpu import StoreGroup, store_group

    port, sent = free_port(), torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    received: list[Any] = []

    def receive() -> None:
        group = store_group("127.0.0.1", port, 1, 2, None)
        weight = torch.empty(2, 3, dtype=torch.bfloat16)
        group.broadcast(weight, src=0, stream=None)
        received.append(weight)

    receiver = threading.Thread(target=receive)
    receiver.start()
    group = store_group("127.0.0.1", port, 0, 2, None)
    assert isinstance(group, StoreGroup)
    group.broadcast(torch.nn.Parameter(sent), src=0, stream=None)
    receiver.join(60)
    assert torch.equal(received[0], sent)


def test_the_replay_buffer_is_openrlhfs_on_the_cpu() -> None:
    from real_openrlhf.dropin.on_cpu import CpuReplayBuffer

    before = torch.cuda.current_device
    buffer = CpuReplayBuffer(4, 0, True, False, False)
    assert buffer.target_device == torch.device("cpu") and (buffer.sample_batch_size, buffer.items) == (4, [])
    assert torch.cuda.current_device is before


def test_losses_are_averaged_over_accumulation_steps_as_openrlhf_does() -> None:
    """DeepSpeed's engine divides, so it gets the loss alone; the base class tells it not to."""
    from real_openrlhf.dropin.on_cpu import CpuStrategy

    calls: list[Any] = []

    class Model:
        def backward(self, *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

    strategy = CpuStrategy.__new__(CpuStrategy)
    loss = torch.tensor(1.0)
    strategy.backward(loss, Model(), None)  # type: ignore[arg-type]
    assert calls == [((loss,), {})]
