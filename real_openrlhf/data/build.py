"""Builds a data set from sources: checks rows, renders prompts, splits groups, writes files and manifest."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.data.agreement import agreement, spread
from real_openrlhf.data.builders.base import Builder, FieldError, Item, Options, Parts
from real_openrlhf.data.judge_prompt import JudgeTemplate, Rubric
from real_openrlhf.data.rounding import written_label
from real_openrlhf.data.row import BadRow, DataError, Place, Row
from real_openrlhf.data.source_rows import LISTED, no_rows, read_sources, shown
from real_openrlhf.data.splits import PRECEDENCE, check_split, keep_one_split, split_of
from real_openrlhf.data.table import MESSAGES, SCHEMA_VERSION, TEXT, prepare_folder, write_manifest, write_table
from real_openrlhf.data.template import PromptError
from real_openrlhf.data.verdict import cut, without_label

# Characters from which on a feedback that stands in a prompt is no mere sentence that a rubric has as well.
_LONG = 60
SFT = "sft"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    sources        SOURCE or SPLIT=SOURCE, each a file, folder or hub id; either all name a split or none does
    scale          scale of the labels
    template       template of the prompts
    fractions      share of the groups per split, if nothing names a split
    shuffle        shuffle the rows, by the seed
    sft            also write sft.parquet, the rows of the training split that have feedback
    rounding       of fractional labels in sft.parquet: "stochastic" or "nearest"
    aspects        those to build, of a data set that has several
    prompt_form    "text", "messages", or None: text where each prompt is one user message
    """

    sources: Sequence[str]
    scale: ScoreScale
    template: JudgeTemplate
    fractions: Mapping[str, float]
    shuffle: bool = False
    sft: bool = False
    rounding: str = "stochastic"
    prompt_form: str | None = None
    skip_bad_rows: bool = False
    seed: int = 0
    label_key: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    aspects: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Built:
    """records: split to rows in the form of `table.schema`, prompts as chat messages; "sft" beside the splits.
    dropped: reason to rows left out. feedback_left_out: reason to rows that stay without feedback; feedback_cut: why
    more than a known form of verdict was taken off it, and how often; raters: split to aspect ("" without one) to
    `agreement`, of the splits whose rows have several raters."""

    records: dict[str, list[dict[str, Any]]]
    skipped: list[BadRow]
    dropped: Counter[str]
    feedback_left_out: Counter[str]
    feedback_cut: Counter[str]
    sources: list[dict[str, Any]]
    raters: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Read:
    item: Item
    place: Place
    messages: list[dict[str, str]]
    split: str
    feedback: str | None
    number: int


def build(builder: Builder, settings: Settings) -> Built:
    """Read everything. Raises DataError at the first bad row (file, row, column, reason), unless they are skipped."""
    options = Options(
        scale=settings.scale,
        seed=settings.seed,
        label_key=settings.label_key,
        columns=settings.columns,
        aspects=settings.aspects,
    )
    if builder.check is not None:
        builder.check(options)
    left_out: Counter[str] = Counter()
    closing: Counter[str] = Counter()
    rows: list[_Read] = []

    def use(row: Row, split: str | None) -> BadRow | None:
        found = _read(builder, settings, options, row, split, len(rows), left_out, closing)
        if isinstance(found, BadRow):
            return found
        rows.extend(found)
        return None

    skipped, sources = read_sources(settings.sources, builder.rows, use, skip_bad_rows=settings.skip_bad_rows)
    if not rows:
        raise no_rows(settings.sources, skipped)
    kept, dropped = _split(builder, rows)
    records = {split: [_record(row) for row in kept[split]] for split in PRECEDENCE[::-1] if kept.get(split)}
    if settings.shuffle:
        for split in kept:
            # Records and rows get the same order: SFT texts are made from the rows below.
            random.Random(settings.seed).shuffle(records[split])
            random.Random(settings.seed).shuffle(kept[split])
    if settings.sft:
        records[SFT] = _warmup(builder, settings, kept)
    return Built(
        records=records,
        skipped=skipped,
        dropped=dropped,
        feedback_left_out=left_out,
        feedback_cut=closing,
        sources=sources,
        raters=_agreements(kept),
    )


def write(
    builder: Builder, settings: Settings, folder: Path, *, command: str, overwrite: bool = False
) -> dict[str, Any]:
    """Build, and write a parquet file per split, sft.parquet if asked for, and the manifest, which is returned.

    FolderError while another program writes into the folder.
    """
    with FolderLock(folder, "--output_dir"):
        return _write(builder, settings, folder, command=command, overwrite=overwrite)


