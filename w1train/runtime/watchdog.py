"""A thread in each rank that watches the progress of the main thread. It writes heartbeats, and ends a run that hangs or does not stop in
time.

A collective waits for the slowest rank, and a rank that hangs or was stopped therefore holds up all ranks without a message. When a rank
has made no progress for ``health.hang_timeout`` seconds, it leaves a mark in the run directory. Every rank whose thread still runs sees the
mark, writes the stacks of its threads to ``stacks/rank_R.txt``, and ends with status 1, so that the launcher can start the run again. A
rank that writes no stacks is missing; of the other ranks, the message names those that are behind. The ranks exchange all of this through
files, because the network is what hangs.
"""

from __future__ import annotations

import faulthandler
import linecache
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from w1train.config.schema import HealthConfig
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.files import open_new
from w1train.runtime.pulse import LOADING, STARTING, pulse
from w1train.runtime.status import Heartbeat, StatusFile, read_heartbeats, write_heartbeat, write_json
from w1train.runtime.stop_signals import StopSignals

logger = logging.getLogger(__name__)

STACKS = "stacks"
_HANG = "hang.json"
_FEWEST_SECONDS, _MOST_SECONDS = 0.05, 1.0
_PAUSE_SECONDS = 5.0
# Parts of the places where a rank waits for others: torch's collectives, megatron-core's pipeline messages, w1train's exchanges of flags.
_WAITING = ("torch/distributed/", "pipeline_parallel/p2p_communication.py", "w1train/training/agreement.py", "w1train/runtime/transfers.py")
# The end of a place whose line waits for a collective that was begun before. torch has no Python function for this wait, and
# megatron-core's layers wait there.
_WAITS = ", waiting"
_MOST_NAMED = 16
# The progress bar hides the terminal's cursor, and a process that ends at once does not take the bar away.
_SHOW_CURSOR = b"\x1b[?25h"


