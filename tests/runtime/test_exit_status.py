"""The exit status by which programs decide whether to start a run again."""

from __future__ import annotations

import signal

import pytest

from w1train.runtime.exit_status import status_after


@pytest.mark.parametrize(("number", "expected"), [(0, 0), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_scheduler_starts_the_run_again_and_a_person_decides(number, expected):
    assert status_after(number) == expected
