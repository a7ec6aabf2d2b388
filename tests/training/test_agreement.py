"""All ranks decide alike."""

from __future__ import annotations

import pytest

from tests.distributed import run_distributed
from w1train.training.agreement import Agreement, StepFlags, agree

QUIET = StepFlags()


def exchange(rank: int, world_size: int, flags: list[StepFlags]) -> tuple[StepFlags, StepFlags]:
    under_way = Agreement(flags[rank])
    # Another exchange meanwhile is not mixed up with it.
    return agree(StepFlags(stop_requested=rank == 0)), under_way.wait()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([QUIET, QUIET], QUIET),
        ([QUIET, StepFlags(stop_requested=True)], StepFlags(stop_requested=True)),
        ([StepFlags(save_failed=True), QUIET], StepFlags(save_failed=True)),
        ([StepFlags(saved=False), QUIET], StepFlags(saved=False)),
        ([StepFlags(saved=False), StepFlags(saved=False, stop_requested=True)], StepFlags(saved=False, stop_requested=True)),
    ],
)
def test_flags_of_any_and_of_all(flags, expected):
    assert run_distributed(exchange, 2, flags) == [(StepFlags(stop_requested=True), expected)] * 2