class Watchdog:
    """A context manager around a rank's run; its thread ends with it."""

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        settings: HealthConfig,
        status: StatusFile,
        signals: StopSignals,
        next_start: Callable[[], str],
    ) -> None:
        """Prepare the thread. Rank 0 has called :func:`put_stacks_aside`.

        Args:
            directory: the run's, which all ranks see.
            next_start: a function that says where the same command will resume.
        """
        self._directory, self._rank, self._world_size, self._settings = directory, rank, world_size, settings
        self._status, self._signals, self._next_start = status, signals, next_start
        self._tick = max(_FEWEST_SECONDS, min(_MOST_SECONDS, settings.heartbeat_interval, settings.hang_timeout / 10))
        self._main = threading.main_thread().ident or 0
        self._stopped = False
        self._has_answered = False
        self._thread = threading.Thread(target=self._watch, name="w1train-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._signals.wake()
        self._thread.join()

    def _watch(self) -> None:
        """Run in the thread until :meth:`__exit__`."""
        last_heartbeat, last_look = float("-inf"), time.monotonic()
        while not self._stopped:
            now = time.monotonic()
            if now - last_look > self._tick + _PAUSE_SECONDS:
                # The whole process was stopped, and usually all other ranks with it. A job that was suspended does not hang.
                pulse.progress = now
            last_look = now
            is_due = now - last_heartbeat >= self._settings.heartbeat_interval
            if is_due:
                last_heartbeat = now
                self._write_heartbeat()
            self._answer_signal()
            self._end_if_not_stopped_in_time(now)
            self._end_if_hanging(now, look_for_others=is_due)
            self._signals.wait(self._tick)

    def _write_heartbeat(self) -> None:
        if not self._status.is_held:
            write_heartbeat(self._directory, self._heartbeat())

    def _heartbeat(self) -> Heartbeat:
        now = time.time()
        silence = time.monotonic() - pulse.progress
        place = describe_place(sys._current_frames().get(self._main))
        host = socket.gethostname()
        return Heartbeat(self._rank, host, os.getpid(), pulse.step, pulse.activity, now, now - silence, place, self._stalled())

    def _stalled(self) -> str:
        is_moving = time.monotonic() - pulse.moved <= self._settings.hang_timeout / 2
        return "" if is_moving else ", ".join(list(pulse.transfers))

    # Signals

    def _answer_signal(self) -> None:
        """Say once that a signal has arrived: the current step, with the validation and the save after it, may take minutes."""
        if self._has_answered or self._signals.requested_at is None or not pulse.can_stop:
            return
        self._has_answered = True
        again = "; a second Ctrl-C ends it at once" if self._signals.is_ctrl_c else ""
        logger.info("%s: the run saves after the current step, and stops%s", self._signals.name, again)

    def _end_if_not_stopped_in_time(self, now: float) -> None:
        signals = self._signals
        if signals.requested_at is None:
            return
        if signals.is_urgent:
            self._end_at_once()
        # A person who has pressed Ctrl-C can press it again. No program is about to kill the run.
        if now - signals.requested_at > self._settings.stop_timeout and not signals.is_ctrl_c:
            self._write_stacks()
            self._end(
                f"not stopped {self._settings.stop_timeout:g} s after {signals.name} (health.stop_timeout), at step {pulse.step}, "
                f"{pulse.activity}: ended as it is; stacks are in {self._directory / STACKS}"
            )

    def _end_at_once(self) -> None:
        """End the process after a second signal. Every rank gets Ctrl-C, and rank 0 alone writes about it."""
        cause = "a second Ctrl-C" if self._signals.is_ctrl_c else f"a second signal after {self._signals.name}"
        message = f"{cause} at step {pulse.step}: ended at once; {self._next_start()}"
        if not self._signals.is_ctrl_c:
            self._end(message)
        self._end(message, ExitStatus.INTERRUPTED, is_silent=self._rank != 0)

    # Hangs

    def _end_if_hanging(self, now: float, *, look_for_others: bool) -> None:
        limit = self._settings.start_timeout if pulse.activity in (STARTING, LOADING) else self._settings.hang_timeout
        silence = now - pulse.progress
        mark = self._directory / STACKS / _HANG
        if silence <= limit and not (look_for_others and mark.exists()):
            return
        if silence > limit:
            write_json(mark, {"rank": self._rank, "time": time.time(), "seconds": silence})
        self._write_stacks()
        self._wait_for_stacks()
        if self._is_lowest_with_stacks():
            self._end(self._describe_hang(silence))
        time.sleep(_MOST_SECONDS)  # the rank that prints the reason has the time to print it
        os._exit(ExitStatus.FAILED)

    def _write_stacks(self) -> None:
        heartbeat = self._heartbeat()
        write_heartbeat(self._directory, heartbeat)
        path = self._stacks_path(self._rank)
        try:
            path.parent.mkdir(exist_ok=True)
            with open_new(path.with_suffix(".partial")) as file:
                head = f"rank {self._rank} on {heartbeat.host}, process {heartbeat.pid}: step {heartbeat.step}, {heartbeat.activity}\n"
                file.write(head.encode())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            os.replace(path.with_suffix(".partial"), path)
        except OSError as error:
            logger.warning("could not write %s: %s", path, error)

    def _stacks_path(self, rank: int) -> Path:
        return self._directory / STACKS / f"rank_{rank}.txt"

    def _wait_for_stacks(self) -> None:
        """Wait until the other ranks, which look for the mark at each heartbeat, have written their stacks, or their time is over."""
        deadline = time.monotonic() + 2 * self._settings.heartbeat_interval + _MOST_SECONDS
        while self._missing() and time.monotonic() < deadline:
            time.sleep(self._tick)

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world_size) if not self._stacks_path(rank).exists()]

    def _is_lowest_with_stacks(self) -> bool:
        return not any(self._stacks_path(rank).exists() for rank in range(self._rank))

    def _describe_hang(self, silence: float) -> str:
        """Describe in one sentence which ranks hold up the others, as far as files show it."""
        heartbeats = read_heartbeats(self._directory, self._world_size)
        text = describe_hang(heartbeats, self._missing(), self._world_size)
        return (
            f"no progress for {silence:.0f} s at step {pulse.step} (health.hang_timeout): {text}; stacks are in {self._directory / STACKS}"
        )

    def _end(self, message: str, status: ExitStatus = ExitStatus.FAILED, *, is_silent: bool = False) -> NoReturn:
        """End the process from this thread: the main thread may be unable to."""
        self._status.update("failed", message=message)
        if not is_silent:
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
            print(f"w1train train, rank {self._rank}: {message}", file=sys.stderr, flush=True)
        os._exit(status)


