"""What runs are doing, from outside: their status.json and their ranks' heartbeats.

    python -m w1train.status runs/demo
    python -m w1train.status runs/*

Exit status, for scripts: 0 finished, 75 to be run again (stopped on a signal after saving), 3 running, 1 failed or died, 2 not a run, or
ended by a mistake of configuration or data.
Of several runs the first of 2, 1, 3, 75 that one of them has.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from w1train.runtime.command import command
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.status import STATUS_FILE, Heartbeat, Status, read_heartbeats, read_status

_STATUSES = {"finished": ExitStatus.FINISHED, "stopped": ExitStatus.STOPPED, "failed": ExitStatus.FAILED, "mistake": ExitStatus.MISTAKE}
_WORST_FIRST = (ExitStatus.MISTAKE, ExitStatus.FAILED, ExitStatus.RUNNING, ExitStatus.STOPPED, ExitStatus.FINISHED)
_SILENT_SECONDS = 1200.0
_SLOW_SECONDS = 30.0
_MOST_CLOCKS_DIFFER = 60.0
_MOST_NAMED = 8
_LONGEST_LINE = 4000


@command("w1train.status")
def main(arguments: Sequence[str]) -> int:
    """Print a line a run; the exit status is the module's."""
    parser = argparse.ArgumentParser(prog="w1train.status", description="What runs are doing.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument(
        "--silent", type=float, default=_SILENT_SECONDS, metavar="SECONDS", help="a run that gives no sign of life so long has died (1200)"
    )
    options = parser.parse_args(arguments)
    found = []
    for run in options.runs:
        line, status = describe_run(run, options.silent)
        found.append(status)
        print(f"{run}: {line}")
    return next(status for status in _WORST_FIRST if status in found)


def describe_run(directory: Path, silent_seconds: float = _SILENT_SECONDS) -> tuple[str, ExitStatus]:
    """(one line, the exit status that stands for it)."""
    status = read_status(directory)
    if status is None:
        if (directory / STATUS_FILE).exists():
            return f"{STATUS_FILE} cannot be read, or is not what w1train writes", ExitStatus.MISTAKE
        return f"no {STATUS_FILE}: not a run directory, or never started", ExitStatus.MISTAKE
    now = time.time()
    heartbeats = {} if status.state in _STATUSES else read_heartbeats(directory, status.world_size)
    # What lives and does not get on is for its own watchdog, which knows how long a start or a step may take.
    # A machine whose clock is ahead would seem to live for as long as that after its end.
    last_sign = max([status.time, *(heartbeat.time for heartbeat in heartbeats.values() if heartbeat.time <= now + _MOST_CLOCKS_DIFFER)])
    died = status.state not in _STATUSES and (_is_gone(status) or now - last_sign > silent_seconds)
    share = status.step / status.num_steps if status.num_steps else 0.0
    parts = [
        "died" if died else status.state,
        f"step {status.step:,}/{status.num_steps:,} ({share:.1%})",
        f"{status.tokens:,} of {status.total_tokens:,} tokens",
        f"{status.world_size} ranks",
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
    """Whether rank 0 is known to have died: only its own machine can tell."""
    if status.host != socket.gethostname():
        return False
    try:
        os.kill(status.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's, so it lives
    return False


def _slow(heartbeats: dict[int, Heartbeat]) -> list[str]:
    """Ranks that are behind the others: in steps, or silent for longer than is usual among them."""
    if not heartbeats:
        return []
    step = max(heartbeat.step for heartbeat in heartbeats.values())
    now = time.time()
    # A rank's own two times are of one clock; between its clock and this one there is any difference.
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
    """Replace the control characters by which a text of somebody else's file would steer the terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:_LONGEST_LINE])


def _last_progress(seconds: float) -> str:
    """Say how long ago the last progress was, by this machine's clock. A status of the future is of another clock, or of before this one
    was set back."""
    text = f"last progress {_duration(max(0.0, seconds))} ago"
    return text if seconds >= -_MOST_CLOCKS_DIFFER else f"{text} (written by a clock that is {_duration(-seconds)} ahead of this machine's)"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
