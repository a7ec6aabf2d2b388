"""Run a function on several CPU ranks, in a fraction of a second.

Starting one Python that imports torch and megatron costs seconds of CPU; the ranks are therefore forked from the test's own
process, which imports once. That is safe because the process has no second thread: OMP_NUM_THREADS is 1 (tests/conftest.py) and
autograd starts none as long as no GPU is visible.

    def sum_of_ranks(rank: int, world_size: int) -> float:
        value = torch.tensor(float(rank))
        torch.distributed.all_reduce(value)
        return value.item()

    assert run_distributed(sum_of_ranks, 4) == [6.0] * 4
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: seconds in each rank, if not here
import torch.distributed

from tests.forking import prepare_to_fork, rank_environment

# torch creates its thread pool at the first operation; a forked child would inherit the pool's locks without its threads.
torch.set_num_threads(1)

PR_SET_PDEATHSIG = 1
"""prctl option of Linux: a signal for this process when its parent dies."""
SETTLE_SECONDS = 0.2
"""How long answers that are under way are waited for once something has failed."""


class RankDiedError(RuntimeError):
    """A rank ended without an answer: it was killed, or left through os._exit."""


class RanksHungError(TimeoutError):
    """Some ranks had not returned when the time was over."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, process_group: bool = True
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on ``world_size`` forked ranks; return their results by rank.

    Each rank has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (a free port) in its environment and,
    unless ``process_group`` is false, an initialised gloo group. Results and exceptions travel by pickle; the function and its
    arguments may be anything, since a fork has them already.

    Raises:
        ValueError: ``world_size`` is below 1.
        RankDiedError: a rank ended without an answer.
        RanksHungError: ``timeout`` seconds passed; names the ranks that had not returned and shows where they were.
        Exception: the first that a rank raised, with the rank's traceback as a note.
    Whichever it is, no rank outlives the call.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    assert not torch.distributed.is_initialized(), "the threads of this process's own group make forking unsafe"
    assert not torch.cuda.is_initialized(), "a process that has touched CUDA cannot fork ranks"
    prepare_to_fork()
    context = multiprocessing.get_context("fork")
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        job = _Job(function, args, world_size, Path(directory), free_port(), time.monotonic() + timeout, process_group)
        try:
            for number in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_rank_main, args=(job, number, theirs))
                process.start()
                theirs.close()  # the rank holds the only other copy: its death closes the pipe
                ranks.append(_Rank(number, process, ours))
            results = _collect(ranks, job)
            for rank in ranks:
                rank.connection.send_bytes(b"leave")
            for rank in ranks:
                rank.process.join(SETTLE_SECONDS)
            return results
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
                rank.connection.close()


@dataclass(frozen=True)
class _Job:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int
    directory: Path
    port: int
    deadline: float
    """On the monotonic clock, which all processes of the machine share."""
    process_group: bool

    def stack_file(self, rank: int) -> Path:
        return self.directory / f"stacks-{rank}"


@dataclass(frozen=True)
class _Rank:
    number: int
    process: ForkProcess
    connection: Connection


# The rank's side


def _rank_main(job: _Job, rank: int, connection: Connection) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a test run that is killed leaves no ranks behind
    gc.freeze()  # the parent's garbage is the parent's: a finalizer run here would delete its temporary directories
    with job.stack_file(rank).open("w") as stack_file:
        faulthandler.dump_traceback_later(job.deadline - time.monotonic(), file=stack_file)
        try:
            _initialize_rank(job, rank)
            answer = pickle.dumps((True, job.function(rank, job.world_size, *job.args)))
        except BaseException as error:  # sent to the parent, which raises it
            answer = pickle.dumps((False, _portable(error, rank)))
        faulthandler.cancel_dump_traceback_later()
    connection.send_bytes(answer)
    # Stay until all have answered: leaving closes the connections to peers that are still talking, and their complaint about that
    # would hide what really happened.
    connection.recv_bytes()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no exit handlers: they belong to pytest's process


def _initialize_rank(job: _Job, rank: int) -> None:
    os.environ.update(rank_environment(rank, job.world_size, job.port))
    if job.process_group:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(str(job.directory / "store"), job.world_size),
            rank=rank,
            world_size=job.world_size,
            # Longer than the call's own timeout, which names the ranks that hang; gloo's would name the ones that wait for them.
            timeout=timedelta(seconds=2 * max(1.0, job.deadline - time.monotonic())),
        )


def _portable(error: BaseException, rank: int) -> BaseException:
    """The error with its traceback as a note, or a RuntimeError with the same text if it does not survive pickling."""
    error.add_note(f"On rank {rank}:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"On rank {rank}:\n{traceback.format_exc()}")
    return error


# The parent's side


def _collect(ranks: list[_Rank], job: _Job) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = {rank.connection: rank for rank in ranks if rank.number not in results}
        failures: list[BaseException] = []
        # Beyond the deadline, the ranks that hang write their stacks.
        ready = wait(list(waiting), max(0.0, job.deadline + SETTLE_SECONDS - time.monotonic()))
        if not ready:
            raise RanksHungError(_describe_hang([rank.number for rank in waiting.values()], job))
        while ready:
            for connection in ready:
                rank = waiting.pop(connection)
                succeeded, value = _receive(rank)
                if succeeded:
                    results[rank.number] = value
                else:
                    failures.append(value)
            ready = wait(list(waiting), SETTLE_SECONDS) if failures and waiting else []
        if failures:
            # A death first: what the others raised is that their connection to the dead was closed.
            raise min(failures, key=lambda error: not isinstance(error, RankDiedError))
    return [results[rank.number] for rank in ranks]


def _receive(rank: _Rank) -> tuple[bool, Any]:
    try:
        return pickle.loads(rank.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        rank.process.join()
        code = rank.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return False, RankDiedError(f"rank {rank.number} ended without an answer: {how}")


def _describe_hang(hung: list[int], job: _Job) -> str:
    lines = [f"not returned in time: ranks {', '.join(map(str, hung))} of {job.world_size}"]
    for rank in hung:
        lines.append(f"rank {rank}:")
        for line in job.stack_file(rank).read_text().splitlines():
            lines.append(f"  {line}")
            if line.endswith(_rank_main.__name__):
                break  # below are pytest's frames, inherited with the fork
    return "\n".join(lines)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment, below those that the system deals out to connections: one of
    these may be gone before it is used (Linux: from 32768 on)."""
    for _ in range(100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 32000)))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise RuntimeError("no free port between 20000 and 32000 in 100 tries")
