"""Storage that is slower than health.hang_timeout holds a run up; storage that has stalled ends it, and the message names the rank."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.end_to_end.runs import Sabotage
from w1train.checkpoints import averaging, verification
from w1train.checkpoints.format import shard_files

HANG = ("health.hang_timeout=3", "health.heartbeat_interval=0.5")
SLOW_SECONDS = 5.0


def slow(owner: Any, name: str, rank: int, seconds: float = SLOW_SECONDS, after: int = 0) -> Sabotage:
    """Each call of a function that reads or writes takes a while, until all of them have taken ``seconds``; the first ``after`` do not."""

    def sabotage(this_rank: int) -> None:
        original, calls, slept = getattr(owner, name), 0, 0.0

        def trapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, slept
            calls += 1
            if calls > after and slept < seconds:
                time.sleep(min(seconds, 0.5))
                slept += 0.5
            return original(*args, **kwargs)

        if this_rank == rank:
            setattr(owner, name, trapped)

    return sabotage


def stalled(rank: int) -> Sabotage:
    """A write of a rank never comes back."""

    def sabotage(this_rank: int) -> None:
        def write(*_: Any) -> int:
            time.sleep(3600)
            raise AssertionError

        if this_rank == rank:
            shard_files._HashedFile.write = write

    return sabotage


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_that_is_slower_than_the_patience_with_hangs_is_waited_for(tiny_run, undisturbed, asynchronous):
    """The other rank waits in the next save, or in this one."""
    trap = slow(shard_files._HashedFile, "write", rank=1, after=5)
    outcome = tiny_run.train(*HANG, f"checkpoint.asynchronous={asynchronous}", world_size=2, sabotage=trap).require(0)
    assert "health.hang_timeout" not in outcome.output
    assert tiny_run.metrics() == undisturbed(2, "fp32").metrics()
    assert not (tiny_run.path / "stacks").exists()


def test_a_save_of_which_no_byte_moves_is_a_hang_that_names_its_rank(tiny_run):
    outcome = tiny_run.train(*HANG, world_size=2, sabotage=stalled(rank=1)).require(1)
    assert "(health.hang_timeout): the run waits for the storage of rank 1 on " in outcome.output
    assert f"writing {tiny_run.checkpoints / '.writing-step_0000000003/rank_00001.shards'}" in outcome.output


@pytest.mark.slow
def test_slow_hashing_and_slow_averaging_of_one_rank_are_waited_for(tiny_run):
    """Of a start, of the members of an average, of the average itself: each takes longer than a hang."""

    def sabotage(rank: int) -> None:
        slow(averaging, "_averaged", rank=1, seconds=4.0)(rank)
        slow(verification, "_sha256", rank=1, seconds=4.0)(rank)

    average = ("checkpoint.keep_best=2", "checkpoint.average_at_end=true", "validation.interval=3")
    outcome = tiny_run.train(*HANG, *average, world_size=2, sabotage=sabotage).require(0)
    assert "averaged the checkpoints of steps" in outcome.output
    assert not (tiny_run.path / "stacks").exists()
