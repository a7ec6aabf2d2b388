"""The manifest that makes a directory a complete checkpoint: the run's progress, and the size and hash of every other file there.

This module only reads. verification.py compares the files with the manifest, and commit.py writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from w1train.checkpoints.checkpoint_names import step_of, step_paths
from w1train.checkpoints.guard_state import state_problems
from w1train.config.reading import is_number, parse_json_object, shorten
from w1train.runtime.names import is_plain_name, open_inside

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
"""The file of a checkpoint that holds the run's configuration."""
MAXIMUM_BYTES = 64 << 20
"""The most bytes of a manifest: an entry takes some 130 bytes, so that this is about half a million files."""
_MOST_PROBLEMS = 5
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which checkpoint, and what is still good."""


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not what its manifest says."""

    def __init__(self, path: Path | str, problems: list[str]) -> None:
        super().__init__(path, problems)  # the arguments, from which pickle makes the error on another rank
        self.path = path
        self.reason = "; ".join(problems)
        """The problems, for the messages of callers who take another checkpoint instead."""

    def __str__(self) -> str:
        return f"{self.path} is damaged: {self.reason}. Remove this directory to resume from an older checkpoint."


@dataclass(slots=True)
class Progress:
    """The progress of a run. A resume needs this, the configuration and the tensors, and nothing else."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Wall time of training up to this step, over all starts of the run, without work that a kill undid."""
    dataset: str | None = None
    """SHA-256 of the training tokens; ``samples`` is a place in their order. None for a dataset of another project, which has no hash."""
    health: dict[str, Any] = field(default_factory=dict)
    """State of the guard of the steps (w1train.training.health.guard), as JSON. Empty in checkpoints that are older than the guard."""
    noise: str | None = None
    """SHA-256 of the token counts that the noise of the last step depends on (diffusion.token_counts). None for noise without counts, and
    in checkpoints that are older than this field."""
    reference: dict[str, str] = field(default_factory=dict)
    """``weights``, the directory that the weights of the reference come from, and ``sha256``, their hash in memory. Empty in runs without a
    reference, and in checkpoints that are older than this field."""


def complete_steps(directory: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, ascending."""
    return [step_of(path) for path in step_paths(directory) if is_complete(path)]


def is_complete(path: Path) -> bool:
    """Tell whether a checkpoint has its manifest. A directory gets the name of a checkpoint only when it has a manifest, so a directory
    without a manifest is damaged."""
    return (path / MANIFEST).is_file()


def require_manifests(directory: Path) -> None:
    """Refuse a checkpoint without a manifest. Otherwise the run would silently resume from an older checkpoint and lose training.

    Raises:
        DamagedCheckpointError: a checkpoint has no manifest.
    """
    for path in step_paths(directory):
        if not is_complete(path):
            raise DamagedCheckpointError(path, [f"{MANIFEST} is missing"])


def latest_step(directory: Path) -> int | None:
    """Return the step of the newest complete checkpoint, or None if there is no complete checkpoint."""
    steps = complete_steps(directory)
    return steps[-1] if steps else None


def describe_next_start(directory: Path) -> str:
    """Say in words that follow "the run has ended;" where the command that started the run will resume."""
    step = latest_step(directory)
    if step is None:
        return "it has no checkpoint yet, and the same command begins it again"
    return f"the same command resumes from step {step}"


def read_progress(path: Path) -> Progress:
    """Return how far the run was at a complete checkpoint.

    Raises:
        DamagedCheckpointError: the manifest is missing or damaged.
    """
    manifest = read_manifest(path)
    return Progress(**{field.name: manifest[field.name] for field in fields(Progress)})


def read_scores(path: Path) -> dict[str, float]:
    """Return the results of the validation at a complete checkpoint's step, by metric. Empty if that step had no validation.

    Raises:
        DamagedCheckpointError: the manifest is missing or damaged.
    """
    return read_manifest(path).get("validation", {})


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, with every value checked.

    Raises:
        DamagedCheckpointError: the manifest is missing or damaged.
    """
    try:
        with open_inside(path, MANIFEST) as file:
            return check_manifest(file.read(MAXIMUM_BYTES + 1))
    except OSError as error:
        raise DamagedCheckpointError(path, [f"{MANIFEST} cannot be read ({error})"]) from error
    except ValueError as error:
        raise DamagedCheckpointError(path, [str(error)]) from error


def check_manifest(content: bytes) -> dict[str, Any]:
    """Parse and check the content of a manifest, which a stranger may have written.

    Raises:
        ValueError: it is not JSON, a part is missing or wrong, or it names a file that is not in its directory.
    """
    if len(content) > MAXIMUM_BYTES:
        raise ValueError(f"{MANIFEST} cannot be read: it has more than {MAXIMUM_BYTES >> 20} MiB")
    manifest = {"health": {}, "noise": None, "reference": {}, **parse_json_object(content, f"{MANIFEST} cannot be read")}
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
        "noise": manifest["noise"] is None or isinstance(manifest["noise"], str),
        "reference": isinstance(manifest["reference"], dict) and all(isinstance(value, str) for value in manifest["reference"].values()),
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


def size_of(path: Path) -> int:
    """Return the number of bytes of a complete checkpoint's files.

    Raises:
        DamagedCheckpointError: the manifest is missing or damaged.
    """
    return sum(entry["size"] for entry in read_manifest(path)["files"].values())
