"""The exit statuses of w1train.pretrain, by which schedulers, launchers and scripts decide what to do next."""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of w1train.pretrain, and of w1train.status, which ends with the status of the run that it describes."""

    FINISHED = 0
    FAILED = 1
    """Something failed (a disk, a lost rank, a hang). Once the cause is gone, the same command resumes from the last checkpoint."""
    MISTAKE = 2
    """A mistake of the user, in the configuration or the data. The same command would fail again."""
    RUNNING = 3
    """The run has not ended. Only w1train.status uses this status."""
    PAUSED = 4
    """The run has ended at the step that --max-steps gave, and its schedule has more steps. Only w1train.status uses this status: the
    command that trained has ended with 0, since it did what it was asked."""
    STOPPED = 75
    """SIGTERM or SIGUSR1 ended the run after a save. The same command resumes it (EX_TEMPFAIL of sysexits.h: schedulers requeue such a
    job)."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C. The same command resumes, but no program should give it by itself: a person has ended the run. status.json
    says whether the run has saved (``stopped``)."""


def status_after(stop_signal: int) -> ExitStatus:
    """Return the exit status of a run that has ended without an error; ``stop_signal`` is the number of the signal that has stopped it, or
    0."""
    if stop_signal == 0:
        return ExitStatus.FINISHED
    return ExitStatus.INTERRUPTED if stop_signal == signal.SIGINT else ExitStatus.STOPPED
