"""`Judge`: scores a response to an instruction with a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from real_openrlhf.actors.engine.limits import ModelLimits
from real_openrlhf.actors.engine.spec import EngineSpecError, check_read_tokens, check_sampling, logprobs_mode_for
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.paths import expand
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.template import PromptError
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.export.settings import JudgeSettings
from real_openrlhf.judge.backends import AUTO, VLLM, check_backend, chosen_backend, start_backend
from real_openrlhf.judge.calibration import Calibration
from real_openrlhf.judge.pairs import ONE_PROMPT, SCORES, check_mode, check_tie_margin, one_prompt, verdict
from real_openrlhf.judge.resolve_settings import find_settings, make_reader
from real_openrlhf.judge.rubrics import SINGLE, AnyRubric, as_dimensions, check_weights, combine
from real_openrlhf.judge.scoring import average, room_for_forcing, score_prompts
from real_openrlhf.judge.types import MAX_PROMPT_TOKENS, JudgeBackend, JudgeError, PromptTooLongError, Score

# Dimension of the rubric -> prompt; a single rubric has one dimension, "".
Prepared = dict[str, Prompt]
ITEM_KEYS = ("instruction", "response", "rubric", "reference", "context")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two responses, by the score of each or by both in one prompt.

    winner      "a", "b" or "tie"; None when a score is missing
    difference  score of a minus score of b (calibrated ones where the judge calibrates); in one prompt half the
                difference of the two orders' scores, above 0 where a is better; None likewise
    a, b        the scores of a and b; in one prompt those of the prompt in which a, and b, comes first
    consistent  in one prompt: whether both orders have the same winner; None else
    """

    winner: str | None
    difference: float | None
    a: Score
    b: Score
    consistent: bool | None = None


