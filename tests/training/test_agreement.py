"""All ranks decide alike whether to stop."""

from __future__ import annotations

import pytest

from tests.distributed import run_distributed
from w1train.training.agreement import StopAgreement


def exchange(rank: int, world_size: int, requests: list[bool]) -> tuple[bool, bool]:
    under_way = StopAgreement(requests[rank])
    # Another exchange meanwhile is not mixed up with it.
    return StopAgreement(not requests[0]).wait(), under_way.wait()


@pytest.mark.parametrize("requests", [[False, False], [True, False], [False, True], [True, True]])
def test_one_rank_stops_all(requests):
    assert run_distributed(exchange, 2, requests) == [(not requests[0], any(requests))] * 2
