"""Copies of complete checkpoints in object storage, for uploads and for starts.

The storage is named and reached through fsspec (s3://, gs://, file://, ...). A copy is complete when it has its manifest, which is uploaded
last. ``run.json`` beside the copies says that a run uploads to this URL, and the newest step that it has uploaded. Without this marker, the
empty listing of a wrong or lost bucket would look like that of a run's first start.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w1train.checkpoints.checkpoint_names import LARGEST_STEP, step_of, step_of_name, step_path
from w1train.checkpoints.manifest import MANIFEST, MAXIMUM_BYTES, CheckpointError, check_manifest, read_manifest
from w1train.checkpoints.retention import kept_steps, rank_steps
from w1train.config.reading import parse_json_object, shorten
from w1train.config.schema_operation import CheckpointConfig
from w1train.runtime.files import open_new
from w1train.runtime.object_storage import ObjectStorage, WrongSizeError

logger = logging.getLogger(__name__)

MARKER = "run.json"
_UNDONE_MANIFEST = "undone-manifest.json"
_LARGEST_MARKER = 1 << 16
"""The largest number of bytes that a marker may have."""


class UnfinishedCopyError(CheckpointError):
    """A copy has no manifest: its upload did not end, checkpoint.resume_step has undone it, or it was removed."""


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of run.json."""

    newest: int | None = None
    """The newest step that was uploaded; None = no checkpoint was uploaded yet."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The files of a run that a storage shows."""

    steps: list[int]
    """Steps that the listing has a directory of or that the marker names, ascending. Their copies may be incomplete or gone, because
    listings may be stale."""
    marker: Marker | None
    """The content of the marker; None if there is no marker."""
    marker_problem: str | None = None
    """The reason why a marker cannot be read."""


