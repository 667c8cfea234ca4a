"""What a run says that lost a process after it was asked to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayError, RpcError

from real_openrlhf.common.errors import RunError
from real_openrlhf.controller.checkpointing import make_store
from real_openrlhf.controller.loop import Stopped
from real_openrlhf.run.stopping import in_plain_words
from tests.unit.checkpoint.helpers import meta


@pytest.mark.parametrize("error", [ActorDiedError(), RpcError("Socket closed"), ConnectionError("x" * 10_000)])
def test_a_lost_process_after_a_signal(tmp_path: Path, error: Exception) -> None:
    store = make_store(str(tmp_path / "checkpoints"), keep=3, metric=None)
    words = r"^SIGUSR1 asked this run to stop, but the step that was under way failed: .*There is no checkpoint yet"
    with pytest.raises(RunError, match=words) as raised, in_plain_words(lambda: "SIGUSR1", store):
        raise error
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    store.open()
    for step in (2, 3):
        with store.begin(step, meta()) as writer:
            writer.write_json("controller.json", {})
            writer.commit()
    with (
        pytest.raises(RunError, match=r"newest checkpoint is of step 3: .*--ckpt.load latest"),
        in_plain_words(lambda: "SIGTERM", store),
    ):
        raise error


@pytest.mark.parametrize("error", [RayError("without a signal"), Stopped(3, "SIGTERM", True), KeyError("a mistake")])
def test_everything_else_passes(tmp_path: Path, error: Exception) -> None:
    store = make_store(str(tmp_path), keep=3, metric=None)
    signal = None if isinstance(error, RayError) else "SIGTERM"
    with pytest.raises(type(error)) as raised, in_plain_words(lambda: signal, store):
        raise error
    assert raised.value is error
