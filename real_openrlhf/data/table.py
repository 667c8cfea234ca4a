"""The files that builders write: parquet files with these columns, and a manifest that says where the data came from.

| column | type | meaning |
|---|---|---|
| `id` | text | unique in the data set |
| `prompt` | text, or list of {role, content} | the judge's prompt; the manifest's `prompt_form` says which |
| `label` | float64 | the human (or GPT-4) score, on the manifest's `scale`, fractions as they are |
| `group` | text | rows of one group share a split: the question, or the pair |
| `split` | text | train, dev, test, ... |
| `source`, `source_row` | text, int64 | file or hub id, and the row's number there (lines from 1, rows from 0) |
| `n` | int32 | judgements averaged into the label |
| `feedback` | text or null | the critique behind the label, cut before its own first verdict |
| `response` | text or null | feedback, anchor and rounded label, for a warm-up; null: still to be written |
| `judged` | struct or null | instruction, response, reference, context, rubric, criteria, descriptions |
| `meta` | text | JSON: the rest of the source's ids and categories |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from real_openrlhf.common.atomic_file import atomic_file, write_text
from real_openrlhf.common.paths import expand
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.row import DataError
from real_openrlhf.data.sources import MANIFEST

SCHEMA_VERSION = 1
TEXT, MESSAGES = "text", "messages"
_DESCRIPTIONS = pa.list_(pa.struct([("score", pa.string()), ("text", pa.string())]))
_JUDGED = pa.struct(
    [
        *((name, pa.string()) for name in ("instruction", "response", "reference", "context", "rubric", "criteria")),
        ("descriptions", _DESCRIPTIONS),
    ]
)


def schema(prompt_form: str) -> pa.Schema:
    """prompt_form: "text" or "messages"."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("prompt", pa.string() if prompt_form == TEXT else pa.list_(message), nullable=False),
            pa.field("label", pa.float64(), nullable=False),
            pa.field("group", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("source_row", pa.int64(), nullable=False),
            pa.field("n", pa.int32(), nullable=False),
            pa.field("feedback", pa.string()),
            pa.field("response", pa.string()),
            pa.field("judged", _JUDGED),
            pa.field("meta", pa.string(), nullable=False),
        ],
        metadata={"real_openrlhf.schema_version": str(SCHEMA_VERSION)},
    )


def prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the folder; refuse one that holds data, or with `overwrite` remove what its manifest lists."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output_dir {folder} is a file")
    old = [path for path in (folder.glob("*") if folder.is_dir() else ()) if path.suffix == ".parquet"]
    manifest = folder / MANIFEST
    if (old or manifest.exists()) and not overwrite:
        raise DataError(f"--output_dir {folder} holds a data set already; name another folder, or pass --overwrite")
    if overwrite and manifest.exists():
        try:
            listed = set(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{manifest} is not a manifest of this program ({error}); name another folder") from error
        # The manifest is removed first: if the program stops here, the rest is not taken for a complete data set.
        manifest.unlink()
        for path in old:
            if path.name in listed:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def write_table(path: Path, records: Sequence[Mapping[str, Any]], prompt_form: str) -> dict[str, Any]:
    """Write a parquet file of the schema above; returns its line in the manifest: rows and sha256."""
    return write_parquet(path, records, schema(prompt_form))


def write_parquet(path: Path, records: Sequence[Mapping[str, Any]], columns: pa.Schema) -> dict[str, Any]:
    """The same for any schema."""
    try:
        table = pa.Table.from_pylist(list(records), schema=columns)
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: a text is not valid Unicode: {error}") from error
    with atomic_file(path) as partial, partial.open("wb") as file:  # pyarrow takes some paths for URLs
        pq.write_table(table, file, compression="zstd")
    return {"rows": len(records), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the manifest, the last file: if it is there, the others are complete."""
    path = folder / MANIFEST
    write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return path


def template_of_built(source: str) -> JudgeTemplate | None:
    """The template that made a built file's prompts; None for other files, and for prompts kept as in the source."""
    path = Path(expand(source))
    manifest = (path if path.is_dir() else path.parent) / MANIFEST
    if not path.exists() or not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))["template"]
        template = JudgeTemplate.from_json({name: value for name, value in content.items() if name != "sha256"})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        # A manifest of another program, or of an earlier version, which did not store the template.
        return None
    return template if "response" in template.variables else None