def _write(builder: Builder, settings: Settings, folder: Path, *, command: str, overwrite: bool) -> dict[str, Any]:
    built = build(builder, settings)
    prompt_form = _prompt_form(built, settings)
    prepare_folder(folder, overwrite=overwrite)
    files = {}
    for name, records in built.records.items():
        if prompt_form == TEXT:
            records = [{**record, "prompt": record["prompt"][0]["content"]} for record in records]
        files[f"{name}.parquet"] = write_table(folder / f"{name}.parquet", records, prompt_form)
    manifest = _manifest(builder, settings, built, files, prompt_form, command)
    write_manifest(folder, manifest)
    return manifest


def _read(
    builder: Builder,
    settings: Settings,
    options: Options,
    row: Row,
    split: str | None,
    number: int,
    left_out: Counter[str],
    closing: Counter[str],
) -> list[_Read] | BadRow:
    column = None
    found = []
    try:
        items = builder.read(row.values, options)
        for item in items if isinstance(items, list) else [items]:
            column = "prompt"
            messages = _messages(item, settings.template)
            column = "split"
            home = split or (check_split(item.split) if item.split else None)
            home = home or split_of(item.group, settings.fractions, settings.seed)
            found.append((item, messages, home))
    except FieldError as error:
        return BadRow(place=row.place, column=error.column, reason=str(error))
    except (PromptError, DataError) as error:
        return BadRow(place=row.place, column=column, reason=str(error))
    read = []
    for place, (item, messages, home) in enumerate(found, start=number):
        feedback, reason = _feedback(item, settings.scale, closing)
        if reason is not None:
            left_out[reason] += 1
        if feedback is not None and _gives_away(item, feedback, messages):
            told = "the prompt holds the feedback, and its label with it"
            return BadRow(place=row.place, column="feedback", reason=told)
        read.append(_Read(item=item, place=row.place, messages=messages, split=home, feedback=feedback, number=place))
    return read


def _messages(item: Item, template: JudgeTemplate) -> list[dict[str, str]]:
    """The prompt as chat messages. A template whose only variable is `instruction` is filled with the last message."""
    if item.whole is not None and template.variables <= {"instruction"}:
        given = item.whole
        if isinstance(given, str):
            return template.messages(instruction=given)
        if not isinstance(given, list) or not given:
            raise PromptError("a prompt is text or a list of chat messages")
        for message in given:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise PromptError("every message needs a text 'role' and a text 'content'")
        *before, last = ({"role": message["role"], "content": message["content"]} for message in given)
        if last["role"] == "assistant":
            raise PromptError("the last message is the assistant's; a prompt ends before the answer")
        return [*before, {"role": last["role"], "content": template.render(instruction=last["content"])}]
    if item.parts is None:
        raise PromptError(f"its parts for template {template.name} cannot be found in it; use --template source")
    parts = {name: value for name, value in vars(item.parts).items() if name in template.variables}
    return template.messages(**parts)


