"""Pairs of responses of which people (or a checker) prefer one: how they are read, and the files that hold them.

| column | type | meaning |
|---|---|---|
| `id` | text | unique in the data set |
| `instruction`, `response_a`, `response_b` | text | what was asked, and the two responses |
| `reference` | text or null | a reference answer |
| `preference` | text | a, b or tie |
| `group` | text | what pairs share that are not independent: the question |
| `subset` | text or null | the part of the benchmark |
| `n` | int32 | votes behind the preference |
| `source`, `source_row` | text, int64 | file or hub id, and the row as it counts (lines from 1, rows from 0) |
| `meta` | text | JSON: the votes, and the rest of the source's ids and categories |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.data.builders.base import FieldError
from real_openrlhf.data.builders.pairs.base import Pair, PairBuilder
from real_openrlhf.data.preferences import PREFERENCES, majority, vote_agreement
from real_openrlhf.data.row import BadRow, DataError, Place, Row
from real_openrlhf.data.source_rows import LISTED, no_rows, read_sources, shown
from real_openrlhf.data.table import prepare_folder, write_manifest, write_parquet

PAIRS = "pairs.parquet"
SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("id", "instruction", "response_a", "response_b")),
        pa.field("reference", pa.string()),
        pa.field("preference", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("subset", pa.string()),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
    ],
    metadata={"real_openrlhf.pairs_schema_version": str(SCHEMA_VERSION)},
)


def write_pairs(
    builder: PairBuilder,
    sources: Sequence[str],
    folder: Path,
    *,
    command: str,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read everything, and write pairs.parquet and the manifest, which is returned.

    Raises DataError at the first bad row (file, row, column, reason), unless they are skipped; FolderError while
    another program writes into the folder.
    """
    with FolderLock(folder, "--output_dir"):
        found: list[tuple[Pair, Place]] = []

        def use(row: Row, split: str | None) -> BadRow | None:
            if split is not None:
                raise DataError(f"--source {split}=...: pairs are for evaluation and have no splits; drop '{split}='")
            try:
                found.append((builder.read(row.values), row.place))
            except FieldError as error:
                return BadRow(place=row.place, column=error.column, reason=str(error))
            return None

        skipped, read_from = read_sources(sources, builder.rows, use, skip_bad_rows=skip_bad_rows)
        if not found:
            raise no_rows(sources, skipped)
        records = [_record(number, pair, place) for number, (pair, place) in enumerate(found)]
        decided = [record for record in records if record["preference"] is not None]
        if not decided:
            raise DataError(f"{', '.join(sources)}: on no pair do most raters agree, so that none is left")
        prepare_folder(folder, overwrite=overwrite)
        manifest = {
            "pairs_schema_version": SCHEMA_VERSION,
            "builder": builder.name,
            "sources": read_from,
            "pairs": len(decided),
            "groups": len({record["group"] for record in decided}),
            "preferences": {name: sum(record["preference"] == name for record in decided) for name in PREFERENCES},
            "subsets": dict(Counter(record["subset"] for record in decided if record["subset"] is not None)),
            "dropped": {"no majority of the votes": len(records) - len(decided)},
            "raters": vote_agreement([pair.votes for pair, _ in found]),
            "bad_rows": {"count": len(skipped), "first": [str(row) for row in skipped[:LISTED]]},
            "command": command,
            "files": {PAIRS: write_parquet(folder / PAIRS, decided, SCHEMA)},
        }
        write_manifest(folder, manifest)
        return manifest


def pairs_summary(manifest: Mapping[str, Any], folder: Path) -> str:
    """Counts, the raters' agreement, and the flags that judge the pairs."""
    counts = ", ".join(f"{name} {count}" for name, count in manifest["preferences"].items())
    lines = [
        f"{manifest['builder']}: {sum(source['rows'] for source in manifest['sources'])} rows read",
        f"  {manifest['pairs']} pairs, {manifest['groups']} groups; preferred: {counts}",
    ]
    lines += [f"  subset {name}: {count} pairs" for name, count in manifest["subsets"].items()]
    raters = manifest["raters"]
    if raters is not None:
        lines.append(
            f"  raters: two give the same vote in {100 * raters['agreement']:.1f}% of {raters['compared']} comparisons "
            f"({raters['rows']} pairs with several raters)"
        )
    lines += [f"  dropped, {reason}: {count}" for reason, count in manifest["dropped"].items() if count]
    bad = manifest["bad_rows"]
    if bad["count"]:
        lines += [f"  bad rows left out: {bad['count']}", *(f"    {row}" for row in bad["first"])]
        lines += [f"    and {bad['count'] - len(bad['first'])} more"] * (bad["count"] > len(bad["first"]))
    return "\n".join([*lines, "", f"evaluate: --pairs {manifest['builder']}={folder / PAIRS}"])


def _record(number: int, pair: Pair, place: Place) -> dict[str, Any]:
    meta = {**pair.meta, "votes": dict(pair.votes)}
    return {
        "id": f"{number}" if pair.id is None else f"{number}:{pair.id}",
        "instruction": pair.instruction,
        "response_a": pair.response_a,
        "response_b": pair.response_b,
        "reference": pair.reference,
        "preference": majority(pair.votes),
        "group": pair.group,
        "subset": pair.subset,
        "n": len(pair.votes),
        "source": shown(place.file),
        "source_row": place.index,
        "meta": json.dumps(meta, sort_keys=True, ensure_ascii=False, default=str),
    }
