"""The ranks of a run on this machine alone: start them, pass signals on, end all if one fails, and say why.

Rank 0 has this process's terminal, and the other ranks write to files. This module does not need torch, so that the ranks start at once.
The variables that torch.distributed reads are set as torchrun sets them.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from w1train.runtime.announcement import ANNOUNCED
from w1train.runtime.cluster import port_of_number
from w1train.runtime.exit_status import ExitStatus
from w1train.runtime.files import open_new

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_DEBUG": "WARN",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_FR_DUMP_ON_TIMEOUT": "1",
}
"""Variables of the ranks, where the user has not set them. launch/settings.sh gives the reasons, and sets the same for clusters."""
_ADDRESS = "127.0.0.1"
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_LAST_SECONDS = 20.0
"""The seconds that the other ranks have after one rank has failed, to write their messages. A rank that waits in a collective for the rank
that has failed would wait for much longer."""
_POLL_SECONDS = 1.0
_SHOWN_LINES = 20
_AGREED = (ExitStatus.FINISHED, ExitStatus.STOPPED, ExitStatus.INTERRUPTED)
"""The statuses of ranks that end together. Each rank takes the time that it needs: rank 0 ends later, because it writes the records."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run."""

    status: ExitStatus
    message: str
    """The message that rank 0 has not written to the terminal, or ""."""


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path | None
    """The file with the rank's output; None for rank 0."""
    was_killed: bool = False
    """True: this module killed the rank after another rank had failed."""
    place: int = 0
    """The place of the rank in the order in which ranks ended; ranks that ended at nearly the same time share it."""

    @property
    def status(self) -> int:
        """The exit status: as a process has it, or the negative number of the signal that ended the process."""
        return self.process.returncode

    @property
    def has_failed(self) -> bool:
        return self.process.poll() is not None and self.status not in _AGREED


def run_local_ranks(arguments: Sequence[str], num_ranks: int, logs: Path) -> Outcome:
    """Run ranks of a command, and wait until all have ended.

    Each SIGINT, SIGTERM and SIGUSR1 is passed on to all ranks. Ctrl-C is not, because a terminal sends it to the ranks too. If this process
    is killed, the ranks get SIGTERM.

    Args:
        arguments: what follows `python` in the command of a rank.
        logs: an existing directory for the output of all ranks but rank 0.
    """
    handled = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    # The signals are received by sigtimedwait, which also tells who has sent them. The mask is set before the first rank starts, because a
    # signal in between would end this process and leave the ranks.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [*handled, signal.SIGCHLD])
    ranks: list[_Rank] = []
    try:
        environment = _environment(num_ranks, logs)
        for number in range(num_ranks):
            ranks.append(_start(number, arguments, environment, logs, old_mask))
        _wait(ranks, handled)
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    return _outcome(ranks)


def _environment(num_ranks: int, logs: Path) -> dict[str, str]:
    """Return the variables that all ranks share."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**SETTINGS, "TORCH_FR_DUMP_TEMP_FILE": str(logs / "nccl_trace_rank_"), **os.environ}
    environment[ANNOUNCED] = "1"
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    environment |= {"MASTER_ADDR": _ADDRESS, "MASTER_PORT": str(_free_port())}
    # Without PYTHONSAFEPATH, a module of the caller's directory would come before a module of the same name, also of Python's own.
    environment["PYTHONSAFEPATH"] = "1"
    if root not in sysconfig.get_paths().values():
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


def _free_port() -> int:
    """Return a port that no program uses. It is below the ports that Linux gives to connections by itself, of which one could take the port
    before rank 0 listens there."""
    for _ in range(100):
        port = port_of_number(random.SystemRandom().randrange(1 << 30))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex((_ADDRESS, port)) == 0:
                continue
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port
    raise OSError(f"no free port on {_ADDRESS}")


def _start(number: int, arguments: Sequence[str], environment: dict[str, str], logs: Path, mask: set[int | signal.Signals]) -> _Rank:
    def prepare() -> None:
        # Python's own start answers Ctrl-C with a traceback. w1train.runtime.ctrl_c lets it in.
        signal.pthread_sigmask(signal.SIG_SETMASK, {*mask, signal.SIGINT})
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    variables = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
    command = [sys.executable, *arguments]
    if number == 0:
        process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, preexec_fn=prepare)
        return _Rank(number, process, None)
    log = logs / f"rank_{number:05d}.log"
    with open_new(log) as output:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=prepare
        )
    return _Rank(number, process, log)


def _wait(ranks: list[_Rank], handled: Sequence[signal.Signals]) -> None:
    """Wait until all ranks have ended. Pass signals on, and kill the ranks that live long after another rank has failed."""
    deadline: float | None = None
    while running := [rank for rank in ranks if rank.process.poll() is None]:
        for rank in running:
            rank.place += 1
        if deadline is None and any(rank.has_failed for rank in ranks):
            deadline = time.monotonic() + _LAST_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.was_killed = True
                rank.process.kill()
        received = signal.sigtimedwait([*handled, signal.SIGCHLD], _POLL_SECONDS)
        # The kernel itself, as a terminal's driver, has sent a signal with a positive code, to the ranks as well.
        if received is not None and received.si_signo != signal.SIGCHLD and received.si_code <= 0:
            for rank in running:
                rank.process.send_signal(received.si_signo)


def _outcome(ranks: Sequence[_Rank]) -> Outcome:
    if any(rank.status in (ExitStatus.INTERRUPTED, -signal.SIGINT) for rank in ranks):
        return Outcome(ExitStatus.INTERRUPTED, "")
    failed = [rank for rank in ranks if rank.has_failed]
    if not failed:
        stopped = any(rank.status == ExitStatus.STOPPED for rank in ranks)
        return Outcome(ExitStatus.STOPPED if stopped else ExitStatus.FINISHED, "")
    # A rank with a mistake or an end by a signal is the cause, and otherwise the first rank that ended. The others have only lost their
    # connection to it. All ranks may have met the same error, of which rank 0 alone has written.
    cause = min(failed, key=lambda rank: (rank.was_killed, rank.status >= 0, rank.status != ExitStatus.MISTAKE, rank.place, rank.number))
    if cause.status == ExitStatus.MISTAKE:
        return Outcome(ExitStatus.MISTAKE, _description(next(rank for rank in failed if rank.status == ExitStatus.MISTAKE)))
    is_told = any(rank.number == 0 and not rank.was_killed and rank.status > 0 for rank in failed)
    if is_told and cause.status > 0 and cause.log is not None and cause.log.stat().st_size == 0:
        return Outcome(ExitStatus.FAILED, "")
    return Outcome(ExitStatus.FAILED, _description(cause))


def _description(rank: _Rank) -> str:
    """Return how a rank has failed. Rank 0 has written its message to the terminal, unless a signal ended it."""
    end = f"was ended by {signal.Signals(-rank.status).name}" if rank.status < 0 else f"ended with status {rank.status}"
    if rank.status == -signal.SIGKILL:
        end += ", perhaps because the machine has no memory left (dmesg says it)"
    if rank.log is None:
        return f"rank 0 {end}" if rank.status < 0 else ""
    lines = rank.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"rank {rank.number} {end}; its output is in {rank.log}", *lines[-_SHOWN_LINES:]])
