"""REAL's reward in a stock OpenRLHF run: `--train.agent_func_path` takes this file, or one that changes its settings.

    from real_openrlhf.dropin.agent import AgentExecutor as Real
    from real_openrlhf.dropin.settings import RealSettings

    class AgentExecutor(Real):
        settings = RealSettings(scale="0-9", lam=0.5)

The policy samples feedback and score as ever. The engine returns the log-probs of the scale's tokens with the same
generation, so the reward r = -(E[score] - y)^2 + lambda log p(y) costs no forward pass. The actions end before the
score: what is trained is the feedback, Term 1. Term 2 needs the loss, see README.md.
"""

from __future__ import annotations

from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor

from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.common.versions import ENGINE, warn_of_versions
from real_openrlhf.data.tokenizer import end_token_ids
from real_openrlhf.dropin.engine_answer import Listener, check_request, read_rollout
from real_openrlhf.dropin.outcome import outcome_of
from real_openrlhf.dropin.settings import DropInError, RealSettings


class AgentExecutor(SingleTurnAgentExecutor):
    """One per engine. OpenRLHF makes it without arguments, so `settings` is a class attribute."""

    settings = RealSettings()

    def __init__(self) -> None:
        super().__init__()
        warn_of_versions(*ENGINE)
        self._reader: ScoreReader | None = None

    async def execute(
        self,
        prompt: str,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """One rollout, in the form that OpenRLHF's `SingleTurnAgentExecutor` returns.

        reward      r; of a rollout without a readable score the floor of `algo.rewards.real_rewards`
        scores      1.0 where the written score is the nearest to the label, else 0.0 (--algo.dynamic_filtering_enable)
        extra_logs  see `outcome.Outcome.logs`
        """
        if images:
            raise DropInError("this agent judges text; leave out --data.max_images_per_prompt")
        try:
            target = self.settings.target(label)
        except ValueError as error:
            raise DropInError(f"--data.label_key: {error}; the row's prompt begins {prompt[:60]!r}") from error
        reader = self._reader_for(hf_tokenizer, llm_engine)
        check_request(sampling_params, llm_engine)
        listener = Listener(llm_engine, reader.bound.read_token_ids)
        output: dict[str, Any] = await super().execute(
            prompt,
            label,
            sampling_params,
            # A label that is written by force may reach beyond the response, and must still fit.
            max_length - reader.bound.extra_tokens,
            hf_tokenizer,
            listener,
        )
        ((start, _),) = output["action_ranges"]
        rollout = await read_rollout(reader, listener, output["observation_tokens"][:start])
        outcome = outcome_of(rollout, target, self.settings)
        # `cot_length` is the whole response where there is no score: all of it is what made it invalid.
        output["action_ranges"] = [(start, start + rollout.cot_length)]
        output.update(reward=outcome.reward, scores=outcome.accuracy, extra_logs=outcome.logs())
        return output

    def _reader_for(self, tokenizer: Any, engine: Any) -> ScoreReader:
        if self._reader is None:
            path = getattr(engine, "kwargs", {}).get("model") or tokenizer.name_or_path
            self._reader = self.settings.reader(tokenizer, end_token_ids(path, tokenizer))
        return self._reader
