"""Clocks that never jump. The time of day does: an administrator or NTP sets it, or a machine was frozen for a while."""

from __future__ import annotations

import os
import time
from pathlib import Path


class SteadyTimeOfDay:
    """A clock of Unix seconds that runs with the monotonic clock from when the object was made. The difference of two readings is the time
    that passed between them, and a later reading is never smaller."""

    def __init__(self) -> None:
        self._difference = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Return the Unix seconds now."""
        return self._difference + time.monotonic()


def seconds_since_start() -> float:
    """Return the seconds since this process began. Its start is read in ticks since the machine's start; psutil would give a time of
    day."""
    # The process's name, in parentheses, may hold spaces; the start is the twentieth field after it (proc(5)).
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
