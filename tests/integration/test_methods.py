"""The examples stsb and mtbench on the real stack, with a tiny model that learns nothing: every cell, twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.methods import run
from examples.own_data.make_model import make_tokenizer
from examples.quickstart.make_model import make_model
from tests.helpers.mtbench_files import write_judgments, write_vicuna

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's files of both examples, and a model of random weights."""
    folder = tmp_path_factory.mktemp("files")
    for split, n in (("train", 24), ("dev", 8), ("test", 8)):
        rows = [
            {
                "instruction": f"A {split} dog number {i} runs.",
                "response": f"A cat of the {split} {'runs' if i % 2 else 'sits'} by {i}.",
                "criteria": "semantic similarity",
                "score": (7 * i % 11) / 2.2,
            }
            for i in range(n)
        ]
        (folder / f"stsb_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_judgments(folder / "mtbench_judgments.jsonl.gz")
    write_vicuna(folder / "vicuna_eval.json")
    tokenizer = make_tokenizer([path.read_text() for path in folder.glob("*.jsonl")])
    torch.manual_seed(0)
    make_model(tokenizer, seed=0, layers=1, hidden=64).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("name", run.EXAMPLES)
def test_every_cell_is_made_and_kept(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [name, "--size", "tiny", "--device", "cpu", "--data_dir", str(files), "--model", str(files / "model")]
    words += ["--output_dir", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    code = run.main(words)
    logs = {path.name: path.read_text()[-2000:] for path in (tmp_path / "out").rglob("*.log")}
    assert code == 0, (capsys.readouterr().err, logs)
    example = run.load_example(name)
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results/cells").glob("*.json")}
    assert len(cells) == 5
    for cell in cells.values():
        assert set(cell["tests"]) == set(example.tests)
        assert len(cell["tests"]["test"]["row"]) == 6
    # All judges have judged the same rows.
    assert len({json.dumps([cell["tests"]["test"][k] for k in ("row", "label")]) for cell in cells.values()}) == 1
    assert cells["real-0.0001-seed0"]["curve"].keys() == {"0", "1"}
    shown = capsys.readouterr().out
    assert "| REAL | RAIL |" in (tmp_path / "results/tables.md").read_text()
    assert "[5/5] real-0.0001 of seed 0" in shown
    # Done is done: without a cluster.
    assert run.main(words) == 0 and "[" not in capsys.readouterr().out.split("###")[0]
