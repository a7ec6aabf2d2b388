"""The exit statuses of w1train.pretrain, by which schedulers, launchers and scripts decide what to do next."""

from __future__ import annotations

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
    STOPPED = 75
    """A signal ended the run after a save. The same command resumes (EX_TEMPFAIL of sysexits.h: schedulers requeue such a job)."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C."""