def put_stacks_aside(directory: Path) -> None:
    """Rename the stacks of an earlier start, so that they stay readable and are not taken for this start's. Rank 0 calls this before any
    rank's watchdog starts."""
    stacks, previous = directory / STACKS, directory / f"{STACKS}.previous"
    if stacks.is_dir():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(stacks, previous)


def describe_hang(heartbeats: dict[int, Heartbeat], missing: list[int], world_size: int) -> str:
    """Say which ranks hold up the others: the missing ranks, or else those whose storage has stalled, or else those at the lowest step, or
    else those that do not wait for another rank."""
    if missing:
        return f"{_listing(missing, heartbeats)} of {world_size} {_is_are(missing)} missing (stopped, or the machine is gone)"
    if not heartbeats:
        return "no rank could write a heartbeat"
    stalled = [rank for rank, heartbeat in heartbeats.items() if heartbeat.stalled]
    if stalled:
        what = "; ".join(f"rank {rank}: {heartbeats[rank].stalled}" for rank in stalled[:_MOST_NAMED])
        return f"the run waits for the storage of {_listing(stalled, heartbeats)}, where no byte moves ({what})"
    lowest = min(heartbeat.step for heartbeat in heartbeats.values())
    behind = [rank for rank, heartbeat in heartbeats.items() if heartbeat.step == lowest]
    if len(behind) == len(heartbeats):
        behind = [rank for rank, heartbeat in heartbeats.items() if not is_waiting(heartbeat.place)]
    if 0 < len(behind) < len(heartbeats):
        return f"{_listing(behind, heartbeats)} {_is_are(behind)} behind, the other ranks wait"
    return f"all {len(heartbeats)} ranks are equally far; rank 0 is in {heartbeats[min(heartbeats)].place}"


def is_waiting(place: str) -> bool:
    """Return whether a rank at this place waits for other ranks."""
    return place.endswith(_WAITS) or any(part in place for part in _WAITING)


def describe_place(frame: FrameType | None) -> str:
    """Describe the innermost Python function of a thread as ``path/to/file.py:12 function``, and whether its line waits for a
    collective."""
    if frame is None:
        return ""
    path = frame.f_code.co_filename
    # The path begins at the package, which is enough to find the file, and the same on all machines.
    for root in ("/site-packages/", "/w1train/"):
        _, found, after = path.rpartition(root)
        if found:
            path = after if root == "/site-packages/" else f"w1train/{after}"
            break
    waits = _WAITS if ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno) else ""
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}{waits}"


def _listing(ranks: list[int], heartbeats: dict[int, Heartbeat]) -> str:
    words = [_describe_rank(rank, heartbeats.get(rank)) for rank in ranks[:_MOST_NAMED]]
    return ", ".join(words) + (f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else "")


def _describe_rank(rank: int, heartbeat: Heartbeat | None) -> str:
    if heartbeat is None:
        return f"rank {rank} (no heartbeat)"
    return f"rank {rank} on {heartbeat.host} (process {heartbeat.pid}, step {heartbeat.step}, {heartbeat.activity}, in {heartbeat.place})"


def _is_are(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"
