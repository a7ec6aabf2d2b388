"""Datasets of object storage: copied once to a local directory, which the ranks of a node share.

Samples are read in random order, a few kilobytes at a time: each would be a request of its own. So a dataset is copied whole before
the run, by one process of each machine, and read from there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from w1train.data.indexed import DatasetError, bin_path, idx_path
from w1train.data.manifest import manifest_path
from w1train.data.shards import SHARD_PATTERN, shard_names
from w1train.runtime.files import exclusive, replace_file

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 16 << 20
_ATTEMPTS = 3
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "mtime", "created")
"""What storages call the version of a file, or the time of its last change."""


def is_remote(prefix: str) -> bool:
    """Whether a prefix names object storage, such as s3://bucket/train."""
    return "://" in prefix


def localize(prefix: str, cache_directory: str | None) -> str:
    """The prefix of a local copy of a dataset, made unless it is there; a local prefix is its own. Waits while another process copies.

    A file in the cache is taken for the remote one if it has its length and, where the storage knows one, its version.

    Raises:
        DatasetError: if the dataset is not there, a file cannot be copied, or the storage's protocol is not installed.
    """
    if not is_remote(prefix):
        return prefix
    assert cache_directory is not None, "the configuration was not validated"
    # Two buckets may have a dataset of the same name.
    directory = Path(cache_directory) / hashlib.sha256(prefix.encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    local = directory / prefix.rsplit("/", 1)[1]
    file_system, path = _file_system(prefix)
    datasets = _datasets(file_system, path)
    for dataset in datasets:
        _localize(file_system, dataset, directory / dataset.rsplit("/", 1)[1])
    _forget_others(local, {dataset.rsplit("/", 1)[1] for dataset in datasets})
    return str(local)


def _datasets(file_system: Any, path: str) -> list[str]:
    """The dataset of a prefix, or if there is none its shards."""
    if file_system.exists(str(bin_path(path))):
        return [path]
    shards = sorted(file_system.glob(str(bin_path(f"{path}{SHARD_PATTERN}"))))
    return [shard.removesuffix(".bin") for shard in shards] or [path]


def _localize(file_system: Any, dataset: str, local: Path) -> None:
    # The manifest last: it is the sign of completeness here too.
    for name in (bin_path, idx_path, manifest_path):
        remote, target = str(name(dataset)), name(local)
        with exclusive(target):
            _fill(file_system, remote, target, required=name is not manifest_path)


def _forget_others(local: Path, names: set[str]) -> None:
    """Copies of what was there before under the same prefix: more shards, or a dataset that is in shards now."""
    for manifest in [manifest_path(local), *map(manifest_path, shard_names(local))]:
        other = str(manifest).removesuffix(".json")
        if other.rsplit("/", 1)[1] not in names:
            for path in (manifest, idx_path(other), bin_path(other)):
                path.unlink(missing_ok=True)


def _file_system(prefix: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(prefix)
    except (ImportError, ValueError) as error:
        raise DatasetError(f"{prefix}: {error}") from error


def _fill(file_system: Any, remote: str, target: Path, required: bool) -> None:
    """Copy a file, complete or not at all, unless it is in the cache already."""
    try:
        info = file_system.info(remote)
    except FileNotFoundError:
        if required:
            raise DatasetError(f"{remote} does not exist in {'/'.join(_protocols(file_system))}") from None
        target.unlink(missing_ok=True)
        return
    stamp = target.with_name(f"{target.name}.version")
    version = repr([info["size"], *(str(info[key]) for key in _VERSION_KEYS if key in info)])
    if target.exists() and target.stat().st_size == info["size"] and stamp.exists() and stamp.read_text(encoding="utf-8") == version:
        return
    stamp.unlink(missing_ok=True)
    _copy(file_system, remote, target, info["size"])
    stamp.write_text(version, encoding="utf-8")


def _copy(file_system: Any, remote: str, target: Path, num_bytes: int) -> None:
    started = time.perf_counter()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with file_system.open(remote, "rb") as source, replace_file(target) as file:
                while chunk := source.read(_CHUNK_BYTES):
                    file.write(chunk)
                if file.tell() != num_bytes:
                    raise OSError(f"{file.tell()} bytes came, expected {num_bytes}")
            logger.info("copied %s (%.1f MB) in %.1f s", remote, os.path.getsize(target) / 1e6, time.perf_counter() - started)
            return
        except OSError as error:
            if attempt == _ATTEMPTS:
                raise DatasetError(f"{remote} could not be copied to {target}, {attempt} times in a row: {error}") from error
            logger.warning("copying %s to %s: %s; trying again", remote, target, error)
            time.sleep(attempt)


def _protocols(file_system: Any) -> tuple[str, ...]:
    return (file_system.protocol,) if isinstance(file_system.protocol, str) else tuple(file_system.protocol)