def _gives_away(item: Item, feedback: str, messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether the prompt holds the critique. A short feedback may occur there by chance and does not count."""
    whole = (item.critique or "").strip()
    sought = [text for text in (whole, feedback) if text != feedback or len(text) >= _LONG]
    return any(text in message["content"] for text in sought for message in messages)


def _feedback(item: Item, scale: ScoreScale, cuts: Counter[str]) -> tuple[str | None, str | None]:
    """(the feedback to train on, None), or (None, why there is none although there is a critique).

    cuts counts critiques that say their label in no known form of verdict; these sentences are removed.
    """
    if item.critique is None:
        return None, None
    if item.n != 1:
        return None, "several judgements were averaged"
    critique = cut(item.critique)
    # In "Score:-4" the sign is a dash, unless the scale has negative scores.
    verdict = critique.verdict if critique.verdict is None or scale.values[0] < 0 else abs(critique.verdict)
    if verdict is not None and verdict != item.label:
        return None, "its own verdict is not the label"
    name = scale.labels[scale.values.index(item.label)] if item.label in scale.values else None
    feedback, reasons = without_label(critique.feedback, item.label, None if name and _is_number(name) else name)
    cuts.update(reasons)
    if not feedback:
        return None, "it holds nothing but its verdict"
    return feedback, None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split(builder: Builder, rows: Sequence[_Read]) -> tuple[dict[str, list[_Read]], Counter[str]]:
    kept: dict[str, list[_Read]] = {}
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    for row, other in zip(rows, keep_one_split([(row.split, row.item.group) for row in rows])):
        if other is not None:
            dropped[f"{row.split}: its group is in {other}"] += 1
        elif builder.unique and row.item.group in seen:
            dropped[f"{row.split}: its group is there already"] += 1
        else:
            seen.add(row.item.group)
            kept.setdefault(row.split, []).append(row)
    return kept, dropped


def _agreements(kept: Mapping[str, Sequence[_Read]]) -> dict[str, dict[str, Any]]:
    """By aspect: pooled over several, raters would seem to agree because some aspects get better scores than others."""
    table: dict[str, dict[str, Any]] = {}
    for split, rows in kept.items():
        for aspect in dict.fromkeys(row.item.aspect for row in rows):
            found = agreement([row.item.ratings for row in rows if row.item.aspect == aspect])
            if found is not None:
                table.setdefault(split, {})[aspect or ""] = found
    return table


def _record(row: _Read) -> dict[str, Any]:
    item = row.item
    meta = dict(item.meta)
    if item.aspect is not None:
        meta["aspect"] = item.aspect
    if item.ratings:
        meta |= {"ratings": dict(item.ratings), "spread": spread(item.ratings)}
    return {
        "id": f"{row.number}" if item.id is None else f"{row.number}:{item.id}",
        "prompt": row.messages,
        "label": item.label,
        "group": item.group,
        "split": row.split,
        "source": shown(row.place.file),
        "source_row": row.place.index,
        "n": item.n,
        "feedback": row.feedback,
        "response": None,
        "judged": None if item.parts is None else _judged(item.parts),
        "meta": json.dumps(meta, sort_keys=True, ensure_ascii=False, default=str),
    }


def _judged(parts: Parts) -> dict[str, Any]:
    rubric = parts.rubric if isinstance(parts.rubric, Rubric) else None
    return {
        "instruction": parts.instruction,
        "response": parts.response,
        "reference": parts.reference,
        "context": parts.context,
        "rubric": None if parts.rubric is None else str(parts.rubric),
        "criteria": rubric and rubric.criteria,
        "descriptions": rubric and [{"score": score, "text": words} for score, words in rubric.descriptions.items()],
    }


def _warmup(builder: Builder, settings: Settings, kept: Mapping[str, Sequence[_Read]]) -> list[dict[str, Any]]:
    if not builder.critiques:
        raise DataError(f"--sft: {builder.name} has no feedback that a warm-up could learn from")
    records = []
    for row in kept.get("train", ()):
        if row.feedback is not None:
            rng = row.item.rng or random.Random(f"{settings.seed}|{row.item.group}|{row.place.index}")
            written = written_label(row.item.label, settings.scale, settings.rounding, rng)
            records.append({**_record(row), "response": f"{row.feedback} {settings.template.anchors[0]}{written}"})
        elif builder.labels_alone:
            # train_warmup has a model write its feedback.
            records.append(_record(row))
    if not records:
        raise DataError("--sft: no row of the split train has feedback; see the manifest of a build without --sft")
    return records


def _prompt_form(built: Built, settings: Settings) -> str:
    prompts = [record["prompt"] for records in built.records.values() for record in records]
    single = all(len(prompt) == 1 and prompt[0]["role"] == "user" for prompt in prompts)
    if settings.prompt_form == TEXT and not single:
        raise DataError("--prompt_form text: some prompts are more than one user message; leave the flag out")
    return settings.prompt_form or (TEXT if single else MESSAGES)


def _manifest(
    builder: Builder,
    settings: Settings,
    built: Built,
    files: Mapping[str, dict[str, Any]],
    prompt_form: str,
    command: str,
) -> dict[str, Any]:
    splits = {
        split: {
            "rows": len(records),
            "groups": len({record["group"] for record in records}),
            "fractional_labels": sum(float(record["label"]) not in settings.scale.values for record in records),
            "with_feedback": sum(record["feedback"] is not None for record in records),
        }
        for split, records in built.records.items()
    }
    template = settings.template
    return {
        "schema_version": SCHEMA_VERSION,
        "builder": builder.name,
        "sources": built.sources,
        "splits": splits,
        "dropped": dict(built.dropped),
        "bad_rows": {"count": len(built.skipped), "first": [str(row) for row in built.skipped[:LISTED]]},
        "raters": built.raters,
        "feedback_left_out": dict(built.feedback_left_out),
        "feedback_cut": dict(built.feedback_cut),
        "scale": str(settings.scale),
        "template": {"sha256": template.sha256, **asdict(template)},
        "prompt_form": prompt_form,
        "rounding": settings.rounding if settings.sft else None,
        "shuffle": settings.shuffle,
        "seed": settings.seed,
        "command": command,
        "files": dict(files),
    }
