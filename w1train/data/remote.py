"""Local copies of datasets in object storage, in a directory that the ranks of a machine share.

Samples are read in random order, a few kilobytes at a time, and each read from object storage would be a request of its own. So one process
of each machine copies the whole dataset before the run, and the ranks read the copy.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from w1train.config.credentials import is_masked, mask_urls
from w1train.config.errors import UserError
from w1train.config.reading import LARGEST_JSON, parse_json
from w1train.data.dataset_manifest import dataset_paths, manifest_path
from w1train.data.indexed import DatasetError, bin_path, idx_path, may_be_noised_path
from w1train.data.sharded_dataset import SHARD_PATTERN, shard_names
from w1train.runtime.files import errors_named, replace_file, write_text
from w1train.runtime.locks import exclusive
from w1train.runtime.object_storage import ObjectStorage, StorageError, require_protocol

logger = logging.getLogger(__name__)

_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "mtime", "created")
"""Names that storages give to the version of a file, or to the time of its last change."""


def is_remote(prefix: str) -> bool:
    """Return whether a prefix names object storage, such as s3://bucket/train."""
    return "://" in prefix


def localize(prefix: str, cache_directory: str | None) -> str:
    """Return the prefix of a local copy of a dataset, and make the copy unless it exists. A local prefix is returned unchanged.

    If another process is making the copy, the function waits for it. A file of the copy is up to date if it has the length of the remote
    file and, if the storage tells versions, its version.

    Raises:
        DatasetError: if the dataset does not exist, a file cannot be copied, or the storage's protocol is not installed.
    """
    if not is_remote(prefix):
        return prefix
    require_password(prefix)
    if cache_directory is None:
        raise DatasetError(
            f"{prefix} must be copied before it is read, and the run has no data.cache_directory for the copy: name a local dataset"
        )
    # Two buckets may have datasets with the same name.
    directory = Path(cache_directory) / hashlib.sha256(mask_urls(prefix).encode()).hexdigest()[:16]
    try:
        require_protocol("a dataset", prefix)
        return str(_localize_all(ObjectStorage(prefix), directory))
    except (UserError, StorageError) as error:
        raise error if isinstance(error, DatasetError) else DatasetError(str(error)) from error


def _localize_all(storage: ObjectStorage, directory: Path) -> Path:
    name = storage.root.rpartition("/")[2]
    if name in ("", ".", ".."):
        raise DatasetError(f"{storage.url} does not end in the name of a dataset")
    directory.mkdir(parents=True, exist_ok=True)
    suffixes = _suffixes(storage)
    for suffix in suffixes:
        _localize_one(storage, f"{storage.root}{suffix}", directory / f"{name}{suffix}")
    _forget_others(directory / name, {f"{name}{suffix}" for suffix in suffixes})
    return directory / name


def _localize_one(storage: ObjectStorage, remote: str, local: Path) -> None:
    """Copy the files of a dataset that is not in shards. The manifest comes last, for it tells that the copy is complete."""
    is_listed = _lists_may_be_noised(storage, remote)
    is_required = {bin_path: True, idx_path: True, may_be_noised_path: is_listed is True, manifest_path: False}
    if is_listed is False:
        # A storage may answer a question about a file that does not exist with a refusal, which would end the run.
        del is_required[may_be_noised_path]
        may_be_noised_path(local).unlink(missing_ok=True)
    for path_of, required in is_required.items():
        target = path_of(local)
        with exclusive(target) as writer:
            _fill(storage, _remote_path(path_of, remote), target, writer, required)


def _lists_may_be_noised(storage: ObjectStorage, prefix: str) -> bool | None:
    """Return whether a dataset's manifest lists PREFIX.may_be_noised; None for a dataset without a manifest."""
    try:
        manifest = parse_json(storage.read(_remote_path(manifest_path, prefix), LARGEST_JSON))
    except FileNotFoundError:
        return None
    except ValueError:  # the manifest is damaged, which is reported when the copy is opened
        return False
    return isinstance(manifest, dict) and "may_be_noised_sha256" in manifest


