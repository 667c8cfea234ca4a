"""Evaluate a judge on benchmarks with human labels, by RAIL (E[score]) and by standard decoding.

    python -m real_openrlhf.evaluate --model JUDGE --benchmark flask=FILE mt_bench=FILE \\
        --output_dir runs/eval/judge
    python -m real_openrlhf.evaluate --model JUDGE --pairs judgebench=FILE --output_dir runs/eval/pairs
    python -m real_openrlhf.evaluate --compare runs/eval/base runs/eval/judge

After an interruption, the same command continues where it stopped. The files that are written are listed in
`evals.report`, the metrics are defined in `evals.results`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.errors import RunError
from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.model_name import check_model
from real_openrlhf.common.paths import path_argument
from real_openrlhf.common.quiet_imports import quiet_imports
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.judge.backends import VLLM
from real_openrlhf.judge.cli_args import add_backend, add_model, read_key
from real_openrlhf.judge.pairs import MODES, SCORES, check_tie_margin
from real_openrlhf.judge.rubrics import read_rubric


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m real_openrlhf.evaluate",
        description="Judge benchmarks with human labels; or compare finished evaluations.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    take_negative_values(parser)
    add_model(parser, required=False)
    add_backend(parser, VLLM)
    add = parser.add_argument
    add("--benchmark", nargs="+", action="extend", metavar="NAME=PATH", help="files of judged prompts")
    add("--pairs", nargs="+", action="extend", metavar="NAME=PATH", help="files of pairs of responses, one preferred")
    add("--output_dir", type=path_argument, help="folder of this evaluation; with --compare, of the comparison")
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
    data.add_argument("--group_key", help="column of what rows share (question, pair); 'group' where there is one")
    data.add_argument("--max_samples", type=int, help="use so many rows of each benchmark, drawn by --seed")
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
    judging.add_argument("--temperature", type=float, help="0 is greedy, the default for --n 1")
    judging.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling")
    judging.add_argument("--seed", type=int, default=0, help="of sampled generations, --max_samples, intervals")
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
    """ValueError for flags that are missing, impossible or contradict each other. args.rubric becomes what it holds."""
    counts = ("n", "batch_size", "n_resamples", "concurrency", "max_samples", "max_new_tokens", "max_model_len")
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvaluationError(f"--{name} must be at least 1, got {value}")
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
    if args.server and args.backend != VLLM:
        raise EvaluationError(
            f"--backend {args.backend} runs the model in this process, --server elsewhere; give one of them"
        )
    if args.rubric is not None:
        args.rubric = read_rubric(args.rubric, "--rubric")
    read_key(args.api_key_env)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the engine, the server or the disk failed, 2 the input is wrong, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    args = parse_args(argv)
    try:
        check(args)
        use_writable_caches()
        if args.model:
            # A server has the model: its tokenizer is enough.
            check_model(args.model, "--model", needs_config=not args.server)
        print(_run(args))
    except (ValueError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues where it stopped\n")
        return 130
    return 0


def _run(args: argparse.Namespace) -> str:
    # Here: help and mistakes in flags answer before torch and transformers are imported; a comparison needs neither.
    if args.compare is not None:
        from real_openrlhf.evals.comparison import compare

        return compare(args)
    quiet_imports()
    from real_openrlhf.evals.command import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
