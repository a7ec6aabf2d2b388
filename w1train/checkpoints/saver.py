"""Saves of a run, written in the background while training continues.

1. At a step boundary, each rank copies its part of the state into host memory (staging.py). Training waits for this copy alone.
2. A thread of each rank writes and hashes the part (format/shard_files.py).
3. At every later step boundary, the ranks agree by one small all-reduce whether all parts are written.
4. A thread of rank 0 then writes the index and the manifest, renames the directory (commit.py) and removes old checkpoints.
5. At a later step boundary, the ranks agree that the checkpoint is complete.

With ``checkpoint.asynchronous=false`` nothing is copied, and training waits until all of this is done.

The all-reduce also says whether bytes have moved on any rank since the last all-reduce. A rank that waits for a save counts this as
progress, so that the watchdog ends a run whose storage has stalled, and does not end a run whose storage is slow.

The threads communicate with no other rank, because collectives of two threads could meet in another order on another rank. Each rank
leaves a note about its part in the directory, and rank 0's thread reads the notes.

One save is under way at a time. The next save, the end of a phase and the end of the run wait for it.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from w1train.checkpoints.checkpoint_names import step_path, writing_path
from w1train.checkpoints.commit import explain_failure, finish, raise_together
from w1train.checkpoints.format.shard_files import write_index, write_part
from w1train.checkpoints.format.shard_plan import Plan, make_plan, tensors_of
from w1train.checkpoints.manifest import CheckpointError, Progress, latest_step, size_of
from w1train.checkpoints.model_state import collect_state
from w1train.checkpoints.remote.uploader import Uploader
from w1train.checkpoints.retention import remove_old
from w1train.checkpoints.save_times import SaveTimes
from w1train.checkpoints.staging import Staging
from w1train.config.schema_operation import CheckpointConfig
from w1train.engine.building import TrainedModel
from w1train.runtime.background import in_background, nothing
from w1train.runtime.clocks import seconds_since_start
from w1train.runtime.distributed import agreed, is_agreed, on_main_rank
from w1train.runtime.pulse import beat, pulse
from w1train.runtime.transfers import POLL_SECONDS, Movement, agree

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Save:
    """The save that is under way."""

    final: Path
    progress: Progress
    remarks: dict[str, Any]
    phase_start: int
    started: float
    work: Future[Any]
    """The work of this rank's thread for the save. On the other ranks it has ended while rank 0 finishes the save."""
    is_finishing: bool = False
    """This flag tells whether all parts are written, so that rank 0 makes a checkpoint of them."""


