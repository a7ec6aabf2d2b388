"""Uploads of a run's checkpoints to object storage, in a thread. A failed upload is logged as a warning and never stops a run."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from w1train.checkpoints.checkpoint_names import step_of
from w1train.checkpoints.remote.remote_checkpoints import RemoteCheckpoints
from w1train.config.schema_operation import CheckpointConfig
from w1train.runtime.background import in_background

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    """An upload of one checkpoint, and the removal of old copies after it."""

    checkpoint: Path
    settings: CheckpointConfig
    phase_start: int
    is_sent: bool = False


class Uploader:
    """The uploader of a run's checkpoints. It uploads them one after another, on rank 0. If checkpoints are saved faster than they can be
    uploaded, the newest checkpoint is next, and those before it are skipped."""

    def __init__(self, url: str) -> None:
        self._remote = RemoteCheckpoints(url)
        self._lock = threading.Lock()
        self._queued: _Job | None = None
        self._present: _Job | None = None
        self._failed: _Job | None = None
        """The newest upload, if it failed."""
        self._is_marked = self._is_abandoned = False
        self.is_busy = False
        self.num_sent = 0
        """The number of files that have arrived, or of parts of files where the storage's library reports parts. It grows while an upload
        makes progress."""

    def begin(self) -> None:
        """Begin to write the run's marker into the storage. This returns at once."""
        with self._lock:
            self._start()

    def upload(self, checkpoint: Path, settings: CheckpointConfig, phase_start: int) -> None:
        """Put the upload of a complete checkpoint into the queue, and the removal of old copies after it. This returns at once."""
        with self._lock:
            if self._queued is not None:
                logger.warning("%s is not uploaded: a newer checkpoint was saved before its turn", self._queued.checkpoint)
            self._queue(_Job(checkpoint, settings, phase_start))

    def try_again(self) -> bool:
        """Put the newest checkpoint into the queue once more if its upload failed, and tell whether it had failed. This returns at once. No
        upload may be under way when this is called."""
        with self._lock:
            failed, self._failed = None if self._is_abandoned else self._failed, None
            if failed is not None:
                logger.info("%s is uploaded again", failed.checkpoint)
                self._queue(failed)
        return failed is not None

    def steps_in_use(self) -> list[int]:
        """Return the steps of checkpoints that are being uploaded or are queued."""
        with self._lock:
            jobs = [] if self._is_abandoned else [self._present, self._queued]
        return [step_of(job.checkpoint) for job in jobs if job is not None]

    def abandon(self, seconds: float) -> None:
        """Give up on a storage in which nothing arrives. The thread ends with the process."""
        with self._lock:
            self._is_abandoned = True
        logger.warning(
            "nothing arrived in %s for %.0f s: the run ends without a copy of its newest checkpoint there", self._remote.url, seconds
        )

    def describe(self) -> str:
        """Describe what is being uploaded, for a log line of a rank that waits for it."""
        steps = ", ".join(map(str, self.steps_in_use()))
        return f"the upload of step {steps} to {self._remote.url}" if steps else f"an answer from {self._remote.url}"

    def _queue(self, job: _Job) -> None:
        """Put a job into the queue, in the place of the queued job. The caller holds the lock."""
        self._queued = job
        self._start()

    def _start(self) -> None:
        """Start the thread unless it is running. The caller holds the lock."""
        if not self.is_busy:
            self.is_busy = True
            in_background(self._run, "checkpoint upload")

    def _run(self) -> None:
        try:
            self._mark()
            while (job := self._next()) is not None:
                self._failed = None if self._succeeds(job) else job
        except BaseException:
            logger.exception("no more checkpoints are uploaded")
            self.is_busy = False
            raise

    def _mark(self) -> None:
        if not self._is_marked:
            try:
                self._remote.mark()
                self._is_marked = True
            except OSError as error:
                logger.warning("%s cannot be written to, and uploads will probably fail: %s. Training continues", self._remote.url, error)

    def _next(self) -> _Job | None:
        with self._lock:
            self._present, self._queued = self._queued, None
            self.is_busy = self._present is not None
            return self._present

    def _count(self) -> None:
        self.num_sent += 1

    def _succeeds(self, job: _Job) -> bool:
        """Do a job, and tell whether all of it succeeded. Warn if a part of it failed."""
        started, name = time.perf_counter(), job.checkpoint.name
        try:
            if not job.is_sent:
                self._remote.send(job.checkpoint, self._count)
                job.is_sent = True
                logger.info("uploaded %s to %s in %.1f s", name, self._remote.url, time.perf_counter() - started)
            self._remote.remove_old(job.settings, job.phase_start)
        except (OSError, RuntimeError, ValueError) as error:
            what = "old checkpoints could not be removed from" if job.is_sent else f"{job.checkpoint} could not be uploaded to"
            logger.warning("%s %s: %s. Training continues", what, self._remote.url, error)
            return False
        return True
