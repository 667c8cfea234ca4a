"""Train a judge with REAL.

    python -m real_openrlhf.train_real --actor.model_name_or_path MODEL --data.prompt_dataset FILE ...
    ray job submit -- python -m real_openrlhf.train_real ...

Everything that can be wrong with the input is found before anything starts; --dry_run stops there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from real_openrlhf.actors.device import Device, DeviceError
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import BoundScale, bind_scale
from real_openrlhf.checkpoint.errors import CheckpointError
from real_openrlhf.checkpoint.signals import EXIT_RESUME
from real_openrlhf.checkpoint.store import Checkpoint
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.plan import batch_plan
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.controller.run_log import RunLogError
from real_openrlhf.controller.trainer import Stopped
from real_openrlhf.data.dataset import JudgeDataset
from real_openrlhf.data.sources import nearest
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.data.tokenizer import end_token_ids, load_tokenizer
from real_openrlhf.errors import RunError
from real_openrlhf.evals.benchmarks import Benchmark, load_benchmark, parse_benchmarks
from real_openrlhf.evals.results import metric_names
from real_openrlhf.judge.scoring import room_for_forcing
from real_openrlhf.ray_session import cluster_to_join
from real_openrlhf.resume import check_folders, checkpoint_to_load

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the flags name, loaded and checked."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    bound: BoundScale
    end_ids: frozenset[int]
    template: PromptTemplate
    train_set: JudgeDataset
    benchmarks: tuple[Benchmark, ...]
    warnings: tuple[str, ...]


def load_inputs(config: Config) -> Inputs:
    """Check flags against each other, then load tokenizer, scale and data sets."""
    from real_openrlhf.wiring import check_samplings

    config = with_absolute_paths(config)
    warnings = validate(config, device=known_device(config))
    check_samplings(config)
    check_lora(config)
    tokenizer = load_tokenizer(config.actor.model_name_or_path)
    bound = bind_scale(config.real.score_scale, tokenizer, config.real.anchor)
    template = PromptTemplate(
        input_template=config.data.input_template,
        apply_chat_template=config.data.apply_chat_template,
        enable_thinking=config.data.enable_thinking,
    )

    train_set = JudgeDataset.load(
        config.data.prompt_dataset,
        max_prompt_tokens=config.data.max_len - config.rollout.max_new_tokens - bound.extra_tokens,
        max_samples=config.data.max_samples,
        **_reading(config, tokenizer, template),
    )
    batch_plan(config, len(train_set))  # raises when the prompts do not fill a step
    return Inputs(
        config=config,
        tokenizer=tokenizer,
        bound=bound,
        end_ids=end_token_ids(config.actor.model_name_or_path, tokenizer),
        template=template,
        train_set=train_set,
        benchmarks=load_benchmarks(config, tokenizer, bound, template),
        warnings=tuple(warnings),
    )


def check_lora(config: Config) -> None:
    """ConfigError for adapters that the model cannot have; reads the model's config, not its weights."""
    from real_openrlhf.wiring import lora_of

    lora = lora_of(config)
    if lora is None:
        return
    from real_openrlhf.actors.lora import LoraError, check_adapters

    try:
        check_adapters(config.actor.model_name_or_path, lora)
    except (LoraError, OSError) as error:
        raise ConfigError(f"--actor.model_name_or_path {config.actor.model_name_or_path}: {error}") from error


def load_benchmarks(
    config: Config, tokenizer: PreTrainedTokenizerBase, bound: BoundScale, template: PromptTemplate
) -> tuple[Benchmark, ...]:
    """The held-out benchmarks of --eval.dataset; none without it. Checks that the best checkpoint's metric exists."""
    if config.eval.dataset is None:
        return ()
    room = bound.extra_tokens
    if config.eval.force_anchor:
        reader = ScoreReader.build(bound, tokenizer, end_token_ids(config.actor.model_name_or_path, tokenizer))
        room = room_for_forcing(reader)
    sources = parse_benchmarks([config.eval.dataset], "--eval.dataset")
    metric, names = config.ckpt.best_metric, metric_names(list(sources))
    if metric is not None and metric not in names:
        raise ConfigError(
            f"--ckpt.best_metric_key: there is no evaluation metric {metric!r}{nearest(metric, names)}; the benchmarks "
            f"are {', '.join(sources)}, their metrics stand in README"
        )
    return tuple(
        load_benchmark(
            name,
            source,
            group_key=None,
            max_prompt_tokens=config.data.max_len - config.rollout.max_new_tokens - room,
            max_samples=config.eval.max_samples,
            **_reading(config, tokenizer, template),
        )
        for name, source in sources.items()
    )


def _reading(config: Config, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> dict[str, Any]:
    """How training and evaluation data are read alike."""
    return dict(
        input_key=config.data.input_key,
        label_key=config.data.label_key,
        scale=config.real.score_scale,
        tokenizer=tokenizer,
        template=template,
        skip_bad_rows=config.data.skip_bad_rows,
    )


def known_device(config: Config) -> Literal["cpu", "cuda"] | None:
    """The device as far as it is known before Ray: a cluster that is joined decides "auto" by its own GPUs.

    Raises DeviceError where --real.device asks for GPUs that this machine does not have.
    """
    if cluster_to_join(config.ray.address):
        return None if config.real.device == "auto" else config.real.device
    return "cuda" if Device.resolve(config.real.device, config.ds.param_dtype).is_cuda else "cpu"


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute: actors on a joined cluster run in another folder than the driver."""
    actor, ckpt = config.actor, config.ckpt
    if Path(actor.model_name_or_path).is_dir():
        actor = replace(actor, model_name_or_path=str(Path(actor.model_name_or_path).resolve()))
    if ckpt.output_dir:
        ckpt = replace(ckpt, output_dir=str(Path(ckpt.output_dir).resolve()))
    if ckpt.path:
        ckpt = replace(ckpt, path=str(Path(ckpt.path).resolve()))
    return replace(config, actor=actor, ckpt=ckpt)


def run(inputs: Inputs, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Start the actors, train, export. Returns the metrics of the last evaluation."""
    from real_openrlhf.launch import launch

    return launch(inputs, checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the input is wrong, 1 the run failed, 85 stopped by a signal: run me again to resume."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = parse_args(list(sys.argv[1:] if argv is None else argv))
        inputs = load_inputs(config)
        if config.dry_run:
            from real_openrlhf.launch import describe

            sys.stdout.write(describe(inputs) + "\n")
            return 0
        checkpoint = checkpoint_to_load(inputs)
        check_folders(inputs, checkpoint)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        run(inputs, checkpoint)
    except Stopped as stopped:
        if not stopped.saved:
            sys.stderr.write(f"error: {stopped}, but its state could not be saved\n")
            return 1
        logger.info("%s; the same command with --ckpt.load latest goes on", stopped)
        return EXIT_RESUME
    except (ConfigError, DeviceError, RunLogError, CheckpointError) as error:
        # What only shows once the cluster or the log is there; nothing has been trained.
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    logger.info("done: the judge is in %s", Path(config.ckpt.output_dir) / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
