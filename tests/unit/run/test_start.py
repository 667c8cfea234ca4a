"""What a run's start makes of an error in training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from real_openrlhf.common.errors import RunError
from real_openrlhf.run import start
from real_openrlhf.run.restarts import Interrupted


@pytest.mark.parametrize("where", ["load", "fit"])
@pytest.mark.parametrize(
    ("error", "interrupts"),
    [
        (ActorUnavailableError("killed", None), True),
        (TimeoutError("a weight sync"), True),
        (RunError("the reward falls"), False),
        (RuntimeError("a mistake"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_fault_interrupts_and_an_error_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, interrupts: bool
) -> None:
    def fails(*args: Any) -> None:
        raise error

    controller = SimpleNamespace(step_number=7, checkpointed_parts=dict, fit=fails)
    monkeypatch.setattr(start, "make_controller", lambda *args: controller)
    saver = SimpleNamespace(load=fails if where == "load" else lambda checkpoint: 7)
    monkeypatch.setattr(start, "Checkpointer", lambda **parts: saver)
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(ckpt=SimpleNamespace(save_steps=1, best_metric=None)), identity=None
    )
    pages: list[dict[str, bool]] = []
    anything: Any = SimpleNamespace(policy=None, requested=None, page=lambda **how: pages.append(how))
    with pytest.raises(Interrupted if interrupts else type(error)) as caught:
        start.train(plan, anything, anything, anything, anything, anything, anything)
    if interrupts:
        assert caught.value.__cause__ is error
        assert isinstance(caught.value, Interrupted) and caught.value.step == 7
    else:
        assert caught.value is error
    # However a run ends, there is a page that shows it.
    assert pages == [{"last": True}]
