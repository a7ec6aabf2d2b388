"""What a complete checkpoint is: a directory with a manifest, which has the size and hash of every other file in it.

Reading only; w1train/checkpoints/checkpoint.py writes and loads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from io import BufferedReader
from pathlib import Path
from typing import Any

from w1train.checkpoints.guard_state import state_problems
from w1train.config.reading import is_number, parse_json, shorten
from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml
from w1train.runtime.distributed import agreed, on_every_rank
from w1train.runtime.names import is_plain_name, open_inside
from w1train.runtime.pulse import moved, pulse
from w1train.runtime.transfers import together

MANIFEST = "manifest.json"
WRITING = ".writing-"
"""Begins the names of directories that are being written or removed. The next start removes them."""
MAXIMUM_BYTES = 64 << 20
"""The most bytes of a manifest: an entry takes some 130 bytes, so that this is about half a million files."""
_MOST_PROBLEMS = 5
_BUFFER_BYTES = 1 << 18
_SHA256 = re.compile(r"[0-9a-f]{64}")
STEP_DIRECTORY = re.compile(r"step_[0-9]{10}")


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
        with open_inside(path, MANIFEST) as file:
            return check_manifest(file.read(MAXIMUM_BYTES + 1))
    except OSError as error:
        raise damaged(path, [f"{MANIFEST} cannot be read ({error})"]) from error
    except ValueError as error:
        raise damaged(path, [str(error)]) from error


def check_manifest(content: bytes) -> dict[str, Any]:
    """Check a manifest that may come from anybody, and parse it.

    Raises:
        ValueError: it is no manifest, lacks a part, or names a file that is not in its directory.
    """
    try:
        if len(content) > MAXIMUM_BYTES:
            raise ValueError(f"it has more than {MAXIMUM_BYTES >> 20} MiB")
        manifest = {"health": {}, **parse_json(content)}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if missing := {*(field.name for field in fields(Progress)), "files"} - manifest.keys():
        raise ValueError(f"{MANIFEST} lacks {', '.join(sorted(missing))}")
    if problems := [*_value_problems(manifest), *_entry_problems(manifest["files"])]:
        raise ValueError("; ".join(problems[:_MOST_PROBLEMS]))
    return manifest


def _value_problems(manifest: dict[str, Any]) -> Iterator[str]:
    is_right = {
        "step": _is_count(manifest["step"]),
        "samples": _is_count(manifest["samples"]),
        "seconds": is_number(manifest["seconds"]) and 0 <= manifest["seconds"] < 1e12,
        "dataset": manifest["dataset"] is None or isinstance(manifest["dataset"], str),
        "validation": isinstance(manifest.get("validation", {}), dict) and all(map(is_number, manifest.get("validation", {}).values())),
        "files": isinstance(manifest["files"], dict),
    }
    yield from (f"{MANIFEST} says {name}: {shorten(manifest[name])}" for name, is_valid in is_right.items() if not is_valid)
    yield from (f"{MANIFEST} says {problem}" for problem in state_problems(manifest["health"]))


def _entry_problems(files: Any) -> Iterator[str]:
    for name, entry in files.items() if isinstance(files, dict) else ():
        if not is_plain_name(name) or name == MANIFEST:
            yield f"{MANIFEST} names {shorten(name)}, which is not the name of another file in its directory"
        elif not (isinstance(entry, dict) and _is_count(entry.get("size")) and _SHA256.fullmatch(str(entry.get("sha256")))):
            yield f"{MANIFEST} has no size and SHA-256 for {name}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def damaged(path: Path | str, problems: list[str]) -> CheckpointError:
    """What is said of a checkpoint that is not what its manifest says."""
    return CheckpointError(f"{path} is damaged: {'; '.join(problems)}. Remove this directory to resume from an older checkpoint.")


def read_config(path: Path) -> Config:
    """The configuration that a complete checkpoint was trained with, which its manifest vouches for.

    Raises:
        CheckpointError: the file is missing or changed.
    """
    _require_config(path)
    return config_from_yaml(path / "config.yaml")


def read_config_text(path: Path) -> str:
    """Return the text of a complete checkpoint's configuration. Raises CheckpointError as ``read_config`` does."""
    _require_config(path)
    try:
        with open_inside(path, "config.yaml") as file:
            return file.read().decode()
    except (OSError, ValueError) as error:
        raise damaged(path, [f"config.yaml cannot be read ({error})"]) from error


def _require_config(path: Path) -> None:
    expected = read_manifest(path)["files"].get("config.yaml")
    problems = [f"{MANIFEST} lacks config.yaml"] if expected is None else _file_problems(path / "config.yaml", expected)
    if problems:
        raise damaged(path, problems)


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
    """What is wrong with a file whose size and hash are known; at most one thing."""
    if not file.exists() and not file.is_symlink():
        return [f"{file.name} is missing"]
    try:
        with open_inside(file.parent, file.name) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != expected["size"]:
                return [f"{file.name} has {size} bytes, expected {expected['size']}"]
            if hashes and _sha256(stream) != expected["sha256"]:
                return [f"{file.name} has changed (SHA-256 differs)"]
    except OSError as error:
        return [f"{file.name} cannot be read ({_why(error, file)})"]
    return []


def _why(error: OSError, file: Path) -> str:
    return "it is a link, and may lead out of the checkpoint" if error.errno == errno.ELOOP else error.strerror or str(error)


def hash_files(paths: Iterable[Path]) -> dict[str, Any]:
    """The manifest's entries of files that are there, by name."""
    entries = {}
    for path in paths:
        with path.open("rb") as file:
            entries[path.name] = {"size": path.stat().st_size, "sha256": _sha256(file)}
    return entries


def _sha256(file: BufferedReader) -> str:
    # One small buffer: a large one, of a thread that ends, stays in the allocator's hands.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER_BYTES))
    with pulse.transferring(f"reading {file.name}"):
        while num_bytes := file.readinto(buffer):
            digest.update(buffer[:num_bytes])
            moved()
    return digest.hexdigest()
