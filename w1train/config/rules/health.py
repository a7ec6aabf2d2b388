"""Rules of what is done about what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from w1train.config.errors import Problem, show
from w1train.config.ranges import NOT_NEGATIVE, POSITIVE, SECONDS, SIZE, Range
from w1train.config.schema import Config

HEALTH_RANGES = {
    "health.max_skips": NOT_NEGATIVE,
    "health.max_rewinds": NOT_NEGATIVE,
    "health.spike_sigma": POSITIVE,
    "health.spike_gradient_sigma": POSITIVE,
    "health.spike_window": Range(2, SIZE.high),
    "health.heartbeat_interval": SECONDS,
    "health.hang_timeout": SECONDS,
    "health.start_timeout": SECONDS,
    "health.stop_timeout": SECONDS,
    "health.straggler_interval": NOT_NEGATIVE,
    "health.straggler_share": POSITIVE,
    "health.gc_interval": NOT_NEGATIVE,
}


def _hang_rule(config: Config) -> Iterator[Problem]:
    """A rank whose heartbeats are further apart than the others' patience would be called missing."""
    health = config.health
    if health.heartbeat_interval > health.hang_timeout / 2:
        valid = f"at most half of health.hang_timeout={show(health.hang_timeout)}, or ranks that live look dead"
        yield Problem("health.heartbeat_interval", show(health.heartbeat_interval), valid, "health.hang_timeout=600")


HEALTH_RULES: Iterable[Callable[[Config], Iterator[Problem]]] = (_hang_rule,)
