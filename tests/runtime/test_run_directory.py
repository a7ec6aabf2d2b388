"""The lock of a run directory ends with the process that took it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from w1train.runtime.run_directory import RunDirectory, RunDirectoryError


def _claim_and_die(path: Path) -> None:
    RunDirectory(path).claim()
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    context.Process(target=_work, args=(begun,)).start()
    assert begun.wait(60)
    os.kill(os.getpid(), signal.SIGKILL)


def _work(begun: Event) -> None:
    """As a data worker does: alive until it notices that its parent is gone."""
    begun.set()
    time.sleep(5)


def test_workers_of_a_killed_run_do_not_hold_its_directory(tmp_path):
    run = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(tmp_path / "run",))
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    RunDirectory(tmp_path / "run").claim()


def test_a_child_gives_up_its_copy_of_the_lock_alone(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
    with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()}"):
        RunDirectory(tmp_path / "run").claim()
    for content in (b"[" * 100_000, b'{"host": "a"' + b" " * (2 << 20) + b', "pid": 1}', b"7"):
        (tmp_path / "run" / ".lock").write_bytes(content)
        with pytest.raises(RunDirectoryError, match="in use by another process"):
            RunDirectory(tmp_path / "run").claim()
