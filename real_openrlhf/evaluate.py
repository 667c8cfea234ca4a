"""Evaluate a judge on benchmarks with human labels, by RAIL (E[score]) and by standard decoding.

    python -m real_openrlhf.evaluate --model JUDGE --benchmark flask=FILE mt_bench=FILE \\
        --output_dir runs/eval/judge
    python -m real_openrlhf.evaluate --model JUDGE --pairs judgebench=FILE --output_dir runs/eval/pairs
    python -m real_openrlhf.evaluate --compare runs/eval/base runs/eval/judge

Interrupted, the same command goes on where it stopped. What is written: `evals.report`; what the numbers mean:
`evals.results`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.errors import RunError
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.paths import path_argument
from real_openrlhf.evals.benchmarks import Benchmark, load_benchmark, parse_benchmarks
from real_openrlhf.evals.judging import earlier_predictions, identity_of, judge_all, largest_difference, name_of
from real_openrlhf.evals.pairs import load_pairs
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.report import (
    PREDICTIONS,
    compare_runs,
    load_run,
    settings_of,
    write_comparison,
    write_report,
)
from real_openrlhf.judge.cli_model import add_model, chosen_settings, read_key
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.pairs import MODES, SCORES, check_tie_margin
from real_openrlhf.judge.rubrics import read_rubric
from real_openrlhf.judge.types import JudgeBackend

logger = logging.getLogger(__name__)

# What the data set's own messages call these flags.
_FLAG_NAMES = {
    "--data.max_len": "--max_model_len",
    "--rollout.max_new_tokens": "--max_new_tokens",
    "--data.": "--",
}
_NO_LIMIT = 1 << 31


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m real_openrlhf.evaluate",
        description="Judge benchmarks with human labels; or compare evaluations that are done.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    take_negative_values(parser)
    add_model(parser, required=False)
    add = parser.add_argument
    add("--benchmark", nargs="+", action="extend", metavar="NAME=PATH", help="files of judged prompts")
    add("--pairs", nargs="+", action="extend", metavar="NAME=PATH", help="files of pairs of responses, one preferred")
    add("--output_dir", type=path_argument, help="folder of this evaluation; with --compare, of the comparison")
    add(
        "--compare",
        nargs="+",
        type=path_argument,
        metavar="RUN",
        help="output folders: all others against the first, paired",
    )
    add("--method", help="first cell of the table; the model's name when not given")
    add("--training", default="", help="second cell of the table, such as SFT or RL")
    data = parser.add_argument_group("data")
    data.add_argument("--input_key", default="prompt", help="column of the prompt")
    data.add_argument("--label_key", default="label", help="column of the human score")
    data.add_argument("--group_key", help="column of what rows share (question, pair); 'group' where there is one")
    data.add_argument("--max_samples", type=int, help="use the first so many rows of each benchmark")
    data.add_argument("--skip_bad_rows", action="store_true", help="count and list bad rows and go on without them")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument(
        "--pair_mode", choices=MODES, default=SCORES, help="each response by itself, or both in one prompt"
    )
    pairs.add_argument("--tie_margin", type=float, default=0.0, help="scores that differ by no more are a tie")
    pairs.add_argument("--by_subset", action="store_true", help="a benchmark per value of the column subset")
    pairs.add_argument("--rubric", help="text, .json or .txt file, for pairs without one; a general one when not given")
    pairs.add_argument("--template", help="name or file: how a pair becomes prompts; the export's, else paper")
    pairs.add_argument("--other_template", action="store_true", help="one that the judge was not trained on")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--n", type=int, default=1, help="generations per prompt, averaged")
    judging.add_argument("--temperature", type=float, help="0: greedy, as for --n 1 when not given")
    judging.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling")
    judging.add_argument("--seed", type=int, default=0, help="of sampled generations, and of the intervals")
    judging.add_argument("--no_force", action="store_true", help="leave generations without a score as they are")
    judging.add_argument("--renormalise", action="store_true", default=None, help="E[score] of the scale alone")
    judging.add_argument(
        "--feedback_of", type=path_argument, metavar="RUN", help="read the scores of that run's feedback anew"
    )
    judging.add_argument("--batch_size", type=int, default=64, help="prompts that are judged and written at a time")
    server = parser.add_argument_group("server")
    server.add_argument("--server", help="address of an OpenAI-compatible server of --model, whose tokenizer is used")
    server.add_argument("--server_model", help="its name on the server")
    server.add_argument("--api_key_env", help="environment variable that holds the server's key")
    server.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    intervals = parser.add_argument_group("intervals")
    intervals.add_argument("--n_resamples", type=int, default=2000, help="bootstrap resamples")
    intervals.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """EvaluationError for flags that are missing, impossible or contradict each other."""
    for name, least in (("n", 1), ("batch_size", 1), ("n_resamples", 1), ("concurrency", 1), ("max_samples", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise EvaluationError(f"--{name} must be at least {least}, got {value}")
    if not 0 < args.confidence < 1:
        raise EvaluationError(f"--confidence must lie between 0 and 1, got {args.confidence}")
    check_tie_margin(args.tie_margin)
    if args.compare is not None:
        if args.benchmark or args.pairs or args.model:
            raise EvaluationError(
                "--compare reads evaluations that are done; drop --model and --benchmark (or --pairs)"
            )
        if len(args.compare) < 2:
            raise EvaluationError("--compare needs two output folders or more")
        return
    given = (("model", args.model, ""), ("benchmark", args.benchmark or args.pairs, " (or --pairs)"))
    for name, value, other in (*given, ("output_dir", args.output_dir, "")):
        if not value:
            raise EvaluationError(f"--{name} is required{other}, unless finished evaluations are compared by --compare")
    if not args.pairs:
        for name in ("by_subset", "rubric", "template", "other_template"):
            if getattr(args, name):
                raise EvaluationError(f"--{name} is of pairs; give --pairs, or drop it")


def make_judge(args: argparse.Namespace, backend: JudgeBackend | None = None) -> Judge:
    """The judge that the flags name; its engine does not run yet. backend: instead of that engine."""
    options: dict[str, Any] = {}
    if args.server:
        options = {
            "model": args.server_model,
            "concurrency": args.concurrency,
            "api_key": read_key(args.api_key_env),
        }
    return Judge(
        args.model,
        server=args.server,
        server_options=options,
        backend=backend,
        settings=chosen_settings(args),
        template=args.template,
        other_template=args.other_template,
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        renormalise=args.renormalise,
        max_model_len=args.max_model_len,
        force=not args.no_force,
        device=args.device,
    )


def load_benchmarks(args: argparse.Namespace, judge: Judge) -> list[Benchmark]:
    """All benchmarks, checked and tokenised for this judge."""
    limit = judge.max_prompt_tokens
    try:
        names = parse_benchmarks(args.benchmark or (), "--benchmark")
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
                skip_bad_rows=args.skip_bad_rows,
            )
            for name, source in names.items()
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
            rubric=None if args.rubric is None else read_rubric(args.rubric, "--rubric"),
            group_key=args.group_key,
            by_subset=args.by_subset,
            max_samples=args.max_samples,
            skip_bad_rows=args.skip_bad_rows,
        )
    ]


def _check_names(benchmarks: Sequence[Benchmark]) -> None:
    names = [benchmark.name for benchmark in benchmarks]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise EvaluationError(f"--pairs: two benchmarks are named {doubled[0]!r}; write NAME=PATH with different names")


def run(args: argparse.Namespace, backend: JudgeBackend | None = None) -> str:
    """Evaluate; returns the table. backend: see `make_judge`. FolderError while another program writes there."""
    with FolderLock(args.output_dir, "--output_dir"):
        return _run(args, backend)


def _run(args: argparse.Namespace, backend: JudgeBackend | None) -> str:
    with make_judge(args, backend) as judge:
        benchmarks = load_benchmarks(args, judge)
        earlier = None if args.feedback_of is None else earlier_predictions(args.feedback_of, benchmarks)
        identity = identity_of(args.model, judge, benchmarks, server=bool(args.server), feedback_of=args.feedback_of)
        path = args.output_dir / PREDICTIONS
        try:
            store = judge_all(
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
    return write_report(args.output_dir, identity, predictions, settings, method=method, training=args.training)


def compare(args: argparse.Namespace) -> str:
    """Compare finished evaluations; returns the Markdown that is also written to --output_dir, if one is given."""
    text, content = compare_runs(
        [load_run(folder) for folder in args.compare],
        seed=args.seed,
        n_resamples=args.n_resamples,
        confidence=args.confidence,
        tie_margin=args.tie_margin,
    )
    if args.output_dir is not None:
        with FolderLock(args.output_dir, "--output_dir"):
            write_comparison(args.output_dir, text, content)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the engine, the server or the disk failed, 2 the input is wrong, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    args = parse_args(argv)
    try:
        check(args)
        use_writable_caches()
        print(run(args) if args.compare is None else compare(args))
    except (ValueError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
