"""The rollout engine: prompts in, groups of scored rollouts out, weights from the policy.

It extends the class under OpenRLHF's RolloutRayActor and inherits pausing, sleeping and the token-level request.
Importing this module imports vLLM (10 s), so do it in the engine's process only; OpenRLHF's class adds 17 small modules
and 0.02 s, neither deepspeed nor the trainers among them. `EngineSpec`, and all that needs no vLLM, is in
`actors.engine.spec`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import torch
import vllm
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from torch import Tensor
from vllm.sampling_params import RequestOutputKind

from real_openrlhf.actors.engine.liveness import needs_engine
from real_openrlhf.actors.engine.owner_watch import own_engines
from real_openrlhf.actors.engine.spec import (
    EngineSpec,
    EngineSpecError,
    check_sampling,
    forced_prefixes,
    make_rollout,
    request_seed,
    with_forced,
)
from real_openrlhf.actors.sync.transfer import NO_VERSION, SyncError
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import Group, Rollout
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.tokenizer import end_token_ids, load_tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")

# The plain class: RolloutRayActor itself is already wrapped by ray.remote.
_Base: Any = RolloutRayActor.__ray_metadata__.modified_class.__ray_actor_class__

_SHUTDOWN_S = 8.0


class RolloutEngine(_Base):
    """One vLLM engine. All public methods except the constructor are coroutines.

    bundle_indices, num_gpus: for an engine of several workers inside a Ray placement group, as in
    OpenRLHF's create_vllm_engines.
    """

    worker_extension = "real_openrlhf.actors.engine.vllm_worker.SyncWorkerExtension"

    def __init__(self, spec: EngineSpec, bundle_indices: list[int] | None = None, num_gpus: float = 1) -> None:
        self.spec = spec
        self.tokenizer = load_tokenizer(spec.model, trust_remote_code=spec.trust_remote_code)
        self.reader = ScoreReader.build(spec.bound, self.tokenizer, end_token_ids(spec.model, self.tokenizer))
        self._version = NO_VERSION if spec.load_format == "dummy" else 0
        self._finished = 0
        self._in_flight = 0
        self._mm_pad_token_ids = None  # read by the base class; text only here
        own_engines()
        os.environ.update(spec.device.engine_env(spec.tensor_parallel_size))
        backend = _executor_backend(spec)
        if spec.device.is_cuda:
            self._configure_device_env(backend=backend, bundle_indices=bundle_indices, num_gpus=num_gpus)
        if backend == "ray" and not os.environ.get("RAY_ADDRESS"):
            import ray

            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        self.llm = vllm.AsyncLLMEngine.from_engine_args(
            vllm.AsyncEngineArgs(
                model=spec.model,
                dtype=spec.device.vllm_dtype,
                max_model_len=spec.max_model_len,
                tensor_parallel_size=spec.tensor_parallel_size,
                distributed_executor_backend=backend,
                worker_extension_cls=self.worker_extension,
                enable_prefix_caching=spec.enable_prefix_caching,
                enforce_eager=spec.enforce_eager,
                gpu_memory_utilization=spec.gpu_memory_utilization,
                seed=spec.seed,
                load_format=spec.load_format,
                enable_sleep_mode=spec.enable_sleep,
                logprobs_mode=spec.logprobs_mode,
                trust_remote_code=spec.trust_remote_code,
                # Token in, token out: nothing is ever tokenized or detokenized by the engine.
                skip_tokenizer_init=True,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **spec.device.engine_options(
                    spec.max_model_len,
                    max_num_seqs=spec.max_num_seqs,
                    max_num_batched_tokens=spec.max_num_batched_tokens,
                    fp32_head=spec.fp32_head,
                ),
            )
        )

    @needs_engine
    async def ready(self) -> bool:
        """Returns once the engine answers; raises its error if it could not start."""
        await self.llm.check_health()
        # Every process of the engine has found the segments by now.
        await self.llm.collective_rpc("forget_shared_memory")
        return True

    # -- generation ------------------------------------------------------------------------------

    @needs_engine
    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of sampling.n rollouts per prompt, in the prompts' order, with their scores read.

        Log-probs are log softmax(logits / temperature) over the full vocabulary; at temperature 0,
        those of temperature 1. A sampled end of text stays in the response. With sampling.seed
        every response has its own seed (`request_seed`), so that it does not depend on how
        requests are batched or distributed over engines.

        Raises EngineSpecError for requests that cannot be answered exactly, SyncError when the
        engine has no weights yet.
        """
        check_sampling(sampling, self.spec.logprobs_mode)
        new_tokens = sampling.max_new_tokens + self.spec.bound.extra_tokens
        for prompt in prompts:
            ids = (*prompt.token_ids, *prompt.given_ids)
            self._check_length(ids, new_tokens, f"the prompt of row {prompt.row}")
        if self._version == NO_VERSION:
            raise SyncError("the engine has no weights: it starts with dummy ones and no sync has been completed")
        version = self._version
        self._in_flight += 1  # counts until the forced labels after the responses are read too
        try:
            rollouts = await self._rollouts([(prompt, k) for prompt in prompts for k in range(sampling.n)], sampling)
        finally:
            self._in_flight -= 1
        return [
            Group(
                prompt_ids=torch.tensor(prompt.token_ids, dtype=torch.int64),
                label=prompt.label,
                rollouts=tuple(rollouts[i * sampling.n : (i + 1) * sampling.n]),
                row=prompt.row,
                weight_version=version,
            )
            for i, prompt in enumerate(prompts)
        ]

    @needs_engine
    async def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each sequence of L tokens (2 <= L < max_model_len): [L - 1] float32, log-probs of tokens 1 .. L-1.

        Always at temperature 1, in both log-prob modes. Always computed, never taken from the prefix cache.
        Works with the dummy weights of the start, too.
        """
        for i, ids in enumerate(sequences):
            if len(ids) < 2:
                raise EngineSpecError(f"sequence {i} has {len(ids)} tokens; log-probs need at least 2")
            self._check_length(ids, 1, f"sequence {i}")
        return await self._run_in_order([self._score(ids) for ids in sequences])

    async def _rollouts(self, wanted: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Rollout]:
        if sampling.seed is None:
            return await self._run([self._respond(prompt, sampling, k) for prompt, k in wanted])
        jobs = [self._respond(prompt, sampling, k) for prompt, k in wanted]
        rollouts = await self._run_in_order(jobs, clear_cache=not sampling.continues)
        return await self._read_forced([prompt for prompt, _ in wanted], rollouts, sampling)

    async def _respond(self, prompt: Prompt, sampling: Sampling, sample: int) -> Rollout:
        seed = None if sampling.seed is None else request_seed(sampling.seed, prompt.row, sample)
        ids = [*prompt.token_ids, *prompt.given_ids]
        output = await self._draw(ids, sampling, sampling.max_new_tokens, seed)
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the request for row {prompt.row} ended with {output.finish_reason!r}")
        read_ids = self.spec.read_token_ids
        rollout = make_rollout(
            self.reader, read_ids, output.token_ids, output.logprobs.logprobs, output.finish_reason, prompt.given_ids
        )
        if sampling.seed is None:
            # Immediately, while the response is still in the engine's prefix cache.
            (rollout,) = await self._read_forced([prompt], [rollout], sampling)
        return rollout

    async def _read_forced(
        self, prompts: Sequence[Prompt], rollouts: list[Rollout], sampling: Sampling
    ) -> list[Rollout]:
        """Read the score rows that the responses did not pass, by one request of one token for each.

        prompts: the prompt of each rollout. A scale of single tokens has no such rows.
        """
        if not self.spec.bound.extra_tokens:
            return rollouts
        prefixes = [forced_prefixes(rollout) for rollout in rollouts]
        jobs = [
            self._draw([*prompt.token_ids, *prefix], sampling, 1, None)
            for prompt, wanted in zip(prompts, prefixes)
            for prefix in wanted
        ]
        if not jobs:
            return rollouts
        outputs = iter(
            await (self._run(jobs) if sampling.seed is None else self._run_in_order(jobs, clear_cache=False))
        )
        read_ids = self.spec.read_token_ids
        return [
            with_forced(rollout, read_ids, [next(outputs).logprobs.logprobs for _ in wanted]) if wanted else rollout
            for rollout, wanted in zip(rollouts, prefixes)
        ]

    async def _draw(self, ids: Sequence[int], sampling: Sampling, max_tokens: int, seed: int | None) -> Any:
        """Sample tokens after ids; returns them, and for each the log-probs that `make_rollout` takes."""
        read_ids = self.spec.read_token_ids
        params = vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=max_tokens,
            seed=seed,
            # `logprobs` stays unset: the sampled token's log-prob comes first even so.
            logprob_token_ids=read_ids,
            flat_logprobs=True,
            stop_token_ids=sorted(self.reader.end_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = (await self._request(ids, params)).outputs[0]
        if output.logprobs.token_ids[:: 1 + len(read_ids)] != list(output.token_ids):
            raise RuntimeError("the engine's log-probs do not belong to the sampled tokens")
        return output

    async def _score(self, ids: Sequence[int]) -> Tensor:
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        flat = (await self._request(ids, params)).prompt_logprobs
        if flat.token_ids != list(ids[1:]):
            raise RuntimeError("the engine's prompt log-probs do not belong to the prompt")
        return torch.tensor(flat.logprobs, dtype=torch.float32)

    async def _request(self, ids: Sequence[int], params: vllm.SamplingParams) -> vllm.RequestOutput:
        output = await super().generate(list(ids), params)
        if output is None or not output.finished:
            raise RuntimeError("the engine ended a request without an output")
        self._finished += 1
        return output

    async def _run(self, jobs: list[Coroutine[Any, Any, T]]) -> list[T]:
        """All results in order; the first error cancels the other requests and is raised."""
        tasks = [asyncio.ensure_future(job) for job in jobs]
        self._in_flight += 1
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._in_flight -= 1

    async def _run_in_order(self, jobs: list[Coroutine[Any, Any, T]], *, clear_cache: bool = True) -> list[T]:
        """Like `_run`, but the engine starts only when it has all requests, in order, and with an empty prefix cache.

        Which requests are batched together changes the last bits of log-probs, and these can change a sampled
        token. So arrival times and cached prefixes must not decide how requests are batched. clear_cache=False is for
        requests right after such a batch: the cache then holds exactly that batch.
        """
        await self.llm.pause_generation(mode="keep", clear_cache=clear_cache and self.spec.enable_prefix_caching)
        before = self.get_num_unfinished_requests()
        running = asyncio.ensure_future(self._run(jobs))
        try:
            while self.get_num_unfinished_requests() < before + len(jobs) and not running.done():
                await asyncio.sleep(0.001)
        finally:
            await self.llm.resume_generation()
        return await running

    def _check_length(self, ids: Sequence[int], new_tokens: int, what: str) -> None:
        if len(ids) + new_tokens > self.spec.max_model_len:
            raise EngineSpecError(
                f"{what} has {len(ids)} tokens; with {new_tokens} new ones it exceeds the engine's max_model_len of "
                f"{self.spec.max_model_len}"
            )
        if not ids:
            raise EngineSpecError(f"{what} is empty")

    # -- weights ---------------------------------------------------------------------------------

    @needs_engine
    async def init_sync_group(
        self,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        backend: str,
        timeout_s: float,
        buffer_bytes: int = 0,
    ) -> list[int]:
        """The workers join the sync group as ranks rank_offset and up; returns these. Blocks until all ranks joined."""
        return await self.llm.collective_rpc(
            "init_sync_group", args=(address, port, rank_offset, world_size, backend, timeout_s, buffer_bytes)
        )

    @needs_engine
    async def sync_hosts(self) -> list[str]:
        """`shared_memory.host_id` of each worker."""
        return await self.llm.collective_rpc("sync_host")

    @needs_engine
    async def receive_weights(self, plan: list[list[list[Any]]], version: int) -> int:
        """Receive the plan's buckets (`sync.transfer.to_wire`), load them, empty the prefix cache.

        Raises when the engine is generating, when the deadline passes, and when a parameter cannot
        be loaded or is missing; the engine then refuses to generate until a sync completes.
        """
        if self._in_flight:
            raise SyncError(f"{self._in_flight} calls are generating: weights must not change under them")
        self._version = NO_VERSION
        versions = await self.llm.collective_rpc("receive_weights", args=(plan, version))
        await self.reset_prefix_cache()
        if set(versions) != {version}:
            raise SyncError(f"the engine's workers report weight versions {versions}, expected {version}")
        self._version = version
        return version

    @needs_engine
    async def sleep(self, level: int = 2) -> None:
        """Free the GPU's memory: weights and KV cache are thrown away (level 2).

        Nothing is generated until `wake_up(["weights"])`, a weight sync and `wake_up(["kv_cache"])`.
        """
        if self._in_flight:
            raise SyncError(f"{self._in_flight} calls are generating: the engine cannot sleep under them")
        self._version = NO_VERSION
        await super().sleep(level)

    @needs_engine
    async def wake_up(self, tags: list[str] | None = None) -> None:
        await super().wake_up(tags)

    async def sync_version(self) -> int:
        """Version of the engine's weights; -1 before the first sync."""
        return self._version

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, which earlier weights computed. Raises when requests still hold blocks of it."""
        if not self.spec.enable_prefix_caching:
            return
        for _ in range(100):
            if await self.llm.reset_prefix_cache():
                return
            await asyncio.sleep(0.05)  # the last block of a finished request is freed a moment later
        raise RuntimeError("the prefix cache could not be reset: requests still hold blocks of it")

    # -- state and end -----------------------------------------------------------------------------------

    async def finished_requests(self) -> int:
        """Number of requests answered since this engine started; may be called while others run."""
        return self._finished

    async def in_flight(self) -> int:
        """Number of calls that are being answered; may be called while others run."""
        return self._in_flight

    async def shutdown(self) -> None:
        """End the engine's processes; those that do not end within the grace period are killed."""
        # Blocks the event loop on purpose: vLLM's output task would report the shutdown as a crash.
        self.llm.shutdown(timeout=_SHUTDOWN_S)


def _executor_backend(spec: EngineSpec) -> str:
    if spec.tensor_parallel_size == 1:
        return "uni"
    # Only Ray can place the workers of one engine on several nodes.
    return "ray" if spec.device.is_cuda else "mp"
