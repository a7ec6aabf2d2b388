"""Comparison of a checkpoint's files with the sizes and hashes in its manifest."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

from w1train.checkpoints.manifest import CONFIG, MANIFEST, DamagedCheckpointError, read_manifest
from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml
from w1train.config.yaml_limits import LARGEST_YAML
from w1train.runtime.distributed import agreed, on_every_rank
from w1train.runtime.files import errors_named
from w1train.runtime.names import open_inside
from w1train.runtime.pulse import moved, pulse
from w1train.runtime.transfers import together

_BUFFER_BYTES = 1 << 18


def verify_checkpoint(path: Path, *, rank: int = 0, num_ranks: int = 1, hashes: bool = True) -> None:
    """Compare every ``num_ranks``-th file with the manifest's sizes and hashes, so that all ranks together compare all files.

    Args:
        hashes: False compares only the sizes, which takes no time and does not notice changed bits.

    Raises:
        DamagedCheckpointError: on every rank; files are missing or differ, and the message names them.
    """

    def problems_here() -> list[str]:
        files = sorted(read_manifest(path)["files"].items())
        return [problem for name, expected in files[rank::num_ranks] for problem in _file_problems(path / name, expected, hashes=hashes)]

    problems = [problem for part in on_every_rank(together(problems_here)) for problem in part] if num_ranks > 1 else problems_here()
    if problems:
        error = DamagedCheckpointError(path, problems)
        raise agreed(error) if num_ranks > 1 else error


def read_config(path: Path) -> Config:
    """Return the configuration that a complete checkpoint was trained with, compared with the hash in the manifest first.

    Raises:
        DamagedCheckpointError: the file is missing or changed.
    """
    _require_config(path)
    return config_from_yaml(path / CONFIG)


def read_config_text(path: Path) -> str:
    """Return the text of a complete checkpoint's configuration. Raise DamagedCheckpointError as ``read_config`` does."""
    _require_config(path)
    try:
        with open_inside(path, CONFIG) as file:
            return file.read(LARGEST_YAML + 1).decode()
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(path, [f"{CONFIG} cannot be read ({error})"]) from error


def _require_config(path: Path) -> None:
    expected = read_manifest(path)["files"].get(CONFIG)
    if expected is None:
        problems = [f"{MANIFEST} lacks {CONFIG}"]
    elif expected["size"] > LARGEST_YAML:
        problems = [f"{MANIFEST} says that {CONFIG} has {expected['size']:,} bytes; a configuration has at most {LARGEST_YAML:,}"]
    else:
        problems = _file_problems(path / CONFIG, expected)
    if problems:
        raise DamagedCheckpointError(path, problems)


def _file_problems(file: Path, expected: dict[str, Any], *, hashes: bool = True) -> list[str]:
    """Return what is wrong with a file whose size and hash are known: at most one problem."""
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
        return [f"{file.name} cannot be read ({_describe_read_error(error)})"]
    return []


def _describe_read_error(error: OSError) -> str:
    return "it is a link, and may lead out of the checkpoint" if error.errno == errno.ELOOP else error.strerror or str(error)


def hash_files(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the manifest's entries of files: the size and SHA-256 of each by its name."""
    entries = {}
    for path in paths:
        with path.open("rb") as file, errors_named(path):
            entries[path.name] = {"size": path.stat().st_size, "sha256": _sha256(file)}
    return entries


def _sha256(file: BufferedReader) -> str:
    # A small buffer, used again for each piece: the allocator would keep a large buffer of a thread that has ended.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER_BYTES))
    with pulse.transferring(f"reading {file.name}"):
        while num_bytes := file.readinto(buffer):
            digest.update(buffer[:num_bytes])
            moved()
    return digest.hexdigest()
