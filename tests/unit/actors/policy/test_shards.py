"""Errors between DeepSpeed's barriers, and random numbers; shards on other ranks: tests/integration/test_resharding."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import distributed

from real_openrlhf.actors.policy.shards import ShardError, load_shards, restore_rng, rng_state, save_shards
from real_openrlhf.common.device import Device

CPU = Device(name="cpu", dtype_name="fp32")


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Writer:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save(self, state_dict: Any, path: str) -> None:
        if self.error:
            raise self.error
        torch.save(state_dict, path)


class Engine:
    """Writes and reads as DeepSpeed does: through its checkpoint engine, then a script; `calls` are its collectives."""

    def __init__(self, error: Exception | None = None, script_error: Exception | None = None) -> None:
        self.checkpoint_engine = Writer(error)
        self.script_error = script_error
        self.weights = {"w": torch.arange(3.0)}
        self.calls: list[str] = []

    def save_checkpoint(self, path: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(path) / tag).mkdir()
        self.checkpoint_engine.save(state_dict=self.weights, path=str(Path(path) / tag / "shard.pt"))
        self._copy_recovery_script(path)
        self.calls.append("barrier")

    def _copy_recovery_script(self, path: str) -> None:
        if self.script_error:
            raise self.script_error

    def load_checkpoint(self, path: str, *, tag: str) -> tuple[str | None, Any]:
        shard = Path(path) / tag / "shard.pt"
        if not shard.exists():
            return None, None
        self.weights = torch.load(shard)
        return str(shard), None


STATE = {"n_updates": 7, "rng": None}


def test_there_and_back(tmp_path: Path) -> None:
    path = str(tmp_path / "policy")
    save_shards(Engine(), path, STATE)
    other = Engine()
    other.weights = {}
    assert load_shards(other, path, scratch=str(tmp_path), seed=0) == STATE
    assert other.weights["w"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("where", ["error", "script_error"])
def test_an_error_waits_until_all_collective_calls_are_through(tmp_path: Path, where: str) -> None:
    engine = Engine(**{where: OSError(28, "No space left on device")})  # type: ignore[arg-type]
    with pytest.raises(ShardError, match=r"could not be written; rank 0: OSError: .*No space left on device"):
        save_shards(engine, str(tmp_path / "policy"), STATE)
    assert engine.calls == ["barrier"]
    # DeepSpeed's own methods are back, and the next save succeeds.
    engine.checkpoint_engine.error = engine.script_error = None
    save_shards(engine, str(tmp_path / "again"), STATE)
    assert "save" not in vars(engine.checkpoint_engine) and "_copy_recovery_script" not in vars(engine)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = Engine()
    with pytest.raises(ShardError, match="could not be made; rank 0: NotADirectoryError"):
        save_shards(engine, str(tmp_path / "file" / "policy"), STATE)
    assert engine.calls == []


def test_nothing_to_load(tmp_path: Path) -> None:
    save_shards(Engine(), str(tmp_path / "policy"), STATE)
    (tmp_path / "policy" / "deepspeed" / "shard.pt").unlink()
    with pytest.raises(ShardError, match="DeepSpeed loaded nothing"):
        load_shards(Engine(), str(tmp_path / "policy"), scratch=str(tmp_path), seed=0)


@pytest.mark.parametrize("name", ["rank_0.pt", "deepspeed/shard.pt"])
def test_a_file_that_names_other_code_is_not_loaded(tmp_path: Path, name: str) -> None:
    """DeepSpeed would call what the file names."""
    save_shards(Engine(), str(tmp_path / "policy"), STATE)
    torch.save({"x": Path("y")}, tmp_path / "policy" / name)
    engine = Engine()
    with pytest.raises(ShardError, match=rf"policy is not loaded; rank 0: UnsafePickleError: .*{name} names pathlib"):
        load_shards(engine, str(tmp_path / "policy"), scratch=str(tmp_path), seed=0)


def test_shards_that_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two ranks, now on one: the converter's reason is passed on, and no files are left."""
    import real_openrlhf.actors.policy.shards as module

    (tmp_path / "policy").mkdir()
    for rank in range(2):
        torch.save(STATE, tmp_path / "policy" / f"rank_{rank}.pt")
    failed = SimpleNamespace(returncode=1, stderr="FileNotFoundError: no *_optim_states.pt")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ShardError, match=r"could not be converted for 1 ranks; .*no .*_optim_states"):
        load_shards(Engine(), str(tmp_path / "policy"), scratch=str(tmp_path / "scratch"), seed=0)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_random_numbers_go_on() -> None:
    def draw() -> tuple[float, ...]:
        return float(torch.rand(1)), random.random(), float(numpy.random.rand())

    state = rng_state(CPU)
    first = draw()
    restore_rng(None, CPU)
    assert draw() != first
    restore_rng(state, CPU)
    assert draw() == first
