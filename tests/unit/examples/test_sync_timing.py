"""The benchmark of the weight sync: stock OpenRLHF's receiver runs under the overrides, and times are put together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf")
pytest.importorskip("vllm")

from examples.benchmark.sync_stock import OVERRIDES, StockWorker, without_cuda
from examples.benchmark.sync_timing import write


def test_stock_s_own_receiver_loads_what_was_broadcast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: dict[str, torch.Tensor] = {}

    class Group:
        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
            assert src == 0 and stream is None and tensor.device.type == "cpu"
            tensor.fill_(3.0)

    worker: Any = object.__new__(StockWorker)
    worker.model_config = SimpleNamespace(dtype=torch.float32)
    worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=lambda weights: loaded.update(weights)))
    worker._model_update_with_ray, worker._model_update_group = False, Group()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    worker.update_weight("w", torch.float32, (2, 3))
    assert torch.equal(loaded["w"], torch.full((2, 3), 3.0))
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="mismatch dtype"):  # its own check, so its own code
        worker.update_weight("w", torch.float16, (2, 3))


def test_the_overrides_end_with_the_call() -> None:
    empty, synchronize = torch.empty, torch.cuda.synchronize
    with without_cuda("openrlhf.utils.distributed_util"):
        assert torch.empty(2, device="cuda").device.type == "cpu"
        torch.cuda.synchronize()
        assert torch.cuda.current_stream() is None and torch.cuda.current_device() == 0
    assert torch.empty is empty and torch.cuda.synchronize is synchronize


def test_every_name_that_is_overridden_is_explained() -> None:
    text = " ".join(OVERRIDES)
    for name in ("stateless_init_process_group", "torch.empty", "current_stream", "current_device", "synchronize"):
        assert name in text
    for name in ("print", "ActorPPOTrainer", "keep_cpu_weights_loadable", "reset_prefix_cache"):
        assert name in text


def test_medians_and_ratios(tmp_path: Path) -> None:
    seconds = {"real": [0.2, 9.0, 0.4], "real_gloo": [2.0, 1.0, 3.0], "openrlhf": [4.0, 5.0, 1.0]}
    path = tmp_path / "new" / "timing.json"
    found = write(path, seconds, {"cores": 2})
    assert found["median_seconds"] == {"real": 0.4, "real_gloo": 2.0, "openrlhf": 4.0}
    assert found["ratio_to_openrlhf"] == {"real": 0.1, "real_gloo": 0.5, "openrlhf": 1.0}
    assert json.loads(path.read_text()) == {**seconds, "facts": {"cores": 2, **found}}
