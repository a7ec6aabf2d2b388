"""The command that prints what runs are doing, by their status.json and the heartbeats of their ranks.

    w1train status runs/demo
    w1train status runs/*

The exit status says what a run does: 0 = it has finished, 4 = it has ended at the step that --max-steps gave, 75 = it was stopped by a
signal after saving, and is to be started again, 3 = it is running, 1 = it has failed or died, 2 = it is not a run, or was ended by a
mistake in configuration or data. For several runs, it is the first of 2, 1, 3, 75, 4 that any of them has.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from w1train.config.argument_parser import ArgumentParser
from w1train.runtime.command import command
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.status import STATUS_FILE, Heartbeat, Status, read_heartbeats, read_status

_STATUSES = {
    "finished": ExitStatus.FINISHED,
    "paused": ExitStatus.PAUSED,
    "stopped": ExitStatus.STOPPED,
    "failed": ExitStatus.FAILED,
    "mistake": ExitStatus.MISTAKE,
}
_WORST_FIRST = (ExitStatus.MISTAKE, ExitStatus.FAILED, ExitStatus.RUNNING, ExitStatus.STOPPED, ExitStatus.PAUSED, ExitStatus.FINISHED)
_SILENT_SECONDS = 1200.0
_SLOW_SECONDS = 30.0
_MOST_CLOCKS_DIFFER = 60.0
_MOST_NAMED = 8
_LONGEST_LINE = 4000


@command("w1train status")
def main(arguments: Sequence[str]) -> int:
    """Run the command: print one line for each run. Return the exit status that the module's docstring describes."""
    parser = ArgumentParser(prog="w1train status", description="Print what runs are doing.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument(
        "--silent", type=float, default=_SILENT_SECONDS, metavar="SECONDS", help="silence after which a run counts as dead (default: 1200)"
    )
    options = parser.parse_args(arguments)
    found = []
    for run in options.runs:
        line, status = describe_run(run, options.silent)
        found.append(status)
        print(f"{run}: {line}")
    return next(status for status in _WORST_FIRST if status in found)


def describe_run(directory: Path, silent_seconds: float = _SILENT_SECONDS) -> tuple[str, ExitStatus]:
    """Return one line about a run, and the exit status for it."""
    status = read_status(directory)
    if status is None:
        if (directory / STATUS_FILE).exists():
            return f"{STATUS_FILE} cannot be read, or is not what w1train writes", ExitStatus.MISTAKE
        return f"no {STATUS_FILE}: not a run directory, or never started", ExitStatus.MISTAKE
    now = time.time()
    heartbeats = {} if status.state in _STATUSES else read_heartbeats(directory, status.world_size)
    # A run that lives without progress is left to its own watchdog, which knows how long a start or a step may take.
    # Heartbeats with a time in the future are ignored: a rank whose clock is ahead would seem to live for that long after its end.
    last_sign = max([status.time, *(heartbeat.time for heartbeat in heartbeats.values() if heartbeat.time <= now + _MOST_CLOCKS_DIFFER)])
    died = status.state not in _STATUSES and (_is_gone(status) or now - last_sign > silent_seconds)
    share = status.step / status.num_steps if status.num_steps else 0.0
    parts = [
        "died" if died else status.state,
        f"step {status.step:,}/{status.num_steps:,} ({share:.1%})",
        f"{status.tokens:,} of {status.total_tokens:,} tokens",
        "1 rank" if status.world_size == 1 else f"{status.world_size} ranks",
        _last_progress(now - status.time),
    ]
    if status.state not in _STATUSES and not died:
        slow = _slow(heartbeats)
        if slow:
            parts.append(f"slow: {', '.join(slow)}")
    if status.message:
        parts.append(status.message)
    return _on_one_line(", ".join(parts)), ExitStatus.FAILED if died else _STATUSES.get(status.state, ExitStatus.RUNNING)


def _is_gone(status: Status) -> bool:
    """Tell whether rank 0 is known to have died. Only the machine of rank 0 can tell this."""
    if status.host != socket.gethostname():
        return False
    try:
        os.kill(status.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # the process belongs to another user, and lives
    return False


def _slow(heartbeats: dict[int, Heartbeat]) -> list[str]:
    """Describe the ranks that are behind the others: by their step, or because they are silent for longer than most."""
    if not heartbeats:
        return []
    step = max(heartbeat.step for heartbeat in heartbeats.values())
    now = time.time()
    # The two times of a rank come from the same clock, which may differ from this machine's clock by any amount.
    silences = {
        rank: max(0.0, heartbeat.time - heartbeat.progress) + max(0.0, now - heartbeat.time) for rank, heartbeat in heartbeats.items()
    }
    limit = statistics.median(silences.values()) + _SLOW_SECONDS
    slow = [rank for rank, heartbeat in heartbeats.items() if heartbeat.step < step - 1 or silences[rank] > limit]
    words = [
        f"rank {rank} on {heartbeats[rank].host} (step {heartbeats[rank].step}, {heartbeats[rank].activity}, {silences[rank]:.0f} s)"
        for rank in slow[:_MOST_NAMED]
    ]
    return words + ([f"{len(slow) - _MOST_NAMED} more"] if len(slow) > _MOST_NAMED else [])


def _on_one_line(text: str) -> str:
    """Replace control characters, by which a text of a stranger's file would control the terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:_LONGEST_LINE])


def _last_progress(seconds: float) -> str:
    """Describe how long ago the last progress was, by this machine's clock. A status with a time in the future was written by another
    clock, or before this clock was set back."""
    text = f"last progress {_duration(max(0.0, seconds))} ago"
    return text if seconds >= -_MOST_CLOCKS_DIFFER else f"{text} (written by a clock that is {_duration(-seconds)} ahead of this machine's)"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
