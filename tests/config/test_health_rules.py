"""Rules of the reactions to what goes wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from w1train.config.resume import allowed_on_resume
from w1train.config.rules.validate import validate
from w1train.config.schema import Config

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(("interval", "timeout", "is_valid"), [(10.0, 600.0, True), (10.0, 20.0, True), (10.0, 19.0, False)])
def test_ranks_that_live_do_not_look_dead(make_config: MakeConfig, interval: float, timeout: float, is_valid: bool) -> None:
    problems = validate(make_config({"health.heartbeat_interval": interval, "health.hang_timeout": timeout}))
    assert [problem.key for problem in problems] == ([] if is_valid else ["health.heartbeat_interval"])


def test_all_of_it_may_change_on_resume() -> None:
    assert allowed_on_resume("health.on_nonfinite")
