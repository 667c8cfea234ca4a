"""`python -m real_openrlhf.judge` without a subcommand: rows in, scores out."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from real_openrlhf.common.plain import NotPlainError, plain
from real_openrlhf.common.progress_bar import BAR_FORMAT
from real_openrlhf.data.row import BadRow, DataError, Row, lookup
from real_openrlhf.data.sources import read_json_lines, read_rows
from real_openrlhf.data.template import PromptError
from real_openrlhf.export.fingerprint import weights_sha256
from real_openrlhf.judge.cli_args import read_key
from real_openrlhf.judge.cli_model import judge_of
from real_openrlhf.judge.judge import Judge, Prepared
from real_openrlhf.judge.output import STANDARD, open_output
from real_openrlhf.judge.types import RESULT, JudgeError, Score

logger = logging.getLogger(__name__)
_LISTED = 10


def score(args: argparse.Namespace) -> None:
    rubric, weights = args.rubric, args.weights
    rows = _rows(args.input)
    options: dict[str, Any] = {}
    if args.server is not None:
        options = {"model": args.server_model, "concurrency": args.concurrency, "api_key": read_key(args.api_key_env)}
    judge = judge_of(
        args,
        server=args.server,
        server_options=options,
        backend=None if args.server else args.backend,
        template_suffix=args.template_suffix,
        top_p=args.top_p,
        max_model_len=args.max_model_len,
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
        _ = judge.backend  # its start is none of the bar's time
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
    """What a job that goes on must have in common with the one that ended early."""
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
    """A hub id as it is, a folder by its full path."""
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
    """Every usable row as it is written, and its prompts. The first bad one is an error, unless it is to be skipped."""
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
    """A `Score` as an output row has it; null for what is not defined."""
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
