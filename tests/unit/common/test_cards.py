"""What nvidia-smi says of the GPUs, and what is refused because of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from real_openrlhf.common.cards import Card, local_cards, parse_cards, why_unusable

H100 = Card(name="NVIDIA H100", capability=(9, 0), memory=80 * 2**30, driver="580.65.06")
T4, V100 = replace(H100, name="T4", capability=(7, 5)), replace(H100, name="V100", capability=(7, 0))


def old(card: Card, driver: str) -> Card:
    return replace(card, driver=driver)


def test_the_answer_of_nvidia_smi() -> None:
    answer = "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65.06\nCard, with a comma, 12.0, 1024, 595.10\n\n"
    assert parse_cards(answer) == (
        Card(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory=81559 * 2**20, driver="580.65.06"),
        Card(name="Card, with a comma", capability=(12, 0), memory=2**30, driver="595.10"),
    )
    assert parse_cards("") == ()
    with pytest.raises(ValueError):
        parse_cards("H100, 9.0, [N/A], 580.65.06")


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'H100, 9.0, 1024, 580.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_cards_of_this_machine(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_cards() == (Card(name="H100", capability=(9, 0), memory=2**30, driver="580.1"),)
    for hidden, n in (("", 0), ("-1", 0), ("0", 1), ("GPU-5f1a", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert len(local_cards()) == n
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for broken in ("exit 9", "echo 'No devices were found'", "echo 'H100, [N/A], 1024, 580'"):
        smi.write_text(f"#!/bin/sh\n{broken}\n")
        assert local_cards() == ()
    smi.unlink()
    assert local_cards() == ()


@pytest.mark.parametrize(
    ("cards", "dtype", "cuda", "says"),
    [
        (
            [old(H100, "570.124.06")],
            "bf16",
            "13.0",
            "driver 570.124.06 is too old for torch's CUDA 13.0; update it to 580",
        ),
        ([old(H100, "520.1")], "fp32", "12.8", "too old for torch's CUDA 12.8; update it to 525 .* cuda-compat-12-8"),
        ([T4], "bf16", "13.0", "T4 .* does not compute in bf16: compute capability 8.0 or higher is needed .* or fp32"),
        ([V100], "fp32", "13.0", r"torch for CUDA 13.0 has no kernels for V100 \(compute capability 7.0\): 7.5 is its"),
        ([V100], "bf16", "12.8", "V100 .* does not compute in bf16"),
    ],
)
def test_what_is_refused(cards: list[Card], dtype: str, cuda: str, says: str) -> None:
    why = why_unusable(cards, dtype_name=dtype, cuda=cuda, starts=lambda: False)
    assert why is not None
    assert re.search(says, why), why


@pytest.mark.parametrize(
    ("cards", "dtype", "cuda", "starts"),
    [
        ([H100], "bf16", "13.0", False),  # not asked for under a driver that is new enough
        ([old(H100, "570.1")], "bf16", "12.8", False),
        ([old(H100, "570.1")], "bf16", "13.0", True),  # NVIDIA's compatibility package
        ([old(H100, "N/A")], "bf16", "13.0", False),
        ([T4], "fp32", "13.0", False),
        ([T4, H100], "bf16", "13.0", False),  # the run may be on the second
        ([V100], "fp32", "12.8", False),
        ([], "bf16", "13.0", False),  # a head node
        ([T4], "bf16", None, False),  # not NVIDIA's
    ],
)
def test_what_is_not(cards: list[Card], dtype: str, cuda: str | None, starts: bool) -> None:
    assert why_unusable(cards, dtype_name=dtype, cuda=cuda, starts=lambda: starts) is None