def require_password(prefix: str) -> None:
    """Raise DatasetError if the prefix is a URL from a run's config.yaml, where *** replaces passwords."""
    if is_masked(prefix):
        raise DatasetError(
            f"{prefix}: *** stands for a password, which a run's config.yaml does not have. Give the dataset's whole URL with --validation"
        )


def require_local(prefix: str) -> None:
    """Raise DatasetError if the prefix of a dataset, read from the config.yaml of a finished run, names object storage.

    Somebody else may have written this file. Its URL could make this machine fetch anything that its network reaches, also by chained
    protocols such as reference::http://..., and would write the copy where the file says (data.cache_directory).
    """
    require_password(prefix)
    if is_remote(prefix):
        raise DatasetError(
            f"{prefix} comes from the run's config.yaml, and w1train does not fetch what a file names. Give the dataset with --validation"
        )


def _remote_path(path_of: Callable[[str], Path], prefix: str) -> str:
    """Return the path of a dataset's file in the storage. ``Path`` would remove one of two slashes, which makes another name there."""
    directory, slash, name = prefix.rpartition("/")
    return f"{directory}{slash}{path_of(name)}"


def _suffixes(storage: ObjectStorage) -> list[str]:
    """Return what follows the prefix in the names of its datasets: "" for a dataset that is not in shards, or the ending of each shard.

    Raises:
        DatasetError: if the storage lists a file that was not asked for, such as a path outside of the prefix.
    """
    if storage.exists(_remote_path(bin_path, storage.root)):
        return [""]
    found = sorted(storage.glob(_remote_path(bin_path, f"{glob.escape(storage.root)}{SHARD_PATTERN}")))
    suffixes = [path.removeprefix(storage.root).removesuffix(".bin") for path in found]
    for path, suffix in zip(found, suffixes, strict=True):
        # The local file gets this name.
        if not path.startswith(storage.root) or not fnmatch.fnmatchcase(suffix, SHARD_PATTERN):
            raise DatasetError(f"{storage.url}: the storage lists {path!r}, which is not a shard of this dataset")
    return suffixes or [""]


def _forget_others(local: Path, names: set[str]) -> None:
    """Remove local copies of datasets that the prefix no longer names: further shards, or a dataset that now is in shards."""
    for manifest in [manifest_path(local), *map(manifest_path, shard_names(local))]:
        other = str(manifest).removesuffix(".json")
        if other.rsplit("/", 1)[1] not in names:
            for path in dataset_paths(other):
                path.unlink(missing_ok=True)


def _fill(storage: ObjectStorage, remote: str, target: Path, writer: str, required: bool) -> None:
    """Copy a file, completely or not at all, unless the cache already has it. A file that is not required may be missing."""
    try:
        info = storage.info(remote)
    except FileNotFoundError:
        if required:
            raise DatasetError(f"{remote} does not exist in {storage.url}") from None
        target.unlink(missing_ok=True)
        return
    stamp = target.with_name(f"{target.name}.version")
    version = repr([info["size"], *(str(info[key]) for key in _VERSION_KEYS if key in info)])
    if target.exists() and target.stat().st_size == info["size"] and _content(stamp) == version.encode():
        return
    stamp.unlink(missing_ok=True)
    _copy(storage, remote, target, writer, info)
    write_text(stamp, version)


def _content(stamp: Path) -> bytes | None:
    """Return what a stamp says, whatever a crash has left in it; None if it does not exist."""
    try:
        with errors_named(stamp):
            return stamp.read_bytes()
    except FileNotFoundError:
        return None


def _copy(storage: ObjectStorage, remote: str, target: Path, writer: str, info: dict[str, Any]) -> None:
    started, free = time.perf_counter(), shutil.disk_usage(target.parent).free
    if info["size"] > free:
        sizes = f"it has {info['size'] / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free"
        raise DatasetError(f"{remote} does not fit into {target.parent} (data.cache_directory): {sizes}")
    try:
        with replace_file(target, writer) as file:
            storage.download(remote, file, info["size"])
    except FileNotFoundError as error:
        raise DatasetError(f"{remote} went away while it was copied to {target}") from error
    logger.info("copied %s (%.1f MB) in %.1f s", remote, os.path.getsize(target) / 1e6, time.perf_counter() - started)
