"""Evaluate a judge on benchmarks with human labels, by RAIL (E[score]) and by standard decoding.

    python -m real_openrlhf.evaluate --model JUDGE --benchmark flask=FILE mt_bench=FILE \\
        --output_dir runs/eval/judge
    python -m real_openrlhf.evaluate --compare runs/eval/base runs/eval/judge

After an interruption, the same command continues where it stopped. The files that are written are listed in
`evals.report`, the metrics are defined in `evals.results`.
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
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.report import (
    PREDICTIONS,
    compare_runs,
    load_run,
    settings_of,
    write_comparison,
    write_report,
)
from real_openrlhf.evals.tables import NamedResults, paper_table
from real_openrlhf.judge.cli_model import add_model, chosen_settings, read_key
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.types import JudgeBackend

logger = logging.getLogger(__name__)

# The names of these flags in the data set's own messages -> their names here.
_FLAG_NAMES = {
    "--data.max_len": "--max_model_len",
    "--rollout.max_new_tokens": "--max_new_tokens",
    "--data.": "--",
}
_NO_LIMIT = 1 << 31


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m real_openrlhf.evaluate",
        description="Judge benchmarks with human labels; or compare finished evaluations.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    take_negative_values(parser)
    add_model(parser, required=False)
    add = parser.add_argument
    add("--benchmark", nargs="+", action="extend", metavar="NAME=PATH", help="files of judged prompts")
    add("--output_dir", type=path_argument, help="folder for this evaluation; with --compare, for the comparison")
    add(
        "--compare",
        nargs="+",
        type=path_argument,
        metavar="RUN",
        help="output folders: all others are compared with the first, row by row",
    )
    add("--method", help="first cell of the table; default: the model's name")
    add("--training", default="", help="second cell of the table, such as SFT or RL")
    data = parser.add_argument_group("data")
    data.add_argument("--input_key", default="prompt", help="column of the prompt")
    data.add_argument("--label_key", default="label", help="column of the human score")
    data.add_argument("--group_key", help="column that groups rows (question, pair); default: 'group', if there is one")
    data.add_argument("--max_samples", type=int, help="use the first so many rows of each benchmark")
    data.add_argument("--skip_bad_rows", action="store_true", help="leave out bad rows, and count and list them")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--n", type=int, default=1, help="generations per prompt, averaged")
    judging.add_argument("--temperature", type=float, help="0 is greedy, the default for --n 1")
    judging.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling")
    judging.add_argument("--seed", type=int, default=0, help="for sampled generations and for the intervals")
    judging.add_argument("--no_force", action="store_true", help="leave generations without a score as they are")
    judging.add_argument("--renormalise", action="store_true", default=None, help="E[score] given a score on the scale")
    judging.add_argument(
        "--feedback_of", type=path_argument, metavar="RUN", help="read the scores after that run's feedback again"
    )
    judging.add_argument("--batch_size", type=int, default=64, help="prompts that are judged and written at a time")
    server = parser.add_argument_group("server")
    server.add_argument("--server", help="address of an OpenAI-compatible server of --model, whose tokenizer is used")
    server.add_argument("--server_model", help="its name on the server")
    server.add_argument("--api_key_env", help="environment variable that holds the server's key")
    server.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    intervals = parser.add_argument_group("intervals")
    intervals.add_argument("--n_resamples", type=int, default=2000, help="bootstrap resamples")
    intervals.add_argument("--confidence", type=float, default=0.95, help="confidence level of the intervals")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """EvaluationError for flags that are missing, impossible or contradict each other."""
    for name, least in (("n", 1), ("batch_size", 1), ("n_resamples", 1), ("concurrency", 1), ("max_samples", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise EvaluationError(f"--{name} must be at least {least}, got {value}")
    if not 0 < args.confidence < 1:
        raise EvaluationError(f"--confidence must lie between 0 and 1, got {args.confidence}")
    if args.compare is not None:
        if args.benchmark or args.model:
            raise EvaluationError("--compare reads finished evaluations; drop --model and --benchmark")
        if len(args.compare) < 2:
            raise EvaluationError("--compare needs two output folders or more")
        return
    for name in ("model", "benchmark", "output_dir"):
        if not getattr(args, name):
            raise EvaluationError(f"--{name} is required, unless finished evaluations are compared by --compare")


def make_judge(args: argparse.Namespace, backend: JudgeBackend | None = None) -> Judge:
    """The judge that the flags name; its engine is not started yet. backend: used instead of an engine."""
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
        return [
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
            for name, source in parse_benchmarks(args.benchmark, "--benchmark").items()
        ]
    except ValueError as error:
        message = str(error)
        for ours, here in _FLAG_NAMES.items():
            message = message.replace(ours, here)
        raise EvaluationError(message) from error


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
            raise RunError(f"{args.output_dir} cannot be written: {error}; the same command continues") from error
    if earlier is not None:
        logger.info("%s", largest_difference(store, earlier))
    predictions = [store.done[b.name, prompt.row] for b in benchmarks for prompt in b.prompts]
    method = args.method or name_of(args.model)
    settings = settings_of(identity, seed=args.seed, n_resamples=args.n_resamples, confidence=args.confidence)
    results = write_report(args.output_dir, identity, predictions, settings, method=method, training=args.training)
    return paper_table([NamedResults(method=method, training=args.training, results=results)])


def compare(args: argparse.Namespace) -> str:
    """Compare finished evaluations; returns the Markdown that is also written to --output_dir, if one is given."""
    text, content = compare_runs(
        [load_run(folder) for folder in args.compare],
        seed=args.seed,
        n_resamples=args.n_resamples,
        confidence=args.confidence,
    )
    if args.output_dir is not None:
        with FolderLock(args.output_dir, "--output_dir"):
            write_comparison(args.output_dir, text, content)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the engine, the server or the disk failed, 2 the input is wrong, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    args = parse_args(argv)
    try:
        check(args)
        use_writable_caches()
        print(run(args) if args.compare is None else compare(args))
    except (ValueError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues where it stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
