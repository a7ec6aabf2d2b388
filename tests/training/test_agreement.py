"""All ranks decide alike."""

from __future__ import annotations

import pytest

from tests.distributed import run_distributed
from w1train.training.agreement import Agreement


def exchange(rank: int, world_size: int, stops: list[bool]) -> tuple[bool, bool]:
    under_way = Agreement(stops[rank])
    # Another exchange meanwhile is not mixed up with it.
    return Agreement(rank == 0).wait(), under_way.wait()


@pytest.mark.parametrize("stops", [[False, False], [False, True], [True, False], [True, True]])
def test_one_rank_that_is_to_stop_is_enough(stops):
    assert run_distributed(exchange, 2, stops) == [(True, any(stops))] * 2
