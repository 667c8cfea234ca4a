"""The timing of first judgements: turns, ratios, and a command that fails, with a judge that is a shell script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.benchmark import first_judgement


def judge(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_backends_take_turns_and_ratios_are_within_a_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    seconds = {"transformers": iter((2.0, 3.0, 2.0)), "vllm": iter((8.0, 6.0, 4.0))}

    def timed(model: str, backend: str, scale: str | None) -> tuple[float, float | None]:
        order.append(backend)
        return next(seconds[backend]), 3.5

    monkeypatch.setattr(first_judgement, "first_judgement", timed)
    assert first_judgement.main(["--model", "m", "--output", str(tmp_path / "o.json")]) == 0
    assert order == ["transformers", "vllm", "vllm", "transformers", "transformers", "vllm"]
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["ratios"] == [0.25, 0.5, 0.5] and found["median_ratio"] == 0.5
    assert found["scores"]["vllm"] == [3.5] * 3
    assert "0.500 [0.250, 0.500]" in capsys.readouterr().out


def test_the_first_line_of_output_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"judgement": {"score": 2.5}})
    said = f"echo \"$@\" > {tmp_path}/words; cat > {tmp_path}/row; echo '{line}'"
    monkeypatch.setattr(first_judgement.sys, "executable", judge(tmp_path, said))
    seconds, score = first_judgement.first_judgement("m", "transformers", "1-5")
    assert score == 2.5 and seconds > 0
    words = (tmp_path / "words").read_text()
    assert "-m real_openrlhf.judge --model m" in words and "--backend transformers" in words and "--scale 1-5" in words
    assert "2 + 2" in json.loads((tmp_path / "row").read_text())["prompt"]


def test_a_judge_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_judgement.sys, "executable", judge(tmp_path, "cat > /dev/null; echo no >&2; exit 3"))
    with pytest.raises(RuntimeError, match=r"(?s)vllm: exit code 3.*no"):
        first_judgement.first_judgement("m", "vllm", None)
