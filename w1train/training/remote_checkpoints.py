"""Copies of complete checkpoints in object storage: sent in the background, fetched by a start that has none of its own.

fsspec names and reaches the storage (s3://, gs://, file://, ...). A copy is complete when its manifest is there, which is sent last.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError
from w1train.config.schema_operation import CheckpointConfig
from w1train.runtime.background import in_background
from w1train.runtime.distributed import on_main_rank
from w1train.runtime.files import sync_directory
from w1train.training.manifest import MANIFEST, STEP_DIRECTORY, WRITING, read_manifest, step_path
from w1train.training.retention import kept_steps, rank_steps

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_UNDONE_MANIFEST = "undone-manifest.json"


class RemoteCheckpoints:
    """The checkpoints of a run under a URL."""

    def __init__(self, url: str) -> None:
        """Raises UserError if the storage's protocol is not known or not installed."""
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint.upload: {url}: {error}") from error

    def steps(self) -> list[int]:
        """Of the complete ones, ascending."""
        self._files.invalidate_cache()
        try:
            names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        steps = [int(name.removeprefix("step_")) for name in names if STEP_DIRECTORY.fullmatch(name)]
        return sorted(step for step in steps if self._files.exists(f"{self._path(step)}/{MANIFEST}"))

    def undo_after(self, step: int) -> None:
        """Make the later checkpoints none, for their steps are done again: their manifests get another name (a directory's cannot be
        changed without copying it). They go when copies of the same steps come.

        Raises:
            OSError: the storage cannot be reached.
        """
        for later in self.steps():
            if later > step:
                logger.warning("%s of step %d is a checkpoint no more: checkpoint.resume_step=%d", self.url, later, step)
                path = self._path(later)
                _attempt(partial(self._files.mv, f"{path}/{MANIFEST}", f"{path}/{_UNDONE_MANIFEST}"))

    def send(self, checkpoint: Path, after_file: Callable[[], None] = lambda: None) -> None:
        """Copy a complete checkpoint; what is there of one of its step is replaced. ``after_file`` is called after each of its files.

        Raises:
            OSError: a file could not be read or sent.
        """
        step = int(checkpoint.name.removeprefix("step_"))
        names = [*read_manifest(checkpoint)["files"], MANIFEST]
        self.remove(step)
        self._files.makedirs(self._path(step), exist_ok=True)
        for name in names:
            _attempt(partial(self._files.put_file, str(checkpoint / name), f"{self._path(step)}/{name}"))
            after_file()

    def remove(self, step: int) -> None:
        """Remove a checkpoint, or what is there of it; the sign of completeness first."""
        path = self._path(step)
        if self._files.exists(f"{path}/{MANIFEST}"):
            self._files.rm_file(f"{path}/{MANIFEST}")
        if self._files.exists(path):
            self._files.rm(path, recursive=True)

    def manifest(self, step: int) -> dict[str, Any]:
        """Raises OSError or ValueError if it cannot be read."""
        return json.loads(_attempt(partial(self._files.cat_file, f"{self._path(step)}/{MANIFEST}")))

    def fetch_file(self, step: int, name: str, directory: Path) -> None:
        """Copy one file of a checkpoint into a directory. Raises OSError."""
        _attempt(partial(self._files.get_file, f"{self._path(step)}/{name}", str(directory / name)))

    def remove_old(self, settings: CheckpointConfig, phase_start: int) -> None:
        """Keep here what the run's settings would keep of these checkpoints."""
        steps, best = self.steps(), []
        if settings.keep_best > 0:
            scores = {step: self.manifest(step).get("validation", {}).get(settings.best_metric) for step in steps if step > phase_start}
            best = rank_steps(scores, settings.keep_best)
        for step in sorted({*steps} - kept_steps(steps, best, settings.keep, settings.keep_every)):
            logger.info("removing checkpoint of step %d from %s", step, self.url)
            self.remove(step)

    def _path(self, step: int) -> str:
        return f"{self._root}/{step_path(Path(), step).name}"


def _attempt[Result](action: Callable[[], Result]) -> Result:
    for attempt in range(1, _ATTEMPTS):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.warning("object storage: %s; trying again", error)
            time.sleep(attempt)
    return action()


def fetch_checkpoint(remote: RemoteCheckpoints, step: int, directory: Path) -> None:
    """Copy a checkpoint into the run's directory, where it appears when it is whole; its hashes are for the caller to compare. Called on
    every rank; rank 0 copies, one file for each time that the others wait.

    Raises:
        OSError: on every rank; a file could not be copied.
        ValueError: on every rank; the manifest there is none.
    """
    final = step_path(directory, step)
    partial_copy = directory / f"{WRITING}{final.name}"

    def begin() -> list[str]:
        logger.info("fetching the checkpoint of step %d from %s", step, remote.url)
        shutil.rmtree(partial_copy, ignore_errors=True)
        partial_copy.mkdir(parents=True)
        return [*remote.manifest(step)["files"], MANIFEST]

    for name in on_main_rank(begin):
        on_main_rank(partial(remote.fetch_file, step, name, partial_copy))
    on_main_rank(partial(partial_copy.rename, final))
    on_main_rank(partial(sync_directory, directory))


class Uploader:
    """Sends a run's checkpoints one after another, beside everything else; on rank 0. If they come faster than they can be sent, the
    newest goes next, and those between are left out. Losing a copy does not stop a run: it is said."""

    def __init__(self, url: str) -> None:
        self._remote = RemoteCheckpoints(url)
        self._lock = threading.Lock()
        self._queued: tuple[Path, CheckpointConfig, int] | None = None
        self._sending: Path | None = None
        self.is_busy = False
        self.num_sent = 0
        """Files."""

    def upload(self, checkpoint: Path, settings: CheckpointConfig, phase_start: int) -> None:
        """Send a complete checkpoint soon, and then remove old ones there. Returns at once."""
        with self._lock:
            if self._queued is not None:
                logger.warning("%s is not uploaded: a newer one is there before its turn", self._queued[0])
            self._queued = checkpoint, settings, phase_start
            if not self.is_busy:
                self.is_busy = True
                in_background(self._run, "checkpoint upload")

    def steps_in_use(self) -> list[int]:
        """Of checkpoints that are being sent or are about to be."""
        with self._lock:
            paths = [self._sending, self._queued[0] if self._queued is not None else None]
        return [int(path.name.removeprefix("step_")) for path in paths if path is not None]

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._send(*job)
        except BaseException:
            logger.exception("checkpoints are uploaded no more")
            self.is_busy = False
            raise

    def _next(self) -> tuple[Path, CheckpointConfig, int] | None:
        with self._lock:
            job, self._queued = self._queued, None
            self._sending = job[0] if job is not None else None
            self.is_busy = job is not None
            return job

    def _count(self) -> None:
        self.num_sent += 1

    def _send(self, checkpoint: Path, settings: CheckpointConfig, phase_start: int) -> None:
        started = time.perf_counter()
        try:
            self._remote.send(checkpoint, self._count)
            logger.info("uploaded %s to %s in %.1f s", checkpoint.name, self._remote.url, time.perf_counter() - started)
            self._remote.remove_old(settings, phase_start)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("%s could not be uploaded to %s: %s. Training goes on", checkpoint, self._remote.url, error)
