"""The manifest of a checkpoint. It is written last: a folder without it is not a checkpoint.

{"format": "real_openrlhf.checkpoint", "format_version": 1,
 "step": 40, "sequence": 4, "time": "2025-01-31T12:00:00+00:00",
 "metric_name": "pearson", "metric": 0.71, "best": true,
 "meta": {...}, "hashes": "how files are hashed, in words",
 "files": [{"path": "policy/rank_0.pt", "size": 123, "kind": "sha256", "hash": "..."}, ...],
 "checksum": sha256 of all of the above}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from real_openrlhf.checkpoint.compat import RunIdentity
from real_openrlhf.checkpoint.errors import CheckpointError
from real_openrlhf.common.durable import MIB, Fingerprint, files_of

MANIFEST_FILE = "manifest.json"
FORMAT = "real_openrlhf.checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint says about its run; it can be read without loading any state.

    identity         what must be the same to resume
    weight_version   version of the weights that the engines had at the end of the step
    """

    identity: RunIdentity
    weight_version: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "identity": self.identity.to_json(),
            "weight_version": self.weight_version,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CheckpointMeta:
        """Inverse of `to_json`; CheckpointError for anything else."""
        try:
            identity, version = content["identity"], content["weight_version"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the meta data lacks {error}") from error
        if type(version) is not int:
            raise CheckpointError("the meta data has a weight_version of another type")
        return cls(identity=RunIdentity.from_json(identity), weight_version=version)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """path: relative to the checkpoint, with slashes. size: bytes. kind, hash: see `Fingerprint`."""

    path: str
    size: int
    kind: str
    hash: str

    def __post_init__(self) -> None:
        pure = PurePosixPath(self.path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise CheckpointError(f"the file {self.path!r} is not inside the checkpoint")
        if type(self.size) is not int or self.kind not in (Fingerprint.WHOLE, Fingerprint.EDGES):
            raise CheckpointError(f"the entry of {self.path!r} has size {self.size!r} and hash kind {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """
    step      number of steps done before the save
    sequence  number of the save; a run that resumed from an earlier step may save a lower step later
    time      ISO 8601, UTC
    metric    value of metric_name; None when not measured or undefined
    best      whether it was the best of its folder when it was written
    """

    step: int
    sequence: int
    time: str
    metric_name: str
    metric: float | None
    best: bool
    meta: CheckpointMeta
    files: tuple[FileEntry, ...]

    def dumps(self, fingerprint: Fingerprint) -> bytes:
        """The content of manifest.json."""
        limit = fingerprint.whole_up_to / MIB
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "sequence": self.sequence,
            "time": self.time,
            "metric_name": self.metric_name,
            "metric": self.metric,
            "best": self.best,
            "meta": self.meta.to_json(),
            "hashes": f"{Fingerprint.WHOLE}: of the whole file; {Fingerprint.EDGES}: of its first and last MiB only, "
            f"for files above {limit:g} MiB, whose middle is checked by nothing but the size",
            "files": [asdict(entry) for entry in self.files],
        }
        # The checksum is made from what will be read back: JSON turns tuples into lists and integer keys into strings.
        content = json.loads(json.dumps(content))
        content["checksum"] = _checksum(content)
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a checkpoint's manifest. CheckpointError, naming it, if it is missing, invalid or of another version."""
        path = folder / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: the save or the copy was not finished") from error
        except PermissionError as error:
            raise CheckpointError(f"no permission to read {path}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not the manifest of a checkpoint of this program")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version!r}, this program reads version {FORMAT_VERSION}; "
                "resume with the version of real_openrlhf that wrote it"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise CheckpointError(f"{path} was changed after it was written: its checksum does not fit")
        try:
            return cls(
                **{name: content[name] for name in ("step", "sequence", "time", "metric_name", "metric", "best")},
                meta=CheckpointMeta.from_json(content["meta"]),
                files=tuple(FileEntry(**entry) for entry in content["files"]),
            )
        except (KeyError, TypeError, CheckpointError) as error:
            raise CheckpointError(f"{path} is not a complete manifest: {error}") from error


def list_files(folder: Path, fingerprint: Fingerprint) -> tuple[FileEntry, ...]:
    """Entries of all files in the folder, which has no manifest yet."""
    entries = []
    for path in files_of(folder):
        kind, digest = fingerprint.of(path)
        relative = path.relative_to(folder).as_posix()
        entries.append(FileEntry(path=relative, size=path.stat().st_size, kind=kind, hash=digest))
    return tuple(entries)


def find_defect(folder: Path, manifest: Manifest, *, hashes: bool) -> str | None:
    """The first file that is not as the manifest says, in words; None when all are right.

    hashes=False compares sizes only and reads no file.
    """
    for entry in manifest.files:
        path = folder / entry.path
        try:
            if not path.is_file():
                return f"{path} is missing"
            size = path.stat().st_size
            if size != entry.size:
                return f"{path} has {size} bytes, not {entry.size}"
            if hashes and Fingerprint.digest(path, entry.kind) != entry.hash:
                return f"{path} has other content than was written (hash differs)"
        except PermissionError:
            return f"no permission to read {path}"
        except OSError as error:
            return f"{path} cannot be read: {error}"
    return None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder and its manifest. Paths below `path` may be read by any process."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def metric(self) -> float | None:
        return self.manifest.metric

    @property
    def meta(self) -> CheckpointMeta:
        return self.manifest.meta

    def read_json(self, name: str) -> Any:
        """Read what `write_json` wrote. CheckpointError if it is missing or not JSON."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error

    def read_torch(self, name: str) -> Any:
        """Read what `write_torch` wrote, onto the CPU, without running code in the file. Else CheckpointError."""
        import torch

        try:
            return torch.load(self.path / name, weights_only=True, map_location="cpu")
        except Exception as error:  # torch passes on any error of its unpickler
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error

    def verify(self) -> None:
        """Compare every file with the manifest, hashes included; CheckpointError names the first that differs."""
        defect = find_defect(self.path, self.manifest, hashes=True)
        if defect:
            raise CheckpointError(f"{self.path} is not a complete checkpoint: {defect}")
