"""The ranks of one start of a training, which are forked from this process or started by torchrun.

Two new interpreters that import torch and megatron-core take 12 seconds of CPU, and forks of a process that has imported them take nothing.
Most runs are therefore forked, with torchrun's environment variables, and a few use the real torchrun.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Protocol

import psutil

from tests.distributed import PR_SET_PDEATHSIG, free_port
from tests.end_to_end.runs import Sabotage, output_to, prepare_to_train
from tests.forking import rank_environment
from w1train import pretrain

WORLD_SIZE = 2
GRACE_SECONDS = 3.0
"""Seconds between the SIGTERM and the SIGKILL that the other ranks get when a rank has failed. torchrun waits 30 s."""
TORCHRUN_RESTARTS = 3
_REPOSITORY = Path(__file__).resolve().parents[2]


class Job(Protocol):
    """Running ranks."""

    num_starts: int
    """How often the ranks were started: more than once only if the launcher starts them again by itself."""

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank that is running."""
        ...

    def poll(self) -> list[int] | None:
        """Return the exit statuses when all ranks have ended (negative for a signal), and otherwise None. Ends the others when a rank has
        failed."""
        ...

    def kill(self) -> None:
        """End all ranks at once."""

    def log(self) -> str:
        """Return the output of the ranks."""
        ...


class ForkedJob:
    """Ranks forked from this process, ended as torchrun ends them."""

    num_starts = 1

    def __init__(self, arguments: list[str], directory: Path, logs: Path, hook: Sabotage | None) -> None:
        """
        Args:
            arguments: the arguments of w1train.pretrain.
            directory: the working directory of the ranks.
            logs: a directory for the logs of this start alone.
        """
        logs.mkdir(parents=True)
        self._logs = [logs / f"rank-{rank}.log" for rank in range(WORLD_SIZE)]
        self._kill_at: float | None = None
        prepare_to_train()
        port, context = free_port(), multiprocessing.get_context("fork")
        # The ranks are not daemons, which may not have children: data.workers=process needs children.
        self._ranks: list[ForkProcess] = []
        for rank, log in enumerate(self._logs):
            self._ranks.append(context.Process(target=_rank_main, args=(arguments, directory, log, hook, rank, port)))
        for process in self._ranks:
            process.start()

    def ranks(self) -> dict[int, int]:
        """Do as ``Job`` says."""
        return {rank: process.pid or 0 for rank, process in enumerate(self._ranks) if process.is_alive()}

    def poll(self) -> list[int] | None:
        """Do as ``Job`` says."""
        alive = [process for process in self._ranks if process.is_alive()]
        if not alive:
            return [process.exitcode or 0 for process in self._ranks]
        now = time.monotonic()
        if self._kill_at is None and any(process.exitcode for process in self._ranks):
            self._kill_at = now + GRACE_SECONDS
            for process in alive:
                process.terminate()
        if self._kill_at is not None and now > self._kill_at:
            self.kill()
        return None

    def kill(self) -> None:
        """Do as ``Job`` says."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()

    def log(self) -> str:
        """Do as ``Job`` says."""
        return "".join(log.read_text(errors="replace") for log in self._logs if log.exists())


def die_with_parent(number: int) -> None:
    """End this process with its parent, so that a campaign that is killed leaves no ranks behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _rank_main(arguments: list[str], directory: Path, log: Path, hook: Sabotage | None, rank: int, port: int) -> None:
    die_with_parent(signal.SIGKILL)
    gc.freeze()  # the parent's garbage stays untouched: a finalizer that runs here would delete its temporary directories
    os.environ.update(rank_environment(rank, WORLD_SIZE, port))
    os.chdir(directory)
    with output_to(log):
        if hook is not None:
            hook(rank)
        status = pretrain.main(arguments)
    sys.exit(status)


class TorchrunJob:
    """``torchrun --max-restarts``, which starts the ranks again by itself."""

    def __init__(self, arguments: list[str], directory: Path, logs: Path) -> None:
        """Start torchrun. The arguments are those of ``ForkedJob``."""
        logs.mkdir(parents=True)
        self._log = logs / "torchrun.log"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
        options = [f"--max-restarts={TORCHRUN_RESTARTS}", "--monitor-interval=0.1", f"--shutdown-timeout={GRACE_SECONDS:.0f}"]
        environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with self._log.open("w") as log:
            self._agent = subprocess.Popen(
                [*launcher, *options, "-m", "w1train.pretrain", *arguments],
                cwd=directory,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),  # torchrun ends its ranks then
            )
        self._seen: set[int] = set()

    @property
    def num_starts(self) -> int:
        """Return the number of starts, counted by the processes that were seen."""
        return len(self._seen) // WORLD_SIZE

    def ranks(self) -> dict[int, int]:
        """Do as ``Job`` says."""
        found = {}
        try:
            for child in psutil.Process(self._agent.pid).children():
                if "w1train.pretrain" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    found[int(child.environ()["RANK"])] = child.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):  # between its fork and its exec, or ending
            pass
        self._seen.update(found.values())
        return found

    def poll(self) -> list[int] | None:
        """Do as ``Job`` says. The exit status is torchrun's."""
        status = self._agent.poll()
        if status is None:
            self.ranks()
            return None
        return [status]

    def kill(self) -> None:
        """Do as ``Job`` says."""
        for pid in [*self.ranks().values(), self._agent.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._agent.wait()

    def log(self) -> str:
        """Return the output of the ranks and of torchrun."""
        return self._log.read_text(errors="replace")
