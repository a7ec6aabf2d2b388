"""Rules of the reactions to what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config


def _hang_rule(config: Config) -> Iterator[Problem]:
    """Check that heartbeats are frequent enough: otherwise a rank that works would be reported as missing."""
    health = config.health
    if health.heartbeat_interval > health.hang_timeout / 2:
        valid = f"at most half of health.hang_timeout={show(health.hang_timeout)}, or a rank that works looks dead"
        yield Problem("health.heartbeat_interval", show(health.heartbeat_interval), valid, "health.hang_timeout=600")


HEALTH_RULES: tuple[Rule, ...] = (_hang_rule,)
