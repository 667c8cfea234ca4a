"""A judge's vLLM engine in this process. Importing this module is cheap; making a `VLLMBackend` imports vLLM."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from real_openrlhf.actors.engine.owner_watch import own_engines
from real_openrlhf.actors.engine.spec import EngineSpec
from real_openrlhf.algo.bound_scale import BoundScale
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.types import Group
from real_openrlhf.common.device import Device
from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.versions import ENGINE, warn_of_versions
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.judge.types import JudgeError

T = TypeVar("T")
_GRACE_S = 5.0  # how long the engine's own tasks may take to end after it


class VLLMBackend:
    """The rollout engine of training, without Ray and with the model's own weights. See `JudgeBackend`.

    device: "auto", "cpu" or "cuda". max_model_len: prompt, response and forced anchor together.
    logprobs_mode: see `actors.engine.spec.logprobs_mode_for`. It uses one GPU; for a model that needs several,
    start `vllm serve --tensor-parallel-size N` and use a `ServerBackend`.

    The engine's coroutines run on an event loop in a separate thread, so this works in notebooks too.
    Calls are answered one after the other. `close` ends the engine's processes.
    """

    def __init__(
        self,
        model: str,
        bound: BoundScale,
        *,
        max_model_len: int,
        device: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        gpu_memory_utilization: float = 0.9,
        trust_remote_code: bool = False,
    ) -> None:
        resolved = Device.resolve(device)
        warn_of_versions(*ENGINE)
        # vLLM reads its log level when it is imported. Its warnings at every start (no Triton, eager mode, prompts of
        # ids) would hide the user's own output, and real errors are raised.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        use_writable_caches()
        os.environ.update(resolved.engine_env())
        own_engines()
        from real_openrlhf.actors.engine.rollout_engine import RolloutEngine

        spec = EngineSpec(
            model=model,
            device=resolved,
            bound=bound,
            max_model_len=max_model_len,
            load_format="auto",
            logprobs_mode=logprobs_mode,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
        )
        self.max_model_len = max_model_len
        self.logprobs_mode = logprobs_mode
        self._engine: Any = RolloutEngine(spec)
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        threading.Thread(target=self._loop.run_forever, name="judge-engine", daemon=True).start()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return self._call(self._engine.generate(prompts, sampling))

    def close(self) -> None:
        """End the engine. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._call(self._shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        while self._loop.is_running():
            threading.Event().wait(0.01)
        self._loop.close()

    async def _shutdown(self) -> None:
        await self._engine.shutdown()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_GRACE_S)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise JudgeError("this judge is closed; make a new one")
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            try:
                return future.result()
            except BaseException:
                future.cancel()  # after Ctrl-C, the requests are cancelled too
                raise
