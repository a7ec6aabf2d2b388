"""Copies of complete checkpoints in object storage, as a start finds and an upload leaves them.

fsspec names and reaches the storage (s3://, gs://, file://, ...). A copy is complete when its manifest is there, which is sent last.
``run.json`` beside the copies says that a run uploads to this place, and the newest step that it has sent: without it, an empty listing
of a wrong bucket and of a lost one would look like the first start of a run.
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
"""The most bytes of a marker."""


class UnfinishedCopyError(CheckpointError):
    """A copy without a manifest: its upload did not end, or checkpoint.resume_step has undone it, or it is gone."""


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of run.json."""

    newest: int | None = None
    """The newest step that was sent; None = no checkpoint has been sent yet."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A storage's files of a run, as it shows them."""

    steps: list[int]
    """Steps that the listing has a directory of or the marker names, ascending. A listing may be stale: neither need be there."""
    marker: Marker | None
    """The content of the marker; None if there is no marker."""
    marker_problem: str | None = None
    """The reason why a marker cannot be read."""


class RemoteCheckpoints:
    """The checkpoints of a run under a URL. Making one opens no connection.

    Every method raises StorageError if the storage fails, and CheckpointError if what it has is not what it should be.
    """

    def __init__(self, url: str) -> None:
        self._storage = ObjectStorage(url)
        self.url = self._storage.url
        """The URL as messages show it."""

    def contents(self) -> Contents:
        """Return what a start can choose from."""
        steps, marker, problem = {*self._listed()}, None, None
        try:
            marker = self._read_marker()
        except CheckpointError as error:
            problem = str(error)
        if marker is not None and marker.newest is not None:
            steps.add(marker.newest)
        return Contents(sorted(steps), marker, problem)

    def steps(self) -> list[int]:
        """The steps of the complete copies, ascending."""
        return [step for step in self._listed() if self._has(step, MANIFEST)]

    def mark(self) -> None:
        """Write the marker, unless there is one: a sign that a run sends its checkpoints here, before the first one is sent."""
        if not self._storage.exists(self._marker_path):
            self._write_marker(Marker(max(self.steps(), default=None)))

    def undo_after(self, step: int) -> None:
        """Make the later checkpoints none, for their steps are done again: their manifests get another name (a directory's cannot be
        changed without copying it). They go when copies of the same steps come."""
        undone = [later for later in self.steps() if later > step]
        for later in undone:
            logger.warning("%s of step %d is a checkpoint no more: checkpoint.resume_step=%d", self.url, later, step)
            self._undo(later)
        if undone:
            self._write_marker(Marker(max(self.steps(), default=None)))

    def _undo(self, step: int) -> None:
        path = self._path(step)
        try:
            self._storage.rename(f"{path}/{MANIFEST}", f"{path}/{_UNDONE_MANIFEST}")
        except FileNotFoundError:
            # The attempt before, which seemed to fail, has renamed it.
            if self._has(step, MANIFEST):
                raise

    def send(self, checkpoint: Path, on_progress: Callable[[], None] = lambda: None) -> None:
        """Copy a complete checkpoint; what is there of one of its step is replaced.

        Args:
            on_progress: called after each part of a file that has arrived.

        Raises:
            OSError: a file could not be read or sent.
        """
        step = step_of(checkpoint)
        names = [*read_manifest(checkpoint)["files"], MANIFEST]
        self.remove(step)
        self._storage.make_directory(self._path(step))
        for name in names:
            self._storage.upload(checkpoint / name, f"{self._path(step)}/{name}", on_progress)
        self._write_marker(Marker(step))

    def remove(self, step: int) -> None:
        """Remove a checkpoint, or what is there of it; the sign of completeness first."""
        self._storage.remove_file(f"{self._path(step)}/{MANIFEST}")
        self._storage.remove_directory(self._path(step))

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a step, whose file names are names in a directory and nothing else.

        Raises:
            UnfinishedCopyError: there is none.
            CheckpointError: it is not a manifest of this step.
        """
        where = f"the copy of step {step} in {self.url}"
        try:
            content = self._storage.read(f"{self._path(step)}/{MANIFEST}", MAXIMUM_BYTES)
        except FileNotFoundError:
            raise UnfinishedCopyError(
                f"it has no {MANIFEST}: its upload did not end, or checkpoint.resume_step has undone it, or it is gone"
            ) from None
        try:
            manifest = check_manifest(content)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if manifest.get("step") != step:
            raise CheckpointError(f"{where} says that it is of step {manifest.get('step')!r}")
        return manifest

    def require_sizes(self, step: int, files: dict[str, dict[str, Any]]) -> None:
        """Compare the sizes that a manifest declares with what the storage says. Raises CheckpointError if one differs or is not there."""
        for name, entry in files.items():
            try:
                size = self._storage.info(f"{self._path(step)}/{name}")["size"]
            except (FileNotFoundError, WrongSizeError) as error:
                raise CheckpointError(str(error)) from error
            if size != entry["size"]:
                raise CheckpointError(f"{name} has {size} bytes, expected {entry['size']}")

    def fetch_file(self, step: int, name: str, num_bytes: int, directory: Path) -> None:
        """Copy one file of a checkpoint into a directory.

        Raises:
            CheckpointError: the file is not there, or is longer or shorter than ``num_bytes`` each time.
            OSError: the local disk or the storage failed.
        """
        try:
            with open_new(directory / name) as file:
                self._storage.download(f"{self._path(step)}/{name}", file, num_bytes)
        except (FileNotFoundError, WrongSizeError) as error:
            raise CheckpointError(str(error)) from error

    def remove_old(self, settings: CheckpointConfig, phase_start: int) -> None:
        """Keep here what the run's settings would keep of these checkpoints, and nothing of uploads that did not end. What
        checkpoint.resume_step has undone stays."""
        listed, complete = self._listed(), self.steps()
        best = []
        if settings.keep_best > 0:
            best = rank_steps(
                {step: self._score(step, settings.best_metric) for step in complete if step > phase_start}, settings.keep_best
            )
        for step in sorted({*complete} - kept_steps(complete, best, settings.keep, settings.keep_every)):
            logger.info("removing checkpoint of step %d from %s", step, self.url)
            self.remove(step)
        for step in sorted({*listed} - {*complete}):
            if not self._has(step, _UNDONE_MANIFEST):
                logger.info("removing from %s what came of step %d, whose upload did not end", self.url, step)
                self.remove(step)

    def _score(self, step: int, metric: str) -> float | None:
        try:
            score = self.manifest(step).get("validation", {}).get(metric)
        except (CheckpointError, AttributeError) as error:
            logger.warning("the copy of step %d in %s counts as one without a score: %s", step, self.url, error)
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
