"""All ranks decide alike."""

from __future__ import annotations

from signal import SIGINT, SIGTERM

import pytest

from tests.distributed import run_distributed
from w1train.training.agreement import Agreement


def exchange(rank: int, world_size: int, signals: list[int]) -> tuple[int, int]:
    under_way = Agreement(signals[rank])
    # Another exchange meanwhile is not mixed up with it.
    return Agreement(1 - rank).wait(), under_way.wait()


@pytest.mark.parametrize("signals", [[0, 0], [0, SIGTERM], [SIGINT, 0], [SIGINT, SIGTERM]])
def test_one_rank_that_is_to_stop_is_enough(signals):
    """Where a scheduler and a person ask at the same time, the scheduler's signal counts."""
    assert run_distributed(exchange, 2, signals) == [(1, max(signals))] * 2
