"""How w1train.pretrain ends: what schedulers, launchers and scripts go by."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of w1train.pretrain, and of w1train.status, which tells of a run what it would end with."""

    FINISHED = 0
    FAILED = 1
    """Stopped by what happened (a disk, a lost rank, a hang): the same command goes on from the last checkpoint, if the cause is gone."""
    MISTAKE = 2
    """The user's: of configuration or data. The same command would fail again."""
    RUNNING = 3
    """w1train.status alone: not ended."""
    STOPPED = 75
    """On a signal, after saving: the same command goes on (EX_TEMPFAIL of sysexits.h, which schedulers take as a reason to requeue)."""
    INTERRUPTED = 130
    """Ctrl-C."""
