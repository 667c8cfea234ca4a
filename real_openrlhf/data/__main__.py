"""Build a data set: `python -m real_openrlhf.data BUILDER --output_dir DIR`; `--help` lists the builders."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.paths import path_argument
from real_openrlhf.data.agreement import agreement_lines
from real_openrlhf.data.aspects import choose_aspects
from real_openrlhf.data.build import SFT, Settings, write
from real_openrlhf.data.builders import BUILDERS, PAIR_BUILDERS, get_builder
from real_openrlhf.data.judge_prompt import JudgeTemplate, template_names
from real_openrlhf.data.pairs import pairs_summary, write_pairs
from real_openrlhf.data.rounding import ROUNDINGS
from real_openrlhf.data.row import DataError
from real_openrlhf.data.splits import parse_fractions
from real_openrlhf.data.table import MESSAGES, TEXT

PROGRAM = "python -m real_openrlhf.data"
# Pairs have neither scores nor prompts of their own.
_NOT_FOR_PAIRS = ("scale", "label_key", "map", "aspect", "template", "suffix", "prompt_form", "split", "shuffle", "sft")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    builders, pairs = (
        "\n".join(f"  {name:20} {builder.about}" for name, builder in known.items())
        for known in (BUILDERS, PAIR_BUILDERS)
    )
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Build a data set for REAL: a parquet file per split and a manifest.",
        epilog=f"builders:\n{builders}\n\nbuilders of pairs, for evaluate --pairs:\n{pairs}\n\n"
        f"templates: {', '.join(template_names())}, or a file",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = take_negative_values(parser).add_argument
    add("builder", help="one of those below")
    add("--source", nargs="+", metavar="[SPLIT=]SOURCE", help="files, folders or hub ids (owner/name:config@split)")
    add("--output_dir", type=path_argument, required=True)
    add("--overwrite", action="store_true", help="replace the data set that is there")
    add("--scale", help="of the labels, such as 1-5; the data set's own unless given")
    add("--label_key", help="column of the score; the data set's own unless given")
    add("--map", nargs="+", default=[], metavar="FIELD=COLUMN", help="generic only: where the fields are")
    add(
        "--aspect",
        nargs="+",
        metavar="ASPECT",
        help="of data sets that rate several; all that the scale fits, unless given",
    )
    add("--template", help="of the prompts: a name or a file; 'source' keeps the source's prompts")
    add("--suffix", help="a template that follows the prompt, such as base_suffix for base models")
    add("--prompt_form", choices=(TEXT, MESSAGES), help="default: text if all are one user message")
    add("--split", help="shares of the groups if no source names a split, such as train=0.8,dev=0.1,test=0.1")
    add("--seed", type=int, default=0, help="seed of splits, order, rounding and generated feedback (default 0)")
    add("--shuffle", action=argparse.BooleanOptionalAction, help="shuffle the rows of each split; default: if sorted")
    add("--sft", action="store_true", help="also write sft.parquet for train_warmup: feedback, anchor and label")
    add(
        "--rounding",
        choices=tuple(ROUNDINGS),
        default="stochastic",
        help="of labels in sft.parquet (default: stochastic)",
    )
    add("--skip_bad_rows", action="store_true", help="leave out rows that cannot be used, and count and list them")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises DataError when a flag is missing or contradicts another."""
    builder = get_builder(args.builder)
    sources = args.source or list(builder.sources)
    aspects, scale = choose_aspects(builder, args.aspect, args.scale)
    template = args.template or builder.template
    for name, value, hint in (
        ("source", sources, "a file, folder or hub id"),
        ("scale", scale, "the scores that its labels can have, such as 1-5"),
    ):
        if not value:
            raise DataError(f"{builder.name} needs --{name}: {hint}")
    columns = _columns(args.map)
    if columns and builder.name != "generic":
        raise DataError(f"--map belongs to the builder generic; {builder.name} knows its columns")
    if template is None:
        if "prompt" not in columns:
            raise DataError(f"{builder.name} needs --template, since --map names no whole prompt")
        template = "source"
    judge = JudgeTemplate.load(template, suffix=args.suffix)
    parsed = ScoreScale.parse(str(scale))
    if judge.scale is not None and ScoreScale.parse(judge.scale).values != parsed.values:
        raise DataError(f"template {judge.name} asks for scores {judge.scale}, but the labels are on {parsed}")
    return Settings(
        sources=sources,
        scale=parsed,
        template=judge,
        fractions=parse_fractions(args.split) if args.split else builder.fractions,
        shuffle=builder.shuffle if args.shuffle is None else args.shuffle,
        sft=args.sft,
        rounding=args.rounding,
        prompt_form=args.prompt_form,
        skip_bad_rows=args.skip_bad_rows,
        seed=args.seed,
        label_key=args.label_key,
        columns=columns,
        aspects=aspects,
    )


