"""What one rank does for all, and what all ranks know of one."""

from __future__ import annotations

import pickle

import pytest
import torch.distributed as dist

from tests.distributed import run_distributed
from w1train.config.errors import ConfigurationError, Problem
from w1train.runtime.distributed import is_lost_connection, on_every_rank, on_main_rank


def test_the_main_ranks_result_and_error_come_out_everywhere():
    problem = Problem("training.seed", "7", "1234", "start a run of another name")

    def attempt(rank: int, world_size: int) -> tuple[int, str]:
        result = on_main_rank(dist.get_rank)

        def fail() -> None:
            raise ConfigurationError([problem])

        with pytest.raises(ConfigurationError) as caught:
            on_main_rank(fail)
        assert caught.value.problems == [problem]
        return result, str(caught.value)

    assert run_distributed(attempt, 3) == [(0, str(ConfigurationError([problem])))] * 3


def test_every_rank_hears_of_one_ranks_error():
    def attempt(rank: int, world_size: int) -> tuple[list[int], str]:
        def fail_on_one() -> None:
            if rank == 1:
                raise OSError(28, "No space left on device", "shard")

        with pytest.raises(OSError, match="No space left on device: 'shard'") as caught:
            on_every_rank(fail_on_one)
        return on_every_rank(lambda: 10 * rank), str(caught.value)

    assert run_distributed(attempt, 3) == [([0, 10, 20], "[Errno 28] No space left on device: 'shard'")] * 3


def test_a_configuration_error_survives_pickling():
    error = ConfigurationError([Problem("a", "1", "2"), Problem("b", "3", "4", "5")])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problems, str(copy)) == (error.problems, str(error))


def test_a_lost_peer_is_known_by_gloos_words():
    def leave(rank: int, world_size: int) -> bool:
        dist.barrier()
        if rank == 0:
            dist.destroy_process_group()
            return True
        with pytest.raises(RuntimeError) as caught:
            dist.barrier()
        return is_lost_connection(caught.value)

    assert run_distributed(leave, 2) == [True, True]
    assert not is_lost_connection(RuntimeError("shapes do not match"))
