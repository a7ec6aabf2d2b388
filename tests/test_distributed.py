"""The runner of CPU ranks itself: every other distributed test believes it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed

from tests.distributed import RankDiedError, RanksHungError, run_distributed
from tests.slow import LONGER_THAN_A_TEST


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


@pytest.fixture(autouse=True)
def _no_rank_survives():
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size):
    def gather(rank: int, size: int, offset: int) -> tuple[int, torch.Tensor]:
        gathered = [torch.zeros(1) for _ in range(size)]
        torch.distributed.all_gather(gathered, torch.tensor([float(rank + offset)]))
        return rank, torch.cat(gathered)

    results = run_distributed(gather, world_size, 10)
    assert [rank for rank, _ in results] == list(range(world_size))
    for _, gathered in results:
        assert gathered.tolist() == [10.0 + rank for rank in range(world_size)]


def test_environment_and_no_process_group():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")

    def read(rank: int, world_size: int) -> tuple:
        return torch.distributed.is_initialized(), [os.environ[name] for name in names]

    results = run_distributed(read, 2, process_group=False)
    assert results == [(False, [str(rank), str(rank), "2", "2", "127.0.0.1"]) for rank in range(2)]
    assert "RANK" not in os.environ


def test_backward_works_in_ranks_after_backward_in_the_parent():
    weight = torch.ones(64, 64, requires_grad=True)
    (weight @ weight).sum().backward()

    def gradient(rank: int, world_size: int) -> float:
        local = torch.ones(64, 64, requires_grad=True)
        (local @ local).sum().backward()
        torch.distributed.all_reduce(local.grad)
        return local.grad.sum().item()

    assert run_distributed(gradient, 2) == [2 * weight.grad.sum().item()] * 2


def test_a_ranks_exception_is_raised_here_while_the_others_wait_for_it():
    def fail_on_one(rank: int, world_size: int) -> None:
        if rank == 1:
            raise ValueError("heads are not divisible")
        torch.distributed.barrier()

    with pytest.raises(ValueError, match="heads are not divisible") as caught:
        run_distributed(fail_on_one, 3, timeout=LONGER_THAN_A_TEST)
    assert "On rank 1:" in caught.value.__notes__[0]
    assert "in fail_on_one" in caught.value.__notes__[0]


def test_exceptions_and_results_that_do_not_pickle_are_reported():
    def fail(rank: int, world_size: int) -> None:
        raise UnpicklableError("two ", "arguments")

    with pytest.raises(RuntimeError, match="UnpicklableError: two arguments"):
        run_distributed(fail, 1)
    with pytest.raises(Exception, match="pickle"):
        run_distributed(lambda rank, world_size: lambda: None, 1)


def test_a_killed_rank_is_named():
    def die(rank: int, world_size: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()

    with pytest.raises(RankDiedError, match=r"rank 1 ended without an answer: killed by SIGKILL"):
        run_distributed(die, 2, timeout=LONGER_THAN_A_TEST)


def test_an_exit_is_a_death_too():
    with pytest.raises(RankDiedError, match="rank 0 ended without an answer: exit status 3"):
        run_distributed(lambda rank, world_size: os._exit(3), 1)


def test_hung_ranks_are_named_with_their_stacks_and_killed():
    def never_comes(rank: int, world_size: int) -> None:
        if rank == 2:
            time.sleep(600)
        elif rank == 1:
            torch.distributed.barrier()

    with pytest.raises(RanksHungError) as caught:
        run_distributed(never_comes, 3, timeout=1.5)
    message = str(caught.value)
    assert "ranks 1, 2 of 3" in message
    assert "barrier" in message.split("rank 1:")[1].split("rank 2:")[0]
    assert "in never_comes" in message.split("rank 2:")[1]
    assert "pytest" not in message


@pytest.mark.parametrize("world_size", [0, -1])
def test_world_size_must_be_positive(world_size):
    with pytest.raises(ValueError, match=f"world_size must be at least 1, got {world_size}"):
        run_distributed(lambda rank, size: None, world_size)
