"""What a complete checkpoint is: a directory with a manifest, which has the size and hash of every other file in it.

Reading only; w1train/training/checkpoint.py writes and loads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml
from w1train.runtime.distributed import agreed, on_every_rank
from w1train.runtime.pulse import moved, pulse
from w1train.runtime.transfers import PIECE_BYTES, together

MANIFEST = "manifest.json"
WRITING = ".writing-"
"""Begins the names of directories that are being written or removed. The next start removes them."""
STEP_DIRECTORY = re.compile(r"step_\d{10}")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what is still good."""


@dataclass(slots=True)
class Progress:
    """How far the run is; with the configuration, all that a resume needs besides tensors."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Wall time up to here over all starts of the run; work that a kill undid is not in it."""
    dataset: str | None = None
    """SHA-256 of the training tokens: ``samples`` is a place in the order of these. None for a foreign dataset, which has none."""
    health: dict[str, Any] = field(default_factory=dict)
    """What the guard of the steps (w1train.training.health.guard) goes by: JSON. Checkpoints of before it have none."""


def step_path(directory: Path, step: int) -> Path:
    """The checkpoint of a step, there or not."""
    return directory / f"step_{step:010d}"


def complete_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(int(path.name.removeprefix("step_")) for path in step_directories(directory) if is_complete(path))


def is_complete(path: Path) -> bool:
    """Directories get their name when they are complete: the manifest's absence means damage."""
    return (path / MANIFEST).is_file()


def step_directories(directory: Path) -> list[Path]:
    """Everything under a checkpoint's name, complete or not."""
    return [path for path in directory.iterdir() if STEP_DIRECTORY.fullmatch(path.name)] if directory.is_dir() else []


def require_manifests(directory: Path) -> None:
    """Directories get their final name when they are complete, so one without manifest is damaged; going on from an older one
    without a word would undo training.

    Raises:
        CheckpointError: naming it.
    """
    for path in step_directories(directory):
        if not is_complete(path):
            raise damaged(path, [f"{MANIFEST} is missing"])


def latest_step(directory: Path) -> int | None:
    """The newest complete checkpoint's step."""
    steps = complete_steps(directory)
    return steps[-1] if steps else None


def read_progress(path: Path) -> Progress:
    """How far the run was at a complete checkpoint.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = read_manifest(path)
    return Progress(**{field.name: manifest[field.name] for field in fields(Progress)})


def read_scores(path: Path) -> dict[str, float]:
    """The validation at a complete checkpoint's step, by metric; empty if there was none."""
    return read_manifest(path).get("validation", {})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest as it is written.

    Raises:
        CheckpointError: it is missing, or no manifest.
    """
    try:
        manifest = {"health": {}, **json.loads((path / MANIFEST).read_bytes())}
        missing = {*(field.name for field in fields(Progress)), "files"} - manifest.keys()
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, [f"{MANIFEST} cannot be read ({error})"]) from error
    if missing:
        raise damaged(path, [f"{MANIFEST} lacks {', '.join(sorted(missing))}"])
    return manifest


def damaged(path: Path, problems: list[str]) -> CheckpointError:
    """What is said of a checkpoint that is not what its manifest says."""
    return CheckpointError(f"{path} is damaged: {'; '.join(problems)}. Remove this directory to resume from an older checkpoint.")


def read_config(path: Path) -> Config:
    """The configuration that a complete checkpoint was trained with, which its manifest vouches for.

    Raises:
        CheckpointError: the file is missing or changed.
    """
    expected = read_manifest(path)["files"].get("config.yaml")
    problems = [f"{MANIFEST} lacks config.yaml"] if expected is None else _file_problems(path / "config.yaml", expected)
    if problems:
        raise damaged(path, problems)
    return config_from_yaml(path / "config.yaml")


def verify_checkpoint(path: Path, *, rank: int = 0, num_ranks: int = 1, hashes: bool = True) -> None:
    """Compare every ``num_ranks``-th file with the manifest's sizes and hashes; all ranks together cover all files.

    Args:
        hashes: False = sizes alone, which takes no time and misses changed bits.

    Raises:
        CheckpointError: on every rank, naming the files.
    """

    def problems_here() -> list[str]:
        files = sorted(read_manifest(path)["files"].items())
        return [problem for name, expected in files[rank::num_ranks] for problem in _file_problems(path / name, expected, hashes=hashes)]

    problems = [problem for part in on_every_rank(together(problems_here)) for problem in part] if num_ranks > 1 else problems_here()
    if problems:
        error = damaged(path, problems)
        raise agreed(error) if num_ranks > 1 else error


def size_of(path: Path) -> int:
    """Bytes of a complete checkpoint's files.

    Raises:
        CheckpointError: its manifest is damaged.
    """
    return sum(entry["size"] for entry in read_manifest(path)["files"].values())


def _file_problems(file: Path, expected: dict[str, Any], *, hashes: bool = True) -> list[str]:
    """What is wrong with a file whose size and hash are known; at most one thing. A file that the disk does not give back (EIO) is no
    better than a changed one: an older checkpoint may be readable."""
    try:
        if not file.is_file():
            return [f"{file.name} is missing"]
        if file.stat().st_size != expected["size"]:
            return [f"{file.name} has {file.stat().st_size} bytes, expected {expected['size']}"]
        if hashes and _sha256(file) != expected["sha256"]:
            return [f"{file.name} has changed (SHA-256 differs)"]
    except OSError as error:
        return [f"{file.name} cannot be read ({error.strerror})"]
    return []


def hash_files(paths: Iterable[Path]) -> dict[str, Any]:
    """The manifest's entries of files that are there, by name."""
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, pulse.transferring(f"reading {path}"):
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            moved()
    return digest.hexdigest()