def _columns(words: Sequence[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for word in words:
        name, equals, column = word.partition("=")
        if not equals or not name or not column:
            raise DataError(f"--map {word!r}: write FIELD=COLUMN")
        if name in columns:
            raise DataError(f"--map: {name} is given twice")
        columns[name] = column
    return columns


def summary(manifest: Mapping[str, Any], folder: Path) -> str:
    """Row counts, what was left out, and the flags that fit the data set."""
    cut = manifest["feedback_cut"]
    lines = [f"{manifest['builder']}: {sum(source['rows'] for source in manifest['sources'])} rows read"]
    for split, counts in manifest["splits"].items():
        lines.append(
            f"  {split}: {counts['rows']} rows, {counts['groups']} groups, {counts['fractional_labels']} fractional "
            f"labels, {counts['with_feedback']} with feedback"
        )
    lines += agreement_lines(manifest["raters"])
    lines += [f"  dropped, {reason}: {count}" for reason, count in manifest["dropped"].items()]
    lines += [f"  feedback left out, {reason}: {count}" for reason, count in manifest["feedback_left_out"].items()]
    lines += [f"  feedback cut, {reason}: {count} (read some of sft.parquet)" for reason, count in cut.items()]
    splits = {split: counts for split, counts in manifest["splits"].items() if split != SFT}
    if (
        manifest["builder"] == "generic"
        and len(splits) > 1
        and all(source["split"] is None for source in manifest["sources"])
        and all(counts["groups"] == counts["rows"] for counts in splits.values())
    ):
        # A whole prompt holds the response too, so that rows of the same question have different prompts.
        lines.append("  every row is its own group: if several rows ask one question, name it by --map group=COLUMN")
    bad = manifest["bad_rows"]
    if bad["count"]:
        lines += [f"  bad rows left out: {bad['count']}", *(f"    {row}" for row in bad["first"])]
        lines += [f"    and {bad['count'] - len(bad['first'])} more"] * (bad["count"] > len(bad["first"]))
    return "\n".join([*lines, "", *_flags(manifest, folder)])


def _flags(manifest: Mapping[str, Any], folder: Path) -> list[str]:
    chat = ["--data.apply_chat_template"] if manifest["prompt_form"] == MESSAGES else []
    splits = [split for split in manifest["splits"] if split != SFT]
    train = [split for split in splits if split == "train"]
    words = ["train_real:"]
    words += [f"--data.prompt_dataset {shlex.quote(str(folder / 'train.parquet'))}" for _ in train]
    words += ["--data.input_key prompt --data.label_key label", *chat]
    # The exported judge is chosen by this one: where there are two, the other is kept for a figure that nobody chose.
    held_out = [split for split in ("dev", "val", "validation", "valid", "eval", "test") if split in splits]
    words += [f"--eval.dataset {shlex.quote(str(folder / held_out[0]))}.parquet"] if held_out else []
    anchors = " ".join(shlex.quote(anchor) for anchor in manifest["template"]["anchors"])
    scale = [f"--real.scale {shlex.quote(manifest['scale'])}", f"--real.anchor {anchors}"]
    lines = [" ".join([*words, *scale])]
    if SFT in manifest["splits"]:
        counts = manifest["splits"][SFT]
        lacks = ["--warmup.feedback missing"] if counts["with_feedback"] < counts["rows"] else []
        warmup = f"train_warmup: --data.prompt_dataset {shlex.quote(str(folder / 'sft.parquet'))}"
        lines.append(" ".join([warmup, *chat, *lacks, *scale]))
    if len(held_out) > 1 and "test" in held_out:
        lines.append(f"evaluate: --benchmark test={shlex.quote(str(folder / 'test.parquet'))}")
    if not chat:
        lines.append(
            "For a chat model add --data.apply_chat_template (Qwen3: and --data.enable_thinking true or false)."
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    args = parse_args(argv)
    command = shlex.join([*PROGRAM.split(), *(sys.argv[1:] if argv is None else argv)])
    try:
        use_writable_caches()
        told = _build_pairs(args, command) if args.builder in PAIR_BUILDERS else _build(args, command)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(told)
    return 0


def _build(args: argparse.Namespace, command: str) -> str:
    settings = settings_of(args)
    manifest = write(get_builder(args.builder), settings, args.output_dir, command=command, overwrite=args.overwrite)
    return summary(manifest, args.output_dir)


def _build_pairs(args: argparse.Namespace, command: str) -> str:
    builder = PAIR_BUILDERS[args.builder]
    for name in _NOT_FOR_PAIRS:
        if getattr(args, name):
            raise DataError(f"--{name}: {builder.name} has pairs, which are judged as they are; drop the flag")
    sources = args.source or list(builder.sources)
    if not sources:
        raise DataError(f"{builder.name} needs --source: a file, folder or hub id")
    manifest = write_pairs(
        builder,
        sources,
        args.output_dir,
        command=command,
        skip_bad_rows=args.skip_bad_rows,
        overwrite=args.overwrite,
    )
    return pairs_summary(manifest, args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
