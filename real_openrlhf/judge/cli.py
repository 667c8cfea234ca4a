"""`python -m real_openrlhf.judge`: rows in, scores out.

python -m real_openrlhf.judge --model FOLDER --input rows.jsonl --output scores.jsonl
python -m real_openrlhf.judge serve --model FOLDER --port 8000
python -m real_openrlhf.judge calibration fit --model FOLDER --data scores.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from real_openrlhf.common.errors import RunError
from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.paths import expand
from real_openrlhf.common.plain import NotPlainError, plain
from real_openrlhf.common.progress_bar import BAR_FORMAT
from real_openrlhf.data.sources import BadRow, DataError, Row, lookup, read_json_lines, read_rows
from real_openrlhf.data.template import PromptError
from real_openrlhf.export.fingerprint import weights_sha256
from real_openrlhf.judge.cli_model import add_model, chosen_settings, make_parser, read_key
from real_openrlhf.judge.cli_tools import fit_args, serve_args
from real_openrlhf.judge.judge import Judge, Prepared
from real_openrlhf.judge.output import STANDARD, open_output
from real_openrlhf.judge.types import RESULT, JudgeError, Score

logger = logging.getLogger(__name__)
_LISTED = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the engine or the server failed, 2 the input is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        use_writable_caches()
        args.run(args)
    except (ValueError, RunError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, RunError) else 2
    return 0


# Subcommands that do not exist, though a user may try them -> what to use instead.
_MEANT = {
    "compare": "two responses are compared by Judge.compare in Python, two evaluations by "
    "python -m real_openrlhf.evaluate --compare RUN RUN",
    "calibrate": "it is called calibration fit",
    "calibration": "it is called calibration fit",
    "evaluate": "it is a separate command: python -m real_openrlhf.evaluate",
    "score": "leave the word out: the command scores --input by itself",
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed flags; their attribute `run` is the function that carries out the subcommand."""
    words = list(argv)
    if words[:1] == ["serve"]:
        return serve_args(words[1:])
    if words[:2] == ["calibration", "fit"]:
        return fit_args(words[2:])
    if words and not words[0].startswith("-"):
        known = "without a subcommand it scores --input; subcommands are serve and calibration fit"
        raise JudgeError(f"there is no subcommand {words[0]!r}: {_MEANT.get(words[0], known)}")
    return _score_args(words)


