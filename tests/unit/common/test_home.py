"""Caches leave a home folder that cannot be written, and stay in one that can."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from real_openrlhf import evaluate, train_real, train_warmup
from real_openrlhf.common import home as module
from real_openrlhf.common.home import HomeError, chosen_here, use_writable_caches
from real_openrlhf.data import __main__ as data
from real_openrlhf.judge import cli as judge
from tests.helpers.homes import isolate

NAMES = {*module._PLACES, "HF_HOME"}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    isolate(monkeypatch, folder)
    return folder


def test_a_home_that_can_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (tmp_path / "home", tmp_path / "not" / "made"):
        monkeypatch.setenv("HOME", str(home))
        (tmp_path / "home").mkdir(exist_ok=True)
        before = dict(os.environ)
        use_writable_caches()
        assert dict(os.environ) == before and chosen_here() == frozenset()
    assert list((tmp_path / "home").iterdir()) == [] and not (tmp_path / "not").exists()


@pytest.mark.parametrize("home", ["/proc/nohome", "/dev/null/home"])
def test_a_home_that_cannot(
    home: str, temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", home)
    use_writable_caches()
    assert chosen_here() == NAMES
    for name in NAMES:
        folder = Path(os.environ[name])
        assert folder.is_relative_to(temporary)
        folder.mkdir(parents=True, exist_ok=True)  # as the library does
    (own,) = temporary.iterdir()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert f"HOME {home} cannot be written: TRITON_CACHE_DIR" in caplog.text
    caplog.clear()
    use_writable_caches()  # once is enough
    assert caplog.text == "" and chosen_here() == NAMES


def test_what_is_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nohome")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/x")
    monkeypatch.setenv("HF_HOME", "/y")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_writable_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "/x" and os.environ["HF_HOME"] == "/y"
    # The cache folder is elsewhere, and can be written.
    assert "VLLM_CACHE_ROOT" not in os.environ and "TORCH_EXTENSIONS_DIR" not in os.environ
    assert "VLLM_CONFIG_ROOT" in chosen_here()


def test_downloads_that_can_be_read_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of which nothing but the hub's cache is there, read-only."""
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Root may write anywhere, so the refusal is played.
    real = tempfile.TemporaryFile

    def refuse(*, dir: Path) -> object:
        if Path(dir).is_relative_to(tmp_path) and not Path(dir).is_relative_to(tmp_path / "tmp"):
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    use_writable_caches()
    assert "HF_HOME" not in os.environ and {"HF_DATASETS_CACHE", "HF_MODULES_CACHE"} <= chosen_here()


def test_a_temporary_folder_of_somebody_else_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / f"real_openrlhf_{os.getuid()}").symlink_to(temporary)
    monkeypatch.setenv("HOME", "/proc/nohome")
    use_writable_caches()
    folder = Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert folder.parent == temporary and not folder.is_symlink() and folder.is_dir()


def test_a_user_without_home_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    use_writable_caches()
    assert chosen_here() == NAMES


def test_nowhere_to_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says so, before anything starts."""
    monkeypatch.setenv("HOME", "/proc/nohome")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/notmp")
    with pytest.raises(HomeError, match=r"HOME /proc/nohome cannot be written, nor can .*; set HOME or TMPDIR"):
        use_writable_caches()
    warmup = ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d", "--ckpt.output_dir", "o"]
    calls = (
        (train_real.main, ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d"]),
        (train_warmup.main, warmup),
        (evaluate.main, ["--model", "m", "--benchmark", "t=b", "--output_dir", "o"]),
        (judge.main, ["--model", "m", "--input", "i"]),
        (data.main, ["generic", "--output_dir", "o"]),
    )
    for main, words in calls:
        assert main(words) == 2
        assert "error: HOME /proc/nohome cannot be written" in capsys.readouterr().err