class CheckpointSaver:
    """The saves of one run. Every method is called on every rank, at the same step boundaries."""

    def __init__(
        self,
        directory: Path,
        model: TrainedModel,
        settings: CheckpointConfig,
        config_yaml: str,
        *,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[int, float], None] = lambda step, seconds: None,
        is_resumed: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        upload_patience: float = 300.0,
    ) -> None:
        """Prepare to save; nothing is written yet.

        Args:
            before_commit: called on rank 0, in any thread, before a checkpoint becomes visible. Records of the steps up to the checkpoint
                must be on the disk when it returns.
            after_commit: called on every rank at a step boundary, with the step of a complete checkpoint and the seconds that it took.
            is_resumed: True for a run that was resumed, so that the time until its first step is recorded.
            upload_patience: the seconds that ``close`` waits for an object storage in which nothing arrives.
        """
        self.directory, self.model, self.settings, self.config_yaml = directory, model, settings, config_yaml
        self.times = SaveTimes(clock)
        self._before_commit, self._after_commit = before_commit, after_commit
        self._is_restarting, self._clock = is_resumed, clock
        self._staging = Staging()
        self._plan: Plan | None = None
        self._save: _Save | None = None
        self._movement = Movement()
        self._saved_step: int | None = None
        """The step of the save that has succeeded since the last call of ``poll``; None if no save has succeeded."""
        self._failure: CheckpointError | None = None
        """The error of the newest save, if that save failed."""
        self._upload_patience = upload_patience
        self._phase_start: int | None = None
        """The start of the phase of the newest checkpoint that became visible in this process; on rank 0."""
        self._uploader = Uploader(settings.upload) if settings.upload is not None and dist.get_rank() == 0 else None

    @property
    def is_saving(self) -> bool:
        """Tell whether a save is under way."""
        return self._save is not None

    def save(self, progress: Progress, *, phase_start: int = 0, scores: Mapping[str, float] | None = None) -> None:
        """Save the current state, in the background if ``checkpoint.asynchronous`` is true. Wait for the previous save first, and do
        nothing more if that save was of the same step.

        Args:
            phase_start: only checkpoints of later steps than this are among the best.
            scores: results of the validation at this step, by metric, if there was a validation.

        Raises:
            CheckpointError: on every rank; a save failed, and ``checkpoint.on_error`` is "stop". In the background, this is the previous
                save; ``poll`` raises the error of this save.
        """
        self.wait()
        if progress.step == self._saved_step:
            return
        with self.times.stalling():
            state = collect_state(self.model, progress)
            if self._plan is None:
                self._plan = make_plan(state)
            if dist.get_rank() == 0:
                self._look_at_space()
            final, remarks = step_path(self.directory, progress.step), {"validation": dict(scores or {})}
            tensors = tensors_of(self._plan, state.boxes)
            if self.settings.asynchronous:
                # The copies are in the order of the plan. The state itself is not touched after this line.
                tensors = self._staging.copy(tensors)
            write = partial(write_part, writing_path(final), dist.get_rank(), self._plan.boxes, tensors, state.values)
            self._save = _Save(final, copy.deepcopy(progress), remarks, phase_start, self._clock(), in_background(write, "checkpoint"))
            if not self.settings.asynchronous:
                self.wait()

    def poll(self) -> None:
        """Continue the save under way as far as possible without waiting. This is called at every step boundary; the first call prepares
        saving.

        Raises:
            CheckpointError: on every rank; the save failed, and ``checkpoint.on_error`` is "stop".
        """
        self._saved_step = None
        if self._plan is None:
            self._prepare()
        self._go_on()

    def _go_on(self) -> None:
        save = self._save
        if save is None:
            return
        is_done = save.work.done()
        error = _error_of(save.work) if is_done else None
        is_running, has_failed, is_moving = agree([not is_done, error is not None, self._movement.is_new()])
        if is_moving:
            beat()
        if is_running:
            # This also waits if a rank has failed already, because the files are removed only when no rank writes there any more.
            return
        if has_failed:
            self._save = None
            self._handle_failure(self._explain(save, error))
        elif not save.is_finishing:
            save.is_finishing = True
            save.work = in_background(partial(self._finish, save), "checkpoint") if dist.get_rank() == 0 else nothing()
        else:
            self._save, self._failure, self._saved_step = None, None, save.progress.step
            seconds = self._clock() - save.started
            self._log_saved(save, seconds)
            self._after_commit(save.progress.step, seconds)

    def _log_saved(self, save: _Save, seconds: float) -> None:
        if not self.settings.asynchronous:
            logger.info("saved %s in %.1f s", save.final, seconds)
            return
        dip = self.times.saved(seconds)
        change = "" if dip is None else f"; steps were {100 * abs(dip):.0f} % {'longer' if dip > 0 else 'shorter'} during the save"
        logger.info("saved %s in %.1f s in the background%s", save.final, seconds, change)

    def _prepare(self) -> None:
        if self._uploader is not None:
            # No thread is started before the first step: a thread that exists when data workers are forked may hold a lock for which they
            # would wait.
            self._uploader.begin()
        with self.times.stalling():
            state = collect_state(self.model, Progress())
            self._plan = make_plan(state)
            if self.settings.asynchronous:
                self._staging.prepare(tensors_of(self._plan, state.boxes))

    def _finish(self, save: _Save) -> None:
        """Make a checkpoint of the written parts. This runs on rank 0, in the background."""
        with pulse.transferring(f"finishing {save.final}"):
            files = write_index(writing_path(save.final), dist.get_world_size())
            self._before_commit()
            finish(save.final, files, save.progress, self.config_yaml, save.remarks)
            self._clean_up(save.final, save.phase_start)

    def _clean_up(self, final: Path, phase_start: int) -> None:
        """Begin to upload a new checkpoint, and remove old checkpoints. Only rank 0 calls this."""
        self._phase_start = phase_start
        if self._uploader is not None:
            self._uploader.upload(final, self.settings, phase_start)
        self.remove_old(phase_start)

    def remove_old(self, phase_start: int) -> None:
        """Remove the checkpoints that the settings do not keep. Only rank 0 calls this, while nothing is being saved."""
        in_use = () if self._uploader is None else self._uploader.steps_in_use()
        remove_old(self.directory, self.settings, phase_start, in_use=in_use)

    def _explain(self, save: _Save, error: OSError | None) -> CheckpointError:
        """Remove the files of a failed save, and return an error that describes the failure."""
        try:
            raise_together(error)
        except CheckpointException as failure:
            return agreed(CheckpointError(on_main_rank(partial(explain_failure, save.final, failure))))
        raise AssertionError("a save failed on no rank")

    def _handle_failure(self, error: CheckpointError) -> None:
        self._failure = error
        if self.settings.on_error == "stop":
            raise error
        if dist.get_rank() == 0:
            logger.warning("%s Training continues, and saves again when the next checkpoint is due (checkpoint.on_error=warn)", error)

    def wait(self) -> None:
        """Wait until no save is under way. Raise as ``poll`` does."""
        if self._save is None:
            return
        with self.times.stalling():
            while self._save is not None:
                self._go_on()
                if self._save is not None:
                    time.sleep(POLL_SECONDS)

    def step_times(self, times: Mapping[str, float | None]) -> dict[str, float]:
        """Return the ``checkpoint/`` metrics of a step's record (SaveTimes).

        Args:
            times: the ``time/`` metrics of the record.
        """
        seconds = times["time/step_seconds"]
        assert seconds is not None
        self.times.step(seconds, is_saving=self.is_saving)
        if self._is_restarting:
            self._is_restarting = False
            self.times.restarted(seconds_since_start())
        return self.times.take()

    def require_saved(self) -> None:
        """Wait for the save under way, and refuse to continue if the newest save failed: what comes next needs its checkpoint.

        Raises:
            CheckpointError: on every rank; the newest save failed.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Finish the save under way and the uploads, and remove the checkpoints that were kept only to be uploaded.

        Raises:
            CheckpointError: on every rank; the newest save failed.
        """
        self.require_saved()
        self._wait_for_uploads()
        # A run that loses its disk is resumed from the newest copy.
        if on_main_rank(lambda: self._uploader is not None and self._uploader.try_again()):
            self._wait_for_uploads()
        if self._phase_start is not None:
            self.remove_old(self._phase_start)

    def _wait_for_uploads(self) -> None:
        """Wait until all uploads have ended, or nothing has arrived in the storage for ``upload_patience`` seconds."""
        uploader, num_sent, moved = self._uploader, 0, self._clock()
        if uploader is not None and uploader.is_busy:
            logger.info("waiting for %s, as long as something arrives every %.0f s", uploader.describe(), self._upload_patience)
        while True:
            silence = self._clock() - moved
            states = [uploader.is_busy, uploader.num_sent, silence > self._upload_patience] if uploader is not None else [0, 0, 0]
            is_busy, now_sent, is_dead, is_moving = agree([*states, self._movement.is_new()])
            if not is_busy:
                return
            if is_dead:
                if uploader is not None:
                    uploader.abandon(silence)
                return
            if now_sent > num_sent or is_moving:
                # An upload may take hours. It hangs only if nothing arrives.
                num_sent, moved = now_sent, self._clock()
                beat()
            time.sleep(POLL_SECONDS)

    def _look_at_space(self) -> None:
        """Warn before a save if the disk is probably too full for it. Only rank 0 calls this."""
        newest = latest_step(self.directory)
        if newest is None:
            return
        try:
            needed = size_of(step_path(self.directory, newest))
        except CheckpointError as error:
            logger.warning("cannot tell how much space the next checkpoint needs: %s", error)
            return
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            sizes = f"{free / 2**20:.1f} MiB are free, and the last checkpoint took {needed / 2**20:.1f} MiB"
            logger.warning("the next checkpoint may not fit into %s: %s", self.directory, sizes)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Finish the save under way if all ranks have met the error: the saved step is earlier than the error. After an error of this rank
        alone the save cannot be finished, because the other ranks do not take part."""
        if error is not None and is_agreed(error):
            self.wait()


def _error_of(work: Future[None]) -> OSError | None:
    """Return the OSError that ended a thread's work, or None. Any other error is a bug in w1train, and is raised on the
    rank where it happened."""
    error = work.exception()
    if error is not None and not isinstance(error, OSError):
        raise error
    return error
