"""What one rank does for all, and what all ranks know of one."""

from __future__ import annotations

import contextlib
import os
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.distributed import free_port, run_distributed
from w1train.config.errors import ConfigurationError, Problem, UserError
from w1train.config.schema import ParallelConfig
from w1train.runtime.distributed import (
    COLLECTIVE_TIMEOUT,
    agreed,
    all_or_none,
    distributed,
    initialize_process_group,
    is_agreed,
    is_lost_connection,
    on_every_rank,
    on_main_rank,
)


def test_the_main_ranks_result_and_error_come_out_everywhere():
    problem = Problem("training.seed", "7", "1234", "start a run of another name")

    def attempt(rank: int, world_size: int) -> tuple[int, str]:
        result = on_main_rank(dist.get_rank)

        def fail() -> None:
            raise ConfigurationError([problem])

        with pytest.raises(ConfigurationError) as caught:
            on_main_rank(fail)
        assert caught.value.problems == [problem]
        assert is_agreed(caught.value)
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


def test_one_ranks_mistake_is_raised_on_all_with_its_rank():
    def attempt(rank: int, world_size: int) -> tuple[str, list[str], bool]:
        def fail_on(ranks: set[int]) -> None:
            if rank in ranks:
                raise UserError("no such file")

        with pytest.raises(UserError) as everywhere:
            all_or_none(lambda: fail_on({0, 1, 2}))
        assert not hasattr(everywhere.value, "__notes__")
        with pytest.raises(UserError) as caught:
            all_or_none(lambda: fail_on({1}))
        return str(caught.value), caught.value.__notes__, is_agreed(caught.value)

    assert run_distributed(attempt, 3) == [("no such file", ["met by rank 1 of 3 ranks"], True)] * 3


def test_an_error_is_its_ranks_own_until_it_is_agreed():
    error = OSError(28, "No space left on device")
    assert not is_agreed(error)
    assert is_agreed(agreed(error))


def test_groups_stay_after_an_error_and_have_the_projects_timeout():
    """Their teardown could wait for peers that sit in a collective."""

    from megatron.core import parallel_state

    def attempt(rank: int, world_size: int) -> tuple[bool, bool, float]:
        with distributed(ParallelConfig()):
            pass
        after_success = dist.is_initialized()
        os.environ["MASTER_PORT"] = str(ports[1])
        with contextlib.suppress(UserError), distributed(ParallelConfig()):
            raise UserError("stop")
        backend = parallel_state.get_tensor_model_parallel_group()._get_backend(torch.device("cpu"))
        return after_success, dist.is_initialized(), backend.options._timeout.total_seconds()

    ports = [free_port(), free_port()]
    assert run_distributed(attempt, 2, process_group=False) == [(False, True, COLLECTIVE_TIMEOUT.total_seconds())] * 2


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


def _one_layout_after_another(_rank, _size, ports):
    from megatron.core import parallel_state

    for tensor, port in zip((1, 2, 1), ports, strict=True):
        # A rendezvous of its own: at the last one's port a rank that is early finds the addresses of groups that are gone.
        os.environ["MASTER_PORT"] = str(port)
        with distributed(ParallelConfig(tensor=tensor)):
            value = torch.ones(1)
            dist.all_reduce(value)
        left = [name for name, group in vars(parallel_state).items() if isinstance(group, dist.ProcessGroup)]
        assert not left, f"groups that nobody destroys: {left}"
    return True


def test_no_group_outlives_its_layout():
    ports = [free_port() for _ in range(3)]
    assert run_distributed(_one_layout_after_another, 2, ports, process_group=False) == [True, True]


def test_a_rank_that_meets_nobody_says_so():
    def meet(_rank: int, _size: int) -> str:
        port = free_port()
        os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        message = rf"rank 1 could not meet the other ranks at 127.0.0.1:{port} \(.*\). Check that rank 0"
        with pytest.raises(ConnectionError, match=message) as failure:
            initialize_process_group(torch.device("cpu"), timedelta(seconds=1))
        return str(failure.value)

    assert "\n" not in run_distributed(meet, 1, process_group=False)[0]
