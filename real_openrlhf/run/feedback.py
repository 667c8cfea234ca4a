"""Feedback for a warm-up, written by a model on the run's engines before training begins.

Its record is <output>/feedback.jsonl: a line per row, written as they come, so that a start that was interrupted goes
on after the last one.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import ray
from tqdm import tqdm

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.common.errors import RunError
from real_openrlhf.common.jsonl import JsonLines, JsonLinesError, keep_lines, read_lines
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.controller.output_folder import FEEDBACK_FILE, LIBRARIES_FILE
from real_openrlhf.data.completed import EMPTY, Completed, complete, tail_tokens
from real_openrlhf.data.given import with_responses
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.export.fingerprint import weights_sha256
from real_openrlhf.run.library_log import library_log
from real_openrlhf.run.placement import ROLLOUT, release, reserve
from real_openrlhf.run.plan import RunPlan, make_plan
from real_openrlhf.run.ray_groups import RayRolloutGroup
from real_openrlhf.run.ray_session import passed_environment, ray_session
from real_openrlhf.run.specs import engine_places
from real_openrlhf.run.start import on_cluster

logger = logging.getLogger(__name__)

# Rows per engine that are asked for at a time, and lost where a start is interrupted.
_ROWS_AT_A_TIME = 256
# Of labels between two scores, as `python -m real_openrlhf.data --sft` rounds them.
_ROUNDING = "stochastic"


def rows_without_feedback(plan: RunPlan) -> list[Prompt]:
    """The rows whose feedback a model is to write, by --warmup.feedback."""
    given, wanted = plan.inputs.given, plan.config.warmup.feedback
    if given is None or wanted == "given":
        return []
    lacks = set(given.without)
    return [p for p in plan.inputs.train_set.prompts if wanted == "sampled" or p.row in lacks]


def with_feedback(plan: RunPlan, model: str | None = None) -> RunPlan:
    """The plan with a response for every row: the rows that lack one get feedback by `model`, and the human score.

    model: a Hugging Face folder of the start's tokenizer; None: the start itself. The caller holds the lock of the
    output folder. ConfigError for a record of other feedback there; RunError when the model writes none at all.
    """
    prompts = rows_without_feedback(plan)
    if not prompts:
        return plan
    path = Path(plan.config.ckpt.output_dir) / FEEDBACK_FILE
    model = model or plan.config.actor.model_name_or_path
    done = _recorded(path, _identity(plan, model))
    missing = [prompt for prompt in prompts if prompt.row not in done]
    if missing:
        logger.info("%s writes feedback for %d rows of %d", model, len(missing), len(prompts))
        lines = JsonLines(path, append=True)
        with (
            closing(lines),
            library_log(path.parent / LIBRARIES_FILE, append=True) as terminal,
            closing(_write(plan, missing, model, terminal)) as written,
        ):
            for prompt, completed in written:
                done[prompt.row] = completed
                lines.write({"row": prompt.row, "label": prompt.label, **vars(completed)})
    mine = {prompt.row: done[prompt.row] for prompt in prompts}
    ended = Counter(completed.ended for completed in mine.values())
    logger.info("feedback in %s: %s", path, ", ".join(f"{n} by {why}" for why, n in sorted(ended.items())))
    if ended[EMPTY] == len(mine):
        raise RunError(
            f"{model} wrote no feedback for any of {len(mine)} rows (see {path}); does it want "
            "--data.apply_chat_template, or a longer --rollout.max_new_tokens?"
        )
    given = plan.inputs.given
    assert given is not None
    full = with_responses(given, {row: completed.response_ids for row, completed in mine.items()})
    return make_plan(replace(plan.inputs, given=full, train_set=full.dataset))


def _write(
    plan: RunPlan, prompts: Sequence[Prompt], model: str, terminal: TextIO
) -> Generator[tuple[Prompt, Completed], None, None]:
    """Feedback in the prompts' order, on engines of their own, which end with this. terminal: for a bar."""
    config, inputs = plan.config, plan.inputs
    reader = ScoreReader.build(inputs.bound, inputs.tokenizer, inputs.end_ids)
    sampling = Sampling(
        n=1,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=config.rollout.max_new_tokens - tail_tokens(reader, inputs.tokenizer),
        # A seed per row: what a row gets does not depend on where a start was interrupted.
        seed=config.train.seed,
    )
    at_a_time = _ROWS_AT_A_TIME * config.vllm.num_engines
    with _engines(plan, model) as engines:
        shown = config.logger.progress
        with tqdm(total=len(prompts), desc="feedback", unit="row", disable=not shown, file=terminal) as bar:
            for start in range(0, len(prompts), at_a_time):
                part = prompts[start : start + at_a_time]
                for prompt, group in zip(part, engines.generate(part, sampling), strict=True):
                    (rollout,) = group.rollouts
                    yield (
                        prompt,
                        complete(
                            reader,
                            inputs.tokenizer,
                            rollout.token_ids.tolist(),
                            finished=rollout.finish_reason == "stop",
                            label=prompt.label,
                            rounding=_ROUNDING,
                            rng=random.Random(f"{config.train.seed}|{prompt.row}"),
                        ),
                    )
                bar.update(len(part))


@contextmanager
def _engines(plan: RunPlan, model: str) -> Iterator[RayRolloutGroup]:
    """Engines of this model that are ready, on the run's cluster. What they took is free again after it."""
    config = plan.config
    n = config.vllm.num_engines
    with (
        ray_session(
            config.ray.address,
            num_cpus=config.ray.num_cpus,
            needed_cpus=float(n * config.vllm.tensor_parallel_size),
        ) as session,
        ExitStack() as ends,
    ):
        plan = on_cluster(plan, session)
        places = reserve([engine_places(config, plan.device)], config.ray.placement_timeout)
        # The cluster may live on, and training needs the room.
        ends.callback(release, places)
        engines = RayRolloutGroup(
            replace(plan.engine, model=model, load_format="auto", enable_sleep=False),
            n_engines=n,
            group=places[ROLLOUT],
            device=plan.device,
            env=passed_environment(),
            call_timeout_s=config.ray.call_timeout,
        )
        ends.callback(engines.shutdown)
        ray.get(engines.ready())
        yield engines


def _identity(plan: RunPlan, model: str) -> dict[str, Any]:
    """What decides the feedback of a row."""
    config, given = plan.config, plan.inputs.given
    assert given is not None
    return {
        "data": given.dataset.sha256,
        "model": weights_sha256(model) or model,
        "anchors": list(config.real.anchor),
        "scale": config.real.scale,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.train.seed,
    }


def _recorded(path: Path, identity: dict[str, Any]) -> dict[int, Completed]:
    """What an earlier start wrote; a new record is opened where there is none."""
    if not path.exists():
        lines = JsonLines(path, append=False)
        lines.write({"feedback_of": identity})
        lines.close()
        return {}
    done: dict[int, Completed] = {}
    try:
        keep_lines(path)  # without a line that was cut off
        for number, line in read_lines(path):
            if number == 1:
                found = line.get("feedback_of") or {}
                changed = sorted(name for name in identity if found.get(name) != identity[name])
                if changed:
                    raise ConfigError(
                        f"{path} holds feedback of another run (other {', '.join(changed)}); remove it, or choose "
                        "another --ckpt.output_dir"
                    )
                continue
            done[line["row"]] = Completed(
                response_ids=tuple(line["response_ids"]), feedback=line["feedback"], ended=line["ended"]
            )
    except (JsonLinesError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a record of feedback ({error}); remove it") from error
    if not path.read_bytes():
        path.unlink()
        return _recorded(path, identity)
    return done
