"""The offline kit's parts: what was packed arrives, in pieces too, and what arrived broken is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parents[3] / "examples/install/gpu_offline"
LIMIT = 40_000


def sh(script: Path, *words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", script, *words], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """pack/1 with a small and a large archive, pack/carry with one for the checkout; `there` is the other machine."""
    contents = {"1/small": b"x = 1\n", "1/large": os.urandom(3 * LIMIT + 1), "carry/files": b"weights"}
    for name, data in contents.items():
        source = tmp_path / "source" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.with_suffix(".py" if name == "1/small" else ".bin").write_bytes(data)
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tmp_path / "pack" / f"{name}.tar.xz", "w:xz") as tar:
            found = next(source.parent.glob(f"{source.name}.*"))
            tar.add(found, found.name)
    (tmp_path / "there").mkdir()
    return tmp_path


def divide(root: Path) -> list[Path]:
    done = sh(HERE / "divide.sh", "parts", str(LIMIT), "pack/1", "pack/carry", cwd=root)
    assert done.returncode == 0, done.stderr
    return sorted((root / "parts").iterdir(), key=lambda p: int(p.name))


def unpack(root: Path, part: Path) -> subprocess.CompletedProcess[str]:
    site = str(root / "site")
    return sh(part / "unpack.sh", cwd=root / "there", SITE=site, PYTHON=sys.executable)


@pytest.mark.parametrize("backwards", [False, True])
def test_what_was_packed_arrives(packed: Path, backwards: bool) -> None:
    parts = divide(packed)
    assert len(parts) > 4
    for part in parts:
        archives = [p for p in part.iterdir() if ".tar.xz" in p.name]
        assert sum(p.stat().st_size for p in archives) <= LIMIT
    for part in reversed(parts) if backwards else parts:
        done = unpack(packed, part)
        assert done.returncode == 0, done.stderr
        again = unpack(packed, part)  # as after a call that was cut off
        assert again.returncode == 0, again.stderr
    assert "pieces wait" not in done.stdout
    for name in ("small.py", "large.bin"):
        assert (packed / "site" / name).read_bytes() == (packed / "source/1" / name).read_bytes()
    assert (packed / "there/files.bin").read_bytes() == b"weights"
    assert list((packed / "site/__pycache__").glob("small.*.pyc"))
    assert str(packed / "site") in (packed / "site/env.sh").read_text()


def test_a_missing_piece_is_waited_for(packed: Path) -> None:
    first, second, *rest = divide(packed)
    for part in (first, *rest):
        done = unpack(packed, part)
        assert done.returncode == 0, done.stderr
    assert "pieces wait for another part" in done.stdout
    assert not (packed / "site/large.bin").exists()
    assert "pieces wait" not in unpack(packed, second).stdout
    assert (packed / "site/large.bin").exists()


def test_a_broken_piece_is_refused(packed: Path) -> None:
    part = divide(packed)[1]
    piece = next(p for p in part.iterdir() if ".tar.xz." in p.name)
    piece.write_bytes(piece.read_bytes()[:-1])
    done = unpack(packed, part)
    assert done.returncode == 1 and "are incomplete" in done.stderr


def test_parts_replace_parts_and_nothing_else(packed: Path) -> None:
    before = divide(packed)
    (before[0] / "old").write_text("")
    assert not (divide(packed)[0] / "old").exists()
    for stranger in ("parts/notes", "parts/99/data"):
        (packed / stranger).parent.mkdir(exist_ok=True)
        (packed / stranger).write_text("precious")
        done = sh(HERE / "divide.sh", "parts", str(LIMIT), "pack/1", cwd=packed)
        assert done.returncode == 1 and "is no part" in done.stderr
        (packed / stranger).unlink()
