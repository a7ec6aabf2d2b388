"""A disk of a few megabytes for one run's directory, and how it fills.

Root may mount a small tmpfs. Anybody else gets a limit on the size of files instead (RLIMIT_FSIZE), set from outside on the ranks that are
there: a shard cannot be written to its end.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

SIZE = "12m"
"""Ten checkpoints of the tiny run."""


def how_a_disk_fills() -> str:
    """In words, for the report."""
    if os.geteuid() == 0:
        return f"a tmpfs of {SIZE} for the run directory, on which another file takes the rest"
    return "a limit on the size of files (RLIMIT_FSIZE), set from outside on running ranks; a small tmpfs takes root to mount"


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """``directory``, on a tmpfs of its own where that may be mounted."""
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "w1train-chaos", str(directory)], capture_output=True)
    try:
        yield
    finally:
        if directory.is_mount():
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


class SmallDisk:
    """How a directory's disk is filled and freed."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._limited = directory, list[int]()

    def fill(self, num_bytes_left: int, pids: list[int]) -> str:
        """Leave so many bytes, or, without a mount, that length of a file to these processes; says which it was."""
        if self._directory.is_mount():
            free = shutil.disk_usage(self._directory).free
            with contextlib.suppress(OSError):  # a rank that writes meanwhile makes it full before
                (self._directory / "ballast").write_bytes(bytes(max(0, free - num_bytes_left)))
            return f"a tmpfs of {SIZE} with {num_bytes_left} bytes left"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(num_bytes_left, 100_000), resource.RLIM_INFINITY))
                self._limited.append(pid)
        return f"RLIMIT_FSIZE of {max(num_bytes_left, 100_000)} bytes"

    def free(self) -> None:
        """As it was."""
        (self._directory / "ballast").unlink(missing_ok=True)
        for pid in self._limited:
            if psutil.pid_exists(pid):
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