class RemoteCheckpoints:
    """The copies of a run's checkpoints under a URL. The constructor opens no connection.

    Every method raises StorageError if the storage fails, and CheckpointError if a file of the storage is wrong.
    """

    def __init__(self, url: str) -> None:
        self._storage = ObjectStorage(url)
        self.url = self._storage.url
        """The URL as messages show it."""

    def contents(self) -> Contents:
        """Return the steps that a start can choose from, and the marker."""
        steps, marker, problem = {*self._listed()}, None, None
        try:
            marker = self._read_marker()
        except CheckpointError as error:
            problem = str(error)
        if marker is not None and marker.newest is not None:
            steps.add(marker.newest)
        return Contents(sorted(steps), marker, problem)

    def steps(self) -> list[int]:
        """Return the steps of the complete copies, ascending."""
        return [step for step in self._listed() if self._has(step, MANIFEST)]

    def mark(self) -> None:
        """Write the marker unless it exists, so that it is there before the first checkpoint is uploaded."""
        if not self._storage.exists(self._marker_path):
            self._write_marker(Marker(max(self.steps(), default=None)))

    def undo_after(self, step: int) -> None:
        """Make the copies of later steps incomplete, because these steps are trained again. Their manifests get another name (object
        storage cannot rename a directory without copying it). They are removed when copies of the same steps are uploaded."""
        undone = [later for later in self.steps() if later > step]
        for later in undone:
            logger.warning("the copy of step %d in %s is not used any more: checkpoint.resume_step=%d", later, self.url, step)
            self._undo(later)
        if undone:
            self._write_marker(Marker(max(self.steps(), default=None)))

    def _undo(self, step: int) -> None:
        path = self._path(step)
        try:
            self._storage.rename(f"{path}/{MANIFEST}", f"{path}/{_UNDONE_MANIFEST}")
        except FileNotFoundError:
            # A previous attempt has renamed it, although it seemed to fail.
            if self._has(step, MANIFEST):
                raise

    def send(self, checkpoint: Path, on_progress: Callable[[], None] = lambda: None) -> None:
        """Upload a complete checkpoint. A copy of the same step is replaced.

        Args:
            on_progress: called after each part of a file has arrived.

        Raises:
            OSError: a file could not be read or uploaded.
        """
        step = step_of(checkpoint)
        names = [*read_manifest(checkpoint)["files"], MANIFEST]
        self.remove(step)
        self._storage.make_directory(self._path(step))
        for name in names:
            self._storage.upload(checkpoint / name, f"{self._path(step)}/{name}", on_progress)
        self._write_marker(Marker(step))

    def remove(self, step: int) -> None:
        """Remove a copy, or what exists of it. The manifest goes first, so that a copy that is half removed is not complete."""
        self._storage.remove_file(f"{self._path(step)}/{MANIFEST}")
        self._storage.remove_directory(self._path(step))

    def manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest of a copy, with every value checked.

        Raises:
            UnfinishedCopyError: the copy has no manifest.
            CheckpointError: the file is not a manifest, or is the manifest of another step.
        """
        where = f"the copy of step {step} in {self.url}"
        try:
            content = self._storage.read(f"{self._path(step)}/{MANIFEST}", MAXIMUM_BYTES)
        except FileNotFoundError:
            raise UnfinishedCopyError(
                f"it has no {MANIFEST}: its upload did not end, checkpoint.resume_step has undone it, or it was removed"
            ) from None
        try:
            manifest = check_manifest(content)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if manifest.get("step") != step:
            raise CheckpointError(f"{where} says that it is of step {manifest.get('step')!r}")
        return manifest

    def require_sizes(self, step: int, files: dict[str, dict[str, Any]]) -> None:
        """Compare the sizes in a manifest with those of the files in the storage. Raise CheckpointError if a file differs or is
        missing."""
        for name, entry in files.items():
            try:
                size = self._storage.info(f"{self._path(step)}/{name}")["size"]
            except (FileNotFoundError, WrongSizeError) as error:
                raise CheckpointError(str(error)) from error
            if size != entry["size"]:
                raise CheckpointError(f"{name} has {size} bytes, expected {entry['size']}")

    def fetch_file(self, step: int, name: str, num_bytes: int, directory: Path) -> None:
        """Copy one file of a copy into a local directory.

        Raises:
            CheckpointError: the file is missing, or was longer or shorter than ``num_bytes`` in every attempt.
            OSError: the local disk or the storage failed.
        """
        try:
            with open_new(directory / name) as file:
                self._storage.download(f"{self._path(step)}/{name}", file, num_bytes)
        except (FileNotFoundError, WrongSizeError) as error:
            raise CheckpointError(str(error)) from error

    def remove_old(self, settings: CheckpointConfig, phase_start: int) -> None:
        """Remove the copies that the run's settings do not keep, and what uploads that did not end have left. Copies that
        checkpoint.resume_step has undone stay."""
        listed, complete = self._listed(), self.steps()
        best = []
        if settings.keep_best > 0:
            scores = {step: self._score(step, settings.best_metric) for step in complete if step > phase_start}
            best = rank_steps(scores, settings.keep_best, settings.best_metric)
        for step in sorted({*complete} - kept_steps(complete, best, settings.keep, settings.keep_every)):
            logger.info("removing checkpoint of step %d from %s", step, self.url)
            self.remove(step)
        for step in sorted({*listed} - {*complete}):
            if not self._has(step, _UNDONE_MANIFEST):
                logger.info("removing the copy of step %d, whose upload did not end, from %s", step, self.url)
                self.remove(step)

    def _score(self, step: int, metric: str) -> float | None:
        try:
            score = self.manifest(step).get("validation", {}).get(metric)
        except (CheckpointError, AttributeError) as error:
            logger.warning("the copy of step %d in %s counts as a checkpoint without a score: %s", step, self.url, error)
            return None
        return score if isinstance(score, int | float) else None

    def _listed(self) -> list[int]:
        names = self._storage.names(self._storage.root)
        return sorted({step for name in names if (step := step_of_name(name)) is not None})

    def _has(self, step: int, name: str) -> bool:
        return self._storage.exists(f"{self._path(step)}/{name}")

    def _path(self, step: int) -> str:
        return f"{self._storage.root}/{step_path(Path(), step).name}"

    @property
    def _marker_path(self) -> str:
        return f"{self._storage.root}/{MARKER}"

    def _write_marker(self, marker: Marker) -> None:
        self._storage.make_directory(self._storage.root)
        self._storage.write(self._marker_path, json.dumps(asdict(marker)).encode())

    def _read_marker(self) -> Marker | None:
        try:
            content = self._storage.read(self._marker_path, _LARGEST_MARKER)
        except FileNotFoundError:
            return None
        try:
            marker = parse_json_object(content, f"{MARKER} cannot be read")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if "newest" not in marker:
            raise CheckpointError(f"{MARKER} cannot be read: it has no newest step")
        newest = marker["newest"]
        if newest is not None and not (type(newest) is int and 0 <= newest <= LARGEST_STEP):
            raise CheckpointError(f"{MARKER} does not have a step, but {shorten(newest)}")
        return Marker(newest)
