"""What `python -m real_openrlhf.evaluate` does with its flags: a judge over benchmarks, and the report."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.common.errors import RunError
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.evals.benchmarks import Benchmark, load_benchmark, parse_benchmarks
from real_openrlhf.evals.judging import earlier_predictions, identity_of, judge_all, largest_difference, name_of
from real_openrlhf.evals.pairs import load_pairs
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.report import PREDICTIONS, settings_of, write_report
from real_openrlhf.judge.cli_args import read_key
from real_openrlhf.judge.cli_model import judge_of
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.types import JudgeBackend

logger = logging.getLogger(__name__)

# What the data set's own messages call these flags.
_FLAG_NAMES = {
    "--data.max_len": "--max_model_len",
    "--rollout.max_new_tokens": "--max_new_tokens",
    "--data.": "--",
}
_NO_LIMIT = 1 << 31
SPEED = "speed.json"


def make_judge(args: argparse.Namespace, backend: JudgeBackend | None = None) -> Judge:
    """The judge that the flags name; its engine does not run yet. backend: instead of that engine."""
    options: dict[str, Any] = {}
    if args.server:
        options = {
            "model": args.server_model,
            "concurrency": args.concurrency,
            "api_key": read_key(args.api_key_env),
        }
    return judge_of(
        args,
        server=args.server,
        server_options=options,
        backend=backend or (None if args.server else args.backend),
        top_p=args.top_p,
        renormalise=args.renormalise,
        max_model_len=args.max_model_len,
        device=args.device,
    )


def load_benchmarks(args: argparse.Namespace, judge: Judge) -> list[Benchmark]:
    """All benchmarks, checked and tokenised for this judge."""
    limit = judge.max_prompt_tokens
    try:
        found = [
            load_benchmark(
                name,
                source,
                input_key=args.input_key,
                label_key=args.label_key,
                group_key=args.group_key,
                scale=judge.scale,
                tokenizer=judge.tokenizer,
                template=judge.settings.template,
                max_prompt_tokens=_NO_LIMIT if limit is None else limit,
                max_samples=args.max_samples,
                seed=args.seed,
                skip_bad_rows=args.skip_bad_rows,
            )
            for name, source in parse_benchmarks(args.benchmark or (), "--benchmark").items()
        ]
        found += _load_pairs(args, judge)
        _check_names(found)
        return found
    except ValueError as error:
        message = str(error)
        for ours, here in _FLAG_NAMES.items():
            message = message.replace(ours, here)
        raise EvaluationError(message) from error


def _load_pairs(args: argparse.Namespace, judge: Judge) -> list[Benchmark]:
    return [
        benchmark
        for name, source in parse_benchmarks(args.pairs or (), "--pairs").items()
        for benchmark in load_pairs(
            name,
            source,
            judge,
            mode=args.pair_mode,
            rubric=args.rubric,
            group_key=args.group_key,
            by_subset=args.by_subset,
            max_samples=args.max_samples,
            seed=args.seed,
            skip_bad_rows=args.skip_bad_rows,
        )
    ]


def _check_names(benchmarks: Sequence[Benchmark]) -> None:
    names = [benchmark.name for benchmark in benchmarks]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise EvaluationError(f"--pairs: two benchmarks are named {doubled[0]!r}; write NAME=PATH with different names")


def run(args: argparse.Namespace, backend: JudgeBackend | None = None) -> str:
    """Evaluate; returns what is to be shown. backend: see `make_judge`. FolderError while another writes there."""
    with FolderLock(args.output_dir, "--output_dir"):
        return _run(args, backend)


def _run(args: argparse.Namespace, backend: JudgeBackend | None) -> str:
    with make_judge(args, backend) as judge:
        benchmarks = load_benchmarks(args, judge)
        earlier = None if args.feedback_of is None else earlier_predictions(args.feedback_of, benchmarks)
        identity = identity_of(args.model, judge, benchmarks, server=bool(args.server), feedback_of=args.feedback_of)
        path = args.output_dir / PREDICTIONS
        try:
            store, speed = judge_all(
                judge, benchmarks, path, identity, batch_size=args.batch_size, earlier=earlier, locked=True
            )
        except OSError as error:
            raise RunError(f"{args.output_dir} cannot be written: {error}; the same command goes on") from error
    if earlier is not None:
        logger.info("%s", largest_difference(store, earlier))
    predictions = [store.done[b.name, prompt.row] for b in benchmarks for prompt in b.prompts]
    method = args.method or name_of(args.model)
    settings = settings_of(
        identity,
        seed=args.seed,
        n_resamples=args.n_resamples,
        confidence=args.confidence,
        tie_margin=args.tie_margin,
    )
    raters = {benchmark.name: benchmark.raters for benchmark in benchmarks if benchmark.raters}
    shown = write_report(
        args.output_dir, identity, predictions, settings, method=method, training=args.training, raters=raters
    )
    if speed is None:
        return shown
    # Not among the results, which do not depend on the machine.
    content = {**speed.to_json(), "batch_size": args.batch_size, "samples": args.n, "backend": judge.backend_name}
    write_text(args.output_dir / SPEED, json.dumps(content, indent=2) + "\n")
    return f"{shown}\n\n{speed}"