class Judge:
    """Scores responses. Its engine starts at the first call, and is ended by `close` or the `with` block.

    model         an export of train_real, or any Hugging Face folder or hub id together with `settings`
    server        address of an OpenAI-compatible server of this model ("http://host:8000"); weights are then not loaded
    backend       "transformers" or "vllm", in this process; None or "auto": by the model's size and the device, see
                  `judge.backends`; or a `JudgeBackend` to use instead
    settings      see `judge.resolve_settings.plain_settings`; None reads the export's
    template      how instruction and response become a prompt: a name or path for `JudgeTemplate.load`, or a
                  `JudgeTemplate`; None: the export's, else "paper"
    template_suffix   a second template that is appended to the first, such as "base_suffix"
    other_template    allow a template that the judge was not trained on
    n             responses per prompt whose scores are averaged; sampled when n > 1
    temperature   0 is greedy; None: greedy for n = 1, else the temperature of the settings. E[score] is read at the
                  settings' temperature, so values other than 0 and that temperature are refused.
    seed          for sampled responses: the same prompt gets the same responses, whatever batch it is in
    max_new_tokens, renormalise   None: the settings'
    max_model_len engine in this process: tokens of prompt and response together; longer prompts are refused
    force         append the anchor once to a response without a score (`Score.n_forced` counts these)
    calibrated    fill `Score.calibrated` by the calibration in the model's folder
    device        "auto", "cpu" or "cuda"
    server_options   keywords of `ServerBackend`: api_key, concurrency, model, ...
    """

    def __init__(
        self,
        model: str | Path,
        *,
        server: str | None = None,
        backend: JudgeBackend | str | None = None,
        settings: JudgeSettings | None = None,
        template: str | Path | JudgeTemplate | None = None,
        template_suffix: str | Path | None = None,
        other_template: bool = False,
        n: int = 1,
        temperature: float | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        max_new_tokens: int | None = None,
        renormalise: bool | None = None,
        max_model_len: int | None = None,
        force: bool = True,
        calibrated: bool = False,
        device: str = "auto",
        trust_remote_code: bool = False,
        server_options: Mapping[str, Any] | None = None,
    ) -> None:
        if server is not None and backend is not None:
            raise JudgeError("give a server or a backend, not both")
        kind = check_backend(backend) if isinstance(backend, str) else AUTO
        if server_options and server is None:
            raise JudgeError("server_options are given, but no server")
        model = expand(str(model))
        self.model = model
        self.tokenizer = load_tokenizer(self.model, trust_remote_code=trust_remote_code, name="the model")
        found = find_settings(model, self.tokenizer, settings)
        self.settings = replace(
            found,
            max_new_tokens=found.max_new_tokens if max_new_tokens is None else max_new_tokens,
            renormalise=found.renormalise if renormalise is None else renormalise,
        )
        self.scale = self.settings.scale
        self.reader = make_reader(self.settings, self.tokenizer)
        self._kind: str | None = None
        if server is None and (backend is None or isinstance(backend, str)):
            self._kind = chosen_backend(kind, self.model, device)
            if self._kind == VLLM:
                check_read_tokens(self.reader.bound)
        self.settings.template.check(self.tokenizer)
        self.template = self._chosen_template(template, template_suffix, other_template)
        self.sampling = self._sampling(n, temperature, top_p, seed)
        self.force = force
        self.calibration = None
        if calibrated:
            self.calibration = Calibration.load(self.model, scale=self.scale, renormalise=self.settings.renormalise)
        self._room = self.settings.max_new_tokens + (
            room_for_forcing(self.reader) if force else self.reader.bound.extra_tokens
        )
        self._server, self._server_options = server, dict(server_options or {})
        self._device, self._trust, self._max_model_len = device, trust_remote_code, max_model_len
        self._backend: JudgeBackend | None = None if isinstance(backend, str) else backend
        self._owns_backend = self._backend is None

    def _chosen_template(
        self, given: str | Path | JudgeTemplate | None, suffix: str | Path | None, other: bool
    ) -> JudgeTemplate:
        trained = self.settings.judge_template
        if given is None and suffix is None and trained is not None:
            return trained
        chosen = _template("paper" if given is None else given, suffix)
        if trained is not None and chosen.sha256 != trained.sha256 and not other:
            raise JudgeError(
                f"{self.model} was trained on prompts of the template {trained.name}, not {chosen.name}; leave the "
                "template out, or pass other_template=True (--other_template)"
            )
        return chosen

    # -- scoring -------------------------------------------------------------------------------------

    def score(
        self,
        instruction: str,
        response: str,
        *,
        rubric: AnyRubric = None,
        reference: str | None = None,
        context: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Score:
        """Score one response. See `score_batch`."""
        item = {"instruction": instruction, "response": response, "rubric": rubric}
        return self.score_batch([{**item, "reference": reference, "context": context}], weights=weights)[0]

    def score_batch(
        self, items: Sequence[Mapping[str, Any]], *, weights: Mapping[str, float] | None = None
    ) -> list[Score]:
        """Score items with instruction, response and, if the template needs them, rubric, reference and context.

        rubric: a text, a `Rubric`, a mapping of Prometheus's fields (criteria, score1_description, ...), or a mapping
        of dimension -> rubric. Several dimensions are judged separately; the score is their mean, or the weighted
        mean by `weights` (dimension -> positive number).

        All parts are plain text: chat tokens within a response do not end the prompt, and a score that a response
        contains is never read, since scores are read from generated tokens only.

        Raises JudgeError or PromptError naming the item before anything is generated.
        """
        prepared = [_named(i, self.prepare, item, weights) for i, item in enumerate(items)]
        return self.score_prepared(prepared, weights=weights)

    def score_prompts(self, prompts: Sequence[Any]) -> list[Score]:
        """Score whole prompts in the form of the training data's (text or chat messages), without a judge template."""
        return self.score_prepared([_named(i, self.prepare_prompt, raw) for i, raw in enumerate(prompts)])

    def prepare(self, item: Mapping[str, Any], weights: Mapping[str, float] | None = None) -> Prepared:
        """An item of `score_batch`, checked and tokenised. Raises JudgeError or PromptError."""
        unknown = sorted(set(item) - set(ITEM_KEYS))
        if unknown:
            raise JudgeError(f"there is no part {unknown[0]!r}; an item has {', '.join(ITEM_KEYS)}")
        if self.template.scale is not None and ScoreScale.parse(self.template.scale) != self.scale:
            raise JudgeError(
                f"the template {self.template.name} asks for scores on the scale {self.template.scale}, but the "
                f"judge's is {self.scale}; give the template that it was trained with, or whole prompts"
            )
        dimensions = as_dimensions(item.get("rubric"))
        check_weights(weights, set(dimensions))
        found = {}
        for name, rubric in dimensions.items():
            messages = self.template.messages(**{**{key: item.get(key) for key in ITEM_KEYS}, "rubric": rubric})
            # Without a system message the prompt is a plain text, as the input template needs it.
            raw: Any = messages if len(messages) > 1 else messages[0]["content"]
            found[name] = self._prompt(raw, literally=True)
        return found

    def prepare_prompt(self, raw: Any) -> Prepared:
        """A whole prompt, checked and tokenised. Raises JudgeError or PromptError."""
        return {SINGLE: self._prompt(raw, literally=None)}

    def score_prepared(
        self, prepared: Sequence[Prepared], *, weights: Mapping[str, float] | None = None
    ) -> list[Score]:
        """Score what `prepare` or `prepare_prompt` returned, all in one batch."""
        scores = iter(self._score([prompt for row in prepared for prompt in row.values()]))
        return [combine({name: next(scores) for name in row}, weights) for row in prepared]

    def compare(
        self,
        instruction: str,
        a: str,
        b: str,
        *,
        mode: str = SCORES,
        tie_margin: float = 0.0,
        rubric: AnyRubric = None,
        reference: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Comparison:
        """Which response is better.

        mode: "scores", from a score of each by itself, so that no order of presentation can sway it; or "one_prompt",
        both in one prompt, asked in both orders (see `judge.pairs`). tie_margin: what differs by no more is a tie.
        """
        check_tie_margin(tie_margin)
        item = {"instruction": instruction, "rubric": rubric, "reference": reference}
        first, second = self.score_prepared(self.prepare_pair(item, a, b, mode=mode, weights=weights), weights=weights)
        values = [s.score if s.calibrated is None or mode == ONE_PROMPT else s.calibrated for s in (first, second)]
        found = verdict(values[0], values[1], mode=mode, scale=self.scale, tie_margin=tie_margin)
        if found is None:
            return Comparison(winner=None, difference=None, a=first, b=second)
        return Comparison(
            winner=found.winner, difference=found.difference, a=first, b=second, consistent=found.consistent
        )

    def prepare_pair(
        self,
        item: Mapping[str, Any],
        a: str,
        b: str,
        *,
        mode: str = SCORES,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[Prepared, Prepared]:
        """The two prompts of `compare`, checked and tokenised; item: what goes with both responses. In mode "scores"
        that of a and that of b, in mode "one_prompt" that with a first and that with b first."""
        if check_mode(mode) == SCORES:
            items = [{**item, "response": response} for response in (a, b)]
        else:
            items = [one_prompt(item, *order, self.scale) for order in ((a, b), (b, a))]
        first, second = (self.prepare(one, weights) for one in items)
        return first, second

    # -- the backend ---------------------------------------------------------------------------------

    @property
    def backend_name(self) -> str:
        """ "transformers" or "vllm" in this process, "server", or "given"."""
        return self._kind or ("given" if self._server is None else "server")

    @property
    def backend(self) -> JudgeBackend:
        """The backend, started when it is first needed."""
        if self._backend is None:
            self._backend = self._make_backend()
        return self._backend

    @cached_property
    def _limit(self) -> int | None:
        """Most tokens of prompt and response together, without starting an engine; None: not known."""
        if self._backend is None and self._server is None:
            return engine_length(self.model, self._room, self._max_model_len, trust_remote_code=self._trust)
        return getattr(self.backend, "max_model_len", None)

    @property
    def max_prompt_tokens(self) -> int | None:
        """Most tokens of a prompt, with room for response and forced anchor; None if the backend has no limit."""
        return None if self._limit is None else self._limit - self._room

    def close(self) -> None:
        """End the engine or connections that the judge opened itself; a backend that was given is not closed."""
        if self._owns_backend and self._backend is not None:
            self._backend.close()  # type: ignore[attr-defined]
            self._backend = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_backend(self) -> JudgeBackend:
        mode = logprobs_mode_for(self.sampling.temperature, self.sampling.top_p)
        if self._server is not None:
            from real_openrlhf.judge.http_backend import ServerBackend

            options = {"logprobs_mode": mode, **self._server_options}
            return ServerBackend(self._server, reader=self.reader, **options)
        assert self._kind is not None and self._limit is not None
        return start_backend(
            self._kind,
            self.model,
            self.reader,
            max_model_len=self._limit,
            device=self._device,
            logprobs_mode=mode,
            trust_remote_code=self._trust,
        )

    # -- prompts -------------------------------------------------------------------------------------

    def _prompt(self, raw: Any, *, literally: bool | None) -> Prompt:
        text, ids = self.settings.template.render(self.tokenizer, raw, literally=literally)
        limit = self._limit
        if limit is not None and len(ids) + self._room > limit:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, but only {limit - self._room} fit: {limit} in all, "
                f"{self._room} of them for the response; lower max_new_tokens or raise the model length"
            )
        # The row number, which the seed is made from, is a hash of the content: the order of prompts does not matter.
        digest = hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()
        return Prompt(token_ids=ids, label=float("nan"), row=int.from_bytes(digest, "big") >> 1, text=text)

    def _score(self, prompts: Sequence[Prompt]) -> list[Score]:
        judged = score_prompts(
            self.backend,
            prompts,
            self.sampling,
            reader=self.reader,
            renormalise=self.settings.renormalise,
            force=self.force,
        )
        scores = [average(row, self.scale) for row in judged]
        if self.calibration is None:
            return scores
        return [s if s.score is None else replace(s, calibrated=self.calibration(s.score)) for s in scores]

    def _sampling(self, n: int, temperature: float | None, top_p: float, seed: int) -> Sampling:
        read_at = self.settings.temperature
        if temperature is None:
            temperature = 0.0 if n == 1 and read_at == 1 else read_at
        if (temperature or 1.0) != read_at:
            raise JudgeError(
                f"this judge's distributions are read at temperature {read_at:g}, so it cannot sample at "
                f"{temperature:g}; use temperature {read_at:g}"
            )
        sampling = Sampling(
            n=n, temperature=temperature, top_p=top_p, max_new_tokens=self.settings.max_new_tokens, seed=seed
        )
        check_sampling(sampling, logprobs_mode_for(temperature, top_p))
        return sampling


def engine_length(model: str, room: int, wanted: int | None, *, trust_remote_code: bool = False) -> int:
    """max_model_len of the engine: `wanted` if given, else MAX_PROMPT_TOKENS + room, but at most the model's."""
    try:
        limits = ModelLimits.of(model, trust_remote_code=trust_remote_code)
    except EngineSpecError as error:
        raise JudgeError(str(error)) from error
    most = limits.positions or MAX_PROMPT_TOKENS + room
    length = min(most, MAX_PROMPT_TOKENS + room) if wanted is None else wanted
    if length > most:
        raise JudgeError(f"max_model_len {length} is more than the {most} positions of {model}")
    if length <= room:
        raise JudgeError(f"{room} tokens for the response leave none of {length} for the prompt; lower max_new_tokens")
    return length


def _template(template: str | Path | JudgeTemplate, suffix: str | Path | None) -> JudgeTemplate:
    if not isinstance(template, JudgeTemplate):
        return JudgeTemplate.load(template, suffix=suffix)
    if suffix is not None:
        raise JudgeError("a suffix can be added to a template's name or path, not to a template that is already loaded")
    return template


def _named(index: int, prepare: Callable[..., Prepared], *arguments: Any) -> Prepared:
    try:
        return prepare(*arguments)
    except (JudgeError, PromptError) as error:
        raise type(error)(f"item {index}: {error}") from error