def _score_args(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("", "Scores responses: each row of the input is written with a new column, 'judgement'.")
    add_model(parser)
    add = parser.add_argument
    add(
        "--input",
        required=True,
        help="jsonl, json, csv or parquet file, folder, hub id, or - for JSONL on standard input",
    )
    add("--output", default=STANDARD, help="JSONL file, or - for standard output")
    add(
        "--overwrite",
        action="store_true",
        help="replace an output file that exists, or the rows of a job that ended early",
    )
    add("--resume", action="store_true", help="continue a job that ended early, from OUTPUT.partial")
    add("--skip_bad_rows", action="store_true", help="leave out, count and list rows that cannot be used")
    add("--prompt_key", help="column with whole prompts in the form of the training data's, instead of the parts")
    for part in ("instruction", "response", "rubric", "reference", "context"):
        add(f"--{part}_key", default=part, help=f"column of the {part}")
    add("--rubric", help="for rows without one: text, or a .json or .txt file; JSON may hold several dimensions")
    add("--weights", help='JSON of dimension to weight, such as {"tone": 1, "facts": 2}; default: equal weights')
    add(
        "--template",
        help="template that makes a prompt of the parts: a name or a file; default: the export's, else paper",
    )
    add("--other_template", action="store_true", help="allow a template that the judge was not trained on")
    add("--template_suffix", help="a second template that is appended to the first, such as base_suffix")
    add("--n", type=int, default=1, help="responses per row, averaged")
    add("--temperature", type=float, help="0 is greedy, the default for --n 1")
    add("--top_p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--no_force", action="store_true", help="do not force an anchor after a response without a score")
    add("--calibrated", action="store_true", help="add the calibrated score, by the stored calibration")
    add("--batch_size", type=int, default=256, help="rows that are judged at a time")
    add("--server", help="address of an OpenAI-compatible server of this model, such as http://127.0.0.1:8000")
    add("--server_model", help="the model's name there, if it serves several")
    add("--api_key_env", help="environment variable with the server's key")
    add("--concurrency", type=int, default=64, help="requests in flight")
    parser.set_defaults(run=_score)
    return parser.parse_args(words)


def _score(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise JudgeError(f"--batch_size must be at least 1, got {args.batch_size}")
    rubric, weights = _rubric(args.rubric), _weights(args.weights)
    rows = _rows(args.input)
    options: dict[str, Any] = {}
    if args.server is not None:
        options = {"model": args.server_model, "concurrency": args.concurrency, "api_key": read_key(args.api_key_env)}
    judge = Judge(
        args.model,
        server=args.server,
        server_options=options,
        settings=chosen_settings(args),
        template=args.template,
        template_suffix=args.template_suffix,
        other_template=args.other_template,
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        max_model_len=args.max_model_len,
        force=not args.no_force,
        calibrated=args.calibrated,
        device=args.device,
    )
    good = list(_prepared(rows, judge, args, rubric, weights))
    if not good:
        raise DataError(f"{args.input}: no usable row is left")
    identity = _identity(judge, args, rubric, weights)
    with judge, open_output(args.output, overwrite=args.overwrite, resume=args.resume, identity=identity) as out:
        out.check_done([row for row, _ in good])
        first = len(out.done)
        _ = judge.backend  # started before the progress bar, whose rate should not include it
        with tqdm(
            total=len(good), initial=first, desc="judged", unit=" rows", bar_format=BAR_FORMAT, file=sys.stderr
        ) as bar:
            for start in range(first, len(good), args.batch_size):
                batch = good[start : start + args.batch_size]
                scores = judge.score_prepared([prepared for _, prepared in batch], weights=weights)
                for (row, _), score in zip(batch, scores):
                    out.write({**row, RESULT: as_json(score)})
                bar.update(len(batch))


def _identity(judge: Judge, args: argparse.Namespace, rubric: Any, weights: Any) -> dict[str, Any]:
    """What must be the same in a job that ended early and in the one that resumes it."""
    settings, sampling = judge.settings, judge.sampling
    return {
        "model": name_of_model(args.model),
        "weights": weights_sha256(args.model),
        "scale": str(settings.scale),
        "anchors": list(settings.anchors),
        "template": [judge.template.sha256, settings.template.sha256],
        "renormalise": settings.renormalise,
        "sampling": [sampling.n, sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed],
        "forcing": judge.force,
        "calibration": args.calibrated,
        "rubric": rubric,
        "weights of the dimensions": weights,
        "batch size": args.batch_size,
    }


def name_of_model(model: str) -> str:
    """A hub id as it is, a folder's absolute path."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _rows(source: str) -> list[Row | BadRow]:
    if source != STANDARD:
        return list(read_rows(source))
    rows = list(read_json_lines(sys.stdin.buffer, "standard input"))
    if not rows:
        raise DataError("standard input is empty: one JSON object per line is expected")
    return rows


def _prepared(
    rows: Iterable[Row | BadRow],
    judge: Judge,
    args: argparse.Namespace,
    rubric: Any,
    weights: Mapping[str, float] | None,
) -> Iterator[tuple[dict[str, Any], Prepared]]:
    """Every usable row with its values and its prompts. The first bad row is an error, unless bad rows are skipped."""
    skipped: list[BadRow] = []
    for row in rows:
        made = row if isinstance(row, BadRow) else _prepare(row, judge, args, rubric, weights)
        if not isinstance(made, BadRow):
            yield made
        elif not args.skip_bad_rows:
            raise DataError(f"{made}. Repair the row, or pass --skip_bad_rows to leave such rows out.")
        else:
            skipped.append(made)
    if skipped:
        shown = "\n".join(f"  {bad}" for bad in skipped[:_LISTED])
        more = f"\n  and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
        logger.warning("skipped %d bad rows:\n%s%s", len(skipped), shown, more)


def _prepare(
    row: Row, judge: Judge, args: argparse.Namespace, rubric: Any, weights: Mapping[str, float] | None
) -> tuple[dict[str, Any], Prepared] | BadRow:
    column: str | None = None
    try:
        if RESULT in row.values:
            column = RESULT
            raise PromptError("the output has a column of this name; rename it")
        written = plain(row.values)
        if args.prompt_key is not None:
            column = args.prompt_key
            return written, judge.prepare_prompt(lookup(row.values, column))
        item: dict[str, Any] = {}
        for part in ("instruction", "response"):
            column = getattr(args, f"{part}_key")
            item[part] = lookup(row.values, column)
        for part in ("rubric", "reference", "context"):
            try:
                item[part] = lookup(row.values, getattr(args, f"{part}_key"))
            except KeyError:
                continue
        if item.get("rubric") in (None, ""):
            item["rubric"] = rubric
        column = None
        return written, judge.prepare(item, weights)
    except KeyError as error:
        return BadRow(place=row.place, column=column, reason=str(error.args[0]))
    except NotPlainError as error:
        return BadRow(place=row.place, column=error.column, reason=str(error))
    except (PromptError, JudgeError) as error:
        return BadRow(place=row.place, column=column, reason=str(error))


def as_json(score: Score) -> dict[str, Any]:
    """A `Score` in the form of an output row; undefined values are null."""
    content: dict[str, Any] = {
        name: getattr(score, name)
        for name in (
            "score",
            "decoded",
            "distribution",
            "mass",
            "entropy",
            "feedback",
            "reason",
            "n_forced",
            "n_invalid",
        )
    }
    if score.calibrated is not None:
        content["calibrated"] = score.calibrated
    if score.dimensions:
        content["dimensions"] = {name: as_json(one) for name, one in score.dimensions.items()}
    if len(score.samples) > 1:
        fields = ("expected", "decoded", "mass", "forced", "reason", "feedback")
        content["samples"] = [{name: getattr(sample, name) for name in fields} for sample in score.samples]
    return content


def _rubric(text: str | None) -> Any:
    if text is None:
        return None
    path = Path(expand(text))
    if path.suffix not in (".json", ".txt"):
        return text
    try:
        content = path.read_text(encoding="utf-8")
        return json.loads(content) if path.suffix == ".json" else content
    except (OSError, ValueError) as error:
        raise JudgeError(f"--rubric {text}: {error}") from error


def _weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        weights = json.loads(text)
    except ValueError as error:
        raise JudgeError(f"--weights is not JSON: {error}") from error
    if not isinstance(weights, dict):
        raise JudgeError(f"--weights must be a JSON object of dimension to number, got {text}")
    return weights
