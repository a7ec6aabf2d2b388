"""Saving while training goes on.

At a step boundary each rank copies its part of the state into host memory that it has for that (staging.py): this is what training waits
for. A thread then writes and hashes the part. At every later boundary the ranks agree, by one all-reduce of three numbers, whether all
parts are there; then a thread of rank 0 writes index and manifest, renames the directory and removes old checkpoints, and at a
boundary after that the ranks agree that the checkpoint is there. With ``checkpoint.asynchronous=false`` nothing is copied, and training
waits until all of this is done.

The third number says whether bytes have moved on any rank since the last time: whoever waits for a save takes that for progress, so that
the watchdog ends a run whose storage has stalled, and no run whose storage is slow.

The threads talk to no other rank: collectives of two threads would meet in another order on another rank. What rank 0's thread must know
of the other parts lies beside them in notes.

One save is under way at a time: the next one waits for it, and so do the ends of a phase and of the run.
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
    """This rank's present part of it; done at once where another rank has to work."""
    is_finishing: bool = False
    """All parts are written, and rank 0 makes a checkpoint of them."""


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
        """``before_commit`` is called on rank 0, in any thread, before a checkpoint becomes visible: what it says happened must be on the
        disk by then. ``after_commit`` gets the step of a checkpoint that is there and the seconds it took, at a step boundary. ``close``
        waits ``upload_patience`` seconds at most for a storage that takes nothing."""
        self.directory, self.model, self.settings, self.config_yaml = directory, model, settings, config_yaml
        self.times = SaveTimes(clock)
        self._before_commit, self._after_commit = before_commit, after_commit
        self._is_restarting, self._clock = is_resumed, clock
        self._staging = Staging()
        self._plan: Plan | None = None
        self._save: _Save | None = None
        self._movement = Movement()
        self._saved_step: int | None = None
        """The step at whose boundary a save succeeded, until training goes on."""
        self._failure: CheckpointError | None = None
        """Of the newest save, if that failed."""
        self._upload_patience = upload_patience
        self._phase_start: int | None = None
        """The start of the phase of the newest checkpoint that became visible in this process; on rank 0."""
        self._uploader = Uploader(settings.upload) if settings.upload is not None and dist.get_rank() == 0 else None

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None

    def save(self, progress: Progress, *, phase_start: int = 0, scores: Mapping[str, float] | None = None) -> None:
        """Save the state as it is now, in the background if the settings have it so; first waits for the save before, and does nothing more
        if that was of this very step.

        Args:
            phase_start: the best checkpoints are sought among later steps than this.
            scores: the validation of this very step by metric, if there was one.

        Raises:
            CheckpointError: on every rank; this save (or in the background, the one before) failed, and the settings want the run to stop.
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
                # Copied in the plan's order; the state itself is not touched after this line.
                tensors = self._staging.copy(tensors)
            write = partial(write_part, writing_path(final), dist.get_rank(), self._plan.boxes, tensors, state.values)
            self._save = _Save(final, copy.deepcopy(progress), remarks, phase_start, self._clock(), in_background(write, "checkpoint"))
            if not self.settings.asynchronous:
                self.wait()

    def poll(self) -> None:
        """At a step boundary: take the save under way as far as it goes without waiting. At the first one, get ready for the first save.

        Raises:
            CheckpointError: on every rank; it failed, and the settings want the run to stop.
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
            # Also where a rank has failed: the files are removed when nobody writes there any more.
            return
        if has_failed:
            self._save = None
            self._failed(self._explain(save, error))
        elif not save.is_finishing:
            save.is_finishing = True
            save.work = in_background(partial(self._finish, save), "checkpoint") if dist.get_rank() == 0 else nothing()
        else:
            self._save, self._failure, self._saved_step = None, None, save.progress.step
            seconds = self._clock() - save.started
            self._tell_saved(save, seconds)
            self._after_commit(save.progress.step, seconds)

    def _tell_saved(self, save: _Save, seconds: float) -> None:
        if not self.settings.asynchronous:
            logger.info("saved %s in %.1f s", save.final, seconds)
            return
        dip = self.times.saved(seconds)
        slower = "" if dip is None else f", steps {100 * dip:.0f} % longer meanwhile"
        logger.info("saved %s, %.1f s in the background%s", save.final, seconds, slower)

    def _prepare(self) -> None:
        if self._uploader is not None:
            # Not before the first step: a thread that is there when data workers are forked may hold a lock that they wait for.
            self._uploader.begin()
        with self.times.stalling():
            state = collect_state(self.model, Progress())
            self._plan = make_plan(state)
            if self.settings.asynchronous:
                self._staging.prepare(tensors_of(self._plan, state.boxes))

    def _finish(self, save: _Save) -> None:
        """On rank 0, in the background."""
        with pulse.transferring(f"finishing {save.final}"):
            files = write_index(writing_path(save.final), dist.get_world_size())
            self._before_commit()
            finish(save.final, files, save.progress, self.config_yaml, save.remarks)
            self._clean_up(save.final, save.phase_start)

    def _clean_up(self, final: Path, phase_start: int) -> None:
        """After a checkpoint has become visible: send it away, and remove what it takes the place of. Rank 0 only."""
        self._phase_start = phase_start
        if self._uploader is not None:
            self._uploader.upload(final, self.settings, phase_start)
        self.remove_old(phase_start)

    def remove_old(self, phase_start: int) -> None:
        """Remove the checkpoints that the settings do not keep. Rank 0 only, while nothing is being saved."""
        in_use = () if self._uploader is None else self._uploader.steps_in_use()
        settings = self.settings
        keep = (settings.keep, settings.keep_best, settings.best_metric)
        remove_old(self.directory, *keep, phase_start, keep_every=settings.keep_every, in_use=in_use)

    def _explain(self, save: _Save, error: OSError | None) -> CheckpointError:
        """Remove what is left of a failed save, and say why it failed."""
        try:
            raise_together(error)
        except CheckpointException as failure:
            return agreed(CheckpointError(on_main_rank(partial(explain_failure, save.final, failure))))
        raise AssertionError("a save failed on no rank")

    def _failed(self, error: CheckpointError) -> None:
        self._failure = error
        if self.settings.on_error == "stop":
            raise error
        if dist.get_rank() == 0:
            logger.warning("%s Training goes on, and saves again when the next checkpoint is due (checkpoint.on_error=warn)", error)

    def wait(self) -> None:
        """Until no save is under way. Raises as ``poll`` does."""
        if self._save is None:
            return
        with self.times.stalling():
            while self._save is not None:
                self._go_on()
                if self._save is not None:
                    time.sleep(POLL_SECONDS)

    def step_times(self, times: Mapping[str, float | None]) -> dict[str, float]:
        """What the record of a step says of saving (SaveTimes).

        Args:
            times: the record's ``time/`` part.
        """
        seconds = times["time/step_seconds"]
        assert seconds is not None
        self.times.step(seconds, is_saving=self.is_saving)
        if self._is_restarting:
            self._is_restarting = False
            self.times.restarted(seconds_since_start())
        return self.times.take()

    def require_saved(self) -> None:
        """Wait, and insist: what comes next builds on the newest save.

        Raises:
            CheckpointError: on every rank; it failed.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """``require_saved``, wait for what is being uploaded, and remove what stayed for that alone."""
        self.require_saved()
        self._wait_for_uploads()
        # The newest copy is the one that a lost disk is made good with.
        if on_main_rank(lambda: self._uploader is not None and self._uploader.try_again()):
            self._wait_for_uploads()
        if self._phase_start is not None:
            self.remove_old(self._phase_start)

    def _wait_for_uploads(self) -> None:
        """Wait until nothing is being uploaded, or nothing has arrived for ``upload_patience`` seconds."""
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
                # Hours, perhaps: a hang is an upload in which nothing gets through.
                num_sent, moved = now_sent, self._clock()
                beat()
            time.sleep(POLL_SECONDS)

    def _look_at_space(self) -> None:
        """Say beforehand that a save may fail. Rank 0 only."""
        newest = latest_step(self.directory)
        if newest is None:
            return
        try:
            needed = size_of(step_path(self.directory, newest))
        except CheckpointError as error:
            logger.warning("how much space a save takes is not known: %s", error)
            return
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            sizes = f"{free / 2**20:.1f} MiB are free, and the last one took {needed / 2**20:.1f} MiB"
            logger.warning("the next checkpoint may not fit into %s: %s", self.directory, sizes)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """After an error of all ranks, finish the save under way: it is of a step before the error. After an error of this rank alone the
        others cannot be asked."""
        if error is not None and is_agreed(error):
            self.wait()


def _error_of(work: Future[None]) -> OSError | None:
    """What the disk said to work that is done. Anything else is a mistake of ours, and is raised on the rank that made it."""
    error = work.exception()
    if error is not None and not isinstance(error, OSError):
        raise error
    return error
